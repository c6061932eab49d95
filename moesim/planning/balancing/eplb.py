"""EPLB while serving: a new placement every so many steps, from the loads of a window of them.

The scheme of vLLM (`EPLBConfig`: window_size 1000, step_interval 3000, use_async true since 0.24)
and of SGLang (`--eplb-rebalance-num-iterations` 1000, `--eplb-rebalance-layers-per-chunk`,
`--eplb-min-rebalancing-utilization-threshold`). Synchronous: serving stops for the plan and, chunk
after chunk of layers in consecutive steps, for the weights. Asynchronous: both happen beside the
steps, and a layer changes over at the first step after its weights have arrived.

Ours is the closed form of the asynchronous moves: while weights move, dispatch and combine have
half of the busiest link, so W microseconds of weights delay steps by W x their share of the time.
Taken from the MoE time alone; attention, in which links are idle, would hide more. Ignored: what
recording loads costs, and how a service starts: it has run for long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf

import numpy as np

from moesim.metrics import balancedness, gpu_loads
from moesim.placement import Placement
from moesim.planning.balancing.bench import Bench, Moves, Outcome, Table
from moesim.sim.rebalance import slot_table
from moesim.solvers.methods.eplb import rebalance_experts
from moesim.solvers.repair import separate_replicas
from moesim.types import Array

Target = Callable[[Bench, Array, Table, int], Table]
"""From loads [W, L, E] of the window, slots held [L, G, S] and the step to the slots wanted."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """every, window: steps. threshold: no new plan where the window's mean balancedness is at least
    this. chunk: layers that move in one step, 0 for all; synchronous only. delay: beside the steps,
    the first layer changes so many steps after the plan's last load, then one in every step, which
    waits for its weights (vllm-ascend); None: each as soon as its weights are there."""

    every: int
    window: int
    asynchronous: bool = False
    threshold: float = inf
    chunk: int = 0
    delay: int | None = None


@dataclass(frozen=True, slots=True)
class Eplb:
    """EPLB with `redundant` slots, hierarchical where `grouped`, else global."""

    name: str
    about: str
    rhythm: Rhythm
    redundant: int = 0
    grouped: bool = False
    enable: str = ""

    def run(self, bench: Bench) -> Outcome:
        return periodic(bench, self.rhythm, self.redundant, self._target, self.enable)

    def _target(self, bench: Bench, seen: Array, held: Table, step: int) -> Table:
        load = seen.mean(axis=0, dtype=np.float64)
        groups, nodes = bench.model.n_group, bench.cluster.num_nodes
        if not self.grouped:
            groups = nodes = 1
        slots = held.shape[1] * held.shape[2]
        table = rebalance_experts(load, slots, groups, nodes, bench.num_gpus).reshape(held.shape)
        separate_replicas(table, load)
        return table


def periodic(
    bench: Bench,
    rhythm: Rhythm,
    redundant: int,
    target: Target,
    enable: str,
    start: Placement | None = None,
) -> Outcome:
    """Serve the course with a new placement by `target` in the rhythm, in the steady state: the log
    comes round again and again, so that the course begins with what was planned at its end, and
    costs are those of as many plans as intervals fit. start: what was there before the first plan
    (what is in use)."""
    course = bench.course
    if start is None:
        start = bench.begin(redundant)
    first = bench.price([(0, start)])
    step_us = float(first.step_us.mean())
    links = float((first.parts_us["dispatch"] + first.parts_us["combine"]).mean()) / step_us
    held, track, busy_until = slot_table(start), [(0, start)], 0
    before, during = (_Clock(bench, rhythm, step_us, links) for _ in range(2))
    for step in range(0, course.num_steps, rhythm.every):
        clock = during if step else before
        seen = course.seen(step or course.num_steps, rhythm.window)
        even = rhythm.threshold < inf and _balance(bench, seen, track[-1][1]) >= rhythm.threshold
        if step < busy_until or even:
            clock.skipped += 1
            continue
        wanted = target(bench, seen, held, step or course.num_steps)
        changes = clock.changes(step, bench.moving(held, wanted))
        for when, layers in changes:
            held = held.copy()
            held[layers] = wanted[layers]
            if step:
                track.append((when, _placement(start, held)))
                busy_until = when
        if not step:
            track = [(0, _placement(start, held))]
    if not during.plans + during.skipped:
        during = before
    rounds = course.num_steps / rhythm.every / (during.plans + during.skipped)
    return Outcome(
        bench.price([entry for entry in track if entry[0] < course.num_steps]),
        during.stall_us * rounds,
        during.slowed_us * rounds,
        during.plans * rounds,
        during.skipped * rounds,
        during.moved * rounds,
        during.moved * rounds * bench.expert_bytes,
        redundant / bench.num_gpus,
        enable=enable,
    )


class _Clock:
    """When layers change over, and what that costs. links: share of a step that uses them."""

    def __init__(self, bench: Bench, rhythm: Rhythm, step_us: float, links: float) -> None:
        costs = bench.costs
        self.plan_us = costs.plan_us
        self.move = costs.beside if rhythm.asynchronous else costs.stopped
        self.rhythm, self.step_us, self.links = rhythm, step_us, links
        self.stall_us = self.slowed_us = 0.0
        self.plans = self.skipped = self.moved = 0

    def changes(self, step: int, moves: Moves) -> list[tuple[int, slice]]:
        """(first step, layers) of the changes that a plan at `step` leads to, ascending."""
        self.plans += 1
        self.moved += int(moves.experts.sum())
        return self._beside(step, moves) if self.rhythm.asynchronous else self._stopped(step, moves)

    def _stopped(self, step: int, moves: Moves) -> list[tuple[int, slice]]:
        layers = len(moves.experts)
        size = self.rhythm.chunk or layers
        out = []
        self.stall_us += self.plan_us
        for i, first in enumerate(range(0, layers, size)):
            some = slice(first, min(first + size, layers))
            changed = int((moves.experts[some] > 0).sum())
            self.stall_us += changed * self.move.layer_us + moves.us(self.move, some)
            out.append((step + i, some))
        return out

    def _beside(self, step: int, moves: Moves) -> list[tuple[int, slice]]:
        at, out, delay = self.plan_us, [], self.rhythm.delay
        for layer in np.flatnonzero(moves.experts).tolist():
            some = slice(layer, layer + 1)
            weights = moves.us(self.move, some)
            slowed, alone = weights * self.links, weights * (1.0 + self.links)
            at += self.move.layer_us + alone
            when = step + ceil(at / self.step_us)
            if delay is not None:
                when = step + delay + layer
                slowed += max(0.0, alone - self.step_us - slowed)
            self.slowed_us += slowed
            out.append((when, some))
        return out


def _balance(bench: Bench, seen: Array, placement: Placement) -> float:
    return float(np.nanmean(balancedness(gpu_loads(seen, placement), bench.step.speed)))


def _placement(like: Placement, held: Table) -> Placement:
    return Placement(
        held.reshape(len(held), -1).copy(), like.num_gpus, like.num_nodes, like.num_experts
    )
