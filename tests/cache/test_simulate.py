"""Cache simulation: conformance, the kernels against the references, INV-10."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.caching.events import decode_stream
from moesim.caching.policies import ONLINE, POLICIES
from moesim.caching.simulate import (
    CacheSettings,
    expert_frequency,
    hit_curves,
    layer_choices,
    model_choices,
    run_policy,
)
from moesim.errors import InputError, UnknownNameError

DYNAMIC = [name for name in POLICIES if name != "static"]


def one_request(toys: ModuleType, events: list[tuple[int, ...]], layers: int, experts: int):  # type: ignore[no-untyped-def]
    ids = np.repeat(np.array(events)[:, None, :], layers, axis=1)
    trace = toys.make_trace([ids], experts)
    return trace, decode_stream(toys.all_requests(trace))


def test_lru_conformance(toys: ModuleType) -> None:
    """Three layers of two slots, event sets {0,1}, {0,2}, {0,1}, {0,3}, {0,1} in each. After the
    two cold misses every event hits 0 and misses its other expert, which replaces the last
    event's: 4 hits of 10 accesses a layer, so 30 accesses, 12 hits, 18 misses."""
    events = [(0, 1), (0, 2), (0, 1), (0, 3), (0, 1)]
    trace, stream = one_request(toys, events, 3, 4)
    curves = hit_curves(trace, stream, CacheSettings("lru"))
    assert curves.accesses.sum() == 30
    assert curves.hits[:, 2].sum() == 12
    assert (curves.accesses - curves.hits[:, 2]).sum() == 18


def test_atomic_and_sequential_differ(toys: ModuleType) -> None:
    """One slot, twice the event set {0, 1}. Atomic: the first event leaves its more recent
    expert, 1, and the second event finds it. Sequential: when 1 is asked for again, 0 has just
    evicted it."""
    trace, stream = one_request(toys, [(0, 1), (0, 1)], 1, 2)
    atomic = hit_curves(trace, stream, CacheSettings("lru", "atomic"))
    sequential = hit_curves(trace, stream, CacheSettings("lru", "sequential"))
    assert atomic.hits[0].tolist() == [0, 1, 2]
    assert sequential.hits[0].tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("policy", "semantics"),
    [(policy, "atomic") for policy in DYNAMIC]
    # the clock of score, lookahead and activation is the token, not the access
    + [(policy, "sequential") for policy in ("lru", "lfu", "lfru", "belady", "optimum")],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_pass_equals_the_reference(
    toys: ModuleType, reference: ModuleType, policy: str, semantics: str, seed: int
) -> None:
    trace = toys.random_trace(seed, num_requests=3, tokens=12, layers=1, experts=7, k=2 + seed % 2)
    stream = decode_stream(toys.all_requests(trace), seed=seed)
    frequency = expert_frequency(trace, toys.all_requests(trace))
    config = CacheSettings(policy, semantics, lookahead=3, alpha=0.5)
    run = run_policy(layer_choices(trace, stream, 0, frequency), config)
    events = np.asarray(trace.expert_ids)[stream.token_idx, 0].tolist()
    gates = np.asarray(trace.gate_weights)[stream.token_idx, 0].tolist()
    if semantics == "sequential":
        events = [[e] for event in events for e in event]
    for capacity in range(1, 8):
        misses = reference.simulate(
            events,
            capacity,
            policy,
            lookahead=3,
            gates=gates,
            start_at=np.flatnonzero(stream.starts).tolist(),
            prior=frequency[0].tolist(),
        )
        assert run.misses_per_event(capacity).tolist() == misses


event_lists = st.lists(
    st.sets(st.integers(0, 4), min_size=1, max_size=3).map(sorted), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(events=event_lists, capacity=st.integers(1, 4))
def test_inv10_optimum_is_dynamic_programming(
    toys: ModuleType, reference: ModuleType, events: list[list[int]], capacity: int
) -> None:
    """INV-10: furthest next use with bypass has the fewest misses there are, Belady the fewest
    with forced admission, and no policy has fewer."""
    width = max(map(len, events))
    ids = np.full((len(events), 1, width), -1)
    for n, event in enumerate(events):
        ids[n, 0, : len(event)] = event
    trace = toys.make_trace([ids], 5)
    stream = decode_stream(toys.all_requests(trace))
    misses = {}
    for name in DYNAMIC:
        run = run_policy(layer_choices(trace, stream, 0), CacheSettings(name))
        misses[name] = int(run.misses_per_event(capacity).sum())
        assert 0 <= misses[name] <= run.events.num_accesses
    assert misses["optimum"] == reference.fewest_misses(events, capacity, forced=False)
    assert misses["belady"] == reference.fewest_misses(events, capacity, forced=True)
    assert (
        misses["optimum"] <= misses["belady"] <= min(misses[n] for n in DYNAMIC if n != "optimum")
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 5),
    semantics=st.sampled_from(["atomic", "sequential"]),
    scope=st.sampled_from(["layer", "model"]),
    warm=st.booleans(),
)
def test_inv10_on_batches(
    toys: ModuleType, seed: int, batch: int, semantics: str, scope: str, warm: bool
) -> None:
    """INV-10 for every size, batch, semantics, scope and start; hits grow with the slots."""
    trace = toys.random_trace(seed)
    requests = toys.all_requests(trace)
    stream = decode_stream(requests, batch, seed)
    frequency = expert_frequency(trace, requests)

    def run(name: str) -> np.ndarray:
        config = CacheSettings(name, semantics, scope, warm)  # type: ignore[arg-type]
        return hit_curves(trace, stream, config, frequency)

    best = run("optimum")
    for name in ONLINE:
        if name == "static" and not warm:
            continue
        curves = run(name)
        assert (curves.accesses == best.accesses).all()
        assert (curves.hits <= best.hits).all()
        assert (np.diff(curves.hits, axis=1) >= 0).all()
        assert (curves.hits[:, -1] <= curves.accesses).all()


def test_static_keeps_the_most_frequent(toys: ModuleType) -> None:
    """Expert 0 is in every event, 1 in two of three: with one slot 3 hits, with two 5."""
    trace, stream = one_request(toys, [(0, 1), (0, 2), (0, 1)], 1, 3)
    frequency = expert_frequency(trace, toys.all_requests(trace))
    curves = hit_curves(trace, stream, CacheSettings("static"), frequency)
    assert curves.hits[0].tolist() == [0, 3, 5, 6]


def test_pinned_experts_are_left_out(toys: ModuleType) -> None:
    trace, stream = one_request(toys, [(0, 1), (0, 2), (0, 1)], 1, 3)
    run = run_policy(layer_choices(trace, stream, 0), CacheSettings("lru"), np.array([0]))
    assert run.events.item.tolist() == [1, 2, 1]
    assert run.hits().tolist() == [0, 0, 1, 1]


def test_shared_pool_equals_one_cache_over_all_items(toys: ModuleType) -> None:
    """With as many slots as experts only first touches miss, wherever the slots are."""
    trace = toys.random_trace(5, layers=3)
    stream = decode_stream(toys.all_requests(trace), 2)
    choices = model_choices(trace, stream)
    assert choices.num_items == 24
    run = run_policy(choices, CacheSettings("lru", scope="model"))
    per_layer = hit_curves(trace, stream, CacheSettings("lru"))
    assert run.hits()[-1] == per_layer.hits[:, -1].sum()
    assert run.events.num_accesses == per_layer.accesses.sum()


def test_decode_stream_batches_continuously(toys: ModuleType) -> None:
    """Requests of 3, 1 and 2 tokens on two lanes: each token once, one a lane and step, a new
    request as soon as a lane is free: 3 steps."""
    trace = toys.make_trace([np.zeros((n, 1, 1), int) for n in (3, 1, 2)], 2)
    stream = decode_stream(toys.all_requests(trace), 2, seed=0)
    assert sorted(stream.token_idx.tolist()) == list(range(6))
    assert stream.starts.sum() == 3
    widths = np.diff(stream.indptr)
    assert widths.max() <= 2
    assert stream.num_steps in (3, 4)
    for s in range(stream.num_steps):
        part = slice(stream.indptr[s], stream.indptr[s + 1])
        assert len(set(stream.lane_idx[part].tolist())) == widths[s]
    positions = np.asarray(trace.positions)[stream.token_idx]
    requests = np.asarray(trace.request_ids)[stream.token_idx]
    for r in range(3):
        assert positions[requests == r].tolist() == sorted(positions[requests == r].tolist())


def test_same_seed_same_bytes(toys: ModuleType) -> None:
    """INV-6."""
    trace = toys.random_trace(1)
    a, b = (decode_stream(toys.all_requests(trace), 3, seed=4) for _ in range(2))
    assert a.token_idx.tobytes() == b.token_idx.tobytes()
    assert (
        a.token_idx.tobytes()
        != decode_stream(toys.all_requests(trace), 3, seed=5).token_idx.tobytes()
    )


def test_bad_input(toys: ModuleType) -> None:
    trace = toys.random_trace(0)
    requests = toys.all_requests(trace)
    stream = decode_stream(requests)
    with pytest.raises(InputError, match="batch size 0"):
        decode_stream(requests, 0)
    with pytest.raises(InputError, match="no tokens"):
        decode_stream(requests.select(np.zeros(4, bool)))
    with pytest.raises(UnknownNameError, match="fifo"):
        hit_curves(trace, stream, CacheSettings("fifo"))
    with pytest.raises(UnknownNameError):
        hit_curves(trace, stream, CacheSettings("lru", "eventual"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="alpha"):
        hit_curves(trace, stream, CacheSettings("score", alpha=0.0))
