"""A picture of simulated steps: where the time goes, and how it varies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesim.files import atomic_path

if TYPE_CHECKING:
    from moesim.sim.result import SimResult

COLOURS = {
    "attention": "#1f4e79",
    "gate": "#5b9bd5",
    "shared": "#7030a0",
    "dense": "#9dc3e6",
    "dispatch": "#ed7d31",
    "compute": "#548235",
    "combine": "#f4b183",
    "other": "#bf9000",
    "waiting": "#d9d9d9",
}
LABELS = {"compute": "routed experts", "shared": "shared experts", "other": "other transfers"}


def plot_simulation(results: Mapping[str, SimResult], path: Path, title: str) -> None:
    """Draw into `path` (png, svg or pdf): parts of the mean step, and step times by rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results)
    parts = {name: results[name].breakdown_us() for name in names}
    height = 1.8 + 0.45 * len(names)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, max(3.2, height)), width_ratios=(1.7, 1), layout="constrained"
    )
    rows = np.arange(len(names))
    start = np.zeros(len(names))
    for part, colour in COLOURS.items():
        width = np.array([parts[name].get(part, 0.0) / 1e3 for name in names])
        if width.max() > 0:
            left.barh(rows, width, 0.62, left=start, color=colour, label=LABELS.get(part, part))
            start += width
    for row, total in zip(rows.tolist(), start.tolist(), strict=True):
        left.text(total, row, f" {total:.2f}", va="center", fontsize=8)
    left.set_yticks(rows, names)
    left.invert_yaxis()
    left.set_xlim(0, start.max() * 1.12)
    left.set_xlabel("mean step, ms")
    left.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    for name in names:
        times = np.sort(results[name].step_us) / 1e3
        right.plot(np.linspace(0, 100, len(times)), times, label=name, lw=1.6)
    right.set_xlabel("percentile of steps")
    right.set_ylabel("ms")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
