"""`moesim trace synth`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moesim.cli.output import echo
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.trace.format import Trace
    from moesim.trace.synth_spec import SynthSpec

COMPARE_TOKENS = 200_000


def synth(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="What to write: .npz, or a folder.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to make.", min=1)] = 100_000,
    like: Annotated[
        str | None, typer.Option(metavar="TRACE", help="Reproduce the statistics of this trace.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="Specification written by --save-spec.")] = None,
    save_spec: Annotated[Path | None, typer.Option(help="Write the specification as JSON.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Preset or config.json: layers, experts and top-k.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="MoE layers.", min=1, max=4096)] = None,
    experts: Annotated[int | None, typer.Option(help="Experts a layer.", min=1)] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts a token.", min=1)] = None,
    skew: Annotated[
        str | None,
        typer.Option(
            help="Expert load: zipf:EXPONENT or lognormal:SIGMA.", show_default="lognormal:0.5"
        ),
    ] = None,
    affinity: Annotated[
        float | None,
        typer.Option(
            help="Affinity of adjacent layers, 0 to 0.5; with shared or linked routers the share"
            " of a token's experts that the next layer follows, to 1.",
            show_default="0.15",
        ),
    ] = None,
    routers: Annotated[
        Literal["own", "shared", "linked"] | None,
        typer.Option(help="One router per layer, one for all, or linked ones.", show_default="own"),
    ] = None,
    layers_per_pool: Annotated[
        int,
        typer.Option(help="Adjacent layers that choose from one set of experts (ReXMoE).", min=1),
    ] = 1,
    domains: Annotated[int | None, typer.Option(help="Domains.", show_default="1")] = None,
    domain_spread: Annotated[
        float | None, typer.Option(help="How much domains differ.", show_default="0.3")
    ] = None,
    request_spread: Annotated[
        float | None, typer.Option(help="How much requests differ.", show_default="0.4")
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(help="Mean prefill tokens per request.", show_default="512")
    ] = None,
    output_tokens: Annotated[
        float | None, typer.Option(help="Mean decode tokens per request.", show_default="0")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Make a synthetic trace of any size, like a real one or from parameters.

    With --like (or --spec), skew, affinity and the variety of requests are those of a real trace;
    a --model or shape of its own carries them over to other layers and experts. Without, --skew,
    --affinity and the rest describe it.

    Examples:
      moesim trace synth --like sample:debian-moe --tokens 1000000 --out big
      moesim trace synth --like t.npz --model DeepSeek-V3 --out v3.npz
      moesim trace synth --layers 16 --experts 64 --top-k 8 --skew zipf:0.8 --out z.npz
    """
    from moesim.trace.pools import with_pools
    from moesim.trace.synth import write_synthetic

    design = {
        "skew": skew,
        "affinity": affinity,
        "routers": routers,
        "num_domains": domains,
        "domain_spread": domain_spread,
        "request_spread": request_spread,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }
    given = {name: value for name, value in design.items() if value is not None}
    if out is None and save_spec is None:
        raise InputError("--out is missing", "name what to write: --out t.npz")
    if like is not None and spec is not None:
        raise InputError("--like and --spec together", "choose one")
    if given and (like or spec):
        option = next(iter(given)).replace("num_", "").replace("_", "-")
        raise InputError(
            f"--{option} has no effect beside --like or --spec", "leave it out, or describe all"
        )
    if out is not None and out.suffix != ".npz" and out.exists():
        raise InputError(f"{out} exists already", "name a new directory, or an .npz file")
    shape = _shape(model, layers, experts, top_k)
    real, made = _specification(like, spec, shape, given, seed)
    if layers_per_pool > 1:
        with_pools(made.meta(), layers_per_pool)
        made = replace(made, layers_per_pool=layers_per_pool)
    if save_spec is not None:
        from moesim.files import atomic_write

        atomic_write(save_spec, made.to_json())
        echo(f"wrote {save_spec}", err=True)
    if out is not None:
        from moesim.cli.progress import progress_bar

        with progress_bar("writing") as progress:
            write_synthetic(made, out, tokens, seed, progress)
    report = _report(made, _sample(made, out, tokens, seed), real)
    report["file"] = None if out is None else str(out)
    report["num_tokens"] = 0 if out is None else tokens
    if as_json:
        echo(json.dumps(report, indent=2))
        return
    if out is not None:
        echo(
            f"wrote {out}: {tokens:,} tokens, {made.num_layers} layers, top-{made.top_k} of"
            f" {made.num_experts} experts (synthetic)"
        )
    _print(report)


def _shape(
    model: str | None, layers: int | None, experts: int | None, top_k: int | None
) -> tuple[str, tuple[int, ...], int, int] | None:
    """Name, layer ids, experts and top-k that were asked for; None if none of them was."""
    if model is not None:
        from moesim.model.names import load_model

        known = load_model(model)
        layer_ids = known.moe_layer_ids if layers is None else tuple(range(layers))
        return known.name, tuple(layer_ids), experts or known.num_experts, top_k or known.top_k
    if layers is None and experts is None and top_k is None:
        return None
    if layers is None or experts is None or top_k is None:
        raise InputError("an incomplete shape", "give --layers, --experts and --top-k, or --model")
    return "", tuple(range(layers)), experts, top_k


def _specification(
    like: str | None,
    spec: Path | None,
    shape: tuple[str, tuple[int, ...], int, int] | None,
    design_options: dict[str, Any],
    seed: int,
) -> tuple[Trace | None, SynthSpec]:
    """The specification, and the trace that it should be compared with."""
    from moesim.cli.progress import progress_bar
    from moesim.trace.format import load_token_trace
    from moesim.trace.pools import own_experts
    from moesim.trace.synth_fit import fit
    from moesim.trace.synth_shape import design, reshape
    from moesim.trace.synth_spec import SynthSpec

    real = None
    if like is not None:
        real = load_token_trace(like, "moesim trace synth --like")
        own_experts(real, "moesim trace synth --like")
        with progress_bar("fitting") as progress:
            found = fit(real, seed, progress)
    elif spec is not None:
        found = SynthSpec.from_json(_read(spec), str(spec))
    elif shape is not None:
        name, layer_ids, experts, top_k = shape
        if "skew" in design_options:
            kind, strength = _skew(design_options.pop("skew"))
            design_options |= {"skew": kind, "skew_strength": strength}
        with progress_bar("calibrating") as progress:
            made = design(
                layer_ids,
                experts,
                top_k,
                model=name,
                seed=seed,
                progress=progress,
                **design_options,
            )
        return None, made
    else:
        raise InputError(
            "no shape was given",
            "name a trace to be --like, a --model, or --layers, --experts and --top-k",
        )
    if shape is not None:
        name, layer_ids, experts, top_k = shape
        with progress_bar("calibrating") as progress:
            found = reshape(
                found,
                layer_ids,
                experts,
                top_k,
                model=name or f"{found.model}, reshaped",
                seed=seed,
                progress=progress,
            )
    return real, found


def _skew(text: str) -> tuple[str, float]:
    kind, colon, strength = text.partition(":")
    try:
        value = float(strength)
    except ValueError:
        value = float("nan")
    if kind not in ("zipf", "lognormal") or not colon or not 0 <= value <= 4:
        raise InputError(f"--skew {text!r:.40}", "write it as zipf:0.8 or lognormal:0.5")
    return kind, value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", "name a specification") from None


def _sample(spec: SynthSpec, out: Path | None, tokens: int, seed: int) -> Trace:
    """What was written, or a sample of it where that is long."""
    from moesim.trace.format import load_token_trace
    from moesim.trace.synth import generate

    if out is not None and tokens <= COMPARE_TOKENS:
        return load_token_trace(out, "moesim trace synth")
    return generate(spec, min(tokens, COMPARE_TOKENS), seed)


def _report(spec: SynthSpec, sample: Trace, real: Trace | None) -> dict[str, Any]:
    """Statistics of a synthetic sample, beside those of the trace that it is like."""
    rows = {"synthetic": _figures(sample)}
    if real is not None:
        rows["real"] = _figures(real)
    return {
        "model": spec.model,
        "num_layers": spec.num_layers,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "source": spec.meta().source,
        "compared_tokens": sample.num_tokens,
        "statistics": rows,
    }


def _figures(trace: Trace) -> dict[str, float]:
    from moesim.trace.stats import batch_imbalance, trace_stats

    stats = trace_stats(trace)
    decode = stats.num_prefill * 2 < stats.num_tokens
    batch = batch_imbalance(
        trace,
        min(8, trace.num_experts),
        "decode" if decode else "prefill",
        256 if decode else 4096,
    )
    out = {
        "load CV, mean over layers": float(stats.skew.cv.mean()),
        "load max / mean, mean over layers": float(stats.skew.max_over_mean.mean()),
        "load entropy, mean over layers": float(stats.skew.entropy.mean()),
    }
    if stats.affinity is not None and len(stats.affinity.bits):
        out["affinity bits, mean"] = float(stats.affinity.bits.mean())
        out["affinity over ceiling, mean"] = float(stats.affinity.normalised.mean())
    if stats.reuse is not None:
        out["experts kept from token to token"] = float(stats.reuse.overlap.mean())
    kind = f"{batch.num_gpus} GPUs, {'decode' if decode else 'prefill'}"
    out[f"imbalance {kind}, p50"] = batch.p50
    out[f"imbalance {kind}, p99"] = batch.p99
    return {name: round(value, 6) for name, value in out.items()}


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"of {report['compared_tokens']:,} tokens")
    columns = [name for name in ("real", "synthetic") if name in report["statistics"]]
    for name in columns:
        table.add_column(name, justify="right")
    for label in report["statistics"]["synthetic"]:
        row = [report["statistics"][name].get(label) for name in columns]
        table.add_row(label, *("-" if value is None else f"{value:.3f}" for value in row))
    Console(highlight=False, markup=False).print(table)
