"""Transfers of KV caches from the engines that take prompts to those that decode, and what a rank
has outstanding."""

from __future__ import annotations

from typing import Any

from moesim.kernels import kernel
from moesim.serving.kv_cache import push_waiting, release
from moesim.serving.router import choose_rank
from moesim.serving.state import INTERNAL, NUM_TRANSFERS


@kernel(**INTERNAL)
def assign(req: Any, ranks: Any, cfg: Any, rank: int, r: int) -> None:
    ranks[rank].outstanding += 1
    ranks[rank].backlog += req[r].prompt + req[r].expected


@kernel(**INTERNAL)
def unassign(req: Any, ranks: Any, cfg: Any, rank: int, r: int) -> None:
    ranks[rank].outstanding -= 1
    ranks[rank].backlog -= req[r].prompt + req[r].expected


@kernel(**INTERNAL)
def begin_transfer(
    req: Any, ids: Any, ranks: Any, prefix: Any, cfg: Any, clock: Any, rank: int, r: int, now: float
) -> None:
    """Send the cache of `r` to a decode rank: both their links must be free, one transfer each."""
    to = choose_rank(req, ids, ranks, prefix, cfg, clock, r, True)
    req[r].decode_rank = to
    assign(req, ranks, cfg, to, r)
    start = max(now, ranks[rank].link_free_us, ranks[to].link_free_us)
    end = (
        start
        + cfg.transfer_latency_us
        + cfg.transfer_us_per_token * min(req[r].computed, cfg.kv_window)
    )
    ranks[rank].link_free_us = end
    ranks[to].link_free_us = end
    child = clock.counts[NUM_TRANSFERS]
    clock.counts[NUM_TRANSFERS] += 1
    while child > 0:
        parent = (child - 1) // 2
        if not _sooner(end, r, clock.heap_us[parent], clock.heap_request[parent]):
            break
        clock.heap_us[child] = clock.heap_us[parent]
        clock.heap_request[child] = clock.heap_request[parent]
        child = parent
    clock.heap_us[child] = end
    clock.heap_request[child] = r


@kernel(**INTERNAL)
def _sooner(a_us: float, a: int, b_us: float, b: int) -> bool:
    return a_us < b_us or (a_us == b_us and a < b)


@kernel(**INTERNAL)
def end_transfer(
    req: Any, ids: Any, ranks: Any, queues: Any, prefix: Any, cfg: Any, clock: Any
) -> None:
    """The first cache under way is there: it leaves the sender and queues for the decode rank."""
    r = clock.heap_request[0]
    size = clock.counts[NUM_TRANSFERS] - 1
    clock.counts[NUM_TRANSFERS] = size
    last_us, last = clock.heap_us[size], clock.heap_request[size]
    parent = 0
    while 2 * parent + 1 < size:
        child = 2 * parent + 1
        if child + 1 < size and _sooner(
            clock.heap_us[child + 1],
            clock.heap_request[child + 1],
            clock.heap_us[child],
            clock.heap_request[child],
        ):
            child += 1
        if _sooner(last_us, last, clock.heap_us[child], clock.heap_request[child]):
            break
        clock.heap_us[parent] = clock.heap_us[child]
        clock.heap_request[parent] = clock.heap_request[child]
        parent = child
    clock.heap_us[parent] = last_us
    clock.heap_request[parent] = last
    sender, to = req[r].rank, req[r].decode_rank
    release(req, ids, ranks, prefix, sender, r)
    unassign(req, ranks, cfg, sender, r)
    req[r].arrived = 1
    req[r].queued_us = clock.now_us[0]
    push_waiting(req, ranks, queues, to, r, False)
