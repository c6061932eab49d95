"""The timeline: hand-worked schedules, and its contents against the one-pass simulation."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.caching.events import decode_stream
from moesim.caching.policies import POLICIES
from moesim.caching.simulate import CacheSettings, expert_frequency, layer_choices, run_policy
from moesim.caching.timeline import Setup, StepTimes, run_timeline
from moesim.errors import MismatchError


def times(layers: int, experts: int, load: float = 10.0, tokens: int = 8) -> StepTimes:
    """Gate after 2 s, 1 s an expert on the GPU, 4 s a token on the CPU, `load` s a transfer."""
    n = np.arange(tokens + 1)
    return StepTimes(
        np.full((layers, tokens + 1), 2.0),
        np.where(n > 0, 1.0, 0.0),
        4.0 * n,
        np.full((layers, experts), load),
        np.zeros((layers, experts)),
        np.zeros(tokens + 1),
    )


def setup(layers: int, experts: int, capacity: int, **changes) -> Setup:  # type: ignore[no-untyped-def]
    base = {
        "slots": np.full(layers, capacity),
        "pinned": np.zeros((layers, experts), bool),
        "cpu_layers": np.zeros(layers, bool),
        "frequency": np.zeros((layers, experts)),
        "warm": False,
    }
    return Setup(**(base | changes))


def one_request(toys: ModuleType, tokens: list, experts: int):  # type: ignore[no-untyped-def, type-arg]
    trace = toys.make_trace([np.array(tokens)], experts)
    return trace, decode_stream(toys.all_requests(trace))


def test_on_demand_by_hand(toys: ModuleType) -> None:
    """One layer, experts {0,1} then {0,2}, two slots. Step 1: gate at 2, transfers arrive at 12
    and 22, experts end at 13 and 23. Step 2: gate at 25, expert 0 ends at 26, expert 2 arrives at
    35 and ends at 36: 13 s. The GPU waits 19 of the first 21 s after the gate, 9 of 11."""
    trace, stream = one_request(toys, [[[0, 1]], [[0, 2]]], 3)
    run = run_timeline(trace, stream, setup(1, 3, 2), times(1, 3))
    assert run.step_s.tolist() == [23.0, 13.0]
    assert run.hits[:, 0].tolist() == [0, 1]
    assert run.fetched[:, 0].tolist() == [2, 1]
    assert run.wait_s[:, 0].tolist() == [19.0, 9.0]
    assert run.link_s == 30.0
    assert run.tokens_per_s == pytest.approx(2 / 36)
    assert run.transfers_per_token == 1.5


def test_cpu_takes_what_it_finishes_first(toys: ModuleType) -> None:
    """Two misses: both over the link end at 23, one on the CPU (4 s) at max(6, 13) = 13, both on
    the CPU at 10. So both; with the CPU ten times as slow the link keeps both: one on the CPU
    would end at 42."""
    trace, stream = one_request(toys, [[[0, 1]]], 3)
    fast = times(1, 3)
    run = run_timeline(trace, stream, setup(1, 3, 2, cpu="auto"), fast)
    assert run.step_s.tolist() == [10.0]
    assert (run.on_cpu.sum(), run.fetched.sum()) == (2, 0)
    slow = fast._replace(cpu_s=10 * fast.cpu_s)
    run = run_timeline(trace, stream, setup(1, 3, 2, cpu="auto"), slow)
    assert run.step_s.tolist() == [23.0]
    assert (run.on_cpu.sum(), run.fetched.sum()) == (0, 2)


def test_cpu_layers_never_fetch(toys: ModuleType) -> None:
    """llama.cpp's --n-cpu-moe: layer 0 on the CPU, 2 experts x 4 s after its gate at 2; layer 1
    is warm and ends 2 + 2 later: 14 s."""
    trace, stream = one_request(toys, [[[0, 1], [0, 1]]], 2)
    frequency = np.ones((2, 2))
    plan = setup(
        2,
        2,
        2,
        slots=np.array([0, 2]),
        cpu_layers=np.array([True, False]),
        frequency=frequency,
        warm=True,
    )
    run = run_timeline(trace, stream, plan, times(2, 2))
    assert run.step_s.tolist() == [14.0]
    assert run.on_cpu.tolist() == [[2, 0]]
    assert run.hits.tolist() == [[0, 2]]


def test_prefetch_by_hand(toys: ModuleType) -> None:
    """Two layers, one expert per token, no slots, transfers of 2 s. Layer 0: gate at 2, expert 0
    arrives at 4, ends at 5; behind it the prefetches of experts 1 and 0 for layer 1 arrive at 6
    and 8. Layer 1 begins at 5, its gate is at 7: expert 1 is there and ends at 8, expert 0 was
    wasted. Without prefetch expert 1 would arrive at 9 and end at 10."""
    trace, stream = one_request(toys, [[[0], [1]]], 2)
    fast = times(2, 2, load=2.0)
    predicted = np.array([[[-1, -1], [1, 0]]], np.int16)
    run = run_timeline(trace, stream, setup(2, 2, 0, depth=1, width=2), fast, predicted)
    assert run.step_s.tolist() == [8.0]
    assert run.staged.tolist() == [[0, 1]]
    assert run.wasted.tolist() == [[0, 1]]
    assert run.link_s == 6.0
    bare = run_timeline(trace, stream, setup(2, 2, 0), fast)
    assert bare.step_s.tolist() == [10.0]


def test_late_prefetch_is_waited_for_and_unstarted_ones_are_dropped(toys: ModuleType) -> None:
    """As above with transfers of 5 s: expert 0 arrives at 7 and ends at 8; the prefetch of 1 runs
    from 7 to 12, that of 0 has not started at the gate of layer 1 (10) and is dropped. Layer 1
    waits until 12 and ends at 13: no byte is wasted."""
    trace, stream = one_request(toys, [[[0], [1]]], 2)
    predicted = np.array([[[-1, -1], [1, 0]]], np.int16)
    run = run_timeline(
        trace, stream, setup(2, 2, 0, depth=1, width=2), times(2, 2, load=5.0), predicted
    )
    assert run.step_s.tolist() == [13.0]
    assert run.wasted.sum() == 0
    assert run.link_s == 10.0


def test_fetch_overtakes_queued_prefetches(toys: ModuleType) -> None:
    """Three layers, depth 2, transfers of 10 s: at the gate of layer 0 (2) expert 0 is fetched
    until 12 and predictions 1 (layer 1) and 1 (layer 2) queue behind it. Layer 0 ends at 13, gate
    of layer 1 at 15: the prefetch for layer 1 started at 12 and is wrong. Expert 0 is fetched
    from 22 to 32, ahead of the queued prefetch for layer 2. Layer 1 ends at 33; the prefetch for
    layer 2 runs from 32 to 42, its gate is at 35, it ends at 43."""
    trace, stream = one_request(toys, [[[0], [0], [1]]], 2)
    predicted = np.array([[[-1], [1], [1]]], np.int16)
    run = run_timeline(trace, stream, setup(3, 2, 0, depth=2, width=1), times(3, 2), predicted)
    assert run.step_s.tolist() == [43.0]
    assert run.wasted.tolist() == [[0, 1, 0]]
    assert run.staged.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_contents_equal_the_one_pass_simulation(
    toys: ModuleType, policy: str, warm: bool, batch: int
) -> None:
    trace = toys.random_trace(7, num_requests=6, tokens=25, layers=3)
    requests = toys.all_requests(trace)
    stream = decode_stream(requests, batch, seed=1)
    frequency = expert_frequency(trace, requests)
    config = CacheSettings(policy, warm=warm, lookahead=3)
    for capacity in (1, 2, 5, 8):
        plan = setup(3, 8, capacity, frequency=frequency, warm=warm, policy=policy, lookahead=3)
        run = run_timeline(trace, stream, plan, times(3, 8))
        for layer in range(3):
            depths = run_policy(layer_choices(trace, stream, layer, frequency), config)
            assert run.fetched[:, layer].tolist() == depths.misses_per_event(capacity).tolist()


def test_pinned_and_slots_equal_the_one_pass_simulation(toys: ModuleType) -> None:
    trace = toys.random_trace(8, layers=1)
    requests = toys.all_requests(trace)
    stream = decode_stream(requests)
    pinned = np.zeros((1, 8), bool)
    pinned[0, [2, 5]] = True
    run = run_timeline(trace, stream, setup(1, 8, 3, pinned=pinned), times(1, 8))
    depths = run_policy(layer_choices(trace, stream, 0), CacheSettings("lru"), np.array([2, 5]))
    assert run.fetched[:, 0].tolist() == depths.misses_per_event(3).tolist()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(0, 8),
    depth=st.integers(0, 3),
    cpu=st.sampled_from(["none", "auto"]),
    policy=st.sampled_from(list(POLICIES)),
)
def test_conservation(
    toys: ModuleType, seed: int, slots: int, depth: int, cpu: str, policy: str
) -> None:
    """INV-1: every access is a hit, staged, fetched or computed on the CPU, once. INV-4: no step
    is shorter than its own work. The link is busy for what it moved."""
    trace = toys.random_trace(seed, layers=3)
    requests = toys.all_requests(trace)
    stream = decode_stream(requests, 2, seed)
    rng = np.random.default_rng(seed)
    predicted = rng.integers(-1, 8, (stream.num_steps, 3, 2)).astype(np.int16)
    predicted[predicted[..., 0] == predicted[..., 1]] = -1
    table = times(3, 8, load=1.5)
    plan = setup(
        3,
        8,
        slots,
        depth=depth,
        width=2,
        cpu=cpu,
        policy=policy,
        frequency=expert_frequency(trace, requests),
    )
    run = run_timeline(trace, stream, plan, table, predicted)
    distinct = [
        len(set(np.asarray(trace.expert_ids)[stream.token_idx[a:b], layer].ravel().tolist()))
        for a, b in zip(stream.indptr[:-1], stream.indptr[1:], strict=True)
        for layer in range(3)
    ]
    served = run.hits + run.staged + run.fetched + run.on_cpu
    assert served.ravel().tolist() == distinct
    moved = int(run.staged.sum() + run.fetched.sum() + run.wasted.sum())
    assert run.link_s == pytest.approx(1.5 * moved)
    on_gpu = (run.hits + run.staged + run.fetched).sum(axis=1)
    assert (run.step_s >= 6.0 + on_gpu - 1e-9).all()
    assert (run.wait_s >= -1e-9).all()
    if depth == 0:
        assert run.staged.sum() == run.wasted.sum() == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), policy=st.sampled_from(list(POLICIES)))
def test_inv9_more_slots_never_slower(toys: ModuleType, seed: int, policy: str) -> None:
    """INV-9, without CPU and prefetch, whose choices change what is admitted."""
    trace = toys.random_trace(seed)
    requests = toys.all_requests(trace)
    stream = decode_stream(requests)
    frequency = expert_frequency(trace, requests)
    total = [
        run_timeline(
            trace, stream, setup(2, 8, c, policy=policy, frequency=frequency), times(2, 8)
        ).step_s.sum()
        for c in range(9)
    ]
    assert (np.diff(total) <= 1e-9).all()


def test_mismatch(toys: ModuleType) -> None:
    trace = toys.random_trace(0)
    stream = decode_stream(toys.all_requests(trace), 3)
    with pytest.raises(MismatchError, match="layers and experts"):
        run_timeline(trace, stream, setup(1, 8, 2), times(1, 8))
    with pytest.raises(MismatchError, match="3 tokens"):
        run_timeline(trace, stream, setup(2, 8, 2), times(2, 8, tokens=2))
