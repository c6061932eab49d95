"""Slow, readable references for the cache kernels: one capacity at a time, plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as memo
from itertools import combinations

import numpy as np

Event = Sequence[int]
INF = 10**9


def simulate(
    events: Sequence[Event],
    capacity: int,
    policy: str,
    *,
    lookahead: int = 4,
    alpha: float = 0.5,
    gates: Sequence[Sequence[float]] | None = None,
    start_at: Sequence[int] = (0,),
    prior: Sequence[float] = (),
    one_by_one: bool = False,
) -> list[int]:
    """Misses of each event, from an empty cache.

    `one_by_one`: classify the event first, then admit its items one after another.
    `start_at`: events at which a new request begins (for `activation`, one token an event).
    """
    held: set[int] = set()
    past: list[tuple[int, Event]] = []
    misses = []
    uses = [(n, e) for n, event in enumerate(events) for e in event]
    at = 0
    for n, event in enumerate(events):
        misses.append(sum(e not in held for e in event))
        groups = [[e] for e in event] if one_by_one else [list(event)]
        done: list[int] = []
        for group in groups:
            done += group
            at += len(group)
            seen = [*past, (n, done)]
            rank = _ranking(
                policy, n, seen, uses[at:], events, done, lookahead, alpha, gates, start_at, prior
            )
            if policy == "optimum":
                held = set(sorted(held | set(group), key=rank, reverse=True)[:capacity])
            elif len(group) >= capacity:
                held = set(sorted(group, key=rank, reverse=True)[:capacity])
            else:
                rest = sorted(held - set(group), key=rank, reverse=True)
                held = set(group) | set(rest[: capacity - len(group)])
        past.append((n, event))
    return misses


def _ranking(policy, now, seen, future, events, done, lookahead, alpha, gates, start_at, prior):  # type: ignore[no-untyped-def]
    """A key function: items with larger keys are kept."""
    recency = {e: i for i, e in enumerate(e for _, event in seen for e in event)}
    used_at = {e: n for n, event in seen for e in event}
    if policy == "lru":
        return lambda e: (0, recency[e])
    if policy == "lfu":
        return lambda e: (sum(e in event for _, event in seen), recency[e])
    if policy == "lfru":
        return lambda e: (
            sum(e in event for _, event in seen) / (now - used_at[e] + 1),
            recency[e],
        )
    if policy == "score":

        def score(e: int) -> float:
            value = 0.0
            for n, event in seen:
                value *= 1 - alpha
                if e in event:
                    value += alpha * gates[n][list(event).index(e)]
            return value

        return lambda e: (score(e), recency[e])
    if policy == "activation":
        first = max(s for s in start_at if s <= now)
        tokens = [event for n, event in seen if n >= first]
        return lambda e: (
            (prior[e] + sum(e in event for event in tokens)) / (1 + len(tokens)),
            recency[e],
        )
    if policy == "lookahead":
        ahead = [e for event in events[now + 1 : now + lookahead] for e in event]
        ahead += [e for e in events[now] if e not in done]
        return lambda e: (ahead.count(e), recency[e])
    upcoming = {}
    for i, (_, e) in enumerate(future):
        upcoming.setdefault(e, i)
    return lambda e: (-upcoming.get(e, INF), recency[e])


def fewest_misses(events: Sequence[Event], capacity: int, *, forced: bool) -> int:
    """Dynamic programming over cache contents: the fewest misses from an empty cache.

    After each event the cache may hold any `capacity` items of what it held and what was asked
    for; with `forced` it must hold the whole event, or if that does not fit, only items of it.
    """

    @memo
    def best(n: int, held: frozenset[int]) -> int:
        if n == len(events):
            return 0
        event = frozenset(events[n])
        cost = len(event - held)
        pool = held | event
        options = []
        if forced and len(event) >= capacity:
            options = [frozenset(c) for c in combinations(sorted(event), capacity)]
        elif forced:
            rest = sorted(held - event)
            room = min(capacity - len(event), len(rest))
            options = [event | frozenset(c) for c in combinations(rest, room)]
        else:
            room = min(capacity, len(pool))
            options = [frozenset(c) for c in combinations(sorted(pool), room)]
        return cost + min(best(n + 1, option) for option in options)

    return best(0, frozenset())


def naive_srp(requests: Sequence[np.ndarray], num_experts: int, m: int) -> float:
    """SRP by its definition: every window, every expert, every threshold."""
    counts = []
    for ids in requests:
        for first in range(len(ids) - m + 1):
            window = ids[first : first + m]
            counts += [int((window == e).sum()) for e in range(num_experts)]
    total = sum(counts)
    best = 0.0
    for threshold in range(1, m + 1):
        matched = sum(a for a in counts if a >= threshold)
        predicted = m * sum(a >= threshold for a in counts)
        best = max(best, 2 * matched / (predicted + total))
    return best
