"""Expert offloading: speed against memory, hits, and where experts are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moesim.draw.axes import Axes
from moesim.draw.charts import Bar, Line, bars, lines
from moesim.draw.colours import GREY, series_of
from moesim.draw.figures import percent, significant
from moesim.draw.heatmap import Colours, Side, heat_map
from moesim.draw.picture import Picture

OWN = "this plan"
BOUND = "offline bound"
FOUND = (
    ("hit_rate", "found in memory", 0),
    ("prefetch_hit_rate", "prefetched", 5),
    ("cpu_share", "on the CPU", 2),
)
"""Share of expert uses, name for readers, series; the rest is fetched on demand."""


def speed_by_memory(
    hbm_gb: Sequence[float],
    speed: Mapping[str, Sequence[float | None]],
    own_gb: float | None = None,
    title: str = "Speed against memory",
) -> Picture:
    """Tokens per second against GPU memory, a line per way of using it, logarithmic; None or NaN
    where it does not fit. `own_gb`: the memory that was asked about."""
    series = dict(series_of([n for n in speed if n != BOUND], OWN)) | {BOUND: GREY}
    drawn = []
    for name, values in speed.items():
        fits = [
            (float(x), float(v))
            for x, v in zip(hbm_gb, values, strict=True)
            if v is not None and np.isfinite(v)
        ]
        drawn.append(Line(name, [x for x, _ in fits], [v for _, v in fits], series[name]))
    axes = Axes(
        "GPU memory for the model (GB)",
        "tokens per second",
        log_y=True,
        height=220,
        marks_x=[] if own_gb is None else [(own_gb, f"{own_gb:.3g} GB")],
    )
    return lines(title, drawn, axes)


def speeds(tokens_per_s: Mapping[str, float], bound: float | None) -> Picture:
    """Tokens per second of each way with the same memory, and what no policy exceeds."""
    rows = [
        Bar(name, [("", 0 if name == OWN else GREY, value)], significant(value))
        for name, value in tokens_per_s.items()
    ]
    mark = None if bound is None else (bound, f"{BOUND} {significant(bound)}")
    return bars("Speed with the same memory", rows, "tokens per second", mark=mark)


def found_shares(shares: Mapping[str, float]) -> list[tuple[str, int, float]]:
    """(name, series, percent) of where experts are found, adding up to 100."""
    known = [(label, series, 100 * shares.get(key, 0.0)) for key, label, series in FOUND]
    return [*known, ("fetched on demand", 1, max(0.0, 100 - sum(v for *_, v in known)))]


def where_found(ways: Mapping[str, Mapping[str, float]]) -> Picture:
    """Where a token's experts are found, by way; {name: shares by the keys of FOUND}."""
    rows = [
        Bar(name, found_shares(shares), f"{percent(shares.get('hit_rate', 0.0))} hits")
        for name, shares in ways.items()
    ]
    return bars("Where a token's experts are found", rows, "share of expert uses (%)")


def slots_of_layers(
    layers: Sequence[str], slots: Sequence[float], pinned: Sequence[float]
) -> Picture:
    """Room for experts in each layer, and how many of them never leave."""
    values = np.array([slots, pinned], np.float64)
    return heat_map(
        "Slots of each layer",
        values,
        Side("", ["slots", "pinned"]),
        Side("MoE layer", layers),
        Colours(float(values.max())),
        "experts",
    )
