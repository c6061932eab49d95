"""KV blocks of a rank: growing, freeing, and preempting by recomputation."""

from __future__ import annotations

from typing import Any

from moesim.kernels import kernel
from moesim.serving.prefix import drop, evict
from moesim.serving.state import INTERNAL


@kernel(**INTERNAL)
def reserve(req: Any, ranks: Any, prefix: Any, cfg: Any, rank: int, r: int, tokens: int) -> bool:
    """Give `r` the blocks that `tokens` cached tokens need; False, and nothing done, if the rank
    has not enough free or evictable ones."""
    have = req[r].blocks + req[r].shared * cfg.hash_blocks
    tokens = min(tokens, cfg.kv_window)
    need = (tokens + cfg.block_size - 1) // cfg.block_size - have
    if need <= 0:
        return True
    if ranks[rank].free_blocks + ranks[rank].num_evictable * cfg.hash_blocks < need:
        return False
    while ranks[rank].free_blocks < need:
        evict(ranks, prefix, cfg, rank)
    ranks[rank].free_blocks -= need
    req[r].blocks += need
    return True


@kernel(**INTERNAL)
def release(req: Any, ids: Any, ranks: Any, prefix: Any, rank: int, r: int) -> None:
    """Give back all blocks of `r`; the end of its prompt becomes evictable before the beginning."""
    ranks[rank].free_blocks += req[r].blocks
    req[r].blocks = 0
    first = req[r].hash_start
    for j in range(req[r].shared - 1, -1, -1):
        drop(ranks, prefix, rank, ids[first + j])
    req[r].shared = 0


@kernel(**INTERNAL)
def remove_running(ranks: Any, running: Any, rank: int, place: int) -> None:
    """Take the request at `place` out of the running ones, keeping their order."""
    last = ranks[rank].num_running - 1
    for s in range(place, last):
        running[0, rank, s] = running[0, rank, s + 1]
        running[1, rank, s] = running[1, rank, s + 1]
    ranks[rank].num_running = last


@kernel(**INTERNAL)
def push_waiting(req: Any, ranks: Any, queues: Any, rank: int, r: int, front: bool) -> None:
    """Queue `r` behind, or before, the waiting requests of its level."""
    level = req[r].level
    head = queues[0, rank, level]
    if head < 0:
        queues[0, rank, level] = r
        queues[1, rank, level] = r
        req[r].next_waiting = -1
    elif front:
        req[r].next_waiting = head
        queues[0, rank, level] = r
    else:
        req[queues[1, rank, level]].next_waiting = r
        req[r].next_waiting = -1
        queues[1, rank, level] = r
    ranks[rank].num_waiting += 1


@kernel(**INTERNAL)
def pop_waiting(req: Any, ranks: Any, queues: Any, rank: int, level: int) -> None:
    """Take the first waiting request of a level out of its queue."""
    r = queues[0, rank, level]
    queues[0, rank, level] = req[r].next_waiting
    ranks[rank].num_waiting -= 1


@kernel(**INTERNAL)
def victim(req: Any, ranks: Any, running: Any, rank: int) -> int:
    """Place of the running request to preempt: the least urgent level, then the last admitted."""
    best = 0
    for s in range(1, ranks[rank].num_running):
        if req[running[0, rank, s]].level >= req[running[0, rank, best]].level:
            best = s
    return best


@kernel(**INTERNAL)
def preempt(
    req: Any,
    ids: Any,
    ranks: Any,
    queues: Any,
    running: Any,
    prefix: Any,
    cfg: Any,
    rank: int,
    place: int,
) -> None:
    """Stop a running request, drop its cache, and queue it first; it is recomputed later."""
    r = running[0, rank, place]
    release(req, ids, ranks, prefix, rank, r)
    remove_running(ranks, running, rank, place)
    req[r].computed = 0
    req[r].prefill_len = req[r].prompt + req[r].generated
    req[r].preempted += 1
    req[r].queued_us = -1.0
    push_waiting(req, ranks, queues, rank, r, True)
