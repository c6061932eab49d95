"""Replay a cache schedule on one GPU: experts in pinned host memory, fetched into slots over PCIe.

Copies run on a side stream, in order, each behind the step before the one that issues it; a step's
kernels wait for the copies it needs. Launches are eager, as in offloading runtimes. Attention and
the rest of a layer are not replayed; `other_us` puts a busy wait of that length after every step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moesim.errors import InputError, MismatchError
from moesim.files import atomic_write
from moesim.replay.cases import check_trace, longest_first
from moesim.replay.engine import draw_expert
from moesim.replay.environment import describe
from moesim.replay.make_schedule import lru_schedule
from moesim.replay.memory import MemoryNeed, available_host_bytes, require_memory
from moesim.replay.numerics import TOLERANCE, NumericsError
from moesim.replay.ops import TORCH_DTYPES, Kernels, choose, grouped_ffn
from moesim.replay.process import Context
from moesim.replay.schedule import (
    Schedule,
    StepCosts,
    predict_tokens_us,
)
from moesim.replay.shape import ExpertShape
from moesim.replay.streams import Fetch, cycles_of, measure_fetch, queued_us
from moesim.replay.timing import issue_us, spread, time_calls
from moesim.trace.format import load_token_trace
from moesim.types import FloatArray

FORMAT = "moesim-offload-measured"
VERSION = 1
NUM_CHECKED = 8


@dataclass(frozen=True, slots=True)
class OffloadOptions:
    """What to replay: cache sizes as shares of the experts, lookaheads in steps, how many tokens
    and layers of the trace; the first `warm_tokens` tokens are replayed but not counted."""

    cache_shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    lookaheads: tuple[int, ...] = (0, 1)
    num_tokens: int = 96
    warm_tokens: int = 16
    num_layers: int = 6
    reps: int = 3
    other_us: float = 0.0
    seed: int = 0
    time_limit_s: float = 300.0


class SlotCache:
    """Slots on the device, and every item's weights in pinned host memory (pageable on the CPU)."""

    def __init__(
        self, ctx: Context, shape: ExpertShape, num_items: int, num_slots: int, seed: int
    ) -> None:
        self.ctx, self.shape, self.seed = ctx, shape, seed
        hidden, width = shape.hidden_size, shape.moe_intermediate_size
        dtype = TORCH_DTYPES[shape.dtype]
        pin = {"pin_memory": True} if ctx.is_cuda else {}
        self.host_gate_up = torch.empty(num_items, 2 * width, hidden, dtype=dtype, **pin)
        self.host_down = torch.empty(num_items, hidden, width, dtype=dtype, **pin)
        for item in range(num_items):
            gate_up, down = draw_expert(shape, item, 0, seed, ctx.device)
            self.host_gate_up[item].copy_(gate_up)
            self.host_down[item].copy_(down)
        device = ctx.device
        self.gate_up = torch.zeros(num_slots, 2 * width, hidden, dtype=dtype, device=device)
        self.down = torch.zeros(num_slots, hidden, width, dtype=dtype, device=device)

    def fetch(self, item: int, slot: int) -> None:
        """Copy an item into a slot on the current stream."""
        self.gate_up[slot].copy_(self.host_gate_up[item], non_blocking=True)
        self.down[slot].copy_(self.host_down[item], non_blocking=True)


class Player:
    """Replays one schedule; `run` gives the time of each token."""

    def __init__(
        self, ctx: Context, cache: SlotCache, schedule: Schedule, kernels: Kernels, other_us: float
    ) -> None:
        self.ctx, self.cache, self.schedule = ctx, cache, schedule
        self.kernel = kernels.ffn
        self.copy_stream = torch.cuda.Stream(ctx.device) if ctx.is_cuda else None
        self._cycles = cycles_of(ctx, other_us)
        generator = torch.Generator(ctx.device).manual_seed(schedule.num_steps)
        dtype = TORCH_DTYPES[cache.shape.dtype]
        noise = torch.randn(64, cache.shape.hidden_size, device=ctx.device, generator=generator)
        self.inputs = noise.to(dtype)
        self._begin = np.searchsorted(schedule.issue, np.arange(schedule.num_steps + 1))
        self._plans = [self._plan(step) for step in range(schedule.num_steps)]
        self._offsets = torch.from_numpy(np.stack([p[2] for p in self._plans])).to(ctx.device)
        self._waits: list[list[int]] = [[] for _ in range(schedule.num_steps)]
        for f, step in enumerate(schedule.need.tolist()):
            self._waits[step].append(f)

    def _plan(self, step: int) -> tuple[int, int, npt.NDArray[np.int32]]:
        """First slot, rows and cumulative rows of the slots that a step may read."""
        schedule = self.schedule
        size = schedule.slots_per_layer or schedule.num_slots
        low = step % schedule.num_layers * size if schedule.slots_per_layer else 0
        used = schedule.slots[step][schedule.slots[step] >= 0] - low
        counts = np.bincount(used, minlength=size)
        return low, len(used), np.cumsum(counts).astype(np.int32)

    def compute(self, step: int) -> torch.Tensor:
        """The experts of one step on one token; rows in the order of slots."""
        low, rows, offsets = self._plans[step]
        size = len(offsets)
        x = self.inputs[step % len(self.inputs)][None].expand(rows, -1).contiguous()
        return grouped_ffn(
            x,
            self.cache.gate_up[low : low + size],
            self.cache.down[low : low + size],
            self._offsets[step],
            offsets.tolist(),
            self.kernel,
        )

    def run(self) -> tuple[FloatArray, list[torch.Tensor]]:
        """[T] microseconds of each token, and the outputs of the last few steps."""
        schedule, cuda = self.schedule, self.ctx.is_cuda
        for slot, item in enumerate(schedule.initial.tolist()):
            if item >= 0:
                self.cache.fetch(item, slot)
        self.ctx.sync()
        marks = _Marks(self.ctx, schedule.num_tokens + 1)
        arrived: dict[int, torch.cuda.Event] = {}
        kept: list[torch.Tensor] = []
        main = torch.cuda.current_stream(self.ctx.device) if cuda else None
        marks.mark(0)
        for step in range(schedule.num_steps):
            self._issue(step, main, arrived)
            for f in self._waits[step]:
                if main is not None:
                    main.wait_event(arrived.pop(f))
            out = self.compute(step)
            if self._cycles:
                torch.cuda._sleep(self._cycles)
            if step >= schedule.num_steps - NUM_CHECKED:
                kept.append(out)
            if (step + 1) % schedule.num_layers == 0:
                marks.mark((step + 1) // schedule.num_layers)
        self.ctx.sync()
        return marks.read_us(), kept

    def _issue(
        self, step: int, main: torch.cuda.Stream | None, arrived: dict[int, torch.cuda.Event]
    ) -> None:
        first, last = int(self._begin[step]), int(self._begin[step + 1])
        if first == last:
            return
        items, slots = self.schedule.item[first:last], self.schedule.slot[first:last]
        if self.copy_stream is None or main is None:
            for item, slot in zip(items.tolist(), slots.tolist(), strict=True):
                self.cache.fetch(item, slot)
            return
        self.copy_stream.wait_stream(main)
        with torch.cuda.stream(self.copy_stream):
            for f in range(first, last):
                self.cache.fetch(int(items[f - first]), int(slots[f - first]))
                event = torch.cuda.Event()
                event.record()
                arrived[f] = event

    def worst_error(self, kept: Sequence[torch.Tensor]) -> float:
        """Relative error of the kept outputs against float64; infinite for a NaN."""
        schedule, shape = self.schedule, self.cache.shape
        worst = 0.0
        for out, step in zip(
            kept, range(schedule.num_steps - len(kept), schedule.num_steps), strict=True
        ):
            used = schedule.slots[step] >= 0
            experts = schedule.experts[step][used][np.argsort(schedule.slots[step][used])]
            x = self.inputs[step % len(self.inputs)].double()
            for row, expert in zip(out.double(), experts.tolist(), strict=True):
                item = step % schedule.num_layers * schedule.num_experts + expert
                gate_up, down = draw_expert(shape, item, 0, self.cache.seed, self.ctx.device)
                both = gate_up.double() @ x
                width = shape.moe_intermediate_size
                want = down.double() @ (both[:width] * torch.sigmoid(both[:width]) * both[width:])
                error = float((row - want).norm() / want.norm())
                worst = max(worst, error if np.isfinite(error) else float("inf"))
        return worst


class _Marks:
    """Token boundaries: device events, or the host's clock on the CPU."""

    def __init__(self, ctx: Context, count: int) -> None:
        self._events = (
            [torch.cuda.Event(enable_timing=True) for _ in range(count)] if ctx.is_cuda else []
        )
        self._host = np.zeros(count)

    def mark(self, i: int) -> None:
        if self._events:
            self._events[i].record()
        else:
            self._host[i] = time.perf_counter()

    def read_us(self) -> FloatArray:
        if not self._events:
            return np.diff(self._host) * 1e6
        since = [self._events[0].elapsed_time(e) * 1e3 for e in self._events]
        return np.diff(np.array(since))


def offload(
    ctx: Context,
    shape: ExpertShape,
    trace_path: str | None,
    schedules: Sequence[Schedule],
    options: OffloadOptions,
    out_path: str | None,
) -> dict[str, Any]:
    """Replay each schedule (or LRU schedules of the trace's first tokens) and write the record.

    Raises MismatchError for a schedule of another model, InputError when host or GPU memory is
    short or more than one rank takes part, NumericsError when an output is wrong.
    """
    if ctx.num_ranks != 1:
        raise InputError(f"{ctx.num_ranks} ranks; offloading is replayed on one GPU", "start one")
    started = time.monotonic()
    schedules = list(schedules) or lru_schedules(shape, trace_path, options)
    for schedule in schedules:
        if schedule.num_experts != shape.num_experts:
            raise MismatchError(
                f"schedule {schedule.label!r:.80} has {schedule.num_experts} experts,"
                f" model {shape.name!r:.60} has {shape.num_experts}",
                "give the schedule of this model",
            )
    num_items = max(s.num_layers for s in schedules) * shape.num_experts
    num_slots = max(s.num_slots for s in schedules)
    weights = num_slots * shape.expert_bytes
    need = MemoryNeed(weights, 64 << 20, (2 << 30) if ctx.is_cuda else 0)
    require_memory(ctx, need, None, f"caching {num_slots} experts of {shape.name}")
    _require_host_memory(num_items * shape.expert_bytes, shape)
    kernels = choose(ctx, shape, graphs=False)
    ctx.beat("filling host memory")
    cache = SlotCache(ctx, shape, num_items, num_slots, options.seed)
    copy_us, copy_low, copy_high = _copy_us(ctx, cache)
    fetch = _fetch(ctx, cache, copy_us)
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "environment": describe(ctx),
        "model": shape.to_json(),
        "kernel": kernels.ffn,
        "notes": list(kernels.notes),
        "expert_bytes": shape.expert_bytes,
        "copy_us": [copy_us, copy_low, copy_high],
        "fetch": asdict(fetch),
        "other_us": options.other_us,
        "results": [],
    }
    for schedule in schedules:
        if time.monotonic() - started > options.time_limit_s:
            record["notes"].append(f"time limit: stopped before {schedule.label}")
            break
        ctx.beat(f"replaying {schedule.label}")
        result = _replay(ctx, cache, schedule, kernels, options, fetch)
        record["results"].append(result)
        ctx.rank0_print(
            f"{schedule.label}: {result['token_us']['mean']:.0f} us per token,"
            f" predicted {result['predicted_us']:.0f}"
        )
        if out_path is not None:
            atomic_write(out_path, json.dumps(record, separators=(",", ":"), allow_nan=False))
    return record


def lru_schedules(
    shape: ExpertShape, trace_path: str | None, options: OffloadOptions
) -> list[Schedule]:
    """LRU at each cache size and lookahead, over the first tokens of the trace's longest request
    and of the requests after it."""
    if trace_path is None:
        raise InputError("neither a schedule nor a trace was given", "pass --trace or --schedule")
    trace = load_token_trace(trace_path, "offload")
    check_trace(shape, trace)
    tokens = longest_first(trace, options.num_tokens)
    layers = min(options.num_layers or trace.num_layers, trace.num_layers)
    experts = np.asarray(trace.expert_ids[tokens, :layers]).astype(np.int64)
    out = []
    for share in options.cache_shares:
        slots = int(np.clip(round(share * shape.num_experts), shape.top_k, shape.num_experts))
        out += [
            lru_schedule(experts, shape.num_experts, slots, lookahead=n) for n in options.lookaheads
        ]
    return out


def _replay(
    ctx: Context,
    cache: SlotCache,
    schedule: Schedule,
    kernels: Kernels,
    options: OffloadOptions,
    fetch: Fetch,
) -> dict[str, Any]:
    player = Player(ctx, cache, schedule, kernels, options.other_us)
    _, kept = player.run()
    error = player.worst_error(kept)
    if not error <= TOLERANCE[cache.shape.dtype]:
        raise NumericsError(
            f"{schedule.label}: relative error {error:.3g} against float64",
            "a step read a slot before its copy arrived, or a kernel is at fault: report it",
        )
    costs = _costs(ctx, player, fetch)
    warm = min(options.warm_tokens, schedule.num_tokens - 1)
    runs = np.stack([player.run()[0] for _ in range(options.reps)])
    every = np.median(runs, axis=0)
    predicted = predict_tokens_us(schedule, costs, options.other_us)
    middle, low, high = spread(every[warm:])
    return {
        "label": schedule.label,
        "num_slots": schedule.num_slots,
        "num_tokens": schedule.num_tokens - warm,
        "copies_per_token": float(schedule.copies_per_token[warm:].mean()),
        **asdict(costs),
        "token_us": {
            "mean": float(every[warm:].mean()),
            "median": middle,
            "p10": low,
            "p90": high,
            "mean_of_each_run": runs[:, warm:].mean(axis=1).round(2).tolist(),
        },
        "predicted_us": float(predicted[warm:].mean()),
        "relative_error": error,
        "measured_tokens_us": every.round(1).tolist(),
        "predicted_tokens_us": predicted.round(1).tolist(),
        "copies": schedule.copies_per_token.tolist(),
    }


def _costs(ctx: Context, player: Player, fetch: Fetch) -> StepCosts:
    """What a schedule's steps and copies take by themselves, measured."""

    def step(i: int) -> torch.Tensor:
        return player.compute(i % player.schedule.num_steps)

    return StepCosts(
        copy_us=fetch.copy_us,
        step_us=float(np.median(queued_us(ctx, step))),
        issue_us=issue_us(ctx, step) if ctx.is_cuda else 0.0,
        fetch_issue_us=fetch.issue_us,
        hand_over_us=fetch.hand_over_us,
    )


def _fetch(ctx: Context, cache: SlotCache, copy_us: float) -> Fetch:
    """One expert's copy between two small kernels; on the CPU a copy is all there is to it."""
    if not ctx.is_cuda:
        return Fetch(copy_us, 0.0, 0.0)
    items, slots = len(cache.host_down), len(cache.down)
    small = torch.zeros(1024, device=ctx.device)
    return measure_fetch(
        ctx, lambda i: cache.fetch(i * 7 % items, i % slots), lambda _: small.add_(1.0)
    )


def _copy_us(ctx: Context, cache: SlotCache) -> tuple[float, float, float]:
    """Time of one expert's copy, alone on the link, copies back to back."""
    items, slots = len(cache.host_down), len(cache.down)
    samples = time_calls(
        ctx,
        lambda i: cache.fetch(i * 7 % items, i % slots),
        mode="eager",
        per_round=8,
        budget_s=0.3,
    )
    return spread(samples)


def _require_host_memory(num_bytes: int, shape: ExpertShape) -> None:
    free = available_host_bytes()
    if num_bytes > free:
        raise InputError(
            f"the experts of {shape.name} take {num_bytes / 1e9:.1f} GB of host memory,"
            f" {free / 1e9:.1f} GB are available",
            "replay fewer layers (--layers)",
        )
