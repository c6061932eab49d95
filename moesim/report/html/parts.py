"""What a page is made of. The template turns these into HTML and escapes every text in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moesim.draw import Picture

_PREDICTED = {
    "measured": "predicted, from measured parts",
    "datasheet": "predicted, from datasheet figures",
    "assumed": "predicted, from assumptions",
}
BASES: dict[str, tuple[str, str, str]] = {
    "counted": ("◆", "counted", "counted from the routing trace; no hardware figure is in it"),
    "measured": ("●", "measured", "measured on hardware"),
    _PREDICTED["measured"]: (
        *("◕", "parts"),
        "computed by the cost model; every part that it was computed from is measured",
    ),
    _PREDICTED["datasheet"]: (
        *("◐", "datasheet"),
        "computed by the cost model; at its weakest it rests on a maker's datasheet",
    ),
    _PREDICTED["assumed"]: (
        *("○", "assumed"),
        "computed by the cost model; at its weakest it rests on an assumption",
    ),
}
"""What a badge says: sign, style and meaning, strongest first."""
MAX_ROWS = 200


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under `columns`; the first column names the row, the others are right-aligned
    unless in `text_columns`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: frozenset[int] = frozenset()
    caption: str = ""

    @property
    def shown(self) -> Sequence[Sequence[str]]:
        return self.rows[:MAX_ROWS]

    @property
    def num_left_out(self) -> int:
        return max(0, len(self.rows) - MAX_ROWS)


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its name, the same data as a table, and what it rests on."""

    title: str
    chart: Picture
    table: Table
    caption: str = ""
    basis: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Charts side by side where there is room."""

    items: Sequence[Figure]


@dataclass(frozen=True, slots=True)
class TableBlock:
    """A table of its own, shown at once."""

    title: str
    table: Table
    basis: str = ""
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One figure, large, with what it is and how sure it is."""

    label: str
    value: str
    detail: str = ""
    basis: str = ""


@dataclass(frozen=True, slots=True)
class Cards:
    items: Sequence[Card]


@dataclass(frozen=True, slots=True)
class Note:
    """A remark; `left_out` where something is missing from the page, with the reason."""

    text: str
    left_out: bool = False


def predicted(basis: str) -> str:
    """The badge of a prediction that rests, at its weakest, on `basis`."""
    return _PREDICTED.get(basis, f"predicted, from {basis} figures")


Block = Figures | TableBlock | Cards | Note


@dataclass(slots=True)
class Section:
    """A part of the page with a heading, made from the files `sources`."""

    title: str
    lead: str = ""
    blocks: list[Block] = field(default_factory=list)
    sources: Sequence[str] = ()
    headline: Sequence[Card] = ()
    anchor: str = ""

    def kind_of(self, block: Block) -> str:
        return type(block).__name__
