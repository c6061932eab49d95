"""Plots of caching plans: speed against memory, hit rate against slots."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from moesim.files import atomic_path

if TYPE_CHECKING:
    from moesim.caching.compare import Sweep
    from moesim.types import FloatArray

_COLOURS = {
    "this plan": "#1b6ca8",
    "offline bound": "#444444",
    "LRU, equal slots, misses fetched": "#c8553d",
    "most frequent pinned, CPU for the rest": "#588157",
    "whole layers on the CPU": "#b08900",
}


def plot_speed_by_memory(
    sweep: Sweep, hbm_gb: float, title: str, path: str | PathLike[str]
) -> None:
    """Tokens per second against HBM, one line a way of using it; the suffix gives the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(7.5, 4.6), constrained_layout=True)
    for name, speed in sweep.speed.items():
        bound = name == "offline bound"
        axes.plot(
            sweep.hbm_gb,
            speed,
            label=name,
            color=_COLOURS.get(name),
            linestyle="--" if bound else "-",
            linewidth=2.4 if name == "this plan" else 1.5,
            marker=None if bound else "o",
            markersize=3.5,
            zorder=3 if name == "this plan" else 2,
        )
    axes.axvline(hbm_gb, color="#999999", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"{hbm_gb:.3g} GB",
        (hbm_gb, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        color="#666666",
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("HBM given to the model [GB]")
    axes.set_ylabel("tokens per second")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(True, which="both", linewidth=0.4, color="#dddddd")
    axes.legend(fontsize=8, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata=_no_date(temporary.suffix))
    plt.close(figure)


def plot_hit_rates(
    curves: dict[str, FloatArray],
    top_k: int,
    title: str,
    path: str | PathLike[str],
    dashed: tuple[str, ...] = (),
) -> None:
    """Hit rate against slots a layer; `curves` {name: [E + 1]}; those in `dashed` are bounds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), constrained_layout=True)
    colours = plt.get_cmap("tab10")
    for i, (name, rate) in enumerate(curves.items()):
        axes.plot(
            np.arange(len(rate)),
            rate,
            label=name,
            color="#444444" if name == "optimum" else colours(i),
            linestyle="--" if name in dashed else "-",
            linewidth=1.6,
        )
    axes.axvline(top_k, color="#999999", linewidth=0.8, linestyle=":")
    axes.annotate(
        "top-k",
        (top_k, 0.96),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        fontsize=8,
        color="#666666",
    )
    axes.set_xlim(0, None)
    axes.set_ylim(0, 1)
    axes.set_xlabel("slots a layer")
    axes.set_ylabel("hit rate")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(True, linewidth=0.4, color="#dddddd")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata=_no_date(temporary.suffix))
    plt.close(figure)


def _no_date(suffix: str) -> dict[str, None]:
    """Metadata that keeps the same picture the same bytes."""
    return (
        {"Date": None} if suffix == ".svg" else {"CreationDate": None} if suffix == ".pdf" else {}
    )
