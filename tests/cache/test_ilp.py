"""The integer programs beside enumeration and the fast methods."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.caching.bits import (
    assumed_errors,
    bit_budget,
    choose_bits,
    loss_table,
    significance,
)
from moesim.caching.slots import allocate_slots, allocate_tiers
from moesim.errors import InfeasibleError, InputError
from moesim.jobs.cache_exact import exact_bits
from moesim.solvers.ilp.cache import choose, solve_bits, solve_slots, solve_tiers


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 12))
def test_slots_equal_dynamic_programming(seed: int, budget: int) -> None:
    cost = np.random.default_rng(seed).random((4, 5))
    found = solve_slots(cost, budget)
    _, best = allocate_slots(cost, budget)
    assert found.status == "optimal"
    assert found.objective == pytest.approx(best)
    assert found.bound <= found.objective
    assert found.pick.sum() <= budget


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_tiers_equal_enumeration(seed: int) -> None:
    """INV-7: two layers, 0 .. 2 slots, three experts; DRAM for three of the six experts."""
    rng = np.random.default_rng(seed)
    misses = np.sort(rng.random((2, 3, 3)), axis=1)[:, ::-1]
    near, far = np.full((2, 3), 1.0), np.full((2, 3), 5.0)
    found = solve_tiers(misses, near, far, budget_slots=2, budget_dram=3)
    best = np.inf
    for slots in product(range(3), repeat=2):
        for dram in product([False, True], repeat=6):
            if sum(slots) > 2 or sum(dram) > 3:
                continue
            where = np.where(np.array(dram).reshape(2, 3), near, far)
            best = min(best, sum(float(misses[i, c] @ where[i]) for i, c in enumerate(slots)))
    assert found.objective == pytest.approx(best)
    assert found.bound <= best + 1e-6
    assert (found.slots.sum(), found.in_dram.sum()) <= (2, 3)
    slots, on_nvme, own, bound = allocate_tiers(misses, near, far, 2, 3)
    assert slots.sum() <= 2
    assert on_nvme.sum() == 3
    assert bound - 1e-9 <= best <= own + 1e-9
    assert own <= 1.25 * best


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(8, 15))
def test_bits_equal_enumeration_and_greedy_comes_close(seed: int, budget: int) -> None:
    """Five experts in {1, 2, 3} bits, at least one of 2 and one of 3 (MC-MoE's program)."""
    worth = np.random.default_rng(seed).random((1, 5))
    loss = loss_table(worth, assumed_errors((1, 5)))
    found = solve_bits(loss[0], budget)
    best = min(
        sum(loss[0, e, b] for e, b in enumerate(pick))
        for pick in product(range(3), repeat=5)
        if sum(b + 1 for b in pick) <= budget and 1 in pick and 2 in pick
    )
    assert found.objective == pytest.approx(best)
    greedy = choose_bits(loss, budget / 5)[0]
    assert {2, 3} <= set(greedy.tolist())
    assert greedy.sum() <= budget
    value = sum(loss[0, e, b - 1] for e, b in enumerate(greedy))
    assert best - 1e-12 <= value <= 1.15 * best


def test_bits_by_hand() -> None:
    """Three experts of worth 1, 2, 4, six bits: one each of 1, 2, 3 bits, the worthiest gets 3:
    loss 1/4 + 2/16 + 4/64 = 0.4375. Nine bits would be all at 3, but one must have 2: 1/16 + 6/64
    (the least worthy), 8 bits."""
    loss = loss_table(np.array([[1.0, 2.0, 4.0]]), assumed_errors((1, 3)))
    assert choose_bits(loss, 2.0).tolist() == [[1, 2, 3]]
    assert solve_bits(loss[0], 6).objective == pytest.approx(0.4375)
    assert choose_bits(loss, 3.0).tolist() == [[2, 3, 3]]
    assert solve_bits(loss[0], 9).objective == pytest.approx(1 / 16 + 6 / 64)


def test_significance_by_hand(toys) -> None:  # type: ignore[no-untyped-def]
    """Expert 0 is chosen twice with weights .8 and .6, expert 1 once with .2, 2 once with .4:
    shares 1/2, 1/4, 1/4; mean weights .7, .2, .4 of 1.3 in all."""
    trace = toys.make_trace(
        [np.array([[[0, 1]], [[0, 2]]])], 4, [np.array([[[0.8, 0.2]], [[0.6, 0.4]]])]
    )
    worth = significance(trace, toys.all_requests(trace), alpha=1.0, beta=1.0)
    expected = [0.5 * 0.7 / 1.3, 0.25 * 0.2 / 1.3, 0.25 * 0.4 / 1.3, 0.0]
    assert worth[0] == pytest.approx(expected, rel=1e-5)


def test_says_nothing_on_standard_output() -> None:
    """HiGHS prints its version there as the first thing of a process; `--json` must be JSON."""
    code = (
        "import numpy as np; from moesim.solvers.ilp.cache import choose;"
        "choose([np.array([1.0, 2.0])], [([np.array([2.0, 1.0])], 1.0)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == ""


def test_bad_input() -> None:
    with pytest.raises(InfeasibleError, match="need"):
        bit_budget(8, 1.2)
    for wrong in (0.5, 9.0, float("nan")):
        with pytest.raises(InputError, match="between 1 and 3"):
            bit_budget(8, wrong)
    with pytest.raises(InfeasibleError):
        choose([np.array([1.0])], [([np.array([2.0])], 1.0)])
    with pytest.raises(InputError):
        choose([np.array([np.inf])], [])
    with pytest.raises(InputError, match="shape"):
        loss_table(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(InputError, match="finite"):
        loss_table(np.ones((1, 1)), np.full((1, 1, 3), np.nan))


def test_bits_of_the_integer_program() -> None:
    """Experts of 1, 2, 3 bits, 9 bits in all. Greedy: the first two get 3 and 2 by the rule, then
    the fourth's first bit is worth 2 and the third's 1, last the second's 1: 0 + 44 + 10 + 6 = 60.
    Better: both bits to the third, 0 + 45 + 0 + 8 = 53."""
    loss = np.array([[[100, 50, 0], [90, 45, 44], [10, 9, 0], [8, 6, 5.9]]])
    assert choose_bits(loss, 2.25).tolist() == [[3, 3, 1, 2]]
    bits, row = exact_bits(loss, 2.25)
    assert bits.tolist() == [[3, 2, 3, 1]]
    assert (row["own"], row["integer_program"]) == (pytest.approx(60), pytest.approx(53))
    assert row["status"] == "optimal"
    assert row["in_plan"]
