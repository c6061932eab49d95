"""New placements while serving, from the loads of the last steps.

The scheme of EPLB in serving engines (vLLM `EplbConfig`: window_size, step_interval, use_async;
SGLang `--eplb-rebalance-num-iterations`, and `--eplb-min-rebalancing-utilization-threshold`, which
leaves well balanced GPUs alone). Synchronous: serving stops for the plan and for the weights, layer
by layer. Asynchronous: both happen beside the steps, the weights compete with dispatch and combine
for links, and a layer changes over at the first step after all its weights have arrived.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from moesim.errors import InputError, MismatchError
from moesim.placement import Placement
from moesim.sim.engine import Engine, SpeedModel
from moesim.sim.event import Tally, run_step
from moesim.sim.migrate import Move, Mover, holdings, plan_moves
from moesim.sim.prepare import Models, one_batch
from moesim.sim.rearrange import LAYER_US, PLAN_US
from moesim.sim.result import SimResult
from moesim.sim.schedules.base import Schedule
from moesim.sim.steps import step_work
from moesim.sim.timeline import StepTimeline
from moesim.trace.batches import Batches
from moesim.trace.format import Trace
from moesim.trace.kernels import count_load
from moesim.types import Progress

Table = npt.NDArray[np.int32]
WindowPlanner = Callable[[npt.NDArray[np.float32], npt.NDArray[np.int64]], Placement]
"""From counts [W, L, E] of the window's steps and slots of each GPU [G] (0 for one that is down) to
a placement."""


@dataclass(frozen=True, slots=True)
class Rebalance:
    """When and how to place again; times in microseconds.

    every_steps: steps between two plans; window_steps: steps whose loads count. plan_us: computing
    a plan; layer_us: host work for each layer moved (see `rearrange`). record_us: what counting
    costs every step. threshold: no new plan where the window's mean balancedness is at least this.
    gb_per_s: rate at which a GPU receives weights that do not go over the network's links (through
    the hosts' memory, as gloo carries them); None: over the links, at their rates. through, source:
    the library whose measured `layer_us` and rate these are, and what they rest on, for the output.
    """

    every_steps: int
    window_steps: int = 100
    asynchronous: bool = False
    plan_us: float = PLAN_US
    layer_us: float = LAYER_US
    record_us: float = 0.0
    threshold: float = math.inf
    gb_per_s: float | None = None
    through: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("every_steps", "window_steps"):
            if not 1 <= getattr(self, name) <= 1 << 30:
                raise InputError(f"{name} is {getattr(self, name)}", "give at least 1")
        for name in ("plan_us", "layer_us", "record_us"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}", "give 0 or more")
        if self.gb_per_s is not None and not (math.isfinite(self.gb_per_s) and self.gb_per_s > 0):
            raise InputError(f"gb_per_s is {self.gb_per_s}", "give more than 0")
        if math.isnan(self.threshold):
            raise InputError("the balancedness threshold is not a number", "give 0 to 1")


@dataclass(slots=True, eq=False)
class Rebalancer:
    """The part of a run that places again: a window of loads, a plan under way, what it cost.

    `arrived` holds layers whose weights are all there: (layer, slots [G, S]), to be taken up by
    whoever runs the steps.
    """

    policy: Rebalance
    planner: WindowPlanner
    mover: Mover
    engine: Engine
    node_of_gpu: npt.NDArray[np.int64]
    window: deque[npt.NDArray[np.int64]] = field(default_factory=deque)
    arrived: list[tuple[int, Table]] = field(default_factory=list)
    moving: bool = False
    num_plans: int = 0
    num_skipped: int = 0
    num_abandoned: int = 0
    stall_us: float = 0.0
    bytes_from_gpus: float = 0.0
    bytes_from_host: float = 0.0
    _attempt: int = 0
    _sent: list[simpy.Event] = field(default_factory=list)

    def record(self, counts: npt.NDArray[np.int64]) -> None:
        """Count the loads [L, E] of a step that has ended."""
        self.window.append(counts)
        while len(self.window) > self.policy.window_steps:
            self.window.popleft()
        self.engine.wait(self.policy.record_us)
        self.stall_us += self.policy.record_us

    def wanted(self, capacity: npt.NDArray[np.int64]) -> Table:
        """Slots [L, G, S] for the loads of the window."""
        return slot_table(self.planner(np.array(self.window, np.float32), capacity))

    def due(self, balancedness: list[float]) -> bool:
        """Whether to place again now, by the balancedness of all steps so far."""
        recent = balancedness[-len(self.window) :]
        if self.moving or float(np.mean(recent)) >= self.policy.threshold:
            self.num_skipped += 1
            return False
        return True

    def begin(self, held: list[list[set[int]]], target: Table) -> None:
        """Move weights so that `target` [L, G, S] is held; synchronous ones are there on return."""
        self.num_plans += 1
        moves = plan_moves(held, target, self.node_of_gpu)
        from_gpus, from_host = self.mover.bytes(moves)
        self.bytes_from_gpus += from_gpus
        self.bytes_from_host += from_host
        by_layer = [[m for m in moves if m.layer == layer] for layer in range(len(target))]
        env, policy, attempt = self.engine.env, self.policy, self._attempt
        self.moving = True

        def work() -> Generator[Any, Any, None]:
            yield env.timeout(policy.plan_us)
            for layer, some in enumerate(by_layer):
                if attempt != self._attempt:
                    return
                if some:
                    yield env.timeout(policy.layer_us)
                    if attempt != self._attempt:
                        return
                    if policy.gb_per_s is None:
                        flows = self.mover.flows(some)
                        self._sent = [self.engine.network.send(flow) for flow in flows]
                        yield env.all_of(self._sent)
                    else:
                        yield env.timeout(self._received(some) / (policy.gb_per_s * 1e3))
                        if attempt != self._attempt:
                            return
                self.arrived.append((layer, target[layer]))
            self.moving = False

        process = env.process(work())
        if not policy.asynchronous:
            start = self.engine.now_us
            env.run(until=process)
            self.stall_us += self.engine.now_us - start

    def _received(self, moves: list[Move]) -> float:
        """Bytes that the busiest GPU gets."""
        count: dict[int, int] = {}
        for move in moves:
            count[move.target] = count.get(move.target, 0) + move.num_experts
        return max(count.values()) * self.mover.expert_bytes

    def abandon(self) -> None:
        """Drop a plan under way: layers that have arrived stay, weights on their way are lost."""
        if not self.moving:
            return
        self._attempt += 1
        self.engine.network.cancel(self._sent)
        self._sent = []
        self.moving = False
        self.num_abandoned += 1

    def figures(self, balancedness: list[float]) -> dict[str, Any]:
        """What new placements did and cost up to now."""
        return {
            "mode": "async" if self.policy.asynchronous else "sync",
            "through": self.policy.through,
            "source": self.policy.source,
            "every_steps": self.policy.every_steps,
            "num_plans": self.num_plans,
            "num_skipped": self.num_skipped,
            "num_abandoned": self.num_abandoned,
            "stall_us": self.stall_us,
            "stall_share": self.stall_us / max(self.engine.now_us, 1e-300),
            "bytes_from_gpus": self.bytes_from_gpus,
            "bytes_from_host": self.bytes_from_host,
            "balancedness_by_step": list(balancedness),
        }


@dataclass(slots=True, eq=False)
class RebalanceRun:
    """All state of a run that places again; `run` goes through the batches."""

    models: Models
    schedule: Schedule
    trace: Trace
    placement: Placement
    policy: Rebalance
    planner: WindowPlanner
    mover: Mover
    speed: SpeedModel | None = None
    timeline: StepTimeline | None = None
    engine: Engine = field(init=False)
    tally: Tally = field(init=False)
    slots: Table = field(init=False)

    def run(self, batches: Batches, progress: Progress | None = None) -> SimResult:
        """Serve every batch, placing again on the way.

        Raises MismatchError where the planner's placement has other slots.
        """
        self.engine = engine = Engine(
            self.models.links.num_links, speed=self.speed, record_links=self.timeline is not None
        )
        self.tally = tally = Tally(self.models, self.schedule.name)
        self.slots = slot_table(self.placement)
        node = np.asarray(self.models.cluster.node_of_gpu)
        anew = Rebalancer(self.policy, self.planner, self.mover, engine, node)
        capacity = (self.slots != -1).sum(axis=2).max(axis=0).astype(np.int64)
        for b in range(len(batches)):
            batch = one_batch(batches, b)
            for layer, row in anew.arrived:
                self.slots[layer] = row
            anew.arrived.clear()
            step = step_work(self.models, self.trace, batch, self._current(), self.schedule)
            run = run_step(engine, self.schedule, step.work)
            tally.add(run, step)
            anew.record(load_counts(self.trace, batch))
            if self.timeline is not None:
                self.timeline.add(run, b, engine.network)
            more = (b + 1) % self.policy.every_steps == 0 and b + 1 < len(batches)
            if more and anew.due(tally.balancedness):
                target = anew.wanted(capacity)
                if target.shape != self.slots.shape:
                    raise MismatchError(
                        f"the new placement has {target.shape[2]} slots per GPU,"
                        f" {self.slots.shape[2]} exist",
                        "plan for the slots that there are",
                    )
                anew.begin(holdings(self.slots), target)
            if progress is not None:
                progress(b + 1, len(batches))
        return tally.result(engine, {"rebalance": anew.figures(tally.balancedness)})

    def _current(self) -> Placement:
        return Placement(
            self.slots.reshape(len(self.slots), -1).copy(),
            self.placement.num_gpus,
            self.placement.num_nodes,
            self.placement.num_experts,
        )


def slot_table(placement: Placement) -> Table:
    """[L, G, S] slots of every GPU."""
    return placement.physical_to_logical.reshape(
        placement.num_layers, placement.num_gpus, -1
    ).copy()


def load_counts(trace: Trace, batch: Batches) -> npt.NDArray[np.int64]:
    """[L, E] tokens of each expert in one batch."""
    out = np.zeros((1, trace.num_layers, trace.num_experts), np.int64)
    count_load(
        np.asarray(trace.expert_ids[batch.token_idx]), np.zeros(len(batch.token_idx), np.int64), out
    )
    return out[0]
