"""Predicted against measured layer times of a validation on hardware."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import InputError
from moesim.files import atomic_path

if TYPE_CHECKING:
    from moesim.replay.compare import Comparison

BAND = 0.10
_MARKERS = {"graph": "o", "eager": "x"}


def plot_validation(comparisons: Sequence[Comparison], path: str | PathLike[str]) -> None:
    """Scatter every layer of every case on log axes, with the diagonal and a band of +-10%.

    One colour a model, one marker a mode. The suffix of `path` gives the format. Raises InputError
    when there is nothing to draw.
    """
    if not any(c.cases for c in comparisons):
        raise InputError("there is nothing to plot", "compare a record that holds results")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    axes = figure.add_subplot()
    low, high = np.inf, 0.0
    for number, comparison in enumerate(comparisons):
        for mode, marker in _MARKERS.items():
            cases = [c for c in comparison.cases if c.mode == mode]
            if not cases:
                continue
            measured = np.concatenate([c.measured_us for c in cases])
            predicted = np.concatenate([c.predicted_us for c in cases])
            low = min(low, measured.min(), predicted.min())
            high = max(high, measured.max(), predicted.max())
            axes.scatter(
                measured,
                predicted,
                s=12,
                marker=marker,
                alpha=0.5,
                color=f"C{number % 10}",
                label=f"{comparison.model}, {mode}",
                linewidths=0.8,
            )
    ends = np.array([low / 1.2, high * 1.2])
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color="black", alpha=0.08)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("measured layer time (us)")
    axes.set_ylabel("predicted layer time (us)")
    axes.set_title("MoE layer on hardware; band: within 10%")
    axes.legend(fontsize=7, loc="upper left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
