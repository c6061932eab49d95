"""Calibration of what crosses links: collectives, point to point, host copies.

Sizes of collectives count the bytes that the busiest rank sends to other ranks, as
`moesim.cost.collective` does; what stays on the rank does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from moesim.replay.environment import num_nodes_of, ranks_per_node
from moesim.replay.process import Context, all_gather_flat
from moesim.replay.streams import measure_fetch
from moesim.replay.timing import Body

if TYPE_CHECKING:
    from moesim.replay.session import Session

NUM_BUFFERS = 3
SMALLEST_MESSAGE = 768  # three times a power of two, which no batch of whole tokens comes to
SMALLEST_UNEVEN = 12288
UNEVEN_SHARES = (1.0, 0.5, 0.125, 0.0)
SUBGROUP_SHARES = (1.0, 0.0)
SUBGROUP_STEP = 8  # sizes of a sub-group grow by this factor
FETCH_SIZES = (3 << 18, 3 << 20, 3 << 22, 3 << 23)
COPY_SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28)


@dataclass(frozen=True)
class Group:
    """Ranks 0 to `size` - 1. `handle` is what torch.distributed's calls take; None: all ranks."""

    size: int
    handle: dist.ProcessGroup | None = None


def growing(low: int, high: int, factor: int = 2) -> list[int]:
    """low, factor low, factor^2 low, ... up to high."""
    out = []
    while low <= high:
        out.append(low)
        low *= factor
    return out


def subgroup_sizes(num_ranks: int, per_node: int) -> list[int]:
    """Powers of two below `num_ranks` that lie within a node, or fill whole ones, of `per_node`."""
    sizes = growing(2, num_ranks - 1)
    return [size for size in sizes if size <= per_node or size % per_node == 0]


def measure_uneven(session: Session) -> None:
    """all_to_all_single as the replay calls it: nothing to oneself, splits that may differ.

    Every rank sends `busy` bytes to rank 0 and `share` times that to each other rank; rank 0 sends
    `share` times `busy` to each. A share of 1 is an even exchange without own rows. `bytes` is what
    the busiest rank receives.
    """
    ctx, recorder = session.ctx, session.recorder
    group = Group(ctx.num_ranks)
    if group.size == 1:
        session.notes.append("one rank: no collective was measured")
        return
    for busy in growing(SMALLEST_MESSAGE, session.options.max_bytes // 2):
        for share in UNEVEN_SHARES:
            if share < 1.0 and busy < SMALLEST_UNEVEN:
                continue
            row = {"group_size": group.size, "bytes": (group.size - 1) * busy, "share": share}
            modes = recorder.modes if share == 1.0 else recorder.modes[:1]
            recorder.time("all_to_all_v", row, _uneven(ctx, group, busy, share), modes=modes)


def measure_collectives(session: Session) -> None:
    """Even all-to-all (own part included, as libraries do), all-gather, reduce-scatter,
    all-reduce, and one-way point to point from rank 0 to rank 1."""
    ctx, recorder = session.ctx, session.recorder
    group = Group(ctx.num_ranks)
    if group.size == 1:
        return
    for kind, make in {**_COLLECTIVES, "p2p": _p2p}.items():
        try:
            make(ctx, group, 256 * group.size)(0)
            ctx.sync()
        except RuntimeError as error:
            session.notes.append(f"{kind} not measured: {_line(error)}")
            continue
        for buffer_bytes in growing(256 * group.size, session.options.max_bytes):
            sent = _sent_bytes(kind, buffer_bytes, group.size)
            row = {"kind": kind, "group_size": group.size, "bytes": sent}
            try:
                recorder.time("collectives", row, make(ctx, group, buffer_bytes))
            except RuntimeError as error:
                session.notes.append(f"{kind} stopped at {buffer_bytes} bytes: {_line(error)}")
                break


def measure_subgroups(session: Session) -> None:
    """The collectives again on the first 2, 4, 8, ... ranks, the others waiting for them.

    Fewer sizes and shares than on all ranks, and one mode only, so that a sub-group takes seconds.
    Every rank calls this; a rank outside the group times an empty call.
    """
    ctx = session.ctx
    for size in subgroup_sizes(ctx.num_ranks, ranks_per_node()):
        handle = dist.new_group(range(size), timeout=timedelta(seconds=ctx.timeout_s))
        group = Group(size, handle)
        fixed = {"group_size": size, "num_nodes": num_nodes_of(size)}
        for busy in growing(SMALLEST_MESSAGE, session.options.max_bytes // 2, SUBGROUP_STEP):
            for share in SUBGROUP_SHARES if busy >= SMALLEST_UNEVEN else SUBGROUP_SHARES[:1]:
                row = {"kind": "all_to_all_v", **fixed, "bytes": (size - 1) * busy, "share": share}
                body = _uneven(ctx, group, busy, share) if ctx.rank < size else _idle
                _time_subgroup(session, row, body)
        for kind, make in _COLLECTIVES.items():
            if not ctx.agree(ctx.rank >= size or _works(make, ctx, group)):
                session.notes.append(f"{kind} of {size} ranks not measured")
                continue
            for buffer_bytes in growing(256 * size, session.options.max_bytes, SUBGROUP_STEP):
                sent = _sent_bytes(kind, buffer_bytes, size)
                row = {"kind": kind, **fixed, "bytes": sent, "share": 1.0}
                body = make(ctx, group, buffer_bytes) if ctx.rank < size else _idle
                _time_subgroup(session, row, body)


def _time_subgroup(session: Session, row: dict[str, object], body: Body) -> None:
    session.recorder.time("subgroups", row, body, modes=session.recorder.modes[:1])


def _works(make: Maker, ctx: Context, group: Group) -> bool:
    try:
        make(ctx, group, 256 * group.size)(0)
        ctx.sync()
    except RuntimeError:
        return False
    return True


def _sent_bytes(kind: str, buffer_bytes: int, size: int) -> int:
    """What a rank sends to other ranks of a call over a buffer."""
    if kind in ("all_to_all", "all_gather", "reduce_scatter"):
        return buffer_bytes * (size - 1) // size
    return buffer_bytes


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
    _measure_fetches(session)


def _measure_fetches(session: Session) -> None:
    """Pinned copies in two parts, as an expert's, on a stream of their own between two kernels, by
    every rank at once. Adds what the hand-over takes, and the host's time."""
    ctx, recorder = session.ctx, session.recorder
    small = torch.zeros(1024, device=ctx.device)
    for num_bytes in (n for n in FETCH_SIZES if n <= session.options.max_bytes):
        ctx.beat(f"calibrating a fetch of {num_bytes} bytes")
        parts = [slice(0, num_bytes * 2 // 3), slice(num_bytes * 2 // 3, num_bytes)]
        host = _host_noise(num_bytes, True)
        device = torch.empty(num_bytes, dtype=torch.uint8, device=ctx.device)

        def copy(
            _: int, to: torch.Tensor = device, of: torch.Tensor = host, both: list[slice] = parts
        ) -> None:
            for part in both:
                to[part].copy_(of[part], non_blocking=True)

        found = measure_fetch(ctx, copy, lambda _: small.add_(1.0))
        row = {"bytes": num_bytes, "num_gpus_at_once": ctx.num_ranks}
        copies = round(ctx.max(found.copy_us), 3)
        recorder.value("fetch", {**row, "copy_us": copies}, found.hand_over_us)
        recorder.value(
            "launch", {"what": "fetch, host time to enqueue", "bytes": num_bytes}, found.issue_us
        )


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


def _uneven(ctx: Context, group: Group, busy: int, share: float) -> Body:
    other, ranks = int(busy * share) // 16 * 16, range(group.size)
    send = [0 if d == ctx.rank else busy if d == 0 else other for d in ranks]
    receive = [0 if s == ctx.rank else busy if ctx.rank == 0 else other for s in ranks]
    sources = [_noise(ctx, sum(send)) for _ in range(NUM_BUFFERS)]
    targets = [_noise(ctx, sum(receive)) for _ in range(NUM_BUFFERS)]

    def body(i: int) -> None:
        k = i % NUM_BUFFERS
        dist.all_to_all_single(targets[k], sources[k], receive, send, group=group.handle)

    return body


def _noise(ctx: Context, num_bytes: int) -> torch.Tensor:
    return torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=ctx.device)


def _host_noise(num_bytes: int, pinned: bool) -> torch.Tensor:
    data = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    return data.random_(0, 255)


def _values(ctx: Context, num_bytes: int) -> torch.Tensor:
    count = max(num_bytes // 2, 1)
    return torch.randn(count, device=ctx.device).to(torch.bfloat16)


def _all_to_all(ctx: Context, group: Group, num_bytes: int) -> Body:
    sources = [_noise(ctx, num_bytes) for _ in range(2)]
    targets = [torch.empty_like(sources[0]) for _ in range(2)]
    return lambda i: dist.all_to_all_single(targets[i % 2], sources[i % 2], group=group.handle)


def _all_gather(ctx: Context, group: Group, num_bytes: int) -> Body:
    part = num_bytes // group.size
    sources = [_noise(ctx, part) for _ in range(2)]
    targets = [_noise(ctx, part * group.size) for _ in range(2)]
    return lambda i: all_gather_flat(targets[i % 2], sources[i % 2], group.handle)


def _reduce_scatter(ctx: Context, group: Group, num_bytes: int) -> Body:
    part = num_bytes // group.size
    sources = [_values(ctx, part * group.size) for _ in range(2)]
    count = sources[0].numel() // group.size
    target = torch.empty(count, dtype=torch.bfloat16, device=ctx.device)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return lambda i: scatter(target, sources[i % 2], group=group.handle)


def _all_reduce(ctx: Context, group: Group, num_bytes: int) -> Body:
    data = [_values(ctx, num_bytes).mul_(1e-3) for _ in range(2)]
    return lambda i: dist.all_reduce(data[i % 2], op=dist.ReduceOp.MAX, group=group.handle)


def _p2p(ctx: Context, group: Group, num_bytes: int) -> Body:
    data = [_noise(ctx, num_bytes) for _ in range(2)] if ctx.rank < 2 else []

    def body(i: int) -> None:
        if ctx.rank > 1:
            return
        move = dist.isend if ctx.rank == 0 else dist.irecv
        peer = 1 - ctx.rank
        for work in dist.batch_isend_irecv([dist.P2POp(move, data[i % 2], peer, group.handle)]):
            work.wait()

    return body


Maker = Callable[[Context, Group, int], Body]
_COLLECTIVES: dict[str, Maker] = {
    "all_to_all": _all_to_all,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
}
