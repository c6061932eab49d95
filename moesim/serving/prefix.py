"""Prefix cache of one rank: blocks of prompts by content, kept until their room is needed.

Blocks in use are counted by reference; the others form a list in order of last use, from which the
oldest goes first. What a request computed becomes findable when its whole prompt is computed;
of equal blocks that two requests compute at the same time one is kept. Only whole blocks are
shared.
"""

from __future__ import annotations

from typing import Any

from moesim.kernels import kernel
from moesim.serving.state import INTERNAL, NEWER, OLDER, REFS


@kernel(**INTERNAL)
def count_hits(req: Any, ids: Any, prefix: Any, cfg: Any, rank: int, r: int) -> int:
    """Leading blocks of the prompt of `r` that `rank` holds; at least one token is left over."""
    first = req[r].hash_start
    most = min(req[r].hash_count, (req[r].prompt - 1) // cfg.hash_tokens)
    hits = 0
    while hits < most and prefix[REFS, rank, ids[first + hits]] >= 0:
        hits += 1
    return hits


@kernel(**INTERNAL)
def _unlink(prefix: Any, rank: int, block: int) -> None:
    newer, older = prefix[NEWER, rank, block], prefix[OLDER, rank, block]
    prefix[NEWER, rank, older] = newer
    prefix[OLDER, rank, newer] = older


@kernel(**INTERNAL)
def take(ranks: Any, prefix: Any, rank: int, block: int) -> None:
    """One more request uses a cached block."""
    if prefix[REFS, rank, block] == 0:
        _unlink(prefix, rank, block)
        ranks[rank].num_evictable -= 1
    else:
        ranks[rank].num_repeats += 1
    prefix[REFS, rank, block] += 1


@kernel(**INTERNAL)
def drop(ranks: Any, prefix: Any, rank: int, block: int) -> None:
    """One request less uses a cached block; unused, it is the last to be evicted."""
    prefix[REFS, rank, block] -= 1
    if prefix[REFS, rank, block] == 0:
        end = prefix.shape[2] - 1
        last = prefix[OLDER, rank, end]
        prefix[NEWER, rank, last] = block
        prefix[OLDER, rank, block] = last
        prefix[NEWER, rank, block] = end
        prefix[OLDER, rank, end] = block
        ranks[rank].num_evictable += 1
    else:
        ranks[rank].num_repeats -= 1


@kernel(**INTERNAL)
def evict(ranks: Any, prefix: Any, cfg: Any, rank: int) -> None:
    """Free the block that was unused for longest."""
    end = prefix.shape[2] - 1
    block = prefix[NEWER, rank, end]
    _unlink(prefix, rank, block)
    prefix[REFS, rank, block] = -1
    ranks[rank].num_evictable -= 1
    ranks[rank].free_blocks += cfg.hash_blocks


@kernel(**INTERNAL)
def register(req: Any, ids: Any, ranks: Any, prefix: Any, cfg: Any, rank: int, r: int) -> None:
    """The prompt of `r` is computed: its whole blocks become shared ones."""
    first = req[r].hash_start
    whole = min(req[r].hash_count, req[r].prompt // cfg.hash_tokens)
    for j in range(req[r].shared, whole):
        block = ids[first + j]
        req[r].blocks -= cfg.hash_blocks
        if prefix[REFS, rank, block] < 0:
            prefix[REFS, rank, block] = 1
        else:
            take(ranks, prefix, rank, block)
            ranks[rank].free_blocks += cfg.hash_blocks
    req[r].shared = max(req[r].shared, whole)
