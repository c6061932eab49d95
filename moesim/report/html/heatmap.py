"""Heat maps: layers by GPUs, and GPUs by GPUs.

Colours come in classes: eleven around a middle (blue below, orange above), or nine from little to
much. Maps of more cells than a page can show are drawn coarser, each cell the largest (or the
mean) of those that it stands for, and say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from moesim.report.html.charts import WIDTH
from moesim.report.html.svg import (
    drawing,
    element,
    fit,
    hint,
    label,
    minus,
    number,
    significant,
    text_width,
)
from moesim.types import FloatArray

NUM_DIVERGING = 11
NUM_SEQUENTIAL = 9
MAX_COLUMNS = 96
MAX_ROWS = 96
MAX_HINTS = 2400


@dataclass(frozen=True, slots=True)
class Colours:
    """From value to colour class. Diverging: `middle - reach .. middle + reach`; else low..reach.
    NaN has no colour."""

    reach: float
    middle: float | None = None
    low: float = 0.0

    def of(self, value: float) -> str:
        if math.isnan(value):
            return "none"
        if self.middle is None:
            span = self.reach - self.low
            share = (value - self.low) / span if span > 0 else 1.0
            return f"w{min(NUM_SEQUENTIAL - 1, max(0, int(share * NUM_SEQUENTIAL)))}"
        share = (value - self.middle + self.reach) / (2 * self.reach) if self.reach > 0 else 0.5
        return f"q{min(NUM_DIVERGING - 1, max(0, int(share * NUM_DIVERGING)))}"

    def classes(self) -> list[str]:
        if self.middle is None:
            return [f"w{i}" for i in range(NUM_SEQUENTIAL)]
        return [f"q{i}" for i in range(NUM_DIVERGING)]

    def ends(self) -> tuple[float, float]:
        if self.middle is None:
            return self.low, self.reach
        return self.middle - self.reach, self.middle + self.reach


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a map: what its rows or columns are, and the name of each."""

    title: str
    names: Sequence[str]


def coarser(values: FloatArray, axis: int, most: int, combine: str) -> tuple[FloatArray, int]:
    """`values` with at most `most` entries along `axis`, and how many were combined into one."""
    count = values.shape[axis]
    size = math.ceil(count / most)
    if size == 1:
        return values, 1
    starts = np.arange(0, count, size)
    if combine == "max":
        return np.fmax.reduceat(values, starts, axis=axis), size
    totals = np.add.reduceat(np.nan_to_num(values), starts, axis=axis)
    counts = np.add.reduceat(~np.isnan(values), starts, axis=axis, dtype=np.int64)
    return np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0), size


def heat_map(
    title: str,
    values: FloatArray,
    rows: Side,
    columns: Side,
    colours: Colours,
    unit: str,
    *,
    combine: str = "max",
    square: bool = False,
) -> Markup:
    """A map of `values` [rows, columns] with its colour scale below."""
    shown, per_row = coarser(values, 0, MAX_ROWS, combine)
    shown, per_column = coarser(shown, 1, MAX_COLUMNS, combine)
    num_rows, num_columns = shown.shape
    row_names = _grouped(rows.names, per_row)
    column_names = _grouped(columns.names, per_column)
    named = max(text_width(name, 11) for name in row_names)
    left, top, right = min(max(30.0, named + 10), 110.0), 22.0, WIDTH - 6
    wide = (right - left) / num_columns
    high = wide if square else min(max(200.0 / num_rows, 2.2), 22.0)
    bottom = top + high * num_rows
    body = [label(2, 8, fit(rows.title, 120), class_="axis")]
    cells = _cells(shown, colours, left, top, wide, high)
    hints = shown.size <= MAX_HINTS
    if hints:
        marks = [
            element(
                "rect",
                hint(
                    f"{rows.title} {row_names[r]}, {columns.title} {column_names[c]}:"
                    f" {significant(float(shown[r, c]), 3)} {unit}"
                ),
                x=left + c * wide,
                y=top + r * high,
                width=wide,
                height=high,
                class_=f"mark {colours.of(float(shown[r, c]))}",
            )
            for r in range(num_rows)
            for c in range(num_columns)
        ]
        body.append(element("g", *marks, class_="cells"))
    else:
        body.append(element("g", *cells, class_="cells"))
    body += [
        label(left - 5, top + (r + 0.5) * high, fit(row_names[r], left - 6, 11), "end", "tick", 11)
        for r in _every(num_rows, 12, num_rows * high)
    ]
    body += [
        label(left + (c + 0.5) * wide, bottom + 10, column_names[c], "middle", "tick", 11)
        for c in _every(num_columns, 8, right - left)
    ]
    body.append(label(right, bottom + 26, columns.title, "end", "axis"))
    body += _key(colours, unit, left, bottom + 42)
    grouped = []
    if per_row > 1 or per_column > 1:
        how = "the largest" if combine == "max" else "the mean"
        grouped = [f"a cell is {how} of {per_row} x {per_column}"]
    said = (
        f"{num_rows} by {num_columns} cells from {significant(float(np.nanmin(values)), 3)} to"
        f" {significant(float(np.nanmax(values)), 3)} {unit}"
    )
    return drawing(title, "; ".join([said, *grouped]), WIDTH, bottom + 82, *body)


def _cells(
    shown: FloatArray, colours: Colours, left: float, top: float, wide: float, high: float
) -> list[Markup]:
    """One path a colour, neighbours in a row merged: small for maps of many cells."""
    paths: dict[str, list[str]] = {}
    for r in range(shown.shape[0]):
        classes = [colours.of(float(v)) for v in shown[r]]
        start = 0
        for c in range(1, len(classes) + 1):
            if c == len(classes) or classes[c] != classes[start]:
                run = number((c - start) * wide)
                paths.setdefault(classes[start], []).append(
                    f"M{number(left + start * wide)} {number(top + r * high)}h{run}"
                    f"v{number(high)}h-{run}z"
                )
                start = c
    return [
        element("path", d="".join(parts), class_=f"mark {name}")
        for name, parts in sorted(paths.items())
    ]


def _key(colours: Colours, unit: str, left: float, y: float) -> list[Markup]:
    """The colour scale with its ends, its middle, and the unit."""
    classes = colours.classes()
    each = (WIDTH - 6 - left) / len(classes)
    body = [
        element("rect", x=left + i * each, y=y, width=each, height=9.0, class_=name)
        for i, name in enumerate(classes)
    ]
    low, high = colours.ends()
    texts = [(left, "start", low), (WIDTH - 6, "end", high)]
    if colours.middle is not None:
        texts.insert(1, ((left + WIDTH - 6) / 2, "middle", colours.middle))
    body += [
        label(x, y + 18, minus(significant(value, 3)), anchor, "tick", 11)
        for x, anchor, value in texts
    ]
    body.append(label(left, y + 33, fit(unit, WIDTH - left - 8, 11), "start", "tick", 11))
    return body


def _grouped(names: Sequence[str], size: int) -> list[str]:
    if size == 1:
        return list(names)
    return [
        f"{names[i]}–{names[min(i + size, len(names)) - 1]}" for i in range(0, len(names), size)
    ]


def _every(count: int, most: int, room: float) -> range:
    """Which of `count` entries are named: evenly, at most `most`, 15 apart at least."""
    step = max(1, math.ceil(count / most), math.ceil(15 * count / max(room, 1)))
    return range(0, count, step)
