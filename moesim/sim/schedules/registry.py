"""Schedules by the name that `--schedule` takes."""

from __future__ import annotations

from collections.abc import Callable

from moesim.errors import InputError, UnknownNameError
from moesim.sim.schedules.base import Schedule
from moesim.sim.schedules.sequential import Sequential

MAX_CHUNKS = 64

SCHEDULES: dict[str, tuple[str, Callable[[int], Schedule]]] = {
    "sequential": ("no overlap: dispatch, compute, combine", lambda _: Sequential()),
}
"""Name: (what it overlaps, maker from the number of chunks)."""

CHUNKED: tuple[str, ...] = ()
"""Schedules whose number of chunks is the user's to choose."""


def get_schedule(name: str, num_chunks: int = 2) -> Schedule:
    """The schedule called `name`; `num_chunks` matters to those of CHUNKED alone.

    Raises UnknownNameError, or InputError for a number of chunks out of range.
    """
    if name not in SCHEDULES:
        raise UnknownNameError("schedule", name, SCHEDULES)
    if not 1 <= num_chunks <= MAX_CHUNKS:
        raise InputError(f"{num_chunks} chunks", f"cut a step into 1 to {MAX_CHUNKS} chunks")
    return SCHEDULES[name][1](num_chunks)
