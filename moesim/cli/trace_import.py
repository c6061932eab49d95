"""`moesim trace import`: other tools' routing dumps to a moesim trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moesim.cli.output import echo, notice
from moesim.numerals import is_index

if TYPE_CHECKING:
    from moesim.trace.format import LoadTrace, Trace
    from moesim.trace.importers.base import ImportOptions


def import_trace(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Files or folders, merged in this order.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="What to write: .npz, or a folder.")
    ] = None,
    format_name: Annotated[
        str | None,
        typer.Option("--from", help="Format; found out when left out (--list names them)."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Preset or config.json: experts, top-k and layers."),
    ] = None,
    num_experts: Annotated[int | None, typer.Option(help="Routed experts per layer.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token.")] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(help="Layers, dense ones too.")] = None,
    layer_ids: Annotated[
        str | None, typer.Option(help="Absolute numbers of the MoE layers, as 1-26 or 1,3,5.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="For plain tables: OURS=THEIRS,... as request=seq_id,experts=e0+e1."),
    ] = None,
    phase: Annotated[
        str, typer.Option(help="Phase of tokens whose source does not say: prefill or decode.")
    ] = "prefill",
    short_records: Annotated[
        str,
        typer.Option(help="Rows of records with too few: the request's first ones, or last."),
    ] = "first",
    zero_experts: Annotated[
        int,
        typer.Option(min=0, help="Experts without computation, numbered after the routed ones."),
    ] = 0,
    domain: Annotated[str, typer.Option(help="Name of the domain of all tokens.")] = "",
    license_text: Annotated[str, typer.Option("--license", help="Licence to note down.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many tokens (steps, for counts).")
    ] = None,
    keep_warmup: Annotated[
        bool, typer.Option("--keep-warmup", help="Keep long runs of constant routing.")
    ] = False,
    list_formats: Annotated[bool, typer.Option("--list", help="List the formats.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Read routing dumps of vLLM, SGLang, TensorRT-LLM, Megatron-Core and others.

    Example: moesim trace import responses.jsonl --model Qwen3-30B-A3B --out t.npz
    """
    from moesim.errors import InputError
    from moesim.jobs.import_trace import import_files
    from moesim.trace.format import save_trace
    from moesim.trace.importers.registry import IMPORTERS, importer

    if list_formats:
        titles = {name: importer(name).TITLE for name in IMPORTERS.names()}
        if as_json:
            echo(json.dumps(titles, indent=2))
        else:
            for name, title in titles.items():
                echo(f"{name:<16} {title}")
        return
    if not files:
        raise InputError("no files were named", "name the files to import, or --list the formats")
    if out is None:
        raise InputError("--out is missing", "name what to write: --out t.npz")
    if phase not in ("prefill", "decode"):
        raise InputError(f"--phase {phase!r:.40}", "choose prefill or decode")
    if short_records not in ("first", "last"):
        raise InputError(f"--short-records {short_records!r:.40}", "choose first or last")
    options = _options(
        model,
        num_experts,
        top_k,
        num_hidden_layers,
        layer_ids,
        columns,
        phase="decode" if phase == "decode" else "prefill",
        short_records="last" if short_records == "last" else "first",
        zero_experts=zero_experts,
        domain=domain,
        license_text=license_text,
        max_tokens=max_tokens,
    )
    trace = import_files(files, options, format_name, keep_warmup)
    save_trace(trace, out)
    summary = _summary(trace, out)
    if as_json:
        echo(json.dumps(summary, indent=2))
        return
    size = (
        f"{summary['num_tokens']:,} tokens of {summary['num_requests']:,} requests"
        if "num_tokens" in summary
        else f"counts of {summary['num_steps']:,} steps"
    )
    echo(
        f"wrote {out}: {size}, {summary['num_layers']} MoE layers, top-{summary['top_k']} of"
        f" {summary['num_experts']} experts"
    )


def parse_layer_ids(text: str, option: str = "--layer-ids") -> tuple[int, ...]:
    """`1-26`, `0,2,4` or a mix, as ascending layer numbers. Raises InputError."""
    from moesim.errors import InputError

    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (is_index(first) and (not dash or is_index(last))) or len(part) > 12:
            raise InputError(f"{option} {text!r:.60}", "write it as 1-26 or 1,3,5")
        if int(last or first) >= 1 << 16:
            raise InputError(f"{option} {text!r:.60}: no model is that deep", "give layer numbers")
        layers += range(int(first), int(last or first) + 1)
    if not layers or sorted(set(layers)) != layers:
        raise InputError(f"{option} {text!r:.60}: not ascending", "write it as 1-26 or 1,3,5")
    return tuple(layers)


def _options(
    model: str | None,
    num_experts: int | None,
    top_k: int | None,
    num_hidden_layers: int | None,
    layer_ids: str | None,
    columns: str | None,
    *,
    phase: Literal["prefill", "decode"],
    short_records: Literal["first", "last"],
    zero_experts: int,
    domain: str,
    license_text: str,
    max_tokens: int | None,
) -> ImportOptions:
    from moesim.errors import InputError
    from moesim.trace.importers.base import ImportOptions

    for name, value in (
        ("--num-experts", num_experts),
        ("--top-k", top_k),
        ("--num-hidden-layers", num_hidden_layers),
    ):
        if value is not None and not 1 <= value <= 32767:
            raise InputError(f"{name} {value}", "give a whole number from 1 to 32767")
    column_map: dict[str, str] = {}
    for part in filter(None, (columns or "").split(",")):
        ours, equals, theirs = part.partition("=")
        if not equals or not theirs:
            raise InputError(f"--columns {part!r:.60}", "write it as OURS=THEIRS,OURS=THEIRS")
        column_map[ours.strip()] = theirs.strip()
    layers = parse_layer_ids(layer_ids) if layer_ids is not None else None
    name = ""
    num_mtp_layers: int | None = None
    if model is not None:
        from moesim.jobs.inputs import model_id
        from moesim.model.names import load_model

        spec = load_model(model)
        name = model_id(model) or spec.name
        num_experts = num_experts or spec.num_experts
        top_k = top_k or spec.top_k
        num_hidden_layers = num_hidden_layers or spec.num_hidden_layers
        layers = layers or spec.moe_layer_ids
        zero_experts = zero_experts or getattr(spec, "num_zero_experts", 0)
        num_mtp_layers = getattr(spec, "mtp_moe_layers", None)
    return ImportOptions(
        model=name,
        num_experts=num_experts,
        top_k=top_k,
        num_hidden_layers=num_hidden_layers,
        layer_ids=layers,
        columns=column_map,
        phase=phase,
        short_records=short_records,
        zero_experts=zero_experts,
        num_mtp_layers=num_mtp_layers,
        domain=domain,
        license=license_text,
        max_tokens=max_tokens,
        notify=notice,
    )


def _summary(trace: Trace | LoadTrace, out: Path) -> dict[str, Any]:
    import numpy as np

    from moesim.trace.format import LoadTrace

    meta = trace.meta
    head: dict[str, Any] = {"file": str(out), "format": meta.source.get("format", "")}
    if isinstance(trace, LoadTrace):
        head["num_steps"] = int(trace.expert_load.shape[0])
    else:
        head["num_tokens"] = trace.num_tokens
        head["num_requests"] = len(np.unique(trace.request_ids))
        head["num_prefill_tokens"] = int((trace.phases == 0).sum())
    return {
        **head,
        "model": meta.model,
        "num_layers": meta.num_layers,
        "num_experts": meta.num_experts,
        "top_k": meta.top_k,
        "layer_ids": list(meta.layer_ids),
        "domains": list(meta.domains),
    }
