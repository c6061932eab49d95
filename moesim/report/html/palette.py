"""The colour of each name: the same plan, part or cache has the same one in every chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

GREY = 7
FIXED = {"linear": GREY, "eplb": 1, "greedy": 1}
"""Baselines have colours of their own; 0 is for what the page is about."""
PARTS: dict[str, tuple[str, int]] = {
    "attention": ("attention", 5),
    "gate": ("gate", 6),
    "shared": ("shared experts", 3),
    "dense": ("dense layers", 4),
    "dispatch": ("dispatch", 1),
    "compute": ("routed experts", 0),
    "combine": ("combine", 8),
    "other": ("other transfers", 2),
    "waiting": ("waiting for the slowest", GREY),
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
