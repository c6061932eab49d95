"""Placing experts anew while serving, from the loads of the last steps.

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

from moesim.errors import InputError, MismatchError
from moesim.plan import Placement
from moesim.sim.engine import Engine, SpeedModel
from moesim.sim.event import Progress, Tally, run_step
from moesim.sim.migrate import Mover, holdings, plan_moves
from moesim.sim.prepare import Models, one_batch, step_work
from moesim.sim.result import SimResult
from moesim.sim.schedules.base import Schedule
from moesim.sim.timeline import Timeline
from moesim.trace.batches import Batches
from moesim.trace.format import Trace
from moesim.trace.kernels import count_load

Table = npt.NDArray[np.int32]
Planner = Callable[[npt.NDArray[np.float32]], Placement]
"""From counts [W, L, E] of the window's steps to a placement with the same slots."""


@dataclass(frozen=True, slots=True)
class Rebalance:
    """When and how to place anew; times in microseconds.

    every_steps: steps between two plans; window_steps: steps whose loads count. plan_us: computing
    a plan (vLLM pull request 28369 measured 80 ms before and 10 ms after its rewrite on DeepSeek-
    V2-Lite with 8 GPUs). layer_us: host work for each layer moved. record_us: what counting costs
    every step. threshold: no new plan where the window's mean balancedness is at least this.
    """

    every_steps: int
    window_steps: int = 100
    asynchronous: bool = False
    plan_us: float = 10_000.0
    layer_us: float = 1_500.0
    record_us: float = 0.0
    threshold: float = math.inf

    def __post_init__(self) -> None:
        for name in ("every_steps", "window_steps"):
            if not 1 <= getattr(self, name) <= 1 << 30:
                raise InputError(f"{name} is {getattr(self, name)}", "give at least 1")
        for name in ("plan_us", "layer_us", "record_us"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}", "give 0 or more")
        if math.isnan(self.threshold):
            raise InputError("the balancedness threshold is not a number", "give 0 to 1")


@dataclass(slots=True, eq=False)
class RebalanceRun:
    """All state of a run that places anew; `run` goes through the batches."""

    models: Models
    schedule: Schedule
    trace: Trace
    placement: Placement
    policy: Rebalance
    planner: Planner
    mover: Mover
    speed: SpeedModel | None = None
    timeline: Timeline | None = None
    num_plans: int = 0
    num_skipped: int = 0
    stall_us: float = 0.0
    bytes_from_gpus: float = 0.0
    bytes_from_host: float = 0.0
    engine: Engine = field(init=False)
    tally: Tally = field(init=False)
    slots: Table = field(init=False)
    arrived: list[tuple[int, Table]] = field(init=False)
    moving: bool = field(init=False)

    def run(self, batches: Batches, progress: Progress | None = None) -> SimResult:
        """Serve every batch, placing anew on the way.

        Raises MismatchError where the planner's placement has other slots.
        """
        self.engine = engine = Engine(
            self.models.links.num_links, speed=self.speed, record_links=self.timeline is not None
        )
        self.tally = Tally(self.models, self.schedule.name)
        self.slots = _table(self.placement)
        self.arrived, self.moving = [], False
        window: deque[npt.NDArray[np.int64]] = deque(maxlen=self.policy.window_steps)
        for b in range(len(batches)):
            batch = one_batch(batches, b)
            self._change_over()
            step = step_work(self.models, self.trace, batch, self._current(), self.schedule)
            run = run_step(engine, self.schedule, step.work)
            self.tally.add(run, step)
            self._stall(self.policy.record_us)
            window.append(_counts(self.trace, batch))
            if self.timeline is not None:
                self.timeline.add(run, b, engine.network)
            if (b + 1) % self.policy.every_steps == 0 and b + 1 < len(batches):
                self._rebalance(np.array(window, np.float32))
            if progress is not None:
                progress(b + 1, len(batches))
        extra = {
            "rebalance": {
                "mode": "async" if self.policy.asynchronous else "sync",
                "every_steps": self.policy.every_steps,
                "num_plans": self.num_plans,
                "num_skipped": self.num_skipped,
                "stall_us": self.stall_us,
                "stall_share": self.stall_us / max(engine.now_us, 1e-300),
                "bytes_from_gpus": self.bytes_from_gpus,
                "bytes_from_host": self.bytes_from_host,
                "balancedness_by_step": list(self.tally.balancedness),
            }
        }
        return self.tally.result(engine, extra)

    def _rebalance(self, counts: npt.NDArray[np.float32]) -> None:
        recent = self.tally.balancedness[-len(counts) :]
        if self.moving or float(np.mean(recent)) >= self.policy.threshold:
            self.num_skipped += 1
            return
        target = _table(self.planner(counts))
        if target.shape != self.slots.shape:
            raise MismatchError(
                f"the new placement has {target.shape[2]} slots a GPU, {self.slots.shape[2]} exist",
                "plan for the slots that there are",
            )
        self.num_plans += 1
        moves = plan_moves(
            holdings(self.slots), target, np.asarray(self.models.cluster.node_of_gpu)
        )
        from_gpus, from_host = self.mover.bytes(moves)
        self.bytes_from_gpus += from_gpus
        self.bytes_from_host += from_host
        by_layer = [[m for m in moves if m.layer == layer] for layer in range(len(target))]
        env, policy = self.engine.env, self.policy
        if policy.asynchronous:
            self.moving = True

        def work() -> Generator[Any, Any, None]:
            yield env.timeout(policy.plan_us)
            for layer, some in enumerate(by_layer):
                if some:
                    yield env.timeout(policy.layer_us)
                    sent = [self.engine.network.send(flow) for flow in self.mover.flows(some)]
                    yield env.all_of(sent)
                self.arrived.append((layer, target[layer]))
            self.moving = False

        process = env.process(work())
        if not policy.asynchronous:
            start = self.engine.now_us
            env.run(until=process)
            self.stall_us += self.engine.now_us - start

    def _change_over(self) -> None:
        for layer, row in self.arrived:
            self.slots[layer] = row
        self.arrived.clear()

    def _current(self) -> Placement:
        return Placement(
            self.slots.reshape(len(self.slots), -1).copy(),
            self.placement.num_gpus,
            self.placement.num_nodes,
            self.placement.num_experts,
        )

    def _stall(self, us: float) -> None:
        self.engine.wait(us)
        self.stall_us += us


def _table(placement: Placement) -> Table:
    return placement.physical_to_logical.reshape(
        placement.num_layers, placement.num_gpus, -1
    ).copy()


def _counts(trace: Trace, batch: Batches) -> npt.NDArray[np.int64]:
    """[L, E] tokens of each expert in one batch."""
    out = np.zeros((1, trace.num_layers, trace.num_experts), np.int64)
    count_load(
        np.asarray(trace.expert_ids[batch.token_idx]), np.zeros(len(batch.token_idx), np.int64), out
    )
    return out[0]
