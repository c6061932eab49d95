"""A picture of a served run: load and queues over time, and latencies by percentile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moesim.files import atomic_path

BLUE, ORANGE, GREEN, GREY = "#1f4e79", "#ed7d31", "#548235", "#7f7f7f"
LABELS = {"serving": "", "decode": ", decoding engines"}
LATENCIES = (
    ("ttft", "time to first token", BLUE),
    ("tpot", "time per output token", ORANGE),
    ("e2e", "end to end", GREEN),
)


def plot_serving(record: dict[str, Any], path: Path) -> None:
    """Draw a run (`moesim.serving.record.run_record`) into `path` (png, svg or pdf).

    Left, over time: output tokens a second, running and waiting requests, shares of GPU time and of
    the KV cache in use. Right: cumulative distributions of the latencies, with the promises.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 7), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(1.6, 1))
    left = [figure.add_subplot(grid[0, 0])]
    left += [figure.add_subplot(grid[i, 0], sharex=left[0]) for i in (1, 2)]
    right = [figure.add_subplot(grid[i, 1]) for i in range(3)]
    _over_time(left, record["series"])
    for axes, (name, label, colour) in zip(right, LATENCIES, strict=True):
        _distribution(axes, record, name, label, colour)
    for axes in (*left, *right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    asked = record["requests"]
    figure.suptitle(
        f"{asked['num_requests']:,} requests of {_short(asked['source'])} on {record['num_gpus']}"
        f" GPUs: {_short(record['deployment']['name'])} ({record['basis']})",
        fontsize=10,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def _over_time(axes: list[Any], series: dict[str, dict[str, list[float]]]) -> None:
    top, middle, bottom = axes
    styles = {"serving": "-", "decode": "--"}
    longest = max((columns["time_s"][-1] for columns in series.values()), default=0.0)
    unit, seconds = ("min", 60.0) if longest > 300 else ("s", 1.0)
    for role, columns in series.items():
        time = np.asarray(columns["time_s"]) / seconds
        style, more = styles[role], LABELS[role]
        top.plot(time, columns["output_tokens_per_s"], style, color=BLUE, lw=1,
                 label=f"output tokens/s{more}")  # fmt: skip
        middle.plot(time, columns["running"], style, color=GREEN, lw=1, label=f"running{more}")
        middle.plot(time, columns["waiting"], style, color=ORANGE, lw=1, label=f"waiting{more}")
        bottom.plot(time, np.asarray(columns["busy"]) * 100, style, color=GREY, lw=1,
                    label=f"GPUs in a step{more}")  # fmt: skip
        bottom.plot(time, np.asarray(columns["kv_used"]) * 100, style, color=BLUE, lw=1,
                    label=f"KV cache in use{more}")  # fmt: skip
    for place, label in ((top, "tokens/s"), (middle, "requests"), (bottom, "%")):
        place.set_ylabel(label, fontsize=8)
        place.set_ylim(bottom=0)
        place.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0))
    bottom.set_ylim(0, 105)
    bottom.set_xlabel(f"{unit} since the first request", fontsize=8)
    for place in (top, middle):
        place.tick_params(labelbottom=False)


def _distribution(axes: Any, record: dict[str, Any], name: str, label: str, colour: str) -> None:
    values = np.asarray(record["cdf"][name])
    if not len(values):
        axes.text(0.5, 0.5, f"no {label}", ha="center", transform=axes.transAxes, fontsize=8)
        axes.set_axis_off()
        return
    unit, scale = ("ms", 1e3) if name == "tpot" or np.median(values) < 1 else ("s", 1.0)
    axes.plot(values * scale, np.linspace(0, 100, len(values)), color=colour, lw=1.6)
    metrics = record["metrics"]
    for stat in ("p50", "p99"):
        value = metrics[f"{name}_{stat}"] * scale
        late = value > 0.7 * values[-1] * scale
        axes.plot([value], [float(stat[1:])], "o", color=colour, ms=4)
        axes.annotate(
            f"{stat} {value:,.0f}" if value >= 100 else f"{stat} {value:.3g}",
            (value, float(stat[1:])),
            textcoords="offset points",
            xytext=(-6, 4) if late else (6, -9),
            ha="right" if late else "left",
            fontsize=8,
        )
    for bound in _promises(record, name):
        if bound * scale < values[-1] * scale * 1.3:
            axes.axvline(bound * scale, color="#c00000", lw=0.9, ls=":")
    axes.set_xlabel(f"{label}, {unit}", fontsize=8)
    axes.set_ylabel("% of requests", fontsize=8)
    axes.set_ylim(0, 101)
    axes.set_xlim(left=0)
    if values[-1] > 4 * metrics[f"{name}_p99"]:
        axes.set_xlim(0, metrics[f"{name}_p99"] * scale * 1.6)


def _promises(record: dict[str, Any], name: str) -> list[float]:
    if record["slo"] is None:
        return []
    return [b["limit_s"] for b in record["slo"]["promises"] if b["latency"] == name]


def _short(text: str) -> str:
    """Plain text of one line: `$` would start mathematics."""
    return (text if len(text) <= 70 else f"{text[:67]}...").replace("$", r"\$")
