"""Balancing schemes: what each is worth against doing nothing."""

from __future__ import annotations

from collections.abc import Mapping

from moesim.draw.charts import Interval, intervals
from moesim.draw.colours import GREY
from moesim.draw.picture import Picture, poster


def worth_of_schemes(
    title: str, found: Mapping[str, tuple[float, float, float]], about: str
) -> Picture:
    """{name: (value, low, high)}, shares of doing nothing's time that a scheme adds."""
    rows = []
    for name, shares in found.items():
        value, low, high = (100 * share for share in shares)
        series = 0 if high < 0 else GREY if low <= 0 else 1
        rows.append(Interval(name, value, low, high, series, f"{value:+.1f}%"))
    drawn = intervals(
        "MoE time with stalls, against doing nothing",
        rows,
        "change (%), with its 95% interval",
        mark=(0.0, "none"),
    )
    return poster(title, [[drawn]], about)
