"""The one-pass stack simulation: a policy's hits at every cache size.

As long as no priority of `state` depends on the capacity c, the caches of all capacities are nested
(Mattson, Gecsei, Slutz, Traiger 1970), and one list, the *stack*, holds them all: its first c items
are the cache of capacity c. The *depth* of an access is its item's place in the stack before the
event: it hits in every cache of more than `depth` slots.

`tests/cache/reference.py` has the same semantics in plain Python, one capacity at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.caching.state import (
    ACTIVATION,
    OPTIMUM,
    STATIC,
    better,
    look_ahead,
    observe,
    observe_requests,
)
from moesim.kernels import kernel

ATOMIC, SEQUENTIAL, TOKEN = range(3)
"""When an event's accesses are classified and the cache updated: ATOMIC classifies all, then
updates once for the whole set; TOKEN classifies all, then updates one access after another (the
convention of arXiv:2505.16056); SEQUENTIAL events have one access each, made so by the caller."""


class Stack(NamedTuple):
    """item: the stack, best first. place [E]: each item's place in it, -1 if not there. carry:
    room for the items on their way down."""

    item: npt.NDArray[np.int32]
    place: npt.NDArray[np.int64]
    carry: npt.NDArray[np.int32]


@kernel(inline="always")
def _insert(carry, head, tail, e, prio, last):  # type: ignore[no-untyped-def]
    """Insert e into carry[head:tail], which is sorted best first; there is room at `tail`."""
    p = tail
    while p > head and better(e, carry[p - 1], prio, last):
        carry[p] = carry[p - 1]
        p -= 1
    carry[p] = e


@kernel(allocates=False)
def _restack(stack, size, state, asks, bypass, stamp):  # type: ignore[no-untyped-def]
    """The stack after the items `asks` were asked for; returns its new size.

    Walks down the old stack. `carry[head:tail]`, best first, holds what the capacity reached so
    far could not keep; each further slot goes to the best of it and of the item it held before.
    Below the deepest item asked for nothing changes.
    """
    item, place, carry = stack
    prio, last, mark = state.prio[0], state.last[0], state.mark[0]
    want = len(asks)
    head, tail, found, p = 0, 0, 0, 0
    for i in range(want):
        mark[asks[i]] = stamp
    if bypass:
        for i in range(want):
            _insert(carry, head, tail, asks[i], prio, last)
            tail += 1
    else:
        while p < want and p < size:
            if mark[item[p]] == stamp:
                found += 1
            else:
                _insert(carry, head, tail, item[p], prio, last)
                tail += 1
            p += 1
        for i in range(want):
            _insert(item, 0, i, asks[i], prio, last)
        for q in range(want):
            place[item[q]] = q
    while p < size and (found < want or head < tail):
        e = item[p]
        asked = mark[e] == stamp
        if asked:
            found += 1
        if asked or better(carry[head], e, prio, last):
            item[p] = carry[head]
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
        item[out] = carry[head]
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
def stack_depths(rule, asked, state, order, semantics):  # type: ignore[no-untyped-def]
    """[A] int32: the depth of every access; a first touch of an item that was not in the initial
    stack has depth -1 - (items touched before it), so that both conventions for cold misses can
    be told apart.

    asked, state: of one cache, whose priorities change; order: items preloaded, best first, up to
    the first -1.
    """
    num_items = state.prio.shape[1]
    depth = np.empty(len(asked.item), np.int32)
    stack = Stack(
        np.full(num_items + 1, -1, np.int32),
        np.full(num_items, -1, np.int64),
        np.empty(2 * num_items + 2, np.int32),
    )
    size = 0
    while size < num_items and order[size] >= 0:
        stack.item[size] = order[size]
        stack.place[order[size]] = size
        size += 1
    stamp = np.int64(0)
    touched = size
    for n in range(len(asked.tokens)):
        lo, hi = asked.indptr[n], asked.indptr[n + 1]
        for i in range(lo, hi):
            if stack.place[asked.item[i]] >= 0:
                depth[i] = stack.place[asked.item[i]]
            else:
                depth[i] = -1 - touched
                touched += 1
        if rule.policy == ACTIVATION:
            observe_requests(asked, state, 0, n)
        if rule.policy != STATIC and hi > lo:
            step = 1 if semantics == TOKEN else hi - lo
            for i in range(lo, hi, step):
                observe(rule, asked, state, 0, n, i, i + step)
                stamp += 1
                asks = asked.item[i : i + step]
                size = _restack(stack, size, state, asks, rule.policy == OPTIMUM, stamp)
        look_ahead(rule, asked, state, 0, n)
    return depth
