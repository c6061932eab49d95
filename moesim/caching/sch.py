"""Segment cache best hit rate (SCH) and the cache hit rates published with it.

After arXiv:2505.16056 (section 3) and github.com/ljcleo/moe-lrc, whose convention is kept so that
figures can be compared: every request starts with an empty cache; hits are tested against the
state before the token; the token's experts are then admitted one after another (each admission is
forced); a first touch that finds an empty slot counts as a hit ("free first fill"). SCH's cache
keeps what is used most in the segment of `m` tokens that begins with the current one, ties going
to the more recent.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from moesim.caching import stack, state
from moesim.caching.events import Stream, build_events
from moesim.caching.simulate import one_pass
from moesim.caching.state import Rule
from moesim.errors import InputError, UnknownNameError
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace
from moesim.types import FloatArray, IntArray

PUBLISHED = {
    "sch": state.LOOKAHEAD,
    "lru": state.LRU,
    "lfu": state.LFU,
    "belady": state.BELADY,
}


def segment_hit_rates(
    trace: Trace, requests: RequestIndex, m: int = 16, policy: str = "sch"
) -> FloatArray:
    """[L, E + 1]: hit rate of each layer's own cache with 0 .. E slots, all requests pooled.

    `policy`: sch, or lru, lfu, belady under the same convention.
    """
    out = np.zeros((trace.num_layers, trace.num_experts + 1))
    for layer in range(trace.num_layers):
        ids = np.asarray(trace.expert_ids[:, layer])[requests.token_idx].astype(np.int32)
        out[layer] = _hit_rates(ids, requests.indptr, trace.num_experts, m, policy)
    return out


def model_hit_rates(
    trace: Trace, requests: RequestIndex, m: int = 16, policy: str = "sch"
) -> FloatArray:
    """[L x E + 1]: hit rate of one pool shared by all layers, by its slots; a token asks for the
    experts of all its layers at once, as in the published model-wide figures."""
    chosen = np.asarray(trace.expert_ids)[requests.token_idx].astype(np.int32)
    offset = (np.arange(trace.num_layers, dtype=np.int32) * trace.num_experts)[None, :, None]
    ids = np.where(chosen >= 0, chosen + offset, chosen).reshape(len(chosen), -1)
    num_items = trace.num_layers * trace.num_experts
    return _hit_rates(ids, requests.indptr, num_items, m, policy)


def _hit_rates(
    ids: npt.NDArray[np.int32], indptr: IntArray, num_items: int, m: int, policy: str
) -> FloatArray:
    if policy not in PUBLISHED:
        raise UnknownNameError("policy", policy, PUBLISHED)
    if m < 1:
        raise InputError(f"segment length {m} is below 1", "give at least 1")
    count = np.zeros(num_items, np.int64)
    total = 0
    for first, last in pairwise(indptr):
        if last == first:
            continue
        part = ids[first:last]
        ptr = np.arange(len(part) + 1, dtype=np.int64)
        events = build_events(part, np.zeros(part.shape, np.float32), ptr, num_items)
        lane = np.zeros(len(part), np.int32)
        depth = one_pass(
            Rule(PUBLISHED[policy], 0.5, m),
            events,
            Stream(np.arange(len(part)), ptr, lane, lane == 1, 1),
            part,
            semantics=stack.TOKEN,
            warm=False,
            frequency=np.zeros(num_items),
        )
        depth = np.where(depth < 0, -1 - depth, depth)
        count += np.bincount(depth, minlength=num_items)
        total += len(depth)
    return np.concatenate(([0.0], np.cumsum(count) / max(1, total)))
