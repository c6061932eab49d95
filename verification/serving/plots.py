"""Predicted against measured, with and without engine constants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from predict import Prediction
from rows import Row

COLOURS = {"vllm": "#0072b2", "sglang": "#d55e00", "trtllm": "#009e73"}
MARKERS = ("o", "s", "^", "D", "v", "P")


def scatter(
    rows: list[Row],
    kernels_only: Mapping[int, Prediction],
    held_out: Mapping[int, Prediction],
    path: Path,
) -> None:
    """Two by two: TPOT and TTFT, kernels only and held-out constants; bands of 10 and 20 %."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(2, 2, figsize=(10, 10), constrained_layout=True)
    kinds = sorted({(row.engine, row.group) for row in rows})
    of_engine: dict[str, int] = {}
    for engine, group in kinds:
        marker = MARKERS[of_engine.setdefault(engine, 0)]
        of_engine[engine] += 1
        own = [row for row in rows if (row.engine, row.group) == (engine, group)]
        for i, name in enumerate(("tpot_ms", "ttft_ms")):
            for j, found in enumerate((kernels_only, held_out)):
                axes[i, j].plot(
                    [getattr(row, name) for row in own],
                    [getattr(found[row.number], name) for row in own],
                    marker,
                    color=COLOURS[engine],
                    markersize=4.5,
                    markerfacecolor="none",
                    alpha=0.8,
                    label=f"{engine}, {group}",
                )
    for i, (name, band) in enumerate((("TPOT", 0.1), ("TTFT", 0.2))):
        measured = [getattr(row, f"{name.lower()}_ms") for row in rows]
        span = np.array([min(measured) / 1.5, max(measured) * 1.5])
        for j, title in enumerate(("kernels only, nothing fitted", "engine constants, held out")):
            axis = axes[i, j]
            axis.plot(span, span, color="0.3", linewidth=0.8)
            axis.fill_between(
                span, span * (1 - band), span * (1 + band), color="0.5", alpha=0.2, linewidth=0
            )
            axis.set(xscale="log", yscale="log", xlim=span, ylim=span)
            axis.set_xlabel(f"measured {name}, ms")
            axis.set_ylabel(f"predicted {name}, ms")
            axis.set_title(f"{name}: {title} (band: {100 * band:.0f} %)", fontsize=10)
            axis.grid(True, which="major", alpha=0.3)
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_formatter(LogFormatter())
                side.set_minor_formatter(NullFormatter())
                side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if i == 0 else (1.0,)))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)
