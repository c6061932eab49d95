"""Compiled kernels: priorities of every policy, and the one-pass stack simulation.

All policies are expressed by a priority of each item at each moment, so that after an event the
cache of capacity c holds the event's items and, of the others it held, those with the highest
priority (`forced` admission), or simply the c best of all (`bypass`). As long as the priority
does not depend on c, the caches of all capacities are nested (Mattson, Gecsei, Slutz, Traiger
1970), and one list, the *stack*, holds them all: its first c items are the cache of capacity c.
The *depth* of an access is its item's place in the stack before the event: it hits in every
cache of more than `depth` slots.

`tests/cache/reference.py` has the same semantics in plain Python, one capacity at a time.
`timeline_kernel.py` calls these functions from a kernel of its own.
"""

from __future__ import annotations

import numpy as np

from moesim.kernels import kernel

STATIC, LRU, LFU, LFRU, SCORE, ACTIVATION, LOOKAHEAD, BELADY, OPTIMUM = range(9)
ATOMIC, SEQUENTIAL, TOKEN = range(3)
"""When an event's accesses are classified and the cache updated: ATOMIC classifies all, then
updates once for the whole set; TOKEN classifies all, then updates one access after another (the
convention of arXiv:2505.16056); SEQUENTIAL events have one access each, made so by the caller."""

NEVER = np.int64(1) << np.int64(62)


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


@kernel
def observe(  # type: ignore[no-untyped-def]
    policy, now, lo, hi, item, gate, tokens, alpha, next_use, prio, last, clock, count, used
):
    """Update priorities for accesses lo..hi of event `now`, before evictions are decided.

    prio, last, count, used: [num_items], see `stack_depths`. Returns the access clock.
    """
    for i in range(lo, hi):
        e = item[i]
        clock += 1
        last[e] = clock
        if policy == LFU:
            prio[e] += 1.0
        elif policy == LFRU:
            count[e] += 1.0
            used[e] = now
        elif policy == LOOKAHEAD:
            prio[e] -= 1.0
        elif policy in (BELADY, OPTIMUM):
            prio[e] = -float(next_use[i])
        elif policy == LRU:
            prio[e] = clock
    if policy == LFRU:
        for e in range(len(prio)):
            prio[e] = count[e] / (now - used[e] + 1)
    elif policy == SCORE:
        for e in range(len(prio)):
            prio[e] *= 1.0 - alpha
        for i in range(lo, hi):
            prio[item[i]] += alpha * gate[i] / tokens
    return clock


@kernel
def observe_requests(ids, lo, hi, lane, starts, prior, weight, rows, size, prio):  # type: ignore[no-untyped-def]
    """ACTIVATION: add tokens lo..hi to their requests' activation rows and sum the rows.

    rows [lanes, num_items] counts of each lane's request, started at one pseudo-token of `prior`;
    size [lanes] tokens in them (0: lane not used yet). prio becomes the sum over lanes of
    rows / size, times `weight` [num_items].
    """
    for t in range(lo, hi):
        j = lane[t]
        if starts[t] or size[j] == 0.0:
            rows[j] = prior
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
        prio[e] *= weight[e]


@kernel(inline="always")
def _insert(carry, head, tail, e, prio, last):  # type: ignore[no-untyped-def]
    """Insert e into carry[head:tail], which is sorted best first; there is room at `tail`."""
    p = tail
    while p > head and better(e, carry[p - 1], prio, last):
        carry[p] = carry[p - 1]
        p -= 1
    carry[p] = e


@kernel
def _restack(stack, size, lo, hi, item, bypass, prio, last, mark, stamp, carry, place):  # type: ignore[no-untyped-def]
    """The stack after the items lo..hi were asked for; returns its new size.

    Walks down the old stack. `carry[head:tail]`, best first, holds what the capacity reached so
    far could not keep; each further slot goes to the best of it and of the item it held before.
    Below the deepest item asked for nothing changes.
    """
    want = hi - lo
    head, tail, found, p = 0, 0, 0, 0
    for i in range(lo, hi):
        mark[item[i]] = stamp
    if bypass:
        for i in range(lo, hi):
            _insert(carry, head, tail, item[i], prio, last)
            tail += 1
    else:
        while p < want and p < size:
            if mark[stack[p]] == stamp:
                found += 1
            else:
                _insert(carry, head, tail, stack[p], prio, last)
                tail += 1
            p += 1
        for i in range(lo, hi):
            _insert(stack, 0, i - lo, item[i], prio, last)
        for q in range(want):
            place[stack[q]] = q
    while p < size and (found < want or head < tail):
        e = stack[p]
        asked = mark[e] == stamp
        if asked:
            found += 1
        if asked or better(carry[head], e, prio, last):
            stack[p] = carry[head]
            place[carry[head]] = p
            head += 1
            if not asked:
                if tail == len(carry):
                    for q in range(head, tail):
                        carry[q - head] = carry[q]
                    tail -= head
                    head = 0
                _insert(carry, head, tail, e, prio, last)
                tail += 1
        p += 1
    out = size if bypass else max(size, want)
    while head < tail:
        stack[out] = carry[head]
        place[carry[head]] = out
        head += 1
        out += 1
    return out


@kernel
def lru_depths(indptr, item, num_items):  # type: ignore[no-untyped-def]
    """`stack_depths` of LRU from an empty cache: the stack is in order of last use, so an item's
    depth is the number of items used since, which is counted rather than kept."""
    depth = np.empty(len(item), np.int32)
    last = np.zeros(num_items, np.int64)
    clock = np.int64(0)
    touched = 0
    for n in range(len(indptr) - 1):
        for i in range(indptr[n], indptr[n + 1]):
            since = last[item[i]]
            if since == 0:
                depth[i] = -1 - touched
                touched += 1
                continue
            newer = 0
            for j in range(num_items):
                newer += last[j] > since
            depth[i] = newer
        for i in range(indptr[n], indptr[n + 1]):
            clock += 1
            last[item[i]] = clock
    return depth


@kernel
def stack_depths(  # type: ignore[no-untyped-def]
    policy,
    semantics,
    indptr,
    item,
    gate,
    tokens,
    num_items,
    initial,
    start_prio,
    next_use,
    lookahead,
    alpha,
    ids,
    token_ptr,
    lane,
    starts,
    num_lanes,
    prior,
    weight,
):
    """[A] int32: the depth of every access; a first touch of an item that was not in the initial
    stack has depth -1 - (items touched before it), so that both conventions for cold misses can
    be told apart.

    indptr, item, gate: the events. tokens [events]: tokens of each. initial: items preloaded,
    best first. start_prio [num_items]: priorities before the first event. next_use [A]: see
    `next_uses`. lookahead: events ahead, the current one included. alpha: weight of the newest
    score. ids, token_ptr, lane, starts, num_lanes, prior, weight: for ACTIVATION alone, see
    `observe_requests`.
    """
    num_events = len(indptr) - 1
    depth = np.empty(len(item), np.int32)
    stack = np.full(num_items + 1, -1, np.int32)
    place = np.full(num_items, -1, np.int64)
    carry = np.empty(2 * num_items + 2, np.int32)
    mark = np.full(num_items, -1, np.int64)
    prio = start_prio.copy()
    last = np.empty(num_items, np.int64)
    count = np.zeros(num_items)
    used = np.zeros(num_items, np.int64)
    rows = np.zeros((num_lanes if policy == ACTIVATION else 0, num_items))
    lane_size = np.zeros(num_lanes if policy == ACTIVATION else 0)
    for e in range(num_items):
        last[e] = -1 - num_items
    size = len(initial)
    for p in range(size):
        stack[p] = initial[p]
        place[initial[p]] = p
        last[initial[p]] = -1 - p
        if policy == LRU:
            prio[initial[p]] = -1 - p
    clock = np.int64(0)
    stamp = np.int64(0)
    touched = size
    if policy == LOOKAHEAD:
        for n in range(min(lookahead, num_events)):
            for i in range(indptr[n], indptr[n + 1]):
                prio[item[i]] += 1.0
    for n in range(num_events):
        lo, hi = indptr[n], indptr[n + 1]
        for i in range(lo, hi):
            if place[item[i]] >= 0:
                depth[i] = place[item[i]]
            else:
                depth[i] = -1 - touched
                touched += 1
        if policy == ACTIVATION:
            observe_requests(
                ids,
                token_ptr[n],
                token_ptr[n + 1],
                lane,
                starts,
                prior,
                weight,
                rows,
                lane_size,
                prio,
            )
        if policy != STATIC and hi > lo:
            step = 1 if semantics == TOKEN else hi - lo
            for i in range(lo, hi, step):
                clock = observe(
                    policy,
                    n,
                    i,
                    i + step,
                    item,
                    gate,
                    tokens[n],
                    alpha,
                    next_use,
                    prio,
                    last,
                    clock,
                    count,
                    used,
                )
                stamp += 1
                size = _restack(
                    stack,
                    size,
                    i,
                    i + step,
                    item,
                    policy == OPTIMUM,
                    prio,
                    last,
                    mark,
                    stamp,
                    carry,
                    place,
                )
        if policy == LOOKAHEAD and n + lookahead < num_events:
            for i in range(indptr[n + lookahead], indptr[n + lookahead + 1]):
                prio[item[i]] += 1.0
    return depth
