"""Colours of every picture, for light and for dark pages, and which name gets which.

Series are Okabe and Ito's palette, changed a little where it lacks contrast on white. A picture is
made in the light colours; a page gives its dark ones in their place (`DARK`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moesim import figures

TEXT, SOFT, AXIS, GRID, PAPER = "#1c2127", "#59616b", "#8b929b", "#e9ebee", "#ffffff"
SERIES = (
    *("#0072b2", "#d55e00", "#009e73", "#b85c94", "#8f7a00"),
    *("#4aa5dc", "#5d4fa3", "#878d96", "#f0a868"),
)
DIVERGING = (
    *("#1b4f91", "#3c78b4", "#72a3d0", "#a8c8e2", "#d7e5f0", "#f2f1ed"),
    *("#fae2c9", "#f6c08d", "#ec9650", "#d36d1e", "#a04a0a"),
)
"""Blue below the middle, orange above."""
SEQUENTIAL = (
    *("#f0f4f6", "#d8e6ec", "#b7d3de", "#8fbccd", "#64a0b8"),
    *("#41829e", "#296682", "#194b65", "#0c3048"),
)
_LIGHT = (TEXT, SOFT, AXIS, GRID, PAPER, *SERIES, *DIVERGING, *SEQUENTIAL)
_DARK = (
    *("#e8eaed", "#a3abb5", "#6d7681", "#2b3037", "#1c2025"),
    *("#4ba3dd", "#f0874a", "#35c295", "#d98bba", "#d6bf3a"),
    *("#8fd0f5", "#a396e6", "#99a1ab", "#f7cfa5"),
    *("#a9d0f5", "#6fabe0", "#4580b8", "#335f8a", "#2c4560", "#2b3037"),
    *("#54402c", "#80582e", "#b0722f", "#dd9440", "#ffc680"),
    *("#23282e", "#24394a", "#264c63", "#2b627e", "#387b99"),
    *("#5296b2", "#7bb3ca", "#abd0e0", "#dcedf4"),
)
DARK: Mapping[str, str] = dict(zip(_LIGHT, _DARK, strict=True))
"""From each colour of a picture to the one that a dark page shows in its place."""

GREY = 7
FIXED = {"linear": GREY, "eplb": 1, "greedy": 1}
"""Baselines have colours of their own; 0 is for what the picture is about."""
PART_SERIES = {
    "attention": 5,
    "gate": 6,
    "shared": 3,
    "dense": 4,
    "dispatch": 1,
    "compute": 0,
    "combine": 8,
    "other": 2,
    "waiting": GREY,
}
PARTS: dict[str, tuple[str, int]] = {
    part: (label, PART_SERIES[part]) for part, label in figures.PARTS.items()
}
"""Parts of a step in the order that they are drawn: name for readers, series."""


def series_of(names: Sequence[str], first: str | None = None) -> Mapping[str, int]:
    """A series number for each name; `first` gets 0, baselines theirs."""
    free = iter((0, 2, 3, 4, 5, 6) if first is None else (2, 3, 4, 5, 6))
    out: dict[str, int] = {}
    for name in names:
        if name == first:
            out[name] = 0
        elif name in FIXED:
            out[name] = FIXED[name]
        else:
            out[name] = next(free, GREY)
    return out
