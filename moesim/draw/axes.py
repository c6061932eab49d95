"""Axes: what they say, where they begin and end, and where their ticks are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moesim.draw.picture import Spec


@dataclass(frozen=True, slots=True)
class Axes:
    """Titles with units, and how the axes run. Limits default to what is drawn, from 0 where that
    is near; marks are lines across with a name, such as promises."""

    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    height: int = 180
    marks_y: Sequence[tuple[float, str]] = ()
    marks_x: Sequence[tuple[float, str]] = ()


def linear_axis(field: str, title: str, domain: Sequence[float]) -> Spec:
    """A linear axis over `domain`, which says where it does not begin at 0."""
    return {
        "field": field,
        "type": "quantitative",
        "scale": {"domain": list(domain), "nice": False, "zero": False},
        "axis": {"title": axis_title(title, domain[0], False), "tickCount": 5},
    }


def axis_title(title: str, low: float, log: bool) -> str:
    """The title of an axis, which says where it does not begin at 0."""
    return title + (", logarithmic" if log else ", not from 0" if low > 0 else "")


def plane(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> tuple[Spec, Spec]:
    """The x and y encodings of fields x and y."""
    out: list[Spec] = []
    for name, title, log, given, values in (
        ("x", axes.x, axes.log_x, axes.x_range, xs),
        ("y", axes.y, axes.log_y, axes.y_range, ys),
    ):
        low, high = given or spread(values, log)
        own = linear_axis(name, title, [low, high])
        if log:
            own["scale"]["type"] = "log"
            own["axis"] = {"title": axis_title(title, low, log), "values": log_ticks(low, high)}
            own["axis"]["format"] = "~s" if high >= 1e5 else ",~g"
        out.append(own)
    return out[0], out[1]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten within low..high, with 2 and 5 times them where few powers are."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [
            m * 10.0**p
            for p in range(first, last + 1)
            for m in steps
            if low * (1 - 1e-9) <= m * 10.0**p <= high * (1 + 1e-9)
        ]
        if len(found) <= most:
            return found or [low, high]
    return found[:: math.ceil(len(found) / most)]


def spread(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Where an axis of `values` begins and ends: at 0 where that is near."""
    usable = [v for v in values if v > 0] if log else list(values)
    if not usable:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(usable), max(usable)
    if log:
        return (low / 1.25, high * 1.25)
    if 0 <= low < 0.4 * high:
        return (0.0, high * 1.05)
    return padded(low, high)


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """The range a little wider, never empty."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
    return low - share * span, high + share * span
