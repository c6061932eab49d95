"""Every figure once: its name in files, what readers call it, its unit, its digits, and which way
is better. Tables, pictures, pages and studies take their words from here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Better = Literal["low", "high", ""]


@dataclass(frozen=True, slots=True)
class Figure:
    """name: as in JSON, in SI-like base units; label: for readers, without unit. A value times
    `factor` is in `unit`, shown with `digits` after the point."""

    name: str
    label: str
    unit: str = ""
    digits: int = 3
    factor: float = 1.0
    better: Better = "low"

    @property
    def base(self) -> str:
        """Unit of the value itself: s, us, bytes, share, or what is shown."""
        return _BASES.get((self.unit, self.factor), self.unit if self.factor == 1.0 else "")

    @property
    def heading(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: float | None) -> str:
        """The value in `unit`, or "-"."""
        return "-" if value is None else f"{value * self.factor:,.{self.digits}f}"


_BASES = {
    ("ms", 1e3): "s",
    ("ms", 1e-3): "us",
    ("KB", 1e-3): "bytes",
    ("MB", 1e-6): "bytes",
    ("GB", 1e-9): "bytes",
    ("%", 100.0): "share",
}


def _ms_of_us(name: str, label: str) -> Figure:
    return Figure(name, label, "ms", 3, 1e-3)


def _ms_of_s(name: str, label: str) -> Figure:
    return Figure(name, label, "ms", 1, 1e3)


def _percent(name: str, label: str, better: Better = "low") -> Figure:
    return Figure(name, label, "%", 1, 100.0, better)


def _latencies() -> Iterable[Figure]:
    for short, label in LATENCIES.items():
        for stat in ("mean", "p50", "p90", "p95", "p99", "p999"):
            yield _ms_of_s(f"{short}_{stat}", f"{label}, {stat}")


LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "e2e": "end to end",
}

PARTS = {
    "attention": "attention",
    "gate": "gate",
    "shared": "shared experts",
    "dense": "dense layers",
    "dispatch": "dispatch",
    "compute": "routed experts",
    "combine": "combine",
    "other": "other transfers",
    "waiting": "waiting for the slowest",
}
"""Parts of a step in order: what readers call them."""

SHORT = {
    "output_tokens_per_s": "out tok/s",
    "output_tokens_per_s_per_gpu": "tok/s per GPU",
    "output_tokens_per_s_per_user": "tok/s per request",
    "offered_requests_per_s": "req/s offered",
    "requests_per_s": "req/s served",
    "prompt_tokens_per_s": "prompt tok/s",
    "cost_usd_per_million_input_tokens": "$/M in tok",
    "cost_usd_per_hour": "$/h",
    "cost_usd_per_million_output_tokens": "$/M out tok",
    "kv_token_capacity": "KV tokens",
    "served_share": "served",
    "goodput_share": "goodput share",
    "gpu_utilisation": "busy share",
    "kv_used_peak": "peak KV share",
    "queue_s_p99": "wait p99, ms",
    "tokens_per_s_per_gpu": "tok/s per GPU",
}
"""Short heads of columns."""

ROLES = {"serving": "", "decode": ", decoding engines"}
"""Engines of a service: what is added to a figure's label."""

GOALS = {"balance": "imbalance", "traffic": "fan_out", "time": "step_us"}
"""Objective of a placement: the figure that says how well it did."""

PLACEMENT_FIGURES = (
    "balancedness",
    "balancedness_worst_layer",
    "imbalance",
    "imbalance_p99",
    "fan_out",
    "node_fan_out",
    "inter_node_bytes",
    "step_us",
    "step_us_p99",
    "dispatch_us",
    "compute_us",
    "combine_us",
)
"""What is shown of a placement, in order."""

BALANCE_FIGURES = (
    "step_us",
    "against_none",
    "charged",
    "imbalance",
    "stall_us_per_plan",
    "num_plans",
    "moved_experts",
    "kv_bytes_less",
)
"""What is shown of a balancing scheme, in order."""

SERVICE_FIGURES = (
    "offered_requests_per_s",
    "requests_per_s",
    "output_tokens_per_s",
    "output_tokens_per_s_per_gpu",
    "prompt_tokens_per_s",
    "total_tokens_per_s_per_gpu",
    "cost_usd_per_hour",
    "cost_usd_per_million_output_tokens",
    "cost_usd_per_million_input_tokens",
    "gpu_utilisation",
    "rank_balance",
    "kv_used_mean",
    "kv_used_peak",
    "decode_kv_used_mean",
    "decode_kv_used_peak",
    "running_mean",
    "queue_mean",
    "queue_peak_on_a_rank",
    "queue_s_mean",
    "queue_s_p99",
    "steps",
    "step_ms_mean",
    "preemptions",
    "prefix_hit_share",
    "drafts_mean",
    "drafts_accepted_share",
    "shortened",
    "demoted",
)
"""What is shown of a service, in order."""

_ALL: tuple[Figure, ...] = (
    # A placement on held-out batches.
    Figure("balancedness", "balancedness", better="high"),
    Figure("balancedness_worst_layer", "balancedness, worst layer", better="high"),
    Figure("imbalance", "imbalance (max/mean)"),
    Figure("imbalance_p99", "imbalance, p99", digits=2),
    Figure("fan_out", "GPUs per token", digits=2),
    Figure("node_fan_out", "nodes per token", digits=2),
    Figure("inter_node_bytes", "inter-node traffic per token", "KB", 1, 1e-3),
    _ms_of_us("step_us", "MoE time per step"),
    _ms_of_us("step_us_p50", "MoE time per step, p50"),
    _ms_of_us("step_us_p99", "MoE time per step, p99"),
    _ms_of_us("dispatch_us", "dispatch per step"),
    _ms_of_us("compute_us", "routed experts per step"),
    _ms_of_us("combine_us", "combine per step"),
    # A balancing scheme on a course of steps.
    _percent("against_none", "against none"),
    _percent("charged", "the same, charged for KV cache"),
    Figure("stall_us_per_plan", "stall per plan", "ms", 1, 1e-3),
    Figure("num_plans", "plans made", "", 1),
    Figure("moved_experts", "experts moved per step", "", 2),
    Figure("kv_bytes_less", "KV cache less per GPU", "GB", 2, 1e-9),
    # A step of the simulation.
    Figure("tokens_per_s", "tokens/s", "", 0, better="high"),
    Figure("tokens_per_s_per_gpu", "tokens/s per GPU", "", 1, better="high"),
    _percent("gpu_busy", "GPU time in kernels", "high"),
    # A service.
    *_latencies(),
    Figure("offered_requests_per_s", "requests/s offered", "", 2, better=""),
    Figure("requests_per_s", "requests/s served", "", 2, better="high"),
    Figure("prompt_tokens_per_s", "prompt tokens/s", "", 0, better="high"),
    Figure("cost_usd_per_hour", "dollars per hour", "", 2),
    Figure("cost_usd_per_million_output_tokens", "dollars per million output tokens", "", 3),
    Figure("cost_usd_per_million_input_tokens", "dollars per million input tokens", "", 3),
    Figure("output_tokens_per_s", "output tokens/s", "", 0, better="high"),
    Figure("output_tokens_per_s_per_gpu", "output tokens/s per GPU", "", 1, better="high"),
    Figure("output_tokens_per_s_per_user", "output tokens/s per request", "", 1, better="high"),
    Figure(
        "total_tokens_per_s_per_gpu", "prompt and output tokens/s per GPU", "", 1, better="high"
    ),
    _percent("gpu_utilisation", "GPU time in steps", ""),
    Figure("rank_balance", "balance of the ranks (mean/slowest)", better="high"),
    _percent("kv_used_mean", "KV cache in use, mean", ""),
    _percent("kv_used_peak", "KV cache in use, peak of a rank"),
    _percent("decode_kv_used_mean", "KV cache of decoding engines, mean", ""),
    _percent("decode_kv_used_peak", "KV cache of decoding engines, peak"),
    Figure("running_mean", "sequences running, mean", "", 1, better=""),
    Figure("queue_mean", "requests waiting, mean", "", 2),
    Figure("queue_peak_on_a_rank", "requests waiting on one rank, most", "", 0),
    _ms_of_s("queue_s_mean", "time to the first step, mean"),
    _ms_of_s("queue_s_p99", "time to the first step, p99"),
    Figure("steps", "steps", "", 0, better=""),
    Figure("step_ms_mean", "engine step, mean", "ms", 2),
    Figure("preemptions", "preemptions", "", 0),
    _percent("prefix_hit_share", "prompt tokens from the prefix cache", "high"),
    Figure("drafts_mean", "drafted tokens per step, mean", "", 2, better=""),
    _percent("drafts_accepted_share", "drafted tokens accepted", "high"),
    Figure("shortened", "requests shortened", "", 0),
    Figure("demoted", "requests demoted", "", 0),
    _percent("served_share", "requests served", "high"),
    _percent("goodput_share", "requests that keep their promises", "high"),
    Figure("kv_token_capacity", "tokens that the KV caches hold", "", 0, better="high"),
    # An expert cache.
    Figure("engine_tokens_per_s", "tokens/s of the fastest engine", "", 1, better="high"),
    _percent("hit_rate", "hit rate", "high"),
    Figure("bytes_per_token", "host link traffic per token", "MB", 1, 1e-6),
    Figure("num_slots", "experts in GPU memory", "", 0, better=""),
    Figure("hbm_gb", "GPU memory", "GB", 1),
)
FIGURES: dict[str, Figure] = {figure.name: figure for figure in _ALL}


def figure(name: str) -> Figure:
    """The figure called `name`; KeyError for another."""
    return FIGURES[name]


def figures_named(*names: str, **labels: str) -> tuple[Figure, ...]:
    """Figures by name, some with labels of their own, where the same figure is of other parts."""
    found = (FIGURES[name] for name in names)
    return tuple(replace(f, label=labels.get(f.name, f.label)) for f in found)


def short_heading(name: str) -> str:
    """A head for a column of a table of services or steps, with the unit that studies show; "" for
    a figure that has none."""
    short, _, rest = name.partition("_")
    return f"{short.upper()} {rest}, ms" if short in LATENCIES else SHORT.get(name, "")


def part_label(part: str) -> str:
    """What readers call a part of a step."""
    return PARTS.get(part, part)


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns of text with two spaces between; the first `left` flush left, the others right."""
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def count(number: int, noun: str) -> str:
    """ "1 node", "2 nodes"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
