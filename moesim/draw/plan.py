"""Plans: load of GPUs and time of layers, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moesim.draw.axes import Axes
from moesim.draw.charts import Line, columns, lines
from moesim.draw.colours import PARTS, series_of
from moesim.draw.heatmap import Colours, Side, heat_map
from moesim.draw.picture import Picture, poster
from moesim.draw.simulate import breakdown

FloatArray = npt.NDArray[np.float64]
STEP_PARTS = ("dispatch", "compute", "combine")
MAX_REACH = 1.0
LOAD_UNIT = "x the mean load"


def relative_load(load: FloatArray) -> FloatArray:
    """Load [L, G] over the mean of each layer's GPUs; 1 where a layer has none."""
    mean = load.mean(axis=1, keepdims=True)
    return np.divide(load, mean, out=np.ones_like(load), where=mean > 0)


def load_maps(loads: Mapping[str, FloatArray], layer_ids: Sequence[int]) -> dict[str, Picture]:
    """Load by layer and GPU of each placement, on one colour scale; `loads` {name: [L, G]}."""
    relative = {name: relative_load(load) for name, load in loads.items()}
    reach = max([0.05, *(float(np.abs(r - 1).max()) for r in relative.values())])
    colours = Colours(min(MAX_REACH, reach), 1.0)
    layers = Side("MoE layer", [str(x) for x in layer_ids])
    out = {}
    for name, values in relative.items():
        gpus = Side("GPU", [str(g) for g in range(values.shape[1])])
        title = f"Load by layer and GPU: {name}"
        out[name] = heat_map(title, values, layers, gpus, colours, LOAD_UNIT)
    return out


def layer_times(parts_us: Mapping[str, FloatArray], layer_ids: Sequence[int]) -> dict[str, Picture]:
    """Predicted time of each MoE layer by dispatch, experts and combine, all on one axis from 0;
    `parts_us` {name: [L, 3] microseconds}."""
    top = max(float(parts.sum(axis=1).max()) for parts in parts_us.values()) * 1.05
    axes = Axes("MoE layer", "predicted time (us)", y_range=(0.0, top or 1.0), height=200)
    names = [str(x) for x in layer_ids]
    out = {}
    for name, parts in parts_us.items():
        stacked = [(*PARTS[part], parts[:, i].tolist()) for i, part in enumerate(STEP_PARTS)]
        out[name] = columns(f"Predicted time by layer: {name}", names, stacked, axes)
    return out


def busiest_gpu(busiest: Mapping[str, FloatArray]) -> Picture:
    """How the load of the busiest GPU over the mean is distributed over batches and layers, the
    plan last in `busiest` {name: [any]}."""
    names = list(busiest)
    series = series_of(names, names[-1])
    drawn = []
    for name in names:
        ordered = np.sort(busiest[name])
        share = np.arange(1, len(ordered) + 1) / len(ordered) * 100
        drawn.append(Line(name, ordered.tolist(), share.tolist(), series[name], step=True))
    low = min([1.0, *(line.x[0] for line in drawn)])
    high = max(line.x[-1] for line in drawn)
    axes = Axes(
        "busiest GPU's load / mean load",
        "share of batches and layers (%)",
        x_range=(low, max(high, low + 0.01) * 1.01),
        y_range=(0.0, 100.0),
    )
    return lines("Busiest GPU of a batch and layer", drawn, axes)


def plan_poster(
    title: str,
    about: str,
    loads: Mapping[str, FloatArray],
    busiest: Mapping[str, FloatArray],
    layer_ids: Sequence[int],
    parts_us: Mapping[str, FloatArray],
) -> Picture:
    """Load of every GPU and layer of each placement above its time by layer, and both in sum.

    loads: {name: [L, G]}; busiest: {name: [B * L]}; parts_us: {name: [L, 3]} dispatch, experts,
    combine, empty where no times are known. The plan is the last.
    """
    rows = [list(load_maps(loads, layer_ids).values())]
    last = [busiest_gpu(busiest)]
    if parts_us:
        rows.append(list(layer_times(parts_us, layer_ids).values()))
        sums = {
            name: dict(zip(STEP_PARTS, parts.sum(axis=0).tolist(), strict=True))
            for name, parts in parts_us.items()
        }
        last.append(breakdown("Predicted MoE time of a step", sums, "time per step (ms)"))
    return poster(title, [*rows, last], about)
