"""A heat map of expert load: layers by experts, relative to the mean."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesim.trace.format import TraceMeta

_CELL_INCHES = 0.085
_UNUSED = "#9e9e9e"


def plot_load(
    load: npt.NDArray[np.integer], meta: TraceMeta, sample: str, path: str | PathLike[str]
) -> None:
    """Draw load [L, E] into `path` (the suffix gives the format: png, svg, pdf).

    One row a layer, the first at the top; colour is load over the layer's mean on a logarithmic
    scale that ends at four times (or, in very even traces, twice) the mean and its inverse; unused
    experts are grey. The bars at the right are max over mean of each layer. `sample` says what was
    counted, as in "54,399 tokens". Raises InputError for a path that cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts = np.asarray(load, np.float64)
    num_layers, num_experts = counts.shape
    mean = counts.mean(axis=1, keepdims=True)
    relative = np.divide(counts, mean, out=np.zeros_like(counts), where=mean > 0)
    used = relative > 0
    spread = np.abs(np.log2(relative[used])) if used.any() else np.zeros(1)
    limit = 2.0 if np.percentile(spread, 99) > 1 else 1.0
    shown = np.ma.masked_where(~used, np.log2(np.where(used, relative, 1.0)))

    width = float(np.clip(4.0 + _CELL_INCHES * num_experts, 8.0, 20.0))
    height = float(np.clip(1.7 + 2 * _CELL_INCHES * num_layers, 3.6, 13.0))
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 2, width_ratios=(width - 2.6, 1.2), wspace=0.02)
    axes = figure.add_subplot(grid[0])
    colours = colormaps["PuOr_r"].with_extremes(bad=_UNUSED)
    image = axes.imshow(
        shown, aspect="auto", interpolation="nearest", cmap=colours, vmin=-limit, vmax=limit
    )
    _label_layers(axes, meta.layer_ids)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    name = meta.model if meta.model.isprintable() and meta.model else "trace"
    made = ", synthetic" if meta.source.get("kind") == "synthetic" else ""
    grey = ", grey: unused" if not used.all() else ""
    axes.set_title(
        f"Load of experts over the layer's mean: {name[:60]}{made}\n"
        f"{sample}, {num_layers} layers, top-{meta.top_k} of {num_experts}{grey}",
        fontsize=10,
        loc="left",
        parse_math=False,
    )
    bars = figure.add_subplot(grid[1], sharey=axes)
    peak = relative.max(axis=1)
    bars.barh(np.arange(num_layers), peak, height=0.8, color="#8c510a")
    bars.axvline(1.0, color="#555555", linewidth=0.8)
    bars.set_xlim(0, max(2.0, float(peak.max()) * 1.05))
    bars.set_xlabel("max / mean")
    bars.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    bars.tick_params(labelleft=False, left=False)
    for side in ("top", "right", "left"):
        bars.spines[side].set_visible(False)
    ticks = np.arange(-limit, limit + 0.5)
    bar = figure.colorbar(image, ax=bars, extend="both", fraction=0.4, pad=0.1, aspect=25)
    bar.set_ticks(list(ticks), labels=[_times(t) for t in ticks])
    bar.set_label("load / mean")
    target = Path(path)
    with atomic_path(target) as temporary:
        try:
            figure.savefig(temporary, dpi=130, metadata=_no_date(target.suffix.lower()))
        except ValueError as error:
            raise InputError(
                f"cannot draw {path}: {error}", "name a file ending in .png, .svg or .pdf"
            ) from None


def _label_layers(axes: Axes, layer_ids: tuple[int, ...]) -> None:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000, 10**6) if len(layer_ids) / n <= 30)
    rows = [row for row, layer in enumerate(layer_ids) if layer % every == 0 or every == 1]
    axes.set_yticks(rows, [str(layer_ids[row]) for row in rows], fontsize=8)


def _times(log2: float) -> str:
    return f"{2**log2:g}x" if log2 >= 0 else f"1/{2**-log2:g}x"


def _no_date(suffix: str) -> dict[str, Any] | None:
    """Metadata that keeps the clock and the version out of the file."""
    return {
        ".png": {"Software": None},
        ".svg": {"Date": None},
        ".pdf": {"CreationDate": None},
    }.get(suffix)
