"""vllm-ascend's policies and SGLang's waterfill, on cases worked by hand, and what they keep."""

from __future__ import annotations

from types import ModuleType

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.planning.balancing.eplb import Rhythm, _Clock
from moesim.planning.balancing.flashlb import FlashLb, place, renamed
from moesim.planning.balancing.swift import Swift, rebalance
from moesim.planning.balancing.waterfill import fill
from tests.planning.test_balancing import Moves, bench_of


def loads(num: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(0, 60), min_size=num, max_size=num).map(
        lambda values: np.array(values, float)
    )


def test_swift_swaps_once_between_two_gpus() -> None:
    """Loads 9 + 5 and 2 + 0, no redundant slot. Swapping 9 for 2 leaves 7 and 9, 9 for 0 leaves 5
    and 11, 5 for 2 leaves 11 and 5, 5 for 0 leaves 9 and 7: the first of the two 9s. The pair may
    not swap again."""
    table = np.array([[0, 1], [2, 3]], np.int32)
    rebalance(np.array([9.0, 5.0, 2.0, 0.0]), 0.01, table)
    assert table.tolist() == [[2, 1], [0, 3]]


def test_swift_leaves_what_is_even() -> None:
    table = np.array([[0, 1], [2, 3]], np.int32)
    rebalance(np.array([9.0, 5.0, 7.0, 7.0]), 0.01, table)
    assert table.tolist() == [[0, 1], [2, 3]]


def test_swift_gives_the_redundant_slot_anew() -> None:
    """GPU 1 holds expert 1 a second time; loads 12 + 2 + 3 and 2 + 3 + 2. Its slot goes to expert
    0, which it lacks, at 2/3 of its 12 tokens per replica: 8 + 4 + 3 and 2 + 3 + 8, less than 17.
    GPU 0 has sent to GPU 1, so that they do not swap."""
    table = np.array([[0, 1, 4], [2, 3, 1]], np.int32)
    rebalance(np.array([12.0, 4.0, 2.0, 3.0, 3.0]), 0.01, table)
    assert table.tolist() == [[0, 1, 4], [2, 3, 0]]


@given(loads(8))
@settings(max_examples=60, deadline=None)
def test_swift_keeps_every_expert_and_never_doubles_one(load: np.ndarray) -> None:
    table = np.array([[0, 1, 2, 3], [4, 5, 0, 1], [6, 7, 2, 3]], np.int32)
    before = table.copy()
    rebalance(load, 0.01 * load.sum() / 3, table)
    assert set(table.ravel()) == set(range(8))
    assert all(len(set(row)) == 4 for row in table)
    stays = [len(set(a) & set(b)) for a, b in zip(before.tolist(), table.tolist(), strict=True)]
    kept = [(a == b).sum() for a, b in zip(before, table, strict=True)]
    assert stays == kept


@given(st.integers(0, 1000), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_flashlb_holds_every_expert_once_a_gpu(seed: int, extra: int) -> None:
    rng = np.random.default_rng(seed)
    samples = rng.poisson(rng.lognormal(0, 1, 12) * 20, (16, 12)) + 1.0
    table = place(samples, 4, 3 + extra)
    if table.min() >= 0:
        assert set(table.ravel()) == set(range(12))
        assert all(len(set(row)) == 3 + extra for row in table)


def test_flashlb_gives_the_replica_to_the_heaviest() -> None:
    """Five experts on two GPUs of three slots: one replica, which min-max gives expert 0; placed,
    both GPUs have 10/2 + ..., 4 + 3 against 4 + 3 at best."""
    table = place(np.array([[10.0, 4.0, 4.0, 3.0, 3.0]]), 2, 3)
    assert [row.tolist().count(0) for row in table] == [1, 1]
    assert sorted(sum([0, 4, 4, 3, 3][e] for e in row) for row in table) == [7, 7]


def test_renaming_keeps_what_stays_in_its_slot() -> None:
    """GPU 0's experts are in the new GPU 1: the names change, one expert of each GPU moves."""
    old = np.array([[0, 1], [2, 3]], np.int32)
    assert renamed(old, np.array([[3, 1], [2, 0]], np.int32)).tolist() in (
        [[0, 2], [1, 3]],
        [[3, 1], [2, 0]],
    )
    assert renamed(old, np.array([[3, 2], [1, 0]], np.int32)).tolist() == old.tolist()


def test_ascend_changes_one_layer_in_a_step(build: ModuleType) -> None:
    """Window over at step 7, plan 50 steps: layers 0 and 2 change in steps 57 and 59. Weights take
    105 us, 157.5 beside dispatch and combine on half of steps of 100 us: each step waits for the
    57.5 beyond it."""
    bench = bench_of(build)
    moves = Moves(np.array([[100.0], [0.0], [100.0]]), np.array([1, 0, 1]), np.ones(3), 5.0)
    clock = _Clock(bench, Rhythm(100, 10, asynchronous=True, delay=50), 100.0, 0.5)
    assert clock.changes(7, moves) == [(57, slice(0, 1)), (59, slice(2, 3))]
    assert clock.slowed_us == 2 * 57.5


def waterfilled(routed: list[int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """One expert a GPU, top-1, `routed` tokens of each; all tokens at home on GPU 0."""
    num = len(routed)
    ids = np.repeat(np.arange(num), routed)[:, None, None]
    home = np.zeros(len(ids), np.int64)
    at_home = np.zeros(num, np.int64)
    at_home[0] = tokens
    shared, messages = np.zeros((1, num), np.int64), np.zeros((1, num, num), np.int64)
    homes = np.arange(num)[None]
    load = np.array([routed])
    fill(ids, np.arange(len(ids)), home, homes, load, at_home, False, shared, messages)
    return shared[0], messages[0]


def test_waterfill_goes_where_the_token_goes_anyway() -> None:
    """GPU 0 has 100 choices and 200 tokens of its own: above the target, (200 + 200 + 200) / 2 =
    300? It is not (300 of 300), nor is GPU 1 (100): any GPU may be taken. What GPU 1 lacks, 200 at
    10/11, is all that there is to draw from, so all shared experts go there, and those of the 100
    tokens that are routed to GPU 0 are sent for that alone."""
    shared, messages = waterfilled([100, 100], 200)
    assert shared.tolist() == [0, 200]
    assert messages.tolist() == [[0, 100], [0, 0]]


def test_waterfill_keeps_small_batches_at_home() -> None:
    shared, messages = waterfilled([20, 20], 40)
    assert shared.tolist() == [40, 0]
    assert not messages.any()


def test_both_policies_serve_a_course_with_redundant_slots(build: ModuleType) -> None:
    """They start from linear placement, whose redundant slots are filled, and lessen imbalance."""
    bench = bench_of(build)
    none = bench.price([(0, bench.placed("linear", "balance", 4))]).imbalance.mean()
    rhythm = Rhythm(20, 10, asynchronous=True, delay=1)
    for scheme in (Swift("s", "", rhythm, 4), FlashLb("f", "", rhythm, 4)):
        done = scheme.run(bench)
        assert done.num_plans > 0
        assert done.moved_experts > 0
        assert done.priced.imbalance.mean() < none
