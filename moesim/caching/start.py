"""Making the policy state of expert caches: what they are asked for, what they start with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.caching.events import Events, Stream
from moesim.caching.state import (
    ABSENT,
    ACTIVATION,
    BELADY,
    LFU,
    OPTIMUM,
    PINNED,
    SCORE,
    STATIC,
    Asked,
    CacheState,
    Rule,
    next_uses,
    preload,
)
from moesim.types import FloatArray, IntArray


def asked_of(
    rule: Rule, events: Events, stream: Stream, ids: npt.NDArray[np.integer], num_caches: int = 1
) -> Asked:
    """What `num_caches` caches are asked for: event s * C + c of `events` is step s of cache c.

    ids: [N, C, K] items that the stream's tokens chose (read for ACTIVATION alone).
    """
    next_use = np.zeros(0, np.int64)
    first_use = np.zeros(0, np.int64)
    if rule.policy in (BELADY, OPTIMUM):
        cache = np.tile(np.arange(num_caches, dtype=np.int32), stream.num_steps)
        flat = events.item + np.repeat(cache, np.diff(events.indptr)) * np.int32(events.num_items)
        next_use, first_use = next_uses(flat, num_caches * events.num_items)
    if rule.policy != ACTIVATION:
        ids = ids[:0]
    return Asked(
        events.indptr,
        events.item,
        events.count,
        events.gate,
        next_use,
        first_use,
        np.diff(stream.indptr).astype(np.int64),
        np.ascontiguousarray(ids, np.int32),
        stream.indptr,
        stream.lane_idx,
        stream.starts,
    )


def new_state(
    rule: Rule,
    asked: Asked,
    slots: IntArray,
    pinned: npt.NDArray[np.bool_],
    frequency: FloatArray,
    num_lanes: int,
    *,
    warm: bool,
    weight: FloatArray | None = None,
    order: npt.NDArray[np.int32] | None = None,
) -> tuple[CacheState, npt.NDArray[np.int32]]:
    """The caches before their first step, and [C, E] the order in which items were preloaded, best
    first, -1 after the last.

    slots [C] that the policy manages, pinned [C, E] items with slots of their own, frequency
    [C, E] share of tuning tokens that chose each item, zeros if unknown. warm: start with the most
    frequent items (BELADY and OPTIMUM: with those used soonest) instead of empty; STATIC always
    does. order: another order to start with.
    """
    shape = frequency.shape
    own, prio = _start(rule.policy, asked.first_use, frequency, warm)
    order = own if order is None else order
    prior = frequency
    if not prior.any():
        prior = np.full(shape, asked.ids.shape[2] / shape[1])
    lanes = num_lanes if rule.policy == ACTIVATION else 0
    state = CacheState(
        slots=slots.astype(np.int64),
        held=np.full(shape, ABSENT, np.int32),
        num_held=np.zeros(shape[0], np.int64),
        place=np.where(pinned, np.int32(PINNED), np.int32(ABSENT)),
        mark=np.full(shape, -1, np.int64),
        prio=prio,
        last=np.full(shape, -1 - shape[1], np.int64),
        clock=np.zeros(shape[0], np.int64),
        uses=np.zeros(shape),
        used=np.zeros(shape, np.int64),
        prior=np.ascontiguousarray(prior, np.float64),
        weight=np.ones(shape[1]) if weight is None else weight,
        rows=np.zeros((shape[0], lanes, shape[1])),
        row_size=np.zeros((shape[0], lanes)),
    )
    for cache in range(shape[0]):
        preload(rule, asked, state, cache, order[cache])
    return state, order


def _start(
    policy: int, first_use: IntArray, frequency: FloatArray, warm: bool
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """[C, E] preload order and starting priorities."""
    shape = frequency.shape
    priority = np.zeros(shape)
    if policy in (BELADY, OPTIMUM) and warm:
        first = first_use.reshape(shape)
        return np.argsort(first, axis=1, kind="stable").astype(np.int32), -first.astype(np.float64)
    if (policy != STATIC and not warm) or policy in (BELADY, OPTIMUM):
        return np.full(shape, -1, np.int32), priority
    order = np.argsort(-frequency, axis=1, kind="stable").astype(np.int32)
    if policy in (LFU, SCORE):
        priority = frequency / np.maximum(1e-300, frequency.max(axis=1, keepdims=True))
    return order, priority
