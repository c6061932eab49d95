"""Expert-cache schedules: which copy is issued when, which step waits for it, and what it costs.

A step is one token in one layer: step s is token s // L, layer s % L. An item is an expert of a
layer: layer * E + expert. A schedule is all that the replay needs, so any planner can write one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.files import atomic_path
from moesim.trace.npyio import read_archive
from moesim.types import FloatArray, IntArray

FORMAT = "moesim-cache-schedule"
_ARRAYS = ("experts", "slots", "issue", "need", "item", "slot", "initial")


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """A cache's life over S steps.

    experts, slots: [S, K] logical experts of each step and the slot each is read from, -1 where a
    token chose fewer. issue, need, item, slot: [F] copies in the order they are issued: at the
    start of step `issue` the item is copied into the slot, and step `need` waits for it.
    initial: [num_slots] items in place before the first step, -1 where empty.
    slots_per_layer: layer l owns slots l * slots_per_layer and up; 0 where all share one pool.

    Raises FormatError when a step reads a slot that does not hold its expert, or a copy overwrites
    a slot that is read before its step.
    """

    label: str
    num_layers: int
    num_experts: int
    slots_per_layer: int
    experts: IntArray
    slots: IntArray
    issue: IntArray
    need: IntArray
    item: IntArray
    slot: IntArray
    initial: IntArray

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_steps(self) -> int:
        return len(self.experts)

    @property
    def num_tokens(self) -> int:
        return self.num_steps // self.num_layers

    @property
    def num_slots(self) -> int:
        return len(self.initial)

    @property
    def copies_per_token(self) -> IntArray:
        """[T]: copies that each token's steps wait for."""
        return np.bincount(self.need // self.num_layers, minlength=self.num_tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule as `.npz`, whole or not at all."""
        meta = {
            "format": FORMAT,
            "version": 1,
            "label": self.label,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "slots_per_layer": self.slots_per_layer,
        }
        with atomic_path(path) as temporary, temporary.open("wb") as out:
            arrays = {name: getattr(self, name) for name in _ARRAYS}
            np.savez_compressed(out, allow_pickle=False, meta=np.array(json.dumps(meta)), **arrays)


def load_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read a schedule. Raises InputError (no such file) or FormatError."""
    if not Path(path).exists():
        raise InputError(f"no schedule at {path}", "give an .npz that a planner wrote")
    try:
        file = read_archive(Path(path), (*_ARRAYS, "meta"))
        meta = json.loads(str(file["meta"]))
        arrays = {name: file[name] for name in _ARRAYS}
    except FormatError as error:
        raise FormatError(error.cause, _REMEDY) from None
    except (ValueError, KeyError) as error:
        raise FormatError(f"{path}: not a readable schedule ({error})", _REMEDY) from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("version") != 1:
        raise FormatError(f'{path}: meta does not say format "{FORMAT}", version 1', _REMEDY)
    sizes: dict[str, int] = {}
    for name, low in (("num_layers", 1), ("num_experts", 1), ("slots_per_layer", 0)):
        value = meta.get(name)
        if type(value) is not int or value < low:
            raise FormatError(f"{path}: meta.{name} must be at least {low}", _REMEDY)
        sizes[name] = value
    if any(a.dtype.kind != "i" for a in arrays.values()):
        raise FormatError(f"{path}: arrays must hold signed integers", _REMEDY)
    whole = {name: a.astype(np.int64) for name, a in arrays.items()}
    return Schedule(label=str(meta.get("label", "")), **sizes, **whole)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What a schedule is made of, in microseconds.

    copy_us: one expert's copy. step_us: the GPU's time for one step. issue_us, fetch_issue_us: the
    host's time to enqueue a step and a copy; 0 for a host that is never waited for. hand_over_us:
    what a copy between two kernels takes longer than the copy itself, half before it, half after.
    """

    copy_us: float
    step_us: float
    issue_us: float = 0.0
    fetch_issue_us: float = 0.0
    hand_over_us: float = 0.0


def predict_tokens_us(schedule: Schedule, costs: StepCosts, other_us: float = 0.0) -> FloatArray:
    """[T] time of each token with one copy engine, one compute stream and one host.

    Copies run one after another, not before the step before the one that issues them has ended; a
    step starts when the step before it has ended and the copies it needs are there, and is followed
    by `other_us` of work that needs no expert (attention). Neither starts before the host has
    enqueued it. The host never waits, so while the GPU waits for copies it gets ahead.
    """
    begin = np.searchsorted(schedule.issue, np.arange(schedule.num_steps + 1))
    ready = np.zeros(schedule.num_steps)
    ends = np.zeros(schedule.num_steps)
    half = costs.hand_over_us / 2
    now = engine_free = host = 0.0
    for step in range(schedule.num_steps):
        for f in range(begin[step], begin[step + 1]):
            host += costs.fetch_issue_us
            engine_free = max(engine_free, now + half, host) + costs.copy_us
            target = schedule.need[f]
            ready[target] = max(ready[target], engine_free + half)
        host += costs.issue_us
        now = max(now, ready[step], host) + costs.step_us + other_us
        ends[step] = now
    return np.diff(ends[schedule.num_layers - 1 :: schedule.num_layers], prepend=0.0)


_REMEDY = "write the schedule again; moesim.replay.schedule describes its arrays"


def _check(schedule: Schedule) -> None:
    steps, slots = schedule.num_steps, schedule.num_slots
    copies = (schedule.issue, schedule.need, schedule.item, schedule.slot)
    if schedule.experts.ndim != 2 or schedule.experts.shape != schedule.slots.shape or not steps:
        raise FormatError("schedule: experts and slots must both be [steps, k]", _REMEDY)
    if steps % schedule.num_layers:
        raise FormatError("schedule: steps are not whole tokens", _REMEDY)
    if len({c.shape for c in copies}) > 1 or schedule.issue.ndim != 1:
        raise FormatError("schedule: issue, need, item and slot must be equally long", _REMEDY)
    num_items = schedule.num_layers * schedule.num_experts
    limits = (
        ("experts", schedule.experts, -1, schedule.num_experts),
        ("slots", schedule.slots, -1, slots),
        ("issue", schedule.issue, 0, steps),
        ("need", schedule.need, 0, steps),
        ("item", schedule.item, 0, num_items),
        ("slot", schedule.slot, 0, slots),
        ("initial", schedule.initial, -1, num_items),
    )
    for name, array, low, high in limits:
        if array.size and (array.min() < low or array.max() >= high):
            raise FormatError(f"schedule: {name} goes outside {low}..{high - 1}", _REMEDY)
    if (np.diff(schedule.issue) < 0).any() or (schedule.issue > schedule.need).any():
        raise FormatError("schedule: copies must be in order and issued before needed", _REMEDY)
    content, ready = schedule.initial.copy(), np.zeros(slots, np.int64)
    begin = np.searchsorted(schedule.issue, np.arange(steps + 1))
    for step in range(steps):
        for f in range(begin[step], begin[step + 1]):
            content[schedule.slot[f]] = schedule.item[f]
            ready[schedule.slot[f]] = schedule.need[f]
        used = schedule.experts[step] >= 0
        where = schedule.slots[step][used]
        want = step % schedule.num_layers * schedule.num_experts + schedule.experts[step][used]
        if (where < 0).any() or (content[where] != want).any() or (ready[where] > step).any():
            raise FormatError(f"schedule: step {step} reads a slot without its expert", _REMEDY)
