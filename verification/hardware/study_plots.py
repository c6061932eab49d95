"""Plots of the study: every layer, errors, plans, offloading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesim.files import atomic_path
from moesim.replay.compare import Case, Comparison, Group

SIZES = (128, 1024, 8192)
BAND = 0.10
KINDS = {
    "ours": ("balanced", "balanced_redundant", "traffic", "time"),
    "linear, round robin": ("linear", "round_robin"),
    "EPLB": ("eplb", "eplb_redundant"),
    "bad on purpose": ("bad_hot", "bad_tilt", "bad_crowded"),
}


def draw(folder: Path, found: Sequence[Comparison], offload: Sequence[dict[str, Any]]) -> None:
    """All plots, as PNG."""
    _save(_scatter(found), folder / "layers.png")
    _save(_errors(found), folder / "errors.png")
    _save(_plans(found), folder / "plans.png")
    if offload:
        _save(_offload(offload), folder / "offload.png")


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})


def _band(axes: Axes, low: float, high: float) -> None:
    ends = np.array([low, high])
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color="black", alpha=0.08)


def _scatter(found: Sequence[Comparison]) -> Figure:
    figure = Figure(figsize=(10.5, 5.4), layout="constrained")
    for axes, mode in zip(figure.subplots(1, 2, sharey=True), ("graph", "eager"), strict=True):
        _band(axes, 100, 50000)
        for number, comparison in enumerate(found):
            cases = [c for c in comparison.cases if c.mode == mode]
            axes.scatter(
                np.concatenate([c.measured_us for c in cases]),
                np.concatenate([c.predicted_us for c in cases]),
                s=9,
                alpha=0.5,
                color=f"C{number}",
                label=comparison.model,
                linewidths=0,
            )
        axes.set(xscale="log", yscale="log", xlim=(120, 40000), ylim=(120, 40000), aspect="equal")
        axes.set_xlabel("measured layer time (us)")
        axes.set_title({"graph": "in CUDA graphs", "eager": "launched call by call"}[mode])
        axes.grid(alpha=0.2)
    figure.axes[0].set_ylabel("predicted layer time (us)")
    figure.axes[0].legend(fontsize=8, loc="upper left")
    figure.suptitle("Every layer, plan and batch; band: within 10%")
    return figure


def _errors(found: Sequence[Comparison]) -> Figure:
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, tokens in enumerate(SIZES):
        for mode, style in (("graph", "-"), ("eager", "--")):
            cases = _of(found, mode, tokens)
            values = np.sort(np.concatenate([c.errors for c in cases]))
            share = np.arange(1, len(values) + 1) / len(values)
            label = f"{mode}, {tokens:,} tokens a rank"
            left.plot(values * 100, share, style, color=f"C{number}", label=label)
    for limit, share in ((10, 0.5), (20, 0.9)):
        left.plot(limit, share, "k*", markersize=9)
    left.set(xlim=(0, 70), ylim=(0, 1), xlabel="|predicted / measured - 1| of a layer (%)")
    left.set_ylabel("share of layers")
    left.set_title("errors; stars: targets at the median and at 90%")
    left.grid(alpha=0.2)
    left.legend(fontsize=8, loc="lower right")
    for number, comparison in enumerate(found):
        for i, tokens in enumerate(SIZES):
            cases = _of([comparison], "graph", tokens)
            values = np.concatenate([c.predicted_us / c.measured_us - 1 for c in cases]) * 100
            at = i + (number - 2) * 0.15
            low, middle, high = np.percentile(values, [5, 50, 95])
            right.plot([at, at], [low, high], color=f"C{number}", linewidth=3, alpha=0.6)
            label = comparison.model if i == 0 else None
            right.plot(at, middle, "o", color=f"C{number}", label=label)
    right.axhspan(-10, 10, color="black", alpha=0.06)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(range(len(SIZES)), [f"{t:,} tokens a rank" for t in SIZES])
    right.set_ylabel("predicted over measured (%)")
    right.set_title("in graphs: median and 5 to 95% of the layers")
    right.legend(fontsize=8)
    right.grid(alpha=0.2, axis="y")
    return figure


def _plans(found: Sequence[Comparison]) -> Figure:
    figure = Figure(figsize=(10.5, 15.0), layout="constrained")
    grid = figure.subplots(len(found), len(SIZES))
    for row, comparison in zip(grid, found, strict=True):
        for axes, tokens in zip(row, SIZES, strict=True):
            group = next(
                g for g in comparison.groups if (g.mode, g.tokens_per_rank) == ("graph", tokens)
            )
            _plan_panel(axes, group)
            axes.set_title(f"{comparison.model}, {tokens:,}", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    figure.supxlabel("measured time over the linear plan's")
    figure.supylabel("predicted time over the linear plan's")
    return figure


def _plan_panel(axes: Axes, group: Group) -> None:
    base, ours = group.mean_us["linear"]
    for number, (kind, plans) in enumerate(KINDS.items()):
        known = [p for p in plans if p in group.mean_us]
        real = np.array([group.mean_us[p][0] / base for p in known])
        guess = np.array([group.mean_us[p][1] / ours for p in known])
        axes.errorbar(
            real,
            guess,
            xerr=real * group.noise,
            fmt="o",
            markersize=5,
            color=f"C{number}",
            label=kind,
            linewidth=0.8,
        )
    values = [*(m / base for m, _ in group.mean_us.values())]
    values += [p / ours for _, p in group.mean_us.values()]
    low, high = min(values) * 0.98, max(values) * 1.02
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.grid(alpha=0.2)
    axes.tick_params(labelsize=8)
    rho = "" if group.spearman is None else f"Spearman {group.spearman:.2f} of"
    axes.text(
        0.97,
        0.04,
        f"{rho} {group.num_distinct} distinct",
        transform=axes.transAxes,
        ha="right",
        fontsize=8,
    )


def _offload(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.0, 0.55 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(rows))
    axes.barh(at - 0.27, [r["measured_us"] / 1e3 for r in rows], 0.25, label="measured")
    own = [r["own_us"] / 1e3 for r in rows]
    axes.barh(at, own, 0.25, label="predicted, the run's own copy and kernel times")
    known = [r for r in rows if r["calibrated_us"] is not None]
    axes.barh(
        [i + 0.27 for i, r in enumerate(rows) if r["calibrated_us"] is not None],
        [r["calibrated_us"] / 1e3 for r in known],
        0.25,
        label="predicted, from the calibration",
    )
    axes.set_yticks(at, [r["label"] for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time per token (ms)")
    axes.set_title("Experts fetched over PCIe: OLMoE shape, 6 layers, one H200")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.2, axis="x")
    return figure


def _of(found: Sequence[Comparison], mode: str, tokens: int) -> list[Case]:
    return [c for x in found for c in x.cases if (c.mode, c.tokens_per_rank) == (mode, tokens)]
