"""Batches by shared experts: order by hand, against a slow reference, and what waiting costs."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.caching.batching import Batching, Order, pooled_stream, waits
from moesim.caching.events import decode_stream
from moesim.caching.timeline import all_events
from moesim.errors import InputError, UnknownNameError


def steps_of(stream) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """Lanes that each step serves."""
    return [
        sorted(stream.lane_idx[a:b].tolist())
        for a, b in zip(stream.indptr[:-1], stream.indptr[1:], strict=True)
    ]


def four_requests(toys: ModuleType):  # type: ignore[no-untyped-def]
    """Two requests of three tokens on experts {0, 1}, two on {2, 3}, in turn by number."""
    want = [[0, 1], [2, 3], [0, 1], [2, 3]]
    return toys.make_trace([np.array([[pair]] * 3) for pair in want], 4)


def test_first_come_first_served_takes_turns(toys: ModuleType) -> None:
    """A pool of 4, batches of 2: lanes 0 and 1, then 2 and 3, and so on."""
    trace = four_requests(toys)
    stream = pooled_stream(trace, toys.all_requests(trace), 2, Batching("fifo", 4))
    assert steps_of(stream) == [[0, 1], [2, 3]] * 3


@pytest.mark.parametrize("order", ["pre-gated", "predicted"])
def test_requests_with_the_same_experts_go_together(toys: ModuleType, order: Order) -> None:
    """The longest waiting lane picks as partner the one with its experts: every step activates 2
    experts instead of 4 (or 2 by luck of the draw). `predicted` goes by the token before, so that
    its first two steps know nothing."""
    trace = four_requests(toys)
    stream = pooled_stream(trace, toys.all_requests(trace), 2, Batching(order, 4))
    events = all_events(trace, stream)
    activated = np.diff(events.indptr)
    assert len(activated) == 6
    known = activated if order == "pre-gated" else activated[2:]
    assert (known == 2).all()
    assert sorted(stream.token_idx.tolist()) == list(range(12))


def test_patience_ends_holding_back(toys: ModuleType) -> None:
    """Three requests on expert 0 and one on 1, batches of 1 from a pool of 4 with eternal patience
    would still take turns, since the longest waiting goes first; with batches of 2 the lonely one
    rides along when it is the oldest. Never longer than patience plus the turns of equals."""
    requests = [np.array([[[0]]] * 6)] * 3 + [np.array([[[1]]] * 6)]
    trace = toys.make_trace(requests, 2)
    for patience in (1, 2, 5):
        stream = pooled_stream(
            trace, toys.all_requests(trace), 2, Batching("pre-gated", 4, patience)
        )
        gaps = []
        for lane in range(4):
            at = [s for s, lanes in enumerate(steps_of(stream)) if lane in lanes]
            gaps += np.diff(at).tolist()
        assert max(gaps) <= patience + 2


def reference(begin, length, batch, pool, patience, sets):  # type: ignore[no-untyped-def]
    """The rule in plain Python: [(place, lane) of each step]."""
    queue = list(zip(begin.tolist(), length.tolist(), strict=True))
    lanes = [list(queue.pop(0)) if queue else [-1, 0] for _ in range(pool)]
    since = [0] * pool
    steps = []
    while any(left for _, left in lanes):
        chosen: list[int] = []
        union: set[int] = set()
        while len(chosen) < batch:
            ready = [i for i in range(pool) if lanes[i][1] and i not in chosen]
            if not ready:
                break
            oldest = min(ready, key=lambda i: (since[i], i))
            pick = oldest
            if chosen and sets.shape[1] and len(steps) - since[oldest] < patience:
                added = {i: len(set(np.flatnonzero(sets[lanes[i][0]])) - union) for i in ready}
                least = min(added.values())
                pick = min((i for i in ready if added[i] == least), key=lambda i: (since[i], i))
            chosen.append(pick)
            union |= set(np.flatnonzero(sets[lanes[pick][0]]))
        steps.append([(lanes[i][0], i) for i in sorted(chosen)])
        for i in sorted(chosen):
            since[i] = len(steps)
            lanes[i][0] += 1
            lanes[i][1] -= 1
            if not lanes[i][1] and queue:
                lanes[i] = list(queue.pop(0))
    return steps


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    extra=st.integers(0, 4),
    patience=st.integers(1, 6),
    order=st.sampled_from(["fifo", "pre-gated"]),
)
def test_kernel_is_the_reference(
    toys: ModuleType, seed: int, batch: int, extra: int, patience: int, order: Order
) -> None:
    from moesim.caching import batching

    trace = toys.random_trace(seed, num_requests=6, tokens=6)
    requests = toys.all_requests(trace)
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 7, 6)
    begin = requests.indptr[:-1].astype(np.int64)
    width = 0 if order == "fifo" else 16
    sets = rng.random((len(requests.token_idx), width)) < 0.3
    place, lane, indptr = batching._schedule(begin, length, batch, batch + extra, patience, sets)
    found = [
        list(zip(place[a:b].tolist(), lane[a:b].tolist(), strict=True))
        for a, b in pairwise(indptr.tolist())
    ]
    assert found == reference(begin, length, batch, batch + extra, patience, sets)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.sampled_from(["fifo", "pre-gated", "predicted"]))
def test_inv1_every_token_once_and_in_order(toys: ModuleType, seed: int, order: Order) -> None:
    """INV-1: every token of every request, once, in order of position."""
    trace = toys.random_trace(seed, num_requests=5, tokens=7)
    requests = toys.all_requests(trace)
    stream = pooled_stream(trace, requests, 2, Batching(order, 4), fit=requests, seed=seed)
    assert sorted(stream.token_idx.tolist()) == sorted(requests.token_idx.tolist())
    assert (np.diff(stream.indptr) <= 2).all()
    seen: dict[int, int] = {}
    for token in stream.token_idx.tolist():
        request, position = int(trace.request_ids[token]), int(trace.positions[token])
        assert position == seen.get(request, 0)
        seen[request] = position + 1
    assert stream.starts.sum() == 5


def test_a_pool_of_the_batch_is_continuous_batching(toys: ModuleType) -> None:
    trace = toys.random_trace(2, num_requests=5, tokens=6)
    requests = toys.all_requests(trace)
    pooled = pooled_stream(trace, requests, 2, Batching("pre-gated", 2), seed=3)
    plain = decode_stream(requests, 2, seed=3)
    assert pooled.token_idx.tolist() == plain.token_idx.tolist()
    assert pooled.indptr.tolist() == plain.indptr.tolist()
    assert waits(pooled, np.ones(pooled.num_steps)).max() == 0.0


def test_waits_by_hand(toys: ModuleType) -> None:
    """Lanes 0, 1 | 2, 3 | 0, 1 | 2, 3 | ... with steps of 1, 2, 3, 4, 5, 6 s. Lanes 0 and 1 start
    at 0, 3 and 10 and ended at 1 and 6: they wait 0, 2 and 4 s. Lanes 2 and 3 are ready at 0 and
    start at 1, then ended at 3 and start at 6, ended at 10 and start at 15: 1, 3 and 5 s."""
    trace = four_requests(toys)
    stream = pooled_stream(trace, toys.all_requests(trace), 2, Batching("fifo", 4))
    waited = waits(stream, np.arange(1.0, 7.0))
    assert waited.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_refused(toys: ModuleType) -> None:
    with pytest.raises(UnknownNameError, match="pre-gated"):
        Batching("pregated", 4)  # type: ignore[arg-type]
    for bad in ({"pool": 0}, {"pool": 10**6}, {"pool": 4, "patience": 0}):
        with pytest.raises(InputError):
            Batching("fifo", **bad)
    trace = four_requests(toys)
    with pytest.raises(InputError, match="pool"):
        pooled_stream(trace, toys.all_requests(trace), 5, Batching("fifo", 4))
