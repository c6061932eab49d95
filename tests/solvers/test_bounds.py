"""INV-7: the bounds are below the optimum of every instance small enough to enumerate."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.placement import Placement
from moesim.solvers.base import Objective, Problem, Traffic
from moesim.solvers.bounds.colocation import applies, colocation_bound, least_neighbours
from moesim.solvers.bounds.load import LowerBound, load_bound, lower_bound
from moesim.solvers.objective import PlacementCost
from moesim.solvers.registry import find_solver


def all_placements(capacity: list[int], experts: int) -> list[np.ndarray]:
    """Every valid table [G * S] of one layer with all slots filled."""
    out = []
    choices = [list(combinations(range(experts), size)) for size in capacity]
    width = max(capacity)
    for parts in product(*choices):
        if len({e for part in parts for e in part}) == experts:
            rows = [list(part) + [-1] * (width - len(part)) for part in parts]
            out.append(np.array(rows, np.int32).ravel())
    return out


def optimum(problem: Problem) -> float:
    """The least objective over all placements of a one-layer problem."""
    objective = PlacementCost(problem)
    return min(
        float(
            objective.layer_values(
                Placement(table[None], problem.num_gpus, problem.num_nodes, problem.num_experts)
            )[0]
        )
        for table in all_placements(problem.capacity.tolist(), problem.num_experts)
    )


def star_traffic(
    rng: np.random.Generator, tokens: int, experts: int, gpus: int, dedup: int
) -> Traffic:
    """Tokens with two choices each; one link out of and one into every GPU."""
    ids = np.argsort(rng.random((tokens, 1, experts)), axis=2)[:, :, :2]
    links = [[s, gpus + d] if s != d else [] for s in range(gpus) for d in range(gpus)]
    count = np.arange(2 * tokens + 1, dtype=np.float64)
    time = np.where(count > 0, 3.0 + 0.5 * count, 0.0)
    return Traffic(
        expert_ids=ids.astype(np.int16),
        home=(np.arange(tokens) % gpus).astype(np.int32),
        batch_idx=np.repeat(np.arange(2, dtype=np.int32), tokens // 2),
        indptr=np.concatenate(([0], np.cumsum([len(x) for x in links]))).astype(np.int64),
        link_idx=np.array([x for row in links for x in row], np.int32),
        link_group=np.zeros(2 * gpus, np.int8),
        link_scale=np.ones(2 * gpus),
        time_us=np.stack([np.stack([time] * 3), np.stack([2 * time] * 3)]),
        dedup=dedup,
    )


@st.composite
def small_problems(draw: st.DrawFn) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    goal: Objective = draw(st.sampled_from(["balance", "time", "traffic"]))
    capacity = draw(st.sampled_from([[2, 2], [3, 2], [3, 3], [2, 2, 2], [3, 3, 2]]))
    experts = draw(st.integers(max(capacity), min(6, sum(capacity))))
    skew = rng.gamma(0.7, 12, experts)
    counts = rng.poisson(skew, (5, 1, experts)).astype(np.float32)
    speed = np.ones(len(capacity))
    if draw(st.booleans()):
        speed[-1] = 0.5
    tokens = np.arange(int(counts.max()) + 2, dtype=np.float64)
    table = np.where(tokens > 0, np.sqrt(25 + (0.8 * tokens) ** 2), 0.0)
    traffic = star_traffic(rng, 16, experts, len(capacity), draw(st.integers(0, 2)))
    return Problem(
        counts=counts,
        capacity=np.array(capacity),
        num_nodes=1,
        objective=goal,
        speed=speed,
        expert_us=table[None] if goal == "time" else None,
        traffic=traffic if goal != "balance" else None,
    )


@settings(max_examples=60, deadline=None)
@given(small_problems())
def test_no_placement_is_below_the_bound(problem: Problem) -> None:
    """INV-7: bound <= optimum by enumeration <= the value of any solver."""
    best = optimum(problem)
    assert lower_bound(problem).value <= best * (1 + 1e-5) + 1e-9
    for name in ("linear", "greedy", "local_search"):
        placement = find_solver(name).solve(problem).placement
        assert PlacementCost(problem).layer_values(placement)[0] >= best * (1 - 1e-5)


def balance(counts: list[list[float]], capacity: list[int]) -> Problem:
    """One layer, [B][E] tokens."""
    return Problem(np.array(counts, np.float32)[:, None], np.array(capacity), num_nodes=1)


def test_largest_expert_and_its_lightest_neighbour() -> None:
    """Six of ten tokens on one expert, two GPUs: it shares with a 1: 7 over the mean 5."""
    problem = balance([[6, 1, 1, 2]], [2, 2])
    assert load_bound(PlacementCost(problem), 0) == pytest.approx([7 / 5])
    assert optimum(problem) == pytest.approx(7 / 5)


def test_pigeonhole() -> None:
    """Three experts of 4 and two of 0 on two GPUs: two of the three meet, 8 over the mean 6."""
    problem = balance([[4, 4, 4, 0, 0]], [3, 2])
    assert load_bound(PlacementCost(problem), 0) == pytest.approx([8 / 6])
    assert optimum(problem) == pytest.approx(8 / 6)


def test_a_redundant_slot_halves_the_largest_expert() -> None:
    """12 tokens on one expert and 2 on each of two others, two GPUs of two slots: the spare slot
    makes it 6 per GPU, so the mean of 8 is all that is proven, and it is reached."""
    problem = balance([[12, 2, 2]], [2, 2])
    assert load_bound(PlacementCost(problem), 0) == pytest.approx([1.0])
    assert optimum(problem) == pytest.approx(1.0)


def test_a_slow_gpu_counts_by_its_speed() -> None:
    """Four equal experts on GPUs of speed 1 and 1/2: 1.5 speeds share 4 loads; in units of mean
    speed 0.75 the ratio cannot be below 4 / (1.5 / 0.75) / 2 = 1."""
    problem = Problem(
        np.ones((1, 1, 4), np.float32), np.array([3, 3]), num_nodes=1, speed=np.array([1.0, 0.5])
    )
    assert load_bound(PlacementCost(problem), 0) == pytest.approx([1.0])


def test_one_placement_for_all_batches() -> None:
    """Experts 0..3 on two GPUs of two, three batches that load the pairs 01, 02 and 03 in turn.

    Batch by batch each pair can be kept apart: 1. Any placement has one of the three pairs
    together: (2 + 1 + 1) / 3 = 4/3, and so has the relaxation with y = 1/3 everywhere: every
    loaded expert sees 1 + 1/3."""
    counts = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]], np.float64)
    problem = balance(counts.tolist(), [2, 2])
    floor = load_bound(PlacementCost(problem), 0)
    assert floor == pytest.approx([1, 1, 1])
    assert optimum(problem) == pytest.approx(4 / 3)
    found = colocation_bound(counts.T, 2, floor)
    assert 1.2 < found <= 4 / 3 + 1e-9
    assert lower_bound(problem).kind == "batch by batch and co-location LP"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_colocation_bound_is_below_every_partition(seed: int) -> None:
    """INV-7 on partitions of six experts into 2 or 3 GPUs, by enumeration."""
    rng = np.random.default_rng(seed)
    capacity = [3, 3] if seed % 2 else [2, 2, 2]
    counts = rng.poisson(rng.gamma(0.5, 8, 6), (12, 6)) + 1
    problem = balance(counts.tolist(), capacity)
    assert applies(problem)
    work = PlacementCost(problem).layer_counts(0).astype(np.float64)
    floor = load_bound(PlacementCost(problem), 0)
    found = colocation_bound(work, len(capacity), floor)
    assert floor.mean() - 1e-9 <= found <= optimum(problem) * (1 + 1e-5)


def test_least_neighbours_is_the_cheapest_matching() -> None:
    """Four experts in pairs at costs 01: 5, 02: 1, 03: 4, 12: 4, 13: 1, 23: 5: 02 and 13, 2."""
    cost = np.array([5.0, 1.0, 4.0, 4.0, 1.0, 5.0])
    assert least_neighbours(cost, 4, 1) == pytest.approx(2.0)


def test_relaxation_is_left_out_where_it_does_not_hold() -> None:
    assert not applies(balance([[1, 1, 1]], [2, 2]))
    assert not applies(balance([[1, 1, 1]], [2, 1]))


def test_same_problem_same_bound() -> None:
    """INV-6."""
    rng = np.random.default_rng(3)
    problem = balance(rng.poisson(9, (40, 8)).tolist(), [2, 2, 2, 2])
    assert lower_bound(problem).value == lower_bound(problem).value


def test_gap_is_relative_to_the_plan() -> None:
    bound = LowerBound(np.array([1.0, 3.0]), "")
    assert bound.value == 2.0
    assert bound.gap(2.5) == pytest.approx(0.2)
    assert bound.gap(1.9) == 0.0
