"""Schedules by the name that `--schedule` takes."""

from __future__ import annotations

from collections.abc import Callable

from moesim.errors import InputError, UnknownNameError
from moesim.sim.collectives.base import Exchange
from moesim.sim.schedules.base import Schedule
from moesim.sim.schedules.co_scheduled import CoScheduled
from moesim.sim.schedules.context_coherent import ContextCoherent
from moesim.sim.schedules.pipelined import Pipelined
from moesim.sim.schedules.sequential import Sequential
from moesim.sim.schedules.shared_overlap import SharedOverlap
from moesim.sim.schedules.two_batch import TwoBatch

MAX_CHUNKS = 64

SCHEDULES: dict[str, tuple[str, Callable[[int], Schedule]]] = {
    "sequential": ("no overlap: dispatch, compute, combine", lambda _: Sequential()),
    "shared-overlap": ("shared experts under dispatch", lambda _: SharedOverlap()),
    "pipelined": ("chunks of a layer (Tutel, PipeMoE)", Pipelined),
    "co-scheduled": ("chunks, and NVLink beside the network (FSMoE)", CoScheduled),
    "two-batch": ("two halves of the step (DeepSeek, SGLang)", lambda _: TwoBatch()),
    "context-coherent": ("tokens stay with their expert (ExFlow)", lambda _: ContextCoherent()),
}
"""Name: (what it overlaps, maker from the number of chunks)."""

CHUNKED = ("pipelined", "co-scheduled")
"""Schedules whose number of chunks is the user's to choose."""


def check_exchange(schedule: Schedule, exchange: Exchange) -> None:
    """Raise InputError where `schedule` cannot make anything of `exchange`."""
    if schedule.name == "co-scheduled" and exchange.name == "flat":
        raise InputError(
            "the co-scheduled schedule over an exchange of one stage",
            "use `all_to_all` bi-level or two-level, on several nodes",
        )


def get_schedule(name: str, num_chunks: int = 2) -> Schedule:
    """The schedule called `name`; `num_chunks` matters to those of CHUNKED alone.

    Raises UnknownNameError, or InputError for a number of chunks out of range.
    """
    if name not in SCHEDULES:
        raise UnknownNameError("schedule", name, SCHEDULES)
    if not 1 <= num_chunks <= MAX_CHUNKS:
        raise InputError(f"{num_chunks} chunks", f"cut a step into 1 to {MAX_CHUNKS} chunks")
    return SCHEDULES[name][1](num_chunks)
