"""`moesim export`: a plan as the file that a serving engine loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesim.exporters.base import ExportOptions
    from moesim.model.spec import ModelSpec
    from moesim.placement import Plan


def export(
    plan_file: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="Plan file.", show_default=False)
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--to", help="Engine; --list names them.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="What to write [default: PLAN's name, the engine and its suffix]."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Preset or config.json [default: the plan's model]."),
    ] = None,
    num_hidden_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers, dense ones too, if the model is unknown.")
    ] = None,
    mtp_layers: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=64,
            help="Multi-token-prediction layers to write rows for, where the engine needs them.",
            show_default="the model's, if known",
        ),
    ] = None,
    fill_layers: Annotated[
        str | None,
        typer.Option(
            help="MoE layers that the plan lacks, as 0-2, to place in order: those that route by"
            " token id."
        ),
    ] = None,
    apply: Annotated[
        Path | None,
        typer.Option(
            "--apply", help="With --to megatron: checkpoint folder to renumber into --out."
        ),
    ] = None,
    list_engines: Annotated[bool, typer.Option("--list", help="List the engines.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Write a plan for SGLang, TensorRT-LLM, vLLM, vllm-ascend, omni-infer, EPLB or Megatron-Core.

    Prints the lines that start the engine with it. What the engine cannot express is refused.

    Example: moesim export plan.json --to sglang --out location.json
    """
    from moesim.cli.notes import note
    from moesim.cli.trace_import import parse_layer_ids
    from moesim.errors import InputError
    from moesim.exporters.base import ExportOptions, filled
    from moesim.exporters.registry import MODULES, exporter
    from moesim.files import atomic_write
    from moesim.placement import load_plan

    if list_engines:
        rows = {name: exporter(name) for name in MODULES}
        if as_json:
            listing = {n: {"title": e.TITLE, "accepted_by": e.ACCEPTED_BY} for n, e in rows.items()}
            typer.echo(json.dumps(listing, indent=2))
            return
        for name, row in rows.items():
            typer.echo(f"{name:<14} {row.TITLE}\n{'':<14} accepted by {row.ACCEPTED_BY}")
        return
    if plan_file is None:
        raise InputError("no plan was named", "name a plan file, or --list the engines")
    if engine is None:
        raise InputError("--to is missing", f"name an engine: {', '.join(MODULES)}")
    target = exporter(engine)
    plan = load_plan(plan_file)
    options = ExportOptions(
        spec=_spec(plan, model),
        num_hidden_layers=num_hidden_layers,
        mtp_layers=mtp_layers,
        fill_layers=parse_layer_ids(fill_layers, "--fill-layers") if fill_layers else (),
        model_id=model if model is not None and not Path(model).exists() else "",
        notify=note,
    )
    plan = filled(plan, options)
    if apply is not None:
        if engine != "megatron":
            raise InputError(f"--apply is not for {engine}", "use it with --to megatron")
        if out is None:
            raise InputError("--out is missing", "name the folder of the new checkpoint")
        _apply(plan, apply, out, options, as_json)
        return
    if out is None:
        out = Path(f"{plan_file.stem}.{engine}{target.SUFFIX}")
        note(f"--out not given, writing {out}")
    if out.suffix != target.SUFFIX:
        raise InputError(
            f"{engine} wants a file that ends in {target.SUFFIX}",
            f"name it {out.stem}{target.SUFFIX}",
        )
    data = target.encode(plan, options)
    atomic_write(out, data)
    lines = target.launch(plan, out, options)
    if as_json:
        summary = {
            "engine": engine,
            "file": str(out),
            "num_bytes": len(data),
            "accepted_by": target.ACCEPTED_BY,
            "launch": lines,
        }
        typer.echo(json.dumps(summary, indent=2))
        return
    typer.echo(f"wrote {out} ({len(data):,} bytes), accepted by {target.ACCEPTED_BY}; start with\n")
    typer.echo("\n".join(lines))


def _apply(plan: Plan, source: Path, target: Path, options: ExportOptions, as_json: bool) -> None:
    from moesim.exporters.checkpoint import permute_checkpoint

    changed = permute_checkpoint(plan, source, target, options)
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(target), "num_changed_tensors": changed}))
        return
    typer.echo(
        f"wrote {target}: {changed} tensors renumbered in {len(plan.layer_ids)} layers; experts"
        f" placed in order over {plan.placement.num_gpus} GPUs are now the plan"
    )


def _spec(plan: Plan, model: str | None) -> ModelSpec | None:
    """The model that was named, else that of the plan if it is known."""
    from moesim.errors import MoesimError
    from moesim.model.names import load_model

    if model is not None:
        return load_model(model)
    try:
        return load_model(plan.model) if plan.model else None
    except MoesimError:
        return None
