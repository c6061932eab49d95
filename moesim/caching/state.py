"""The one policy state of expert caches: which item is in which slot, and which would be given up.

Compiled loops (`stack`, `timeline_kernel`) and Python, one step at a time (the event simulation,
the schedules of the replay), call these functions; when each is called is theirs, and so is time.
`start.py` makes the state. C caches (a layer each, or one for the model) of E items: step `now` of
cache c is event now * C + c of `Asked`.

A policy is a priority of each item at each moment. After an event the cache holds the event's items
and, of the others that it held, those with the highest priority; if the event's items do not fit,
the best of them. OPTIMUM keeps the best of all (bypass). Ties go to the more recently used.
`tests/cache/reference.py` has the same rules in plain Python.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.kernels import kernel
from moesim.types import FloatArray, IntArray

STATIC, LRU, LFU, LFRU, SCORE, ACTIVATION, LOOKAHEAD, BELADY, OPTIMUM = range(9)
NEVER = np.int64(1) << np.int64(62)
ABSENT, PINNED = -1, -2
"""In `CacheState.place`: not in the cache; in a slot of its own that no policy manages."""


class Rule(NamedTuple):
    """A policy (`policies.Policy.code`); alpha: weight of the newest step in SCORE; lookahead:
    steps that LOOKAHEAD sees, the current one included."""

    policy: int
    alpha: float
    lookahead: int


class Asked(NamedTuple):
    """What C caches are asked for over S steps.

    indptr [S * C + 1], item, gate [A]: see `events.Events`; chosen_by [A]: its `count`. next_use
    [A]: index of the next access to the same item, first_use [C * E] of the first, NEVER if none;
    both for BELADY and OPTIMUM alone. tokens [S] of each step. For ACTIVATION alone: ids [N, C, K]
    items that each token chose, token_ptr [S + 1], lane, starts [N] as in `events.Stream`.
    """

    indptr: IntArray
    item: npt.NDArray[np.int32]
    chosen_by: npt.NDArray[np.int32]
    gate: npt.NDArray[np.float32]
    next_use: IntArray
    first_use: IntArray
    tokens: IntArray
    ids: npt.NDArray[np.int32]
    token_ptr: IntArray
    lane: npt.NDArray[np.int32]
    starts: npt.NDArray[np.bool_]


class CacheState(NamedTuple):
    """C caches at one moment.

    slots [C]: slots that the policy manages; held [C, E] the item in each, num_held [C] of them in
    use. place [C, E]: an item's slot, ABSENT or PINNED. mark [C, E]: the last step that asked for
    the item. prio, last [C, E]: priority, and place in the order of use; clock [C] accesses so far.
    LFRU: uses, used [C, E] uses so far and step of the last. ACTIVATION: rows [C, lanes, E] counts
    of each lane's request, started at one pseudo-token of `prior` [C, E], row_size [C, lanes]
    tokens in them (0: lane not used yet), weight [E] of items.
    """

    slots: IntArray
    held: npt.NDArray[np.int32]
    num_held: IntArray
    place: npt.NDArray[np.int32]
    mark: IntArray
    prio: FloatArray
    last: IntArray
    clock: IntArray
    uses: FloatArray
    used: IntArray
    prior: FloatArray
    weight: FloatArray
    rows: FloatArray
    row_size: FloatArray


@kernel
def next_uses(item, num_items):  # type: ignore[no-untyped-def]
    """[A] for each access the index of the next access to the same item, NEVER if none; and
    [num_items] the index of each item's first access."""
    upcoming = np.full(num_items, NEVER, np.int64)
    out = np.empty(len(item), np.int64)
    for i in range(len(item) - 1, -1, -1):
        out[i] = upcoming[item[i]]
        upcoming[item[i]] = i
    return out, upcoming


@kernel(inline="always")
def better(a, b, prio, last):  # type: ignore[no-untyped-def]
    """Whether item a is to be kept rather than b: higher priority, then more recent use."""
    return prio[a] > prio[b] or (prio[a] == prio[b] and last[a] > last[b])


@kernel(inline="always")
def lookup(state, cache, e):  # type: ignore[no-untyped-def]
    """The slot of item e, PINNED, or ABSENT."""
    return state.place[cache, e]


@kernel
def preload(rule, asked, state, cache, order):  # type: ignore[no-untyped-def]
    """Fill the slots with the items of `order`, best first, up to its first -1; then let LOOKAHEAD
    see the first steps."""
    for rank in range(len(order)):
        e = order[rank]
        if e < 0:
            break
        state.last[cache, e] = -1 - rank
        if rule.policy == LRU:
            state.prio[cache, e] = -1 - rank
        slot = state.num_held[cache]
        if state.place[cache, e] == ABSENT and slot < state.slots[cache]:
            state.held[cache, slot] = e
            state.place[cache, e] = slot
            state.num_held[cache] += 1
    if rule.policy == LOOKAHEAD:
        for now in range(min(rule.lookahead, len(asked.tokens))):
            foresee(asked, state, cache, now)


@kernel(allocates=False)
def foresee(asked, state, cache, now):  # type: ignore[no-untyped-def]
    """LOOKAHEAD: step `now` comes into sight."""
    n = now * len(state.slots) + cache
    for i in range(asked.indptr[n], asked.indptr[n + 1]):
        state.prio[cache, asked.item[i]] += 1.0


@kernel(allocates=False)
def update(rule, asked, state, cache, now, arrived):  # type: ignore[no-untyped-def]
    """All of a step: learn of the event, admit those that arrived [any number of items], look
    ahead."""
    learn(rule, asked, state, cache, now)
    for i in range(len(arrived)):
        admit(rule, state, cache, arrived[i], now)
    look_ahead(rule, asked, state, cache, now)


@kernel(allocates=False)
def learn(rule, asked, state, cache, now):  # type: ignore[no-untyped-def]
    """Priorities and marks after step `now` has asked, before anything is admitted."""
    n = now * len(state.slots) + cache
    lo, hi = asked.indptr[n], asked.indptr[n + 1]
    for i in range(lo, hi):
        state.mark[cache, asked.item[i]] = now
    if rule.policy == ACTIVATION:
        observe_requests(asked, state, cache, now)
    if rule.policy != STATIC and hi > lo:
        observe(rule, asked, state, cache, now, lo, hi)


@kernel(allocates=False)
def look_ahead(rule, asked, state, cache, now):  # type: ignore[no-untyped-def]
    """Once step `now` has been served: another step comes into sight of LOOKAHEAD."""
    if rule.policy == LOOKAHEAD and now + rule.lookahead < len(asked.tokens):
        foresee(asked, state, cache, now + rule.lookahead)


@kernel(allocates=False)
def admit(rule, state, cache, e, now):  # type: ignore[no-untyped-def]
    """Put the absent item e, asked for in step `now`, into a slot if the policy wants it there;
    its slot, or ABSENT."""
    if rule.policy == STATIC:
        return ABSENT
    slot = state.num_held[cache]
    if slot < state.slots[cache]:
        state.num_held[cache] += 1
    else:
        slot = evict(rule, state, cache, e, now)
        if slot < 0:
            return ABSENT
    state.held[cache, slot] = e
    state.place[cache, e] = slot
    return slot


@kernel(allocates=False)
def evict(rule, state, cache, e, now):  # type: ignore[no-untyped-def]
    """Take out the item that goes for e, from a full cache: its slot, or ABSENT if e is the worst
    itself. The items of step `now` go last, and not at all before a worse e; under OPTIMUM all
    items are alike."""
    held, mark = state.held[cache], state.mark[cache]
    prio, last = state.prio[cache], state.last[cache]
    num_held = state.num_held[cache]
    worst = -1
    if rule.policy != OPTIMUM:
        for j in range(num_held):
            if mark[held[j]] != now and (worst < 0 or better(held[worst], held[j], prio, last)):
                worst = j
    if worst < 0:
        for j in range(num_held):
            if worst < 0 or better(held[worst], held[j], prio, last):
                worst = j
        if worst < 0 or better(held[worst], e, prio, last):
            return ABSENT
    state.place[cache, held[worst]] = ABSENT
    return worst


@kernel(allocates=False)
def observe(rule, asked, state, cache, now, lo, hi):  # type: ignore[no-untyped-def]
    """Update priorities for accesses lo..hi of step `now`."""
    prio, last, item = state.prio[cache], state.last[cache], asked.item
    policy, clock = rule.policy, state.clock[cache]
    for i in range(lo, hi):
        e = item[i]
        clock += 1
        last[e] = clock
        if policy == LFU:
            prio[e] += 1.0
        elif policy == LFRU:
            state.uses[cache, e] += 1.0
            state.used[cache, e] = now
        elif policy == LOOKAHEAD:
            prio[e] -= 1.0
        elif policy in (BELADY, OPTIMUM):
            prio[e] = -float(asked.next_use[i])
        elif policy == LRU:
            prio[e] = clock
    state.clock[cache] = clock
    if policy == LFRU:
        uses, used = state.uses[cache], state.used[cache]
        for e in range(len(prio)):
            prio[e] = uses[e] / (now - used[e] + 1)
    elif policy == SCORE:
        tokens = asked.tokens[now]
        for e in range(len(prio)):
            prio[e] *= 1.0 - rule.alpha
        for i in range(lo, hi):
            prio[item[i]] += rule.alpha * asked.gate[i] / tokens


@kernel(allocates=False)
def observe_requests(asked, state, cache, now):  # type: ignore[no-untyped-def]
    """ACTIVATION: add the step's tokens to their requests' rows. The priority is the sum over lanes
    of rows / row_size, times the weight."""
    ids, prio = asked.ids[:, cache], state.prio[cache]
    rows, size = state.rows[cache], state.row_size[cache]
    for t in range(asked.token_ptr[now], asked.token_ptr[now + 1]):
        j = asked.lane[t]
        if asked.starts[t] or size[j] == 0.0:
            for e in range(len(prio)):
                rows[j, e] = state.prior[cache, e]
            size[j] = 1.0
        size[j] += 1.0
        for k in range(ids.shape[1]):
            if ids[t, k] >= 0:
                rows[j, ids[t, k]] += 1.0
    prio[:] = 0.0
    for j in range(len(size)):
        if size[j] > 0.0:
            for e in range(len(prio)):
                prio[e] += rows[j, e] / size[j]
    for e in range(len(prio)):
        prio[e] *= state.weight[e]
