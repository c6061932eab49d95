"""Clocks: device events around phases, CUDA graphs, and how often to repeat."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from moesim.replay.process import Context
from moesim.types import FloatArray

Body = Callable[[int], object]
GRAPH_MEMORY_SHARE = 0.4


class PhaseClock:
    """Marks on the device's own time line: `num_layers` layers of `num_marks` marks each.

    On CUDA a mark is a timing event; `external` makes it an event-record node when it is marked
    while a graph is captured, so that every replay of the graph refreshes it. On the CPU a mark is
    the host's clock.
    """

    def __init__(
        self, ctx: Context, num_layers: int, num_marks: int, *, external: bool = False
    ) -> None:
        self.num_layers, self.num_marks = num_layers, num_marks
        self._host = np.zeros((num_layers, num_marks))
        self._events: list[list[torch.cuda.Event]] = []
        if ctx.is_cuda:
            extra = {"external": True} if external else {}
            self._events = [
                [torch.cuda.Event(enable_timing=True, **extra) for _ in range(num_marks)]
                for _ in range(num_layers)
            ]

    def mark(self, layer: int, index: int) -> None:
        if self._events:
            self._events[layer][index].record()
        else:
            self._host[layer, index] = time.perf_counter()

    def read_us(self) -> FloatArray:
        """[L, marks - 1] microseconds between successive marks; the device must be idle."""
        if not self._events:
            return np.diff(self._host, axis=1) * 1e6
        return np.array(
            [[a.elapsed_time(b) * 1e3 for a, b in pairwise(row)] for row in self._events]
        )


def capture(ctx: Context, body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture `body` into a CUDA graph; it must have run once before, outside of a capture.

    The error mode is thread-local because NCCL's watchdog thread queries events meanwhile. What
    earlier graphs held is given back first once it adds up, since nothing can be freed later on.
    """
    ctx.sync()
    total = torch.cuda.get_device_properties(ctx.device).total_memory
    if torch.cuda.memory_reserved(ctx.device) > GRAPH_MEMORY_SHARE * total:
        torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream(ctx.device)
    side.wait_stream(torch.cuda.current_stream(ctx.device))
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            body()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(ctx.device).wait_stream(side)
    return graph


def time_calls(
    ctx: Context,
    body: Body,
    *,
    mode: str,
    per_round: int = 10,
    budget_s: float = 0.1,
    min_rounds: int = 5,
    max_rounds: int = 30,
) -> FloatArray:
    """[rounds] microseconds a call of `body(i)`, i counting the calls of a round, on this rank.

    A round is `per_round` calls back to back between two device events: captured into one CUDA
    graph and replayed (`mode` "graph"), or called (`mode` "eager"). Fewer calls make a round, and
    fewer rounds the sample, when a call is slow; every rank settles on the same numbers.
    """
    for i in range(2):
        body(i)
    ctx.sync()
    start = time.perf_counter()
    body(0)
    ctx.sync()
    call_s = ctx.max(time.perf_counter() - start)
    per_round = int(np.clip(budget_s / min_rounds / max(call_s, 1e-7), 1, per_round))
    rounds = int(np.clip(budget_s / (per_round * max(call_s, 1e-7)), min_rounds, max_rounds))

    def one_round() -> None:
        for i in range(per_round):
            body(i)

    run: Callable[[], object] = one_round
    if mode == "graph":
        run = capture(ctx, one_round).replay
    run()
    ctx.barrier()
    clock = PhaseClock(ctx, rounds, 2)
    for r in range(rounds):
        clock.mark(r, 0)
        run()
        clock.mark(r, 1)
    ctx.sync()
    return clock.read_us()[:, 0] / per_round


def issue_us(ctx: Context, body: Body, num_calls: int = 50) -> float:
    """Host time to enqueue one call of `body`, in microseconds: the median of three runs."""
    samples = []
    for _ in range(3):
        ctx.sync()
        start = time.perf_counter()
        for i in range(num_calls):
            body(i)
        samples.append((time.perf_counter() - start) / num_calls * 1e6)
    ctx.sync()
    return float(np.median(samples))


def spread(samples: FloatArray) -> tuple[float, float, float]:
    """(median, p10, p90) of a sample."""
    low, middle, high = np.percentile(samples, [10, 50, 90])
    return float(middle), float(low), float(high)


def slowest(ctx: Context, samples: FloatArray) -> tuple[float, float, float]:
    """(median, p10, p90) of the rank whose median is largest."""
    every = ctx.gather(list(spread(samples)))
    return tuple(float(x) for x in every[every[:, 0].argmax()])  # type: ignore[return-value]
