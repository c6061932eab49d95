"""Tasks on GPU streams and on the network, run by SimPy.

A step is a *program*: tasks in the order in which a host would launch them. A task runs on one
stream of one GPU, or is a collective on the communication streams of all GPUs. As with CUDA
streams, the tasks of one stream run one after the other in launch order, and a task also waits for
those named in `after`. Collectives start when all their GPUs have reached them.

Simultaneous events: SimPy fires events of one instant in the order in which they were scheduled,
tasks become ready in launch order, and the network is solved once after all else at that instant,
so that a run is a function of its inputs alone (INV-6). docs/simulator.md spells this out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import simpy

from moesim.sim.network import Flow, Network, on_event

COMPUTE, COMM, BACK = "compute", "comm", "comm-back"
INTRA_OUT, INTRA_BACK = "comm-intra-dispatch", "comm-intra-combine"
"""Streams of a GPU: kernels, collectives, those from experts back (two pools), and (co-scheduling)
collectives within the node."""

COMPUTE_CATEGORIES = ("attention", "gate", "shared", "dense", "compute")
COMM_CATEGORIES = ("dispatch", "combine", "other")
CATEGORIES = (*COMPUTE_CATEGORIES, *COMM_CATEGORIES)
ALL_GPUS = -1


class SpeedModel(Protocol):
    """How fast a GPU computes, in time."""

    def end_us(self, gpu: int, start_us: float, work_us: float) -> float:
        """When work that takes `work_us` at nominal speed ends, if it starts at `start_us`."""
        ...


class NominalSpeed:
    """Every GPU at its nominal speed at all times."""

    def end_us(self, gpu: int, start_us: float, work_us: float) -> float:
        return start_us + work_us


class ExpertRunner(Protocol):
    """What runs routed experts where they take more than their own time."""

    def start(self, task: Task) -> simpy.Event:
        """Run the experts of a task of category `compute`; the event fires at its end."""
        ...


@dataclass(slots=True, eq=False)
class Task:
    """One kernel (`gpu`, `work_us`) or one collective (`flow`, gpu ALL_GPUS).

    `start_us` and `end_us` are -1 until the task has started or ended. `parts`: (name, start, end)
    of the kernels of a task that `Engine.experts` runs, None else; between them the GPU waits.
    """

    name: str
    category: str
    gpu: int
    stream: str
    layer: int
    work_us: float = 0.0
    flow: Flow | None = None
    start_us: float = -1.0
    end_us: float = -1.0
    waits: int = 0
    followers: list[Task] = field(default_factory=list)
    parts: list[tuple[str, float, float]] | None = None

    @property
    def spans(self) -> list[tuple[str, float, float]]:
        """(name, start, end) of its parts, or of all of it."""
        if self.parts is None:
            return [(self.name, self.start_us, self.end_us)]
        return self.parts


class Program:
    """Tasks of one step in launch order."""

    def __init__(self, num_gpus: int) -> None:
        self.num_gpus = num_gpus
        self.tasks: list[Task] = []
        self._last: dict[tuple[int, str], Task] = {}

    def kernels(
        self,
        category: str,
        work_us: Sequence[float],
        *,
        layer: int = -1,
        after: Iterable[Task] = (),
        name: str | None = None,
    ) -> list[Task]:
        """One kernel on every GPU that has work; `work_us` [G]. A GPU without work has no task."""
        label = name or (category if layer < 0 else f"layer {layer} {category}")
        before = list(after)
        out = []
        for gpu, work in enumerate(work_us):
            if work > 0.0:
                task = Task(label, category, gpu, COMPUTE, layer, work_us=work)
                self._add(task, before, ((gpu, COMPUTE),))
                out.append(task)
        return out

    def collective(
        self,
        flow: Flow,
        *,
        layer: int = -1,
        after: Iterable[Task] = (),
        stream: str = COMM,
    ) -> Task:
        """A collective of all GPUs, after its predecessor on that stream."""
        task = Task(flow.name, flow.category, ALL_GPUS, stream, layer, flow=flow)
        self._add(task, list(after), ((ALL_GPUS, stream),))
        return task

    def _add(self, task: Task, before: list[Task], streams: Iterable[tuple[int, str]]) -> None:
        seen: set[int] = set()
        for stream in streams:
            last = self._last.get(stream)
            if last is not None:
                before = [*before, last]
            self._last[stream] = task
        for earlier in before:
            if id(earlier) not in seen:
                seen.add(id(earlier))
                earlier.followers.append(task)
                task.waits += 1
        self.tasks.append(task)


@dataclass(frozen=True, slots=True, eq=False)
class StepRun:
    """A program that has run: when it started and ended; the tasks hold the details."""

    program: Program
    start_us: float
    end_us: float
    finished: bool

    @property
    def us(self) -> float:
        return self.end_us - self.start_us


class Engine:
    """Runs programs one after the other on one clock and one network.

    `experts` runs the routed experts where it is set; else they take their `work_us`.
    """

    def __init__(
        self,
        num_links: int,
        *,
        speed: SpeedModel | None = None,
        record_links: bool = False,
    ) -> None:
        self.env = simpy.Environment()
        self.network = Network(self.env, num_links, record=record_links)
        self.speed: SpeedModel = speed or NominalSpeed()
        self.experts: ExpertRunner | None = None
        self.num_events = 0
        self._left = 0
        self._done: simpy.Event | None = None
        self._sent: list[simpy.Event] = []

    @property
    def now_us(self) -> float:
        return float(self.env.now)

    def run(self, program: Program, until_us: float | None = None) -> StepRun:
        """Run all tasks of `program` from now on.

        With `until_us`, stop there if the program is not done: `finished` is then False, its
        flows are dropped and its tasks never end. Raises RuntimeError for a program whose tasks
        wait for each other, or for a link that is down and never comes back.
        """
        start = self.now_us
        self._left = len(program.tasks)
        self._done = done = self.env.event()
        self._sent = []
        if not program.tasks:
            return StepRun(program, start, start, True)
        for task in program.tasks:
            if task.waits == 0:
                self._start(task)
        if until_us is not None and np.isfinite(until_us):
            if until_us <= start:
                self._abort()
                return StepRun(program, start, start, False)
            self.env.run(until=self.env.any_of([done, self.env.timeout(until_us - start)]))
        else:
            self._run_until(done)
        if not done.triggered:
            self._abort()
            return StepRun(program, start, self.now_us, False)
        return StepRun(program, start, self.now_us, True)

    def wait(self, us: float) -> None:
        """Let time pass with no step running; flows that were started go on."""
        if us > 0:
            self.env.run(until=self.env.now + us)

    def transfer(self, flows: Iterable[Flow]) -> float:
        """Send flows at once and wait for the last one; returns the microseconds it took."""
        start = self.now_us
        events = [self.network.send(flow) for flow in flows]
        if events:
            self._run_until(self.env.all_of(events))
        return self.now_us - start

    def _run_until(self, event: simpy.Event) -> None:
        try:
            self.env.run(until=event)
        except RuntimeError:
            stuck = self.network.stalled()
            reason = f"flows over links that are down: {stuck[:3]}" if stuck else "a cycle"
            raise RuntimeError(f"the simulation cannot go on: {reason}") from None

    def _start(self, task: Task) -> None:
        now = self.env.now
        task.start_us = now
        self.num_events += 1
        if task.flow is not None:
            event = self.network.send(task.flow)
            self._sent.append(event)
        elif self.experts is not None and task.category == "compute":
            event = self.experts.start(task)
        else:
            end = self.speed.end_us(task.gpu, now, task.work_us)
            event = self.env.timeout(end - now)
        done = self._done
        on_event(event, lambda _: self._end(task, done))

    def _end(self, task: Task, done: simpy.Event | None) -> None:
        if done is None or done is not self._done:
            return
        task.end_us = self.env.now
        self._left -= 1
        if self._left == 0 and done is not None:
            done.succeed()
        for follower in task.followers:
            follower.waits -= 1
            if follower.waits == 0:
                self._start(follower)

    def _abort(self) -> None:
        self.network.cancel(self._sent)
        self._done = None
