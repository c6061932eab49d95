"""The event simulation of steps, one after the other, through one placement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.placement import Placement
from moesim.sim.breakdown import breakdown
from moesim.sim.capacity import Drops
from moesim.sim.engine import Engine, Program, SpeedModel, StepRun
from moesim.sim.prepare import Models, Step, one_batch
from moesim.sim.result import SimResult
from moesim.sim.schedules.base import Schedule
from moesim.sim.steps import step_work
from moesim.sim.timeline import StepTimeline
from moesim.sim.work import StepWork
from moesim.trace.batches import Batches
from moesim.trace.format import Trace
from moesim.types import FloatArray, Progress


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
    drops: Drops = field(default_factory=Drops)
    last: npt.NDArray[np.int64] | None = None
    token_waiting_us: list[float] = field(default_factory=list)
    exchange_us: list[float] = field(default_factory=list)
    parts: int = 1

    def add(self, run: StepRun, step: Step) -> None:
        """Count a finished step."""
        work, routed = step.work, step.routed
        split = breakdown(run)
        self.parts = len(work.chunks)
        self.step_us.append(run.us)
        self.parts_us.append(split.us.mean(axis=0))
        self.waiting_us.append(float(split.waiting_us.mean()))
        self.overlapped_us.append(float(split.overlapped_us.mean()))
        self.gpu_busy.append(split.busy)
        self.tokens.append(work.num_tokens)
        load = routed.gpu_tokens(self.models.num_gpus).sum(axis=0)
        self.balancedness.append(float(np.nanmean(self.models.balancedness(load))))
        self.drops = self.drops + step.drops
        self._stragglers(run, work)

    def _stragglers(self, run: StepRun, work: StepWork) -> None:
        """Who finished its experts last, and how much of the waiting the tokens alone explain."""
        latest: dict[int, tuple[float, int]] = {}
        for task in run.program.tasks:
            if task.category == "compute":
                latest[task.layer] = max(latest.get(task.layer, (-1.0, 0)), (task.end_us, task.gpu))
        if self.last is None:
            self.last = np.zeros(work.num_gpus, np.int64)
        for _, gpu in latest.values():
            self.last[gpu] += 1
        wait = 0.0
        for chunk in work.chunks:
            own = chunk.expert_us[:, self.models.attention_gpus :]
            wait += float((own.max(axis=1, keepdims=True) - own).mean(axis=1).sum())
        self.token_waiting_us.append(wait)
        alone = (t.flow.latency_us + t.flow.alone_us for t in run.program.tasks if t.flow)
        self.exchange_us.append(sum(alone))

    def pools_figures(self) -> dict[str, Any]:
        """With attention and experts apart: share of the mean step that each pool computes, and
        that the exchange takes of each direction with nothing else on the network."""
        first, step = self.models.attention_gpus, np.array(self.step_us)
        busy = np.array(self.gpu_busy) * step[:, None] / step.sum()
        return {
            "attention_gpus": first,
            "expert_gpus": self.models.num_gpus - first,
            "parts": self.parts,
            "attention_busy": float(busy[:, :first].mean(axis=1).sum()),
            "experts_busy": float(busy[:, first:].mean(axis=1).sum()),
            "exchange_share": float(sum(self.exchange_us) / 2 / step.sum()),
        }

    def straggler_figures(self) -> dict[str, Any]:
        """Share of layers that each GPU was the last of, and mean waiting that uneven tokens cause
        at nominal speed, microseconds per step."""
        last = self.last if self.last is not None else np.zeros(self.models.num_gpus)
        return {
            "last_share": (last / max(1, int(last.sum()))).tolist(),
            "token_waiting_us": float(np.mean(self.token_waiting_us)),
        }

    def result(self, engine: Engine, extra: dict[str, Any] | None = None) -> SimResult:
        """All steps so far, with what the network carried up to now."""
        network = engine.network
        extra = {"stragglers": self.straggler_figures(), **(extra or {})}
        if self.models.attention_gpus:
            extra["pools"] = self.pools_figures()
        if self.models.drop is not None:
            extra["drops"] = self.drops.to_json()
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
            extra=extra,
        )


def run_event(
    models: Models,
    schedule: Schedule,
    trace: Trace,
    batches: Batches,
    placement: Placement,
    *,
    speed: SpeedModel | None = None,
    timeline: StepTimeline | None = None,
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
        step = step_work(models, trace, batch, placement, schedule)
        run = run_step(engine, schedule, step.work)
        tally.add(run, step)
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
