"""Faults: GPUs, nodes and links that fail at a time or at a rate, and come back."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim.choices import OnLoss as OnLoss
from moesim.errors import InputError, UnknownNameError
from moesim.numerals import is_index, number
from moesim.placement import EMPTY
from moesim.types import stream

if TYPE_CHECKING:
    from moesim.cluster import Cluster

Table = npt.NDArray[np.int32]
ON_LOSS: dict[str, str] = {
    "fail": "a lost expert ends the run (verdict no)",
    "wait": "serving stops until the GPU is back",
    "reload": "lost experts are loaded from host memory into spare slots of other GPUs",
    "replan": "the solver places all experts again on the GPUs that are left",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """GPUs that are down, or links that have `room` of their rate left, from at_us to until_us."""

    name: str
    at_us: float
    until_us: float = math.inf
    gpus: tuple[int, ...] = ()
    links: tuple[int, ...] = ()
    room: float = 0.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """What happens after a GPU is lost; all times in microseconds and assumed, not measured.

    on_loss: for experts with no replica left, see ON_LOSS. detect_us: until the others notice
    (nothing is served). restart_us: to form the group again, when a GPU leaves and when it returns.
    plan_us: computing time of a new plan. spare_slots: experts a layer that a GPU can hold beyond
    its own slots.
    """

    on_loss: OnLoss = "reload"
    detect_us: float = 100_000.0
    restart_us: float = 1_000_000.0
    plan_us: float = 100_000.0
    spare_slots: int = 1 << 20

    def __post_init__(self) -> None:
        if self.on_loss not in ON_LOSS:
            raise UnknownNameError("answer to a lost expert", self.on_loss, ON_LOSS)
        for name in ("detect_us", "restart_us", "plan_us", "spare_slots"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}", "give 0 or more")


class FaultClock:
    """Faults in order of time: those given, and GPU failures at a rate.

    mtbf_us: mean time between failures of one GPU, exponential, counted from its last return;
    repair_us: mean time until it is back, exponential. Seeded by GPU, so that more GPUs do not
    change the fate of the first ones.
    """

    def __init__(
        self,
        faults: Sequence[Fault] = (),
        *,
        num_gpus: int = 0,
        mtbf_us: float = math.inf,
        repair_us: float = math.inf,
        seed: int = 0,
    ) -> None:
        for value, name in ((mtbf_us, "mean time between failures"), (repair_us, "repair time")):
            if not value > 0:
                raise InputError(f"{name} {value}", "give a time above 0")
        self._mtbf_us, self._repair_us = mtbf_us, repair_us
        self._rng = [stream(seed, 0xFA, g) for g in range(num_gpus)]
        self._heap = [(f.at_us, i, f) for i, f in enumerate(faults)]
        heapq.heapify(self._heap)
        self._count = len(self._heap)
        if math.isfinite(mtbf_us):
            for gpu in range(num_gpus):
                self._schedule(gpu, 0.0)

    @property
    def next_us(self) -> float:
        """Time of the next fault, infinite where there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def next_for(self, down: Collection[int]) -> float:
        """Time of the next fault that concerns a GPU not in `down`."""
        times = (at for at, _, fault in self._heap if not set(fault.gpus) <= set(down))
        return min(times, default=math.inf)

    def pop(self) -> Fault:
        """The next fault; a random one schedules its successor."""
        _, order, fault = heapq.heappop(self._heap)
        if order < 0 and math.isfinite(fault.until_us):
            self._schedule(fault.gpus[0], fault.until_us)
        return fault

    def _schedule(self, gpu: int, since_us: float) -> None:
        rng = self._rng[gpu]
        at = since_us + float(rng.exponential(self._mtbf_us))
        until = math.inf
        if math.isfinite(self._repair_us):
            until = at + float(rng.exponential(self._repair_us))
        self._count += 1
        fault = Fault(f"gpu:{gpu}", at, until, gpus=(gpu,))
        heapq.heappush(self._heap, (at, -self._count, fault))


_FORM = re.compile(
    r"(?P<kind>gpu|node|link):(?P<what>[^=@]+?)(=(?P<room>[^@]+))?@(?P<at>[^-]+)(-(?P<until>.+))?"
)


def parse_fault(text: str, cluster: Cluster) -> Fault:
    """`gpu:3@50-200` (GPU 3 down from 50 to 200 ms), `node:1@50` (for good), or
    `link:gpu:3->nvswitch:0=0.5@50-200` (half its rate; 0 or no `=`: down). Raises InputError."""
    remedy = "write gpu:3@50-200, node:1@50 or link:NAME=0.5@50-200, times in ms"
    match = _FORM.fullmatch(text.strip())
    if match is None or (match["room"] is not None and match["kind"] != "link"):
        raise InputError(f"fault {text!r:.60}", remedy)
    try:
        at = number(match["at"]) * 1e3
        until = number(match["until"]) * 1e3 if match["until"] else math.inf
        room = number(match["room"]) if match["room"] else 0.0
    except ValueError:
        raise InputError(f"fault {text!r:.60}: not a number", remedy) from None
    if not (math.isfinite(at) and 0 <= at < until and 0 <= room <= 1):
        raise InputError(f"fault {text!r:.60}: out of range", remedy)
    name = f"{match['kind']}:{match['what']}"
    if match["kind"] == "link":
        names = cluster.routes().link_name
        if match["what"] not in names:
            raise UnknownNameError("link", match["what"], names)
        return Fault(name, at, until, links=(names.index(match["what"]),), room=room)
    count = cluster.num_gpus if match["kind"] == "gpu" else cluster.num_nodes
    if not is_index(match["what"]) or int(match["what"]) >= count:
        raise InputError(
            f"fault {text!r:.60}: no such {match['kind']}", f"they are 0 to {count - 1}"
        )
    index = int(match["what"])
    gpus: tuple[int, ...] = (index,)
    if match["kind"] == "node":
        gpus = tuple(np.flatnonzero(cluster.node_of_gpu == index).tolist())
    return Fault(name, at, until, gpus=gpus)


def without_gpus(table: Table, dead: Sequence[int]) -> tuple[Table, list[tuple[int, int]]]:
    """Slots [L, G, S] with those of `dead` GPUs empty, and the (layer, expert) that none holds."""
    left = table.copy()
    left[:, list(dead)] = EMPTY
    lost = []
    for layer in range(table.shape[0]):
        before, after = set(table[layer].ravel().tolist()), set(left[layer].ravel().tolist())
        lost += [(layer, expert) for expert in sorted(before - after - {EMPTY})]
    return left, lost


def reloaded(
    left: Table, lost: Sequence[tuple[int, int]], dead: Sequence[int], limit: int
) -> Table | None:
    """`left` with every lost expert in a slot of the GPU that holds fewest in that layer (the
    lowest number of equals), at most `limit` a GPU; None where there is no room."""
    num_layers, num_gpus, size = left.shape
    alive = [g for g in range(num_gpus) if g not in set(dead)]
    rows = [[[e for e in row if e != EMPTY] for row in layer] for layer in left.tolist()]
    for layer, expert in lost:
        options = [g for g in alive if len(rows[layer][g]) < limit]
        if not options:
            return None
        rows[layer][min(options, key=lambda g: (len(rows[layer][g]), g))].append(expert)
    width = max(size, max(len(row) for layer in rows for row in layer))
    out = np.full((num_layers, num_gpus, width), EMPTY, np.int32)
    for layer in range(num_layers):
        for gpu in range(num_gpus):
            out[layer, gpu, : len(rows[layer][gpu])] = rows[layer][gpu]
    return out
