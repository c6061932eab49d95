"""Calibration of what crosses links: collectives, point to point, host copies.

Sizes of collectives count the bytes that the busiest rank sends to other ranks, as
`moesim.cost.collective` does; what stays on the rank does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from moesim.replay.process import Context, all_gather_flat
from moesim.replay.timing import Body

if TYPE_CHECKING:
    from moesim.replay.calibrate import Session

NUM_BUFFERS = 3
SMALLEST_MESSAGE = 768  # three times a power of two, which no batch of whole tokens comes to
SMALLEST_UNEVEN = 12288
UNEVEN_SHARES = (1.0, 0.5, 0.125, 0.0)
COPY_SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28)


def doubling(low: int, high: int) -> list[int]:
    """low, 2 low, 4 low, ... up to high."""
    out = []
    while low <= high:
        out.append(low)
        low *= 2
    return out


def measure_uneven(session: Session) -> None:
    """all_to_all_single as the replay calls it: nothing to oneself, splits that may differ.

    Every rank sends `busy` bytes to rank 0 and `share` times that to each other rank; rank 0 sends
    `share` times `busy` to each. A share of 1 is an even exchange without own rows. `bytes` is what
    the busiest rank receives.
    """
    ctx, recorder = session.ctx, session.recorder
    size = ctx.num_ranks
    if size == 1:
        session.notes.append("one rank: no collective was measured")
        return
    for busy in doubling(SMALLEST_MESSAGE, session.options.max_bytes // 2):
        for share in UNEVEN_SHARES:
            if share < 1.0 and busy < SMALLEST_UNEVEN:
                continue
            other = int(busy * share) // 16 * 16
            send = [0 if d == ctx.rank else busy if d == 0 else other for d in range(size)]
            receive = [
                0 if s == ctx.rank else busy if ctx.rank == 0 else other for s in range(size)
            ]
            row = {"group_size": size, "bytes": (size - 1) * busy, "share": share}
            modes = recorder.modes if share == 1.0 else recorder.modes[:1]
            recorder.time("all_to_all_v", row, _uneven(ctx, send, receive), modes=modes)


def measure_collectives(session: Session) -> None:
    """Even all-to-all (own part included, as libraries do), all-gather, reduce-scatter,
    all-reduce, and one-way point to point from rank 0 to rank 1."""
    ctx, recorder = session.ctx, session.recorder
    size = ctx.num_ranks
    if size == 1:
        return
    for kind, make in _COLLECTIVES.items():
        try:
            make(ctx, 256 * size)(0)
            ctx.sync()
        except RuntimeError as error:
            session.notes.append(f"{kind} not measured: {_line(error)}")
            continue
        for buffer_bytes in doubling(256 * size, session.options.max_bytes):
            sent = buffer_bytes
            if kind in ("all_to_all", "all_gather", "reduce_scatter"):
                sent = buffer_bytes * (size - 1) // size
            row = {"kind": kind, "group_size": size, "bytes": sent}
            try:
                recorder.time("collectives", row, make(ctx, buffer_bytes))
            except RuntimeError as error:
                session.notes.append(f"{kind} stopped at {buffer_bytes} bytes: {_line(error)}")
                break


def measure_copies(session: Session) -> None:
    """Host to device and back, pinned and pageable, by one rank alone, by all at once, and in both
    directions at once."""
    ctx, recorder = session.ctx, session.recorder
    if not ctx.is_cuda:
        session.notes.append("CPU: no host copies were measured")
        return
    for num_bytes in COPY_SIZES:
        if num_bytes > session.options.max_bytes:
            break
        for pinned in (True, False):
            for direction, body in _copies(ctx, num_bytes, pinned).items():
                for alone in (True, False):
                    if alone and ctx.num_ranks == 1:
                        continue
                    row = {
                        "direction": direction,
                        "pinned": pinned,
                        "num_gpus_at_once": 1 if alone else ctx.num_ranks,
                        "bytes": num_bytes,
                    }
                    mine = body if ctx.rank == 0 or not alone else _idle
                    recorder.time("copies", row, mine, per_round=4, modes=("eager",))


def _copies(ctx: Context, num_bytes: int, pinned: bool) -> dict[str, Body]:
    """Copies to and from the device, and (pinned only) both at once on two streams."""
    host = [_host_noise(num_bytes, pinned) for _ in range(2)]
    device = [torch.empty(num_bytes, dtype=torch.uint8, device=ctx.device) for _ in range(2)]
    side = torch.cuda.Stream(ctx.device)

    def h2d(i: int) -> None:
        device[i % 2].copy_(host[i % 2], non_blocking=True)

    def d2h(i: int) -> None:
        host[i % 2].copy_(device[i % 2], non_blocking=True)

    def both(_: int) -> None:
        main = torch.cuda.current_stream(ctx.device)
        side.wait_stream(main)
        device[0].copy_(host[0], non_blocking=True)
        with torch.cuda.stream(side):
            host[1].copy_(device[1], non_blocking=True)
        main.wait_stream(side)

    return {"h2d": h2d, "d2h": d2h} | ({"both": both} if pinned else {})


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def _idle(_: int) -> None:
    return None


def _uneven(ctx: Context, send: list[int], receive: list[int]) -> Body:
    sources = [_noise(ctx, sum(send)) for _ in range(NUM_BUFFERS)]
    targets = [_noise(ctx, sum(receive)) for _ in range(NUM_BUFFERS)]

    def body(i: int) -> None:
        k = i % NUM_BUFFERS
        dist.all_to_all_single(targets[k], sources[k], receive, send)

    return body


def _noise(ctx: Context, num_bytes: int) -> torch.Tensor:
    return torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=ctx.device)


def _host_noise(num_bytes: int, pinned: bool) -> torch.Tensor:
    data = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    return data.random_(0, 255)


def _values(ctx: Context, num_bytes: int) -> torch.Tensor:
    count = max(num_bytes // 2, 1)
    return torch.randn(count, device=ctx.device).to(torch.bfloat16)


def _all_to_all(ctx: Context, num_bytes: int) -> Body:
    sources = [_noise(ctx, num_bytes) for _ in range(2)]
    targets = [torch.empty_like(sources[0]) for _ in range(2)]
    return lambda i: dist.all_to_all_single(targets[i % 2], sources[i % 2])


def _all_gather(ctx: Context, num_bytes: int) -> Body:
    part = num_bytes // ctx.num_ranks
    sources = [_noise(ctx, part) for _ in range(2)]
    targets = [_noise(ctx, part * ctx.num_ranks) for _ in range(2)]
    return lambda i: all_gather_flat(targets[i % 2], sources[i % 2])


def _reduce_scatter(ctx: Context, num_bytes: int) -> Body:
    part = num_bytes // ctx.num_ranks
    sources = [_values(ctx, part * ctx.num_ranks) for _ in range(2)]
    count = sources[0].numel() // ctx.num_ranks
    target = torch.empty(count, dtype=torch.bfloat16, device=ctx.device)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return lambda i: scatter(target, sources[i % 2])


def _all_reduce(ctx: Context, num_bytes: int) -> Body:
    data = [_values(ctx, num_bytes).mul_(1e-3) for _ in range(2)]
    return lambda i: dist.all_reduce(data[i % 2], op=dist.ReduceOp.MAX)


def _p2p(ctx: Context, num_bytes: int) -> Body:
    data = [_noise(ctx, num_bytes) for _ in range(2)] if ctx.rank < 2 else []

    def body(i: int) -> None:
        if ctx.rank > 1:
            return
        move = dist.isend if ctx.rank == 0 else dist.irecv
        for work in dist.batch_isend_irecv([dist.P2POp(move, data[i % 2], 1 - ctx.rank)]):
            work.wait()

    return body


_COLLECTIVES: dict[str, Callable[[Context, int], Body]] = {
    "all_to_all": _all_to_all,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
    "p2p": _p2p,
}
