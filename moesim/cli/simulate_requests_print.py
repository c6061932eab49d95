"""Tables of `moesim simulate --requests`."""

from __future__ import annotations

import sys
from typing import Any

import typer

STATS = ("mean", "p50", "p90", "p99")
ROWS = (
    ("requests/s", "requests_per_s", "{:,.2f}"),
    ("output tokens/s", "output_tokens_per_s", "{:,.0f}"),
    ("output tokens/s per GPU", "output_tokens_per_s_per_gpu", "{:,.1f}"),
    ("all tokens/s per GPU", "total_tokens_per_s_per_gpu", "{:,.1f}"),
    ("GPUs in a step", "gpu_utilisation", "{:.1%}"),
    ("balance of the ranks", "rank_balance", "{:.3f}"),
    ("KV cache in use, mean", "kv_used_mean", "{:.1%}"),
    ("KV cache in use, peak of a rank", "kv_used_peak", "{:.1%}"),
    ("  decoding engines, mean", "decode_kv_used_mean", "{:.1%}"),
    ("  decoding engines, peak", "decode_kv_used_peak", "{:.1%}"),
    ("sequences running, mean", "running_mean", "{:,.1f}"),
    ("requests waiting, mean", "queue_mean", "{:,.2f}"),
    ("requests waiting, most on a rank", "queue_peak_on_a_rank", "{:,.0f}"),
    ("time to the first step, mean ms", "queue_s_mean", "{:,.1f}"),
    ("steps", "steps", "{:,.0f}"),
    ("mean step, ms", "step_ms_mean", "{:,.2f}"),
    ("preemptions", "preemptions", "{:,.0f}"),
    ("prompt tokens from the prefix cache", "prefix_hit_share", "{:.1%}"),
    ("drafted tokens a step, mean", "drafts_mean", "{:.2f}"),
    ("  of these accepted", "drafts_accepted_share", "{:.1%}"),
    ("requests shortened", "shortened", "{:,.0f}"),
    ("requests demoted", "demoted", "{:,.0f}"),
)
HIDDEN_AT_ZERO = ("preemptions", "shortened", "demoted")


def print_run(record: dict[str, Any]) -> None:
    """Tables on standard output, notices on standard error."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    for notice in record["notices"]:
        print(f"note: {notice}", file=sys.stderr)
    if record["defaults"]:
        taken = "; ".join(f"{k}: {v}" for k, v in record["defaults"].items())
        typer.echo(f"defaults taken: {taken}")
    counts, metrics = record["counts"], record["metrics"]
    asked = record["requests"]
    typer.echo(
        f"{asked['num_requests']:,} requests of {asked['source']} over {asked['span_s']:,.0f} s"
        f" ({asked['rate_per_s']:.2f}/s), prompts of {asked['prompt_tokens']['mean']:,.0f} and"
        f" outputs of {asked['output_tokens']['mean']:,.0f} tokens on average"
    )
    one = record["deployment"]
    service = record["service"]
    typer.echo(
        f"{record['num_gpus']} GPUs: {service['replicas']} x {one['name']},"
        f" KV cache of {one['kv_tokens_per_rank']:,} tokens a rank"
    )
    others = ", ".join(f"{n:,} {name}" for name, n in counts.items() if n and name != "finished")
    typer.echo(f"{counts['finished']:,} finished{', ' + others if others else ''}")
    _latencies(console, metrics)
    _levels(console, record["by_level"])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for label, name, form in ROWS:
        value = metrics.get(name)
        if value is None or (name in HIDDEN_AT_ZERO and value == 0):
            continue
        table.add_row(label, form.format(value * 1e3 if name == "queue_s_mean" else value))
    console.print(table)
    if record["slo"] is not None:
        _slo(record["slo"])
    typer.echo(f"basis: {record['basis']} at the weakest part (--json lists every part)")


def _latencies(console: Any, metrics: dict[str, float | None]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("ms", no_wrap=True)
    for stat in STATS:
        table.add_column(stat, justify="right", no_wrap=True)
    for name, label in (
        ("ttft", "time to first token"),
        ("tpot", "time per output token"),
        ("e2e", "end to end"),
    ):
        table.add_row(label, *(_ms(metrics[f"{name}_{stat}"]) for stat in STATS))
    console.print(table)


def _levels(console: Any, levels: list[dict[str, Any]]) -> None:
    from rich.table import Table

    if not levels:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in (
        "priority",
        "requests",
        "finished",
        "degraded",
        "TTFT p50",
        "TTFT p99",
        "TPOT p50",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in levels:
        figures = (row["ttft_p50"], row["ttft_p99"], row["tpot_p50"])
        numbers = (row["priority"], row["requests"], row["finished"], row["degraded"])
        table.add_row(*(f"{n:,}" for n in numbers), *(_ms(v) for v in figures))
    console.print(table)


def _slo(slo: dict[str, Any]) -> None:
    good = slo["goodput"]
    typer.echo(
        f"goodput under {slo['text']}: {good['requests_per_s']:.2f} requests/s"
        f" ({good['share']:.1%} of the requests), {good['requests_per_s_per_gpu']:.3f} per GPU"
    )
    for miss in slo["missed"]:
        value = miss["value_s"]
        reason = "too many requests are not served" if value is None else f"it is {_ms(value)} ms"
        typer.echo(f"missed: {miss['promise']}: {reason}")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"
