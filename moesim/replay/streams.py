"""Device times of calls that the host enqueued well before, and of copies between two kernels.

Launched call by call, a short kernel takes as long as the host needs to enqueue it. Where the GPU
has something to wait for, as in offloading, the host gets ahead, and the GPU's own time counts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from moesim.replay.process import Context
from moesim.replay.timing import Body, issue_us, time_calls
from moesim.types import FloatArray

TRIAL_CYCLES = 1_000_000
MARGIN = 1.5
TRIES = 4


def cycles_of(ctx: Context, us: float) -> int:
    """Clock cycles of a busy wait of so long, from a timed one; 0 on the CPU."""
    if us <= 0 or not ctx.is_cuda:
        return 0
    samples = time_calls(ctx, lambda _: torch.cuda._sleep(TRIAL_CYCLES), mode="eager", per_round=2)
    return int(us * TRIAL_CYCLES / float(np.median(samples)))


def queued_us(ctx: Context, body: Body, *, num_calls: int = 40, rounds: int = 7) -> FloatArray:
    """[rounds] microseconds a call of `body(i)`, the host being ahead: the device is kept busy
    until all calls of a round are enqueued. On the CPU the plain time of a call.

    Too many kernels for the launch queue (about a thousand) would hold the host up.
    """
    if not ctx.is_cuda:
        return time_calls(ctx, body, mode="eager", budget_s=0.05)
    body(0)
    ctx.sync()
    begin = time.perf_counter()
    for i in range(num_calls):
        body(i)
    took_us = (time.perf_counter() - begin) * 1e6
    ctx.sync()
    wait = cycles_of(ctx, MARGIN * took_us + 200.0)
    out: list[float] = []
    for _ in range(rounds * TRIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(wait)
        start.record()
        for i in range(num_calls):
            body(i)
        ahead = not start.query()
        end.record()
        ctx.sync()
        if ahead:
            out.append(start.elapsed_time(end) * 1e3 / num_calls)
        else:
            wait = int(wait * MARGIN)
        if len(out) == rounds:
            break
    return np.array(out or [float("nan")])


@dataclass(frozen=True)
class Fetch:
    """A copy on a stream of its own between two kernels. copy_us: copies back to back;
    hand_over_us: what each takes longer between kernels; issue_us: the host's time for one."""

    copy_us: float
    hand_over_us: float
    issue_us: float


def measure_fetch(ctx: Context, copy: Body, kernel: Body) -> Fetch:
    """Of `copy(i)`, which waits for `kernel(i - 1)` and for which `kernel(i)` waits; CUDA only."""
    side, main = torch.cuda.Stream(ctx.device), torch.cuda.current_stream(ctx.device)

    def fetch(i: int) -> None:
        side.wait_stream(main)
        with torch.cuda.stream(side):
            copy(i)
            event = torch.cuda.Event()
            event.record()
        main.wait_event(event)

    def together(i: int) -> None:
        fetch(i)
        kernel(i)

    copies, kernels, both = (
        float(np.median(queued_us(ctx, body))) for body in (copy, kernel, together)
    )
    return Fetch(copies, max(0.0, both - copies - kernels), issue_us(ctx, fetch))
