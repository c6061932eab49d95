"""Steps of a model whose experts do not all fit, one after the other on one clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from moesim.caching.events import Events, Stream
from moesim.caching.rates import Rates
from moesim.caching.timeline import Setup, all_events
from moesim.caching.timeline_kernel import StepTimes
from moesim.cost.routing import Routed
from moesim.placement import Placement
from moesim.sim.capacity import Drops
from moesim.sim.engine import Engine, SpeedModel, Task
from moesim.sim.event import Tally, run_step
from moesim.sim.offload.contents import Contents
from moesim.sim.offload.copies import host_paths
from moesim.sim.offload.memory import GpuMemory
from moesim.sim.prepare import Models, Step, routed_by
from moesim.sim.result import SimResult
from moesim.sim.schedules.sequential import Sequential
from moesim.sim.timeline import COPY, CPU, StepTimeline
from moesim.sim.work import Chunk, HomeWork, StepWork
from moesim.trace.batches import Batches
from moesim.trace.format import Trace
from moesim.types import FloatArray, IntArray, Progress


@dataclass(frozen=True, slots=True, eq=False)
class GpuCache:
    """What one GPU's memory is and how fast: `setup` of its slots, `times` in seconds, `rates` that
    they come from. size_bytes, on_nvme: [L, E]. predicted: [S, L, C] experts that a predictor
    expects, -1 for none; the GPU sends for those it is responsible for."""

    setup: Setup
    times: StepTimes
    rates: Rates
    size_bytes: FloatArray
    on_nvme: npt.NDArray[np.bool_]
    predicted: npt.NDArray[np.int16]


@dataclass(slots=True, eq=False)
class OffloadRun:
    """A stream of decode steps through a placement whose GPUs hold what their caches hold.

    Each GPU's gate and tail times are those of its own tokens (lane i of the batch is at home on
    GPU i mod G), each expert's those of the tokens that reach it. Between gate and experts lies the
    dispatch, and the combine after them; one GPU has neither.
    """

    models: Models
    trace: Trace
    stream: Stream
    placement: Placement
    caches: Sequence[GpuCache]
    speed: SpeedModel | None = None
    timeline: StepTimeline | None = None
    memories: list[GpuMemory] = field(init=False)
    engine: Engine = field(init=False)

    def run(self, progress: Progress | None = None) -> SimResult:
        """Run every step of the stream, each layer waiting for its experts."""
        models, stream = self.models, self.stream
        routed = [self._route(s) for s in range(stream.num_steps)]
        self.engine = engine = Engine(
            models.links.num_links, speed=self.speed, record_links=self.timeline is not None
        )
        self.memories = self._memories(routed)
        engine.experts = _Experts(self.memories)
        tally = Tally(models, Sequential.name)
        for s, one in enumerate(routed):
            for memory in self.memories:
                memory.begin_step(s)
            step = Step(self._work(s, one), one, Drops())
            run = run_step(engine, Sequential(), step.work)
            for memory in self.memories:
                memory.end_step()
            tally.add(run, step)
            self._show(s)
            if self.timeline is not None:
                self.timeline.add(run, s, engine.network)
            if progress is not None:
                progress(s + 1, stream.num_steps)
        return tally.result(engine, {"offload": self.figures()})

    def figures(self) -> dict[str, Any]:
        """What the caches did, over all GPUs and steps; times and shares are means over GPUs."""
        counts = [memory.counts for memory in self.memories]
        moved = sum((m.copies.bytes_moved + m.read_bytes for m in self.memories), np.zeros(2))
        copied = sum((m.copies.bytes_moved for m in self.memories), np.zeros(2))
        elapsed = max(self.engine.now_us, 1e-300)
        accesses = sum(c.accesses for c in counts)
        total = {
            name: int(sum(getattr(c, name).sum() for c in counts))
            for name in ("hits", "staged", "fetched", "on_cpu", "wasted")
        }
        stall = [float(c.stall_us.sum(axis=1).mean()) for c in counts]
        return {
            "accesses": accesses,
            **total,
            "hit_rate": total["hits"] / max(1, accesses),
            "bytes_from_dram": float(moved[0]),
            "bytes_from_nvme": float(moved[1]),
            "bytes_to_hbm": float(copied.sum()),
            "bytes_to_hbm_per_token": float(copied.sum() / max(1, self.stream.num_tokens)),
            "stall_us": float(np.mean(stall)),
            "stall_us_by_gpu": stall,
            "hit_rate_by_gpu": [float(c.hits.sum() / max(1, c.accesses)) for c in counts],
            "copying_by_gpu": [float(m.copies.busy_us / elapsed) for m in self.memories],
        }

    def _route(self, step: int) -> Routed:
        tokens = self._tokens(step)
        batch = Batches(tokens, np.array([0, len(tokens)], np.int64), "decode", len(tokens))
        return routed_by(self.models, self.trace, batch, self.placement, self._home(step))

    def _tokens(self, step: int) -> IntArray:
        ptr = self.stream.indptr
        return self.stream.token_idx[ptr[step] : ptr[step + 1]]

    def _home(self, step: int) -> npt.NDArray[np.int32]:
        ptr = self.stream.indptr
        return self.stream.lane_idx[ptr[step] : ptr[step + 1]] % np.int32(self.models.num_gpus)

    def _work(self, step: int, routed: Routed) -> StepWork:
        models = self.models
        gpus, layers = models.num_gpus, self.trace.num_layers
        at_home = np.bincount(self._home(step), minlength=gpus)
        gate, tail = np.zeros((2, layers, gpus))
        expert = np.zeros((layers, gpus))
        tokens = routed.slot_tokens[0].reshape(layers, gpus, -1)
        for g, cache in enumerate(self.caches):
            speed = models.step.speed[g] * 1e-6
            gate[:, g] = cache.times.gate_s[:, at_home[g]] / speed
            tail[-1, g] = cache.times.tail_s[at_home[g]] / speed
            expert[:, g] = cache.times.gpu_s[tokens[:, g]].sum(axis=1) / speed
        none = np.zeros((layers, gpus))
        home = HomeWork(gate, none, none, none[0], none, tail)
        alone = gpus == 1
        chunk = Chunk(
            0,
            expert,
            [] if alone else list(models.exchange.dispatch(routed)),
            [] if alone else list(models.exchange.combine(routed)),
            home,
        )
        return StepWork(layers, gpus, int(at_home.sum()), home, (chunk,))

    def _memories(self, routed: Sequence[Routed]) -> list[GpuMemory]:
        trace, stream, gpus = self.trace, self.stream, self.models.num_gpus
        everything = all_events(trace, stream)
        ids = np.asarray(trace.expert_ids)[stream.token_idx].astype(np.int32)
        slots = np.stack([r.slot_tokens[0] for r in routed])
        row = np.arange(trace.num_layers)[:, None]
        out = []
        for g, cache in enumerate(self.caches):
            own = self.placement.physical_to_logical.reshape(trace.num_layers, gpus, -1)[:, g]
            held = np.zeros((trace.num_layers, trace.num_experts), bool)
            held[np.broadcast_to(row, own.shape)[own >= 0], own[own >= 0]] = True
            count = np.zeros((len(routed), *held.shape), np.int64)
            served = slots.reshape(len(routed), trace.num_layers, gpus, -1)[:, :, g]
            layer, slot = np.nonzero(own >= 0)
            count[:, layer, own[layer, slot]] = served[:, layer, slot]
            events = _served(everything, count.reshape(-1, trace.num_experts))
            here = np.where((ids >= 0) & held[row[None, :, :], ids], ids, np.int32(-1))
            expect = cache.predicted
            expect = np.where(
                (expect >= 0) & held[row[None, :, :], expect], expect, np.int16(-1)
            ).astype(np.int16)
            contents = Contents(cache.setup, events, stream, here, trace.num_experts)
            paths = host_paths(
                self.models.cluster,
                self.models.links,
                cache.rates,
                g,
                cache.times.load_s * 1e6,
                cache.times.host_s * 1e6,
                cache.size_bytes,
                cache.on_nvme,
            )
            speed = float(self.models.step.speed[g])
            out.append(GpuMemory(self.engine, contents, cache.times, paths, expect, speed))
        return out

    def _show(self, step: int) -> None:
        for g, memory in enumerate(self.memories):
            for stream, spans in ((COPY, memory.copies.spans), (CPU, memory.cpu_spans)):
                if self.timeline is not None:
                    self.timeline.add_spans(g, stream, spans)
                spans.clear()


@dataclass(frozen=True, slots=True)
class _Experts:
    memories: list[GpuMemory]

    def start(self, task: Task) -> simpy.Event:
        return self.memories[task.gpu].start(task)


def _served(events: Events, count: IntArray) -> Events:
    """The accesses of `events` that one GPU serves: `count` [events, E] tokens of each expert
    there. Gate weights are shared out by tokens."""
    event = np.repeat(np.arange(events.num_events), np.diff(events.indptr))
    here = count[event, events.item]
    kept = here > 0
    share = here[kept] / events.count[kept]
    indptr = np.concatenate(([0], np.cumsum(np.bincount(event[kept], minlength=len(count)))))
    return replace(
        events,
        indptr=indptr.astype(np.int64),
        item=events.item[kept],
        count=here[kept].astype(np.int32),
        gate=(events.gate[kept] * share).astype(np.float32),
    )
