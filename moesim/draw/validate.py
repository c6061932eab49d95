"""Validation on hardware: predicted beside measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moesim.draw.axes import Axes
from moesim.draw.charts import Bar, Points, bars, points
from moesim.draw.colours import GREY
from moesim.draw.picture import Picture
from moesim.errors import InputError

BAND = 0.10
MAX_POINTS = 1500


def layer_scatter(
    cases: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[str]]],
    title: str = "Time of a layer, predicted against measured",
) -> Picture:
    """A point per layer on equal logarithmic axes, with the diagonal and a band of +-10%.

    cases: {name: (measured us, predicted us, hint of each)}; of more than MAX_POINTS points one in
    so many is drawn (see `stride`). Raises InputError when there is nothing to draw.
    """
    every = stride(cases)
    drawn = [
        Points(name, measured[::every], predicted[::every], i % GREY, hints[::every])
        for i, (name, (measured, predicted, hints)) in enumerate(cases.items())
        if len(measured)
    ]
    if not drawn:
        raise InputError("there is nothing to plot", "compare a record that holds results")
    axes = Axes("measured (us)", "predicted (us)", log_x=True, log_y=True)
    return points(title, drawn, axes, band=BAND)


def stride(cases: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[str]]]) -> int:
    """One layer in so many is drawn."""
    return max(1, -(-sum(len(measured) for measured, *_ in cases.values()) // MAX_POINTS))


def measured_bars(
    title: str,
    pairs: Mapping[str, tuple[float, float]],
    axis: str,
    unit: str = "",
    linear: bool = False,
) -> Picture:
    """Bars of (measured, predicted) pairs from 0; `linear` marks 1, the linear plan."""
    rows = []
    for name, pair in pairs.items():
        for kind, series, value in zip(("measured", "predicted"), (0, GREY), pair, strict=True):
            text = f"{value:.3f}" + (f" {unit}" if unit else "")
            rows.append(Bar(f"{name}, {kind}", [("", series, value)], text))
    return bars(title, rows, axis, mark=(1.0, "linear") if linear else None)
