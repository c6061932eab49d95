"""Load of experts: layers by experts, relative to the layer's mean, and its peaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim.draw.colours import PAPER, SERIES
from moesim.draw.heatmap import Colours, Side, heat_map
from moesim.draw.picture import Picture, Spec

if TYPE_CHECKING:
    from moesim.trace.format import TraceMeta

CELL = 6
UNUSED = SERIES[7]
TIMES = "isFinite(datum.value) ? format(pow(2, datum.value), '.2~f') + 'x' : ''"


def expert_load(load: npt.NDArray[np.integer], meta: TraceMeta, sample: str) -> Picture:
    """Load [L, E] over the layer's mean by layer and expert, with max over mean beside it.

    Colour is logarithmic and ends at four times (or, in very even traces, twice) the mean and its
    inverse; unused experts are grey. `sample` says what was counted, as in "54,399 tokens".
    """
    counts = np.asarray(load, np.float64)
    num_layers, num_experts = counts.shape
    mean = counts.mean(axis=1, keepdims=True)
    relative = np.divide(counts, mean, out=np.zeros_like(counts), where=mean > 0)
    used = relative > 0
    spread = np.abs(np.log2(relative[used])) if used.any() else np.zeros(1)
    limit = 2.0 if np.percentile(spread, 99) > 1 else 1.0
    shown = np.where(used, np.log2(np.where(used, relative, 1.0)), np.nan)
    layers = [str(x) for x in meta.layer_ids]
    made = ", synthetic" if meta.source.get("kind") == "synthetic" else ""
    grey = ", grey: unused" if not used.all() else ""
    cells = heat_map(
        "",
        shown,
        Side("layer", layers),
        Side("expert", [str(e) for e in range(num_experts)]),
        Colours(limit, 0.0),
        f"load / mean, logarithmic{grey}",
        most=counts.shape,
    )
    view: Spec = cells.view
    view |= {
        "width": int(np.clip(CELL * num_experts, 330, 1500)),
        "height": int(np.clip(2 * CELL * num_layers, 80, 900)),
        "view": {"fill": UNUSED if grey else PAPER},
    }
    view["encoding"]["color"]["legend"]["labelExpr"] = TIMES
    peak = relative.max(axis=1)
    bars: Spec = {
        "width": 110,
        "height": view["height"],
        "data": {
            "values": [
                {"row": layers[i], "peak": float(peak[i]), "mean": 1} for i in range(num_layers)
            ]
        },
        "encoding": {"y": {**view["encoding"]["y"], "axis": None}},
        "layer": [
            {
                "mark": {"type": "bar", "color": SERIES[1]},
                "encoding": {
                    "x": {"field": "peak", "type": "quantitative"}
                    | {"axis": {"title": "max / mean", "tickCount": 4}}
                    | {"scale": {"domainMin": 0}}
                },
            },
            {
                "mark": {"type": "rule", "strokeDash": [3, 3]},
                "encoding": {"x": {"datum": 1, "type": "quantitative"}, "y": {"value": 0}}
                | {"y2": {"value": "height"}},
            },
        ],
    }
    title: Spec = {"text": f"Load of experts over the layer's mean: {meta.model or 'trace'}{made}"}
    title["subtitle"] = f"{sample}, {num_layers} layers, top-{meta.top_k} of {num_experts}{grey}"
    whole: Spec = {"title": title, "hconcat": [view, bars], "spacing": 14}
    return Picture(str(title["text"]), whole, str(title["subtitle"]))
