"""`moesim trace info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.output import echo, notice
from moesim.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moesim.trace.format import Trace, TraceMeta
    from moesim.trace.measures import Skew
    from moesim.trace.stats import BatchImbalance, LoadStats, TraceStats

MAX_BATCH_TRACE_TOKENS = 4_000_000
_BATCH_TOKENS = {"prefill": 4096, "decode": 256}
_TOP_DOMAINS = 20
_TOP_PAIRS = 5


def info(
    trace: Annotated[str, typer.Argument(help="Trace file, trace directory, or sample:NAME.")],
    plot: Annotated[
        Path | None,
        typer.Option(help="Heat map of layers by experts to write (PNG, SVG, PDF)."),
    ] = None,
    gpus: Annotated[
        int, typer.Option(help="GPUs for the imbalance of batches.", min=1, max=65536)
    ] = 8,
    offload: Annotated[
        bool, typer.Option("--offload", help="How well expert caches would do: SRP, SCH, sparsity.")
    ] = False,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Domains, balance and drops, layer by layer."),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(metavar="TRACE", help="With --layers: another trace beside this one."),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(help="serial, local, local:4, dask://host:port or ray://host:port."),
    ] = "serial",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Statistics of a trace: skew, affinity, co-activation, drift, domains, requests.

    One pass in bounded memory, so that traces larger than memory can be looked at; with --backend
    its parts are counted side by side, and workers elsewhere have to reach the trace by its path.
    Of a load trace (expert counts only) the skew is shown.

    Example: moesim trace info sample:debian-moe --plot load.png
    """
    from moesim.backend import open_backend
    from moesim.cli.output import check_targets, notice
    from moesim.cli.progress import progress_bar
    from moesim.trace.empty import layers_text, loaded_layers, only_layers
    from moesim.trace.format import LoadTrace, load_token_trace, load_trace, require_tokens
    from moesim.trace.parallel import trace_stats_on
    from moesim.trace.pools import own_experts
    from moesim.trace.stats import load_stats

    check_targets(plot=plot)
    loaded = load_trace(trace)
    if offload:
        own_experts(require_tokens(loaded, "moesim trace info --offload"), "--offload")
    if against is not None and not layers:
        raise InputError("`against` without `layers`", "add `layers`")
    beside = None if against is None else load_token_trace(against, "moesim trace info --against")
    keep = loaded_layers(loaded)
    if keep.any() and not keep.all():
        without = layers_text(loaded.meta.layer_ids, keep)
        notice(f"layers {without} have no load ({int((~keep).sum())} of {len(keep)}): left out")
        loaded = only_layers(loaded, keep)
    if isinstance(loaded, LoadTrace):
        counts = load_stats(loaded)
        report = counts.to_dict()
        sample = f"counts of {counts.num_steps:,} steps"
        load = counts.load
    else:
        with open_backend(backend) as opened, progress_bar("counting") as progress:
            stats = trace_stats_on(opened, loaded, progress)
        batches = _batches(loaded, stats, min(gpus, loaded.num_experts))
        report = stats.to_dict()
        report["batch_imbalance"] = [_plain(b) for b in batches]
        sample = f"{stats.num_tokens:,} tokens"
        load = stats.load
    more: list[str] = []
    if layers:
        from moesim.trace.by_layer import by_layer

        apart = by_layer(require_tokens(loaded, "moesim trace info --layers"), beside)
        report["by_layer"] = apart.to_dict()
        more += ["", *apart.lines()]
    if offload:
        from moesim.caching.info import offload_info

        with progress_bar("segments") as progress:
            found = offload_info(loaded, progress=progress)
        report["offload"] = found.to_dict()
        more += ["", *found.lines()]
    if plot is not None:
        from moesim.draw.trace import expert_load

        expert_load(load, loaded.meta, sample).save(plot)
        echo(f"wrote {plot}", err=True)
    if as_json:
        echo(json.dumps(report, indent=2, allow_nan=False))
    elif isinstance(loaded, LoadTrace):
        _print_load(counts, _console())
    else:
        _print_trace(stats, batches, _console())
        for line in more:
            echo(line)


def _batches(trace: Trace, stats: TraceStats, num_gpus: int) -> list[BatchImbalance]:
    """Imbalance of batches of each phase that the trace has; none of traces too large to index."""
    from moesim.trace.stats import batch_imbalance

    if not 0 < trace.num_tokens <= MAX_BATCH_TRACE_TOKENS:
        return []
    out = []
    if stats.num_prefill:
        out.append(batch_imbalance(trace, num_gpus, "prefill", _BATCH_TOKENS["prefill"]))
    if stats.num_prefill < stats.num_tokens:
        out.append(batch_imbalance(trace, num_gpus, "decode", _BATCH_TOKENS["decode"]))
    return out


def _print_trace(stats: TraceStats, batches: list[BatchImbalance], console: Console) -> None:
    meta = stats.meta
    _head(meta, console)
    prefill, decode = stats.num_prefill, stats.num_tokens - stats.num_prefill
    lengths = stats.requests.lengths
    spread = (
        f", {lengths['min']:.0f} to {lengths['max']:.0f} tokens long (median {lengths['p50']:.0f})"
        if lengths
        else ""
    )
    console.print(f"tokens    {stats.num_tokens:,} ({prefill:,} prefill, {decode:,} decode)")
    console.print(f"requests  {stats.requests.num_requests:,}{spread}")
    if not stats.num_tokens:
        return
    extra = {}
    if stats.affinity is not None:
        extra["affinity\nbits"] = [f"{x:.3f}" for x in stats.affinity.bits] + ["-"]
        extra["of\nceiling"] = [f"{x:.1%}" for x in stats.affinity.normalised] + ["-"]
    if stats.co_activation is not None:
        extra["pair\nlift"] = [f"{x:.2f}" for x in stats.co_activation.mean_lift]
    if stats.reuse is not None:
        extra["kept\nexperts"] = [f"{x:.1%}" for x in stats.reuse.overlap]
        extra["by\nchance"] = [f"{x:.1%}" for x in stats.reuse.by_load]
    console.print()
    console.print(_layer_table(meta.layer_ids, stats.skew, extra))
    if extra:
        console.print(
            "affinity: mutual information with the next layer; kept: experts shared with the"
            " token before"
        )
    for batch in batches:
        phase = "prefill" if batch.batch_tokens == _BATCH_TOKENS["prefill"] else "decode"
        console.print(
            f"\nmax / mean load of {batch.num_gpus} GPUs, experts in order, {phase} batches of"
            f" {batch.batch_tokens:,} tokens:\n  mean {batch.mean:.3f}, p50 {batch.p50:.3f},"
            f" p99 {batch.p99:.3f} over batches and layers"
        )
    _print_drift(stats, console)
    _print_pairs(stats, console)
    _print_domains(stats, console)
    notice(*stats.notices)


def _print_load(stats: LoadStats, console: Console) -> None:
    _head(stats.meta, console)
    console.print(f"counts    {stats.num_steps:,} steps, {int(stats.load.sum()):,} choices")
    console.print("          a load trace: no tokens, so no affinity, requests or drift\n")
    console.print(_layer_table(stats.meta.layer_ids, stats.skew, {}))
    if stats.step_divergence is not None:
        console.print(
            f"\nsuccessive steps differ by {stats.step_divergence:.4f} bits (Jensen-Shannon)"
        )


def _head(meta: TraceMeta, console: Console) -> None:
    from rich.text import Text

    layers = f"{meta.num_layers} MoE layers ({min(meta.layer_ids)} to {max(meta.layer_ids)})"
    console.print(Text(f"model     {printable(meta.model) or 'unknown'}"))
    console.print(f"routing   {layers}, top-{meta.top_k} of {meta.num_experts} experts")
    if meta.layers_per_pool > 1:
        console.print(f"pools     {meta.layers_per_pool} adjacent layers share their experts")
    console.print(Text(f"source    {printable(meta.source.get('kind', 'unknown'))}"))
    if meta.license:
        console.print(Text(f"license   {printable(meta.license)}"))


def _layer_table(layer_ids: tuple[int, ...], skew: Skew, extra: dict[str, list[str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("\nlayer", "max /\nmean", "\nCV", "\nGini", "\nentropy", "unused\nexperts"):
        table.add_column(title, justify="right")
    for title in extra:
        table.add_column(title, justify="right")
    for i, layer in enumerate(layer_ids):
        table.add_row(
            str(layer),
            f"{skew.max_over_mean[i]:.2f}",
            f"{skew.cv[i]:.3f}",
            f"{skew.gini[i]:.3f}",
            f"{skew.entropy[i]:.3f}",
            str(int(skew.num_unused[i])),
            *(column[i] for column in extra.values()),
        )
    return table


def _print_drift(stats: TraceStats, console: Console) -> None:
    drift = stats.drift
    if drift.successive is None or drift.within is None or drift.ratio is None:
        console.print("\ndrift: too few requests to tell")
        return
    console.print(
        f"\ndrift: load differs by {drift.successive:.4f} bits (Jensen-Shannon) between successive"
        f" 1/{drift.num_windows} of the trace,\n  by {drift.within:.4f} between halves of one:"
        f" {drift.ratio:.1f} times the noise"
    )


def _print_pairs(stats: TraceStats, console: Console) -> None:
    if stats.co_activation is None or not stats.co_activation.top:
        return
    console.print("\nexperts most often chosen together, against chance:")
    for pair in stats.co_activation.top[:_TOP_PAIRS]:
        console.print(
            f"  layer {stats.meta.layer_ids[pair.layer_idx]}: {pair.first} and {pair.second},"
            f" {pair.lift:.1f} times as often ({pair.count:,} tokens)"
        )


def _print_domains(stats: TraceStats, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    if not stats.domains:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("\ndomain")
    for title in ("\ntokens", "bits from\nthe others", "bits between\nits halves"):
        table.add_column(title, justify="right")
    ranked = sorted(stats.domains, key=lambda d: -d.num_tokens)
    for domain in ranked[:_TOP_DOMAINS]:
        table.add_row(
            Text(printable(domain.name)),
            f"{domain.num_tokens:,}",
            _bits(domain.divergence),
            _bits(domain.noise),
        )
    console.print()
    console.print(table)
    if len(ranked) > _TOP_DOMAINS:
        console.print(f"and {len(ranked) - _TOP_DOMAINS} more domains (--json lists all)")


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def printable(text: object, length: int = 100) -> str:
    """Text from a file, without control characters and not longer than a line."""
    clean = "".join(ch for ch in " ".join(str(text).split()) if ch.isprintable())
    return clean if len(clean) <= length else clean[: length - 3] + "..."


def _plain(value: Any) -> Any:
    from moesim.trace.stats import plain

    return plain(value)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    return console if console.width >= 100 else Console(width=100, highlight=False, markup=False)
