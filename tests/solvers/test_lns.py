"""Dealing anew against enumeration, and what the large neighbourhood search promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.solvers.base import Objective, Problem, Traffic
from moesim.solvers.kernels.enumerate_parts import (
    Terms,
    best_parts,
    make_parts,
    mean_largest,
)
from moesim.solvers.kernels.layer_state import LayerState, draw_gpus
from moesim.solvers.kernels.placed import Goal, objective
from moesim.solvers.methods.lns import (
    MAX_WAYS,
    LargeNeighbourhoodSearch,
    deal_anew,
    most_freed,
    num_rounds,
    ways,
)
from moesim.solvers.methods.local_search import LocalSearch
from moesim.solvers.objective import PlacementCost

GOALS: tuple[Objective, ...] = ("balance", "time", "traffic")

GRAINS = 2.0**12


def reference(
    item: np.ndarray,
    work: np.ndarray,
    base: np.ndarray,
    fixed: np.ndarray,
    unit: np.ndarray,
    alone: np.ndarray,
    apart: np.ndarray,
    between: np.ndarray,
    ceiling: float,
    weight: float,
    on: np.ndarray,
) -> float:
    """The value of one way of dealing, slowly."""
    load = base.astype(np.float64).copy()
    for i, g in enumerate(on):
        load[g] += work[unit[g], i]
    mean = float(np.maximum(fixed, load.max(axis=0)).mean())
    cost = sum(alone[i, g] for i, g in enumerate(on))
    cost += sum(apart[i, j] * between[on[i], on[j]] for i in range(len(on)) for j in range(i))
    return float(objective(mean, cost, ceiling, weight))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([[2, 2], [3, 2], [2, 2, 1]]),
    st.booleans(),
    st.booleans(),
)
def test_best_of_all_ways(seed: int, room: list[int], kinds: bool, ceiling: bool) -> None:
    """Every way of dealing five items or fewer, replicas apart, one slot possibly empty."""
    rng = np.random.default_rng(seed)
    num, gpus, batches = sum(room), len(room), 7
    start = np.repeat(np.arange(gpus), room)
    item = np.arange(num)
    if rng.random() < 0.5:
        item[-1] = item[0]
    if rng.random() < 0.3:
        item[1] = 99
    unit = np.arange(gpus) % 2 if kinds else np.zeros(gpus, np.int64)
    work = rng.gamma(0.7, 10, (2 if kinds else 1, num, batches))
    work = np.round(work * GRAINS).astype(np.int32)
    work[:, item == 99] = 0
    base = np.round(rng.gamma(1.0, 3, (gpus, batches)) * GRAINS).astype(np.int32)
    fixed = np.round(rng.gamma(1.0, 10, batches) * GRAINS).astype(np.int32)
    alone, apart = rng.random((num, gpus)), rng.random((num, num))
    apart += apart.T
    between = 1 - np.eye(gpus)
    between[0, 1] = between[1, 0] = 0.3
    limits = (12.0, 5.0) if ceiling else (0.0, 0.0)
    given_ = (
        item,
        work / GRAINS,
        base / GRAINS,
        fixed / GRAINS,
        unit,
        alone,
        apart,
        between,
        *limits,
    )
    best = np.inf
    for on in set(permutations(start.tolist())):
        pairs = [(e, g) for e, g in zip(item.tolist(), on, strict=True) if e != 99]
        if len(set(pairs)) == len(pairs):
            best = min(best, reference(*given_, np.array(on)))
    parts = make_parts(item, work, base, fixed, start, unit, 99)
    terms, goal = Terms(alone, apart, between), Goal(*limits, GRAINS)
    found, value, _ = best_parts(parts, terms, goal, np.array(room), 10**6)
    assert np.bincount(found, minlength=gpus).tolist() == room
    assert reference(*given_, found) == pytest.approx(best, rel=1e-4)
    assert value <= best * (1 + 1e-4)


def test_mean_largest_by_hand() -> None:
    """Batches (2, 8): fixed 5, 1; loads 2 + 4 and 3 + 0; rest 8 and 2. Largest 5 and 4 without
    evenness; with halves (2 + 3 + 8) / 2 = 6.5 and (4 + 0 + 2) / 2 = 3, so 6.5 and 4."""
    fixed, loads, rest = (np.array(x, np.int32) * 4 for x in ([5, 1], [[2, 4], [3, 0]], [8, 2]))
    assert mean_largest(fixed, loads, rest, 0, 4.0) == pytest.approx(4.5)
    assert mean_largest(fixed, loads, rest, 2, 4.0) == pytest.approx(5.25)


def test_how_much_is_freed() -> None:
    """C(18, 9) = 48,620 and 12! / 4!^3 = 34,650 ways."""
    assert ways(2, 9) == 48_620
    assert ways(3, 4) == 34_650
    assert most_freed(2) == 9
    assert most_freed(3) == 4
    assert max(ways(2, 9), ways(3, 4)) <= MAX_WAYS


def toy(goal: Objective, capacity: list[int], seed: int = 0, layers: int = 3) -> Problem:
    rng = np.random.default_rng(seed)
    experts, gpus = 12, len(capacity)
    counts = rng.poisson(rng.gamma(0.7, 12, (layers, experts)), (50, layers, experts))
    tokens = np.arange(int(counts.max()) + 2, dtype=np.float64)
    ids = np.argsort(rng.random((64, layers, experts)), axis=2)[:, :, :3]
    links = [[s, gpus + d] if s != d else [] for s in range(gpus) for d in range(gpus)]
    time = np.where(np.arange(400) > 0, 3.0 + 0.2 * np.arange(400), 0.0)
    traffic = Traffic(
        expert_ids=ids.astype(np.int16),
        home=(np.arange(64) % gpus).astype(np.int32),
        batch_idx=np.repeat(np.arange(2, dtype=np.int32), 32),
        indptr=np.concatenate(([0], np.cumsum([len(x) for x in links]))).astype(np.int64),
        link_idx=np.array([x for row in links for x in row], np.int32),
        link_group=np.zeros(2 * gpus, np.int8),
        link_scale=np.ones(2 * gpus),
        time_us=np.stack([np.stack([time] * 3)] * 2),
        dedup=2,
    )
    return Problem(
        counts.astype(np.float32),
        np.array(capacity),
        2,
        goal,
        expert_us=(5.0 + tokens)[None],
        traffic=traffic,
        seed=seed,
    )


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("capacity", [[3, 3, 3, 3], [4, 4, 3, 3]])
def test_never_worse_than_the_local_search(goal: Objective, capacity: list[int]) -> None:
    problem = toy(goal, capacity)
    cost = PlacementCost(problem)
    start = cost.layer_values(LocalSearch().solve(problem).placement)
    solution = LargeNeighbourhoodSearch().solve(problem)
    assert (cost.layer_values(solution.placement) <= start * (1 + 1e-6)).all()
    assert solution.status == "feasible"


@pytest.mark.parametrize("goal", GOALS)
def test_same_bytes_whatever_the_workers(goal: Objective) -> None:
    """INV-6"""
    problem = toy(goal, [4, 4, 3, 3])
    tables = {
        LargeNeighbourhoodSearch(n).solve(problem).placement.physical_to_logical.tobytes()
        for n in (1, 2, 3)
    }
    assert len(tables) == 1


@pytest.mark.parametrize("goal", GOALS)
def test_state_agrees_with_the_objective(goal: Objective) -> None:
    problem = toy(goal, [4, 4, 3, 3])
    cost = PlacementCost(problem)
    placement = LocalSearch().solve(replace(problem, time_limit_s=0)).placement
    rng = np.random.default_rng(0)
    state = LayerState(cost, 1, cost.layer_slots(placement, 1))
    assert state.value == pytest.approx(cost.layer_value(state.slots, 1), rel=1e-5)
    before, gained = state.value, 0
    for _ in range(20):
        gained += deal_anew(state, draw_gpus(state, 2, rng), 1, rng)
        assert state.value == pytest.approx(cost.layer_value(state.slots, 1), rel=1e-5)
    assert (state.value < before) == (gained > 0)


def test_a_better_way_is_taken_and_only_then() -> None:
    """GPUs hold 4 + 4, 1 + 1 and 3 + 3: the first two are dealt to 5 + 5, after which nothing."""
    problem = Problem(
        np.array([[[4, 4, 1, 1, 3, 3]]], np.float32), np.array([2, 2, 2]), num_nodes=1
    )
    state = LayerState(PlacementCost(problem), 0, np.array([[0, 1], [2, 3], [4, 5]]))
    rng = np.random.default_rng(0)
    assert deal_anew(state, np.array([0, 1]), 1, rng)
    assert state.value == pytest.approx(6 / (16 / 3))
    assert not deal_anew(state, np.array([0, 1]), 1, rng)


def test_when_the_time_is_up_the_start_is_returned() -> None:
    problem = replace(toy("time", [3, 3, 3, 3]), time_limit_s=0.0)
    solution = LargeNeighbourhoodSearch().solve(problem)
    assert solution.status == "time_limit"
    assert any("fewer than" in note for note in solution.notes)


def test_a_stopped_search_returns() -> None:
    problem = replace(toy("balance", [3, 3, 3, 3]), stop=lambda: True)
    assert LargeNeighbourhoodSearch().solve(problem).status == "time_limit"


def test_one_gpu_has_nothing_to_deal() -> None:
    problem = Problem(np.ones((3, 1, 4), np.float32), np.array([4]), num_nodes=1)
    assert LargeNeighbourhoodSearch().solve(problem).status == "feasible"


def test_rounds_are_counted_by_size() -> None:
    """More layers, fewer rounds each; never fewer than four."""
    small, large = toy("balance", [3] * 4, layers=2), toy("balance", [3] * 4, layers=40)
    assert num_rounds(small) >= num_rounds(large) >= 4
