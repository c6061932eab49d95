"""The event simulation of steps, one after the other, through one placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.routing import Routed
from moesim.metrics import balancedness
from moesim.plan import Placement
from moesim.sim.breakdown import breakdown
from moesim.sim.engine import Engine, Program, SpeedModel, StepRun
from moesim.sim.prepare import Models, one_batch, step_work
from moesim.sim.result import SimResult
from moesim.sim.schedules.base import Schedule
from moesim.sim.timeline import Timeline
from moesim.sim.work import StepWork
from moesim.trace.batches import Batches
from moesim.trace.format import Trace

FloatArray = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(slots=True, eq=False)
class Tally:
    """Figures of steps as they end."""

    models: Models
    schedule: str
    step_us: list[float] = field(default_factory=list)
    parts_us: list[FloatArray] = field(default_factory=list)
    waiting_us: list[float] = field(default_factory=list)
    overlapped_us: list[float] = field(default_factory=list)
    gpu_busy: list[FloatArray] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    balancedness: list[float] = field(default_factory=list)
    num_events: int = 0

    def add(self, run: StepRun, work: StepWork, routed: Routed) -> None:
        """Count a finished step; `routed` holds its chunks as batches."""
        split = breakdown(run)
        self.step_us.append(run.us)
        self.parts_us.append(split.us.mean(axis=0))
        self.waiting_us.append(float(split.waiting_us.mean()))
        self.overlapped_us.append(float(split.overlapped_us.mean()))
        self.gpu_busy.append(split.busy)
        self.tokens.append(work.num_tokens)
        load = routed.gpu_tokens(self.models.num_gpus).sum(axis=0)
        self.balancedness.append(float(balancedness(load, self.models.step.speed).mean()))

    def result(self, engine: Engine, extra: dict[str, Any] | None = None) -> SimResult:
        """All steps so far, with what the network carried up to now."""
        network = engine.network
        return SimResult(
            fidelity="event",
            schedule=self.schedule,
            exchange=self.models.exchange_name,
            step_us=np.array(self.step_us),
            parts_us=np.array(self.parts_us),
            waiting_us=np.array(self.waiting_us),
            overlapped_us=np.array(self.overlapped_us),
            gpu_busy=np.array(self.gpu_busy),
            link_bytes=network.bytes.copy(),
            link_busy_us=network.busy_us.copy(),
            tokens=np.array(self.tokens, np.int64),
            balancedness=np.array(self.balancedness),
            elapsed_us=engine.now_us,
            num_events=engine.num_events + network.num_solved,
            extra=extra or {},
        )


def run_event(
    models: Models,
    schedule: Schedule,
    trace: Trace,
    batches: Batches,
    placement: Placement,
    *,
    speed: SpeedModel | None = None,
    timeline: Timeline | None = None,
    progress: Progress | None = None,
) -> SimResult:
    """Run every batch of `batches` as a step of `schedule`.

    speed: GPU speeds on top of the cluster's own, which may vary in time. timeline: filled with
    the first steps that it wants.
    """
    engine = Engine(models.links.num_links, speed=speed, record_links=timeline is not None)
    tally = Tally(models, schedule.name)
    for b in range(len(batches)):
        batch = one_batch(batches, b)
        work, routed = step_work(models, trace, batch, placement, schedule.num_chunks)
        run = run_step(engine, schedule, work)
        tally.add(run, work, routed)
        if timeline is not None:
            timeline.add(run, b, engine.network)
        if progress is not None:
            progress(b + 1, len(batches))
    return tally.result(engine)


def run_step(
    engine: Engine, schedule: Schedule, work: StepWork, until_us: float | None = None
) -> StepRun:
    """One step of `schedule` from now on; see `Engine.run`."""
    program = Program(work.num_gpus)
    schedule.build(program, work)
    return engine.run(program, until_us)
