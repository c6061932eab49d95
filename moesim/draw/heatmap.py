"""Heat maps: layers by GPUs, GPUs by GPUs, layers by experts.

Colours come in steps: eleven around a middle (blue below, orange above), or nine from little to
much. Maps of more cells than a page can show are drawn coarser, each cell the largest (or the
mean) of those that it stands for, and say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.draw.colours import DIVERGING, SEQUENTIAL
from moesim.draw.figures import significant
from moesim.draw.picture import Picture, Spec

MAX_COLUMNS = 72
MAX_ROWS = 96
MAX_HINTS = 2400
"""Cells up to which each says its value to a pointer."""
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Colours:
    """From value to colour. Diverging: `middle - reach .. middle + reach`; else low..reach. Values
    beyond have the last colour, NaN has none."""

    reach: float
    middle: float | None = None
    low: float = 0.0

    def encoding(self, unit: str) -> Spec:
        """The colour of field `value`, with the scale below the map."""
        ends, colours = [self.low, self.reach], list(SEQUENTIAL)
        if self.middle is not None:
            ends = [self.middle - self.reach, self.middle + self.reach]
            colours = list(DIVERGING)
        legend: Spec = {"orient": "bottom", "direction": "horizontal", "title": unit}
        legend |= {"gradientLength": 250, "gradientThickness": 9, "format": ".3~g"}
        legend |= {"labelFontSize": 11, "labelOverlap": "parity", "labelSeparation": 8}
        scale = {"type": "quantize", "domain": ends, "range": colours, "zero": False}
        return {"field": "value", "type": "quantitative", "scale": scale, "legend": legend}


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
    most: tuple[int, int] = (MAX_ROWS, MAX_COLUMNS),
) -> Picture:
    """A map of `values` [rows, columns] with its colour scale below. `most`: rows and columns from
    which it is drawn coarser."""
    shown, per_row = coarser(values, 0, most[0], combine)
    shown, per_column = coarser(shown, 1, most[1], combine)
    num_rows = shown.shape[0]
    row_names, column_names = _grouped(rows.names, per_row), _grouped(columns.names, per_column)
    cells = [
        {"row": row_names[r], "column": column_names[c], "value": float(shown[r, c])}
        | {
            "hint": f"{rows.title} {row_names[r]}, {columns.title} {column_names[c]}:"
            f" {significant(float(shown[r, c]), 3)} {unit}"
        }
        for r in range(num_rows)
        for c in range(shown.shape[1])
        if not np.isnan(shown[r, c])
    ]
    y = {"field": "row", "type": "ordinal", "scale": {"domain": row_names}}
    x = {"field": "column", "type": "ordinal", "scale": {"domain": column_names}}
    axis = {"grid": False, "domain": False}
    view: Spec = {
        "height": 290 if square else min(max(200, round(2.2 * num_rows)), 22 * num_rows),
        "data": {"values": cells},
        "mark": {"type": "rect", "aria": len(cells) <= MAX_HINTS},
        "encoding": {
            "y": y | {"axis": axis | {"title": rows.title}},
            "x": x | {"axis": axis | {"title": columns.title, "labelAngle": 0}},
            "color": colours.encoding(unit),
            "description": {"field": "hint"},
        },
    }
    grouped = []
    if per_row > 1 or per_column > 1:
        how = "the largest" if combine == "max" else "the mean"
        grouped = [f"a cell is {how} of {per_row} x {per_column}"]
    known = values[~np.isnan(values)]
    said = f"{num_rows} by {shown.shape[1]} cells"
    if known.size:
        low, high = (significant(float(edge), 3) for edge in (known.min(), known.max()))
        said += f" from {low} to {high} {unit}"
    return Picture(title, view, "; ".join([said, *grouped]))


def _grouped(names: Sequence[str], size: int) -> list[str]:
    if size == 1:
        return list(names)
    return [
        f"{names[i]}–{names[min(i + size, len(names)) - 1]}" for i in range(0, len(names), size)
    ]
