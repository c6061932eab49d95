"""One GPU whose experts do not all fit: what happens between a layer's gate and its last expert.

At the gate the chosen experts are known. Those in their slots run at once; those whose prefetch has
begun run as they arrive; of the others some are computed by the CPU and the rest are fetched, most
tokens first. The layer's experts are done when GPU and CPU are. docs/offloading.md has the rules;
`moesim.caching.timeline` has the same ones in closed form for one GPU with nobody beside it, and
the two agree there (INV-8). Here copies are flows over links that other GPUs may use as well.

How many misses the CPU takes is decided at the gate, from what copies take when alone.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from moesim.caching.timeline import Setup
from moesim.caching.timeline_kernel import StepTimes, split_misses
from moesim.sim.engine import Engine, Task
from moesim.sim.offload.contents import Contents
from moesim.sim.offload.copies import Copy, CopyStream, HostPaths
from moesim.types import FloatArray, IntArray

US = 1e6


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """What became of the accesses of one GPU, each [S, L]: found in a slot, prefetched in time to
    be used, fetched, computed by the CPU; prefetches that nothing used; stall_us, in which the GPU
    had nothing to compute for want of experts."""

    hits: IntArray
    staged: IntArray
    fetched: IntArray
    on_cpu: IntArray
    wasted: IntArray
    stall_us: FloatArray

    @staticmethod
    def zeros(shape: tuple[int, int]) -> Counts:
        a, b, c, d, e = np.zeros((5, *shape), np.int64)
        return Counts(a, b, c, d, e, np.zeros(shape))

    @property
    def accesses(self) -> int:
        return int((self.hits + self.staged + self.fetched + self.on_cpu).sum())


@dataclass(slots=True, eq=False)
class GpuMemory:
    """The experts of one GPU, its copy stream and its share of the CPU.

    times: tables in seconds, see StepTimes. speed: the GPU's own factor. predicted: [S, L, C]
    experts to prefetch, best first, -1 for none. `cpu_spans` holds (name, start, end) of experts
    on the CPU, `read_bytes` what it read of DRAM and of NVMe.
    """

    engine: Engine
    contents: Contents
    times: StepTimes
    paths: HostPaths
    predicted: npt.NDArray[np.int16]
    speed: float = 1.0
    copies: CopyStream = field(init=False)
    counts: Counts = field(init=False)
    read_bytes: FloatArray = field(default_factory=lambda: np.zeros(2))
    cpu_spans: list[tuple[str, float, float]] = field(default_factory=list)
    _step: int = -1
    _reached: int = 0
    _predicted_upto: int = 0
    _staged: dict[tuple[int, int], Copy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.copies = CopyStream(self.engine.network)
        layers = len(self.setup.slots)
        self.counts = Counts.zeros((self.contents.stream.num_steps, layers))

    @property
    def setup(self) -> Setup:
        return self.contents.setup

    def begin_step(self, step: int) -> None:
        """Steps must be begun and ended in order."""
        self._step, self._reached, self._predicted_upto = step, 0, 0

    def end_step(self) -> None:
        """Account for layers at the end of the step that asked this GPU for nothing."""
        self._skip_to(len(self.setup.slots))

    def start(self, task: Task) -> simpy.Event:
        """Run the experts of `task`'s layer; the event fires when the last one is done."""
        layer, step, env = task.layer, self._step, self.engine.env
        task.parts = []
        self._skip_to(layer)
        self._reached = layer + 1
        self.copies.drop(layer)
        items, tokens = self.contents.asked(step, layer)
        count = dict(zip(items.tolist(), tokens.tolist(), strict=True))
        hits, early, missed = self._classify(layer, list(count))
        missed.sort(key=lambda e: count[e])
        share = self._cpu_share(layer, hits, early, missed, count)
        on_cpu, to_fetch = missed[:share], missed[share:][::-1]
        fetched = [self._copy(layer, e, ahead=False) for e in to_fetch]
        self._prefetch(layer)
        figures = self.counts
        figures.hits[step, layer], figures.staged[step, layer] = len(hits), len(early)
        figures.fetched[step, layer], figures.on_cpu[step, layer] = len(fetched), share
        self.contents.update(step, layer, [*(c.expert for c in early), *to_fetch])
        self._forget_staged(layer, count)
        return env.process(self._run(task, hits, [*early, *fetched], on_cpu, count))

    def _classify(self, layer: int, items: list[int]) -> tuple[list[int], list[Copy], list[int]]:
        """(in slots, staged or on their way in order of arrival, missing)."""
        if self.setup.cpu_layers[layer]:
            return [], [], items
        hits, early, missed = [], [], []
        for e in items:
            copy = self._staged.get((layer, e))
            if self.contents.holds(layer, e):
                hits.append(e)
            elif copy is not None and copy.start_us >= 0.0:
                early.append(copy)
            else:
                missed.append(e)
        early.sort(key=lambda copy: copy.start_us)
        return hits, early, missed

    def _cpu_share(
        self,
        layer: int,
        hits: list[int],
        early: list[Copy],
        missed: list[int],
        count: dict[int, int],
    ) -> int:
        """How many of the misses, fewest tokens first, the CPU computes."""
        if self.setup.cpu_layers[layer]:
            return len(missed)
        if self.setup.cpu != "auto" or not missed:
            return 0
        now = self.engine.now_us
        gpu_s = self.times.gpu_s / self.speed
        busy = sum(float(gpu_s[count[e]]) for e in hits)
        link = (self.copies.free_at(now) - now) / US
        for copy in early:
            arrives = 0.0 if copy.done else link
            busy = max(busy, arrives) + float(gpu_s[count[copy.expert]])
        tokens = np.zeros(self.contents.num_experts, np.int64)
        tokens[list(count)] = list(count.values())
        return int(
            split_misses(
                self.times._replace(gpu_s=gpu_s), layer, 0.0, link, busy, np.array(missed), tokens
            )
        )

    def _run(
        self,
        task: Task,
        hits: list[int],
        arriving: list[Copy],
        on_cpu: list[int],
        count: dict[int, int],
    ) -> Generator[Any, Any, None]:
        env, step = self.engine.env, self._step
        begin = env.now
        cpu = env.process(self._run_cpu(task.layer, on_cpu, count)) if on_cpu else None
        yield from self._run_gpu(task, hits, arriving, count)
        if cpu is not None:
            yield cpu
        worked = sum(end - start for _, start, end in task.spans)
        self.counts.stall_us[step, task.layer] = env.now - begin - worked

    def _run_gpu(
        self, task: Task, hits: list[int], arriving: list[Copy], count: dict[int, int]
    ) -> Generator[Any, Any, None]:
        layer = task.layer
        if hits:
            work = sum(float(self.times.gpu_s[count[e]]) for e in hits)
            yield from self._kernel(task, work, f"layer {layer} experts in HBM")
        for copy in arriving:
            if not copy.done:
                yield copy.arrived
            work = float(self.times.gpu_s[count[copy.expert]])
            yield from self._kernel(task, work, f"layer {layer} expert {copy.expert}")

    def _kernel(self, task: Task, work_s: float, name: str) -> Generator[Any, Any, None]:
        env = self.engine.env
        start = env.now
        end = self.engine.speed.end_us(task.gpu, start, work_s * US / self.speed)
        yield env.timeout(end - start)
        task.spans.append((name, start, env.now))

    def _run_cpu(
        self, layer: int, experts: list[int], count: dict[int, int]
    ) -> Generator[Any, Any, None]:
        env, network = self.engine.env, self.engine.network
        yield env.timeout(self.times.cpu_start_s * US)
        for e in experts:
            start = env.now
            far = bool(self.paths.on_nvme[layer, e])
            if far:
                yield network.send(self.paths.read(layer, e))
            us = float(self.times.cpu_s[count[e]]) * US
            yield network.send(self.paths.compute(layer, e, us))
            self.read_bytes[int(far)] += self.paths.size_bytes[layer, e]
            self.cpu_spans.append((f"layer {layer} expert {e}", start, env.now))

    def _copy(self, layer: int, expert: int, *, ahead: bool) -> Copy:
        far = bool(self.paths.on_nvme[layer, expert])
        name = f"{'prefetch' if ahead else 'fetch'} layer {layer} expert {expert}"
        flow = self.paths.load(layer, expert, f"{name} from NVMe" if far else name)
        copy = Copy(layer, expert, flow, self.engine.env.event(), ahead, far)
        self.copies.add(copy)
        return copy

    def _prefetch(self, layer: int) -> None:
        """Send for what is predicted of the layers that come into reach with `layer`."""
        setup = self.setup
        last = min(layer + setup.depth, len(setup.slots) - 1)
        for target in range(max(self._predicted_upto, layer) + 1, last + 1):
            sent = 0
            for e in self.predicted[self._step, target].tolist():
                if sent == setup.width or setup.cpu_layers[target]:
                    break
                if e < 0 or self.contents.holds(target, e) or (target, e) in self._staged:
                    continue
                self._staged[target, e] = self._copy(target, e, ahead=True)
                sent += 1
        self._predicted_upto = max(self._predicted_upto, last)

    def _forget_staged(self, layer: int, used: dict[int, int]) -> None:
        """Empty the staging places of `layer`; what was sent for and not asked for is wasted."""
        for target, e in [key for key in self._staged if key[0] == layer]:
            copy = self._staged.pop((target, e))
            if copy.start_us >= 0.0 and e not in used:
                self.counts.wasted[self._step, layer] += 1

    def _skip_to(self, layer: int) -> None:
        """Layers before `layer` that asked for nothing."""
        for skipped in range(self._reached, layer):
            self.copies.drop(skipped)
            self._forget_staged(skipped, {})
            self.contents.update(self._step, skipped, [])
        self._reached = max(self._reached, layer)
