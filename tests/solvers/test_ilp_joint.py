"""The joint model against enumeration (INV-7), and what `ilp` promises about its start."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.solvers.base import Objective, Problem, Traffic
from moesim.solvers.ilp.engine import ENGINES, Outcome
from moesim.solvers.ilp.joint import JointLayer, fits
from moesim.solvers.ilp.messages import convex_below
from moesim.solvers.ilp.neighbourhood import regroup
from moesim.solvers.ilp.solver import JointIlp
from moesim.solvers.kernels.layer_state import LayerState
from moesim.solvers.methods.local_search import LocalSearch
from moesim.solvers.objective import PlacementCost

GOALS: tuple[Objective, ...] = ("balance", "time", "traffic")


def tables(problem: Problem) -> list[np.ndarray]:
    """Every valid table [G, S] of one layer, empty slots included."""
    experts, width = problem.num_experts, int(problem.capacity.max())
    choices = [
        [c for size in range(int(n) + 1) for c in combinations(range(experts), size)]
        for n in problem.capacity
    ]
    out = []
    for parts in product(*choices):
        if len({e for part in parts for e in part}) == experts:
            table = np.full((problem.num_gpus, width), experts, np.int64)
            for gpu, part in enumerate(parts):
                table[gpu, : len(part)] = part
            out.append(table)
    return out


def optimum(problem: Problem) -> float:
    cost = PlacementCost(problem)
    return min(cost.layer_value(table, 0) for table in tables(problem))


def star(
    rng: np.random.Generator, tokens: int, experts: int, gpus: int, dedup: int, bent: bool
) -> Traffic:
    """Tokens with up to two choices; one link out of and one into every GPU. `bent`: collective
    time falls behind a straight line at first, and links count for 1.5 messages."""
    ids = np.argsort(rng.random((tokens, 1, experts)), axis=2)[:, :, :2]
    ids[rng.random(ids.shape) < 0.1] = -1
    links = [[s, gpus + d] if s != d else [] for s in range(gpus) for d in range(gpus)]
    count = np.arange(4 * tokens + 1, dtype=np.float64)
    time = np.where(count > 0, 3.0 + 0.5 * count, 0.0)
    if bent:
        time = 2.0 + 0.4 * np.maximum(count, 7.0) + np.where(count > 9, 1.0, 0.0)
    return Traffic(
        expert_ids=ids.astype(np.int16),
        home=(np.arange(tokens) % gpus).astype(np.int32),
        batch_idx=np.repeat(np.arange(2, dtype=np.int32), tokens // 2),
        indptr=np.concatenate(([0], np.cumsum([len(x) for x in links]))).astype(np.int64),
        link_idx=np.array([x for row in links for x in row], np.int32),
        link_group=np.zeros(2 * gpus, np.int8),
        link_scale=np.full(2 * gpus, 1.5 if bent else 1.0),
        time_us=np.stack([np.stack([time] * 3), np.stack([2 * time] * 3)]),
        dedup=dedup,
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    goal: Objective = draw(st.sampled_from(GOALS))
    shapes = [([2, 2], 1), ([3, 2], 1), ([3, 3], 2), ([2, 2, 2], 1), ([2, 2, 1, 2], 2)]
    capacity, nodes = draw(st.sampled_from(shapes))
    experts = draw(st.integers(max(capacity), min(5, sum(capacity))))
    counts = rng.poisson(rng.gamma(0.7, 12, experts), (6, 1, experts)).astype(np.float32)
    speed = np.ones(len(capacity))
    if draw(st.booleans()):
        speed[-1] = 0.5
    tokens = np.arange(int(counts.max()) + 2, dtype=np.float64)
    table = np.where(tokens > 0, np.sqrt(25 + (0.8 * tokens) ** 2), 0.0)
    bent = draw(st.booleans())
    traffic = star(rng, 12, experts, len(capacity), draw(st.integers(0, 2)), bent)
    return Problem(
        counts=counts,
        capacity=np.array(capacity),
        num_nodes=nodes,
        objective=goal,
        speed=speed,
        expert_us=table[None] if goal == "time" else None,
        traffic=traffic if goal != "balance" else None,
    )


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_bound_below_optimum_below_every_value(problem: Problem) -> None:
    """INV-7. Without redundancy and with convex link times the model is exact, so that it ends
    at the optimum with a proof; elsewhere its bound is still below."""
    cost = PlacementCost(problem)
    best = optimum(problem)
    start = tables(problem)[0]
    found = JointLayer(cost, 0).solve(start, 20.0)
    assert found.bound <= best * (1 + 1e-6)
    assert found.value == pytest.approx(cost.layer_value(found.slots, 0))
    assert best * (1 - 1e-6) <= found.value <= cost.layer_value(start, 0)
    if problem.objective == "balance":
        assert found.proven
        assert found.value == pytest.approx(best, rel=1e-5)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10_000), st.sampled_from(GOALS), st.sampled_from([0, 1, 2]))
def test_exact_with_messages(seed: int, goal: Objective, dedup: int) -> None:
    """Five experts, four GPUs on two nodes, no redundancy, link time 3 + m/2 from the first
    message on: its largest convex function below is steeper at first, and the optimum is found
    all the same wherever the model proves it."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.7, 12, 5), (4, 1, 5)).astype(np.float32)
    tokens = np.arange(int(counts.max()) + 2, dtype=np.float64)
    problem = Problem(
        counts=counts,
        capacity=np.array([2, 1, 1, 1]),
        num_nodes=2,
        objective=goal,
        expert_us=tokens[None],
        traffic=star(rng, 12, 5, 4, dedup, bent=False),
    )
    found = JointLayer(PlacementCost(problem), 0).solve(tables(problem)[0], 20.0)
    best = optimum(problem)
    assert found.bound <= best * (1 + 1e-6)
    if found.proven:
        assert found.value == pytest.approx(best, rel=1e-5)
    if goal != "time":
        assert found.proven


def test_two_heavy_experts_are_parted() -> None:
    """Loads 4, 4, 1, 1 on two GPUs of two slots: 5 and 5, so max over mean is 1, not 8/5."""
    problem = Problem(np.array([[[4, 4, 1, 1]]], np.float32), np.array([2, 2]), num_nodes=1)
    found = JointLayer(PlacementCost(problem), 0).solve(np.array([[0, 1], [2, 3]]), 5.0)
    assert found.value == pytest.approx(1.0)
    assert found.outcome is Outcome.OPTIMAL
    assert {tuple(sorted(row)) for row in found.slots.tolist()} in (
        {(0, 2), (1, 3)},
        {(0, 3), (1, 2)},
    )


def test_replicas_are_part_of_the_model() -> None:
    """12 tokens on one expert and 2 on each of two others, two GPUs of two slots: 6 + 2 on both
    with the heavy one twice, the mean 8; 12 + 0 otherwise."""
    problem = Problem(np.array([[[12, 2, 2]]], np.float32), np.array([2, 2]), num_nodes=1)
    start = np.array([[0, 1], [2, 3]])
    found = JointLayer(PlacementCost(problem), 0).solve(start, 5.0)
    assert found.value == pytest.approx(1.0)
    assert (found.slots == 0).sum() == 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("goal", GOALS)
def test_never_worse_than_its_start(goal: Objective, engine: str) -> None:
    """Three layers, twelve experts in fourteen slots or in twelve, with very little time."""
    rng = np.random.default_rng(3)
    counts = rng.poisson(rng.gamma(0.7, 12, (3, 12)), (40, 3, 12)).astype(np.float32)
    tokens = np.arange(int(counts.max()) + 2, dtype=np.float64)
    traffic = star(rng, 40, 12, 4, 1, bent=False)
    ids = np.repeat(traffic.expert_ids, 3, axis=1)
    for capacity in ([3, 3, 3, 3], [4, 4, 3, 3]):
        problem = Problem(
            counts,
            np.array(capacity),
            2,
            goal,
            expert_us=tokens[None],
            traffic=replace(traffic, expert_ids=ids),
            time_limit_s=1.0,
        )
        cost = PlacementCost(problem)
        start = cost.layer_values(LocalSearch().solve(problem).placement)
        solution = JointIlp(engine).solve(problem)
        reached = cost.layer_values(solution.placement)
        assert (reached <= start * (1 + 1e-6)).all()
        assert solution.objective_value == pytest.approx(reached.mean(), rel=1e-5)
        assert solution.status in ("optimal", "feasible", "time_limit")
        assert solution.layer_bounds is not None
        assert (solution.layer_bounds <= reached * (1 + 1e-6)).all()


def test_a_search_that_is_stopped_returns_its_start() -> None:
    rng = np.random.default_rng(5)
    counts = rng.poisson(9, (30, 2, 16)).astype(np.float32)
    problem = Problem(counts, np.full(4, 4), 1, stop=lambda: True, time_limit_s=100.0)
    solution = JointIlp().solve(problem)
    assert solution.status == "time_limit"
    assert solution.seconds < 20


def test_a_neighbourhood_is_reoptimised() -> None:
    """GPUs 0 and 1 hold 4 + 4 and 1 + 1, GPU 2 holds 3 + 3 and is left alone: 6 is the best."""
    problem = Problem(
        np.array([[[4, 4, 1, 1, 3, 3]]], np.float32), np.array([2, 2, 2]), num_nodes=1
    )
    state = LayerState(PlacementCost(problem), 0, np.array([[0, 1], [2, 3], [4, 5]]))
    improved, _ = regroup(state, np.array([0, 1]), time_limit_s=5.0)
    assert improved
    assert state.slots[2].tolist() == [4, 5]
    assert state.value == pytest.approx(6 / (16 / 3))
    improved, _ = regroup(state, np.array([0, 1]), time_limit_s=5.0)
    assert not improved


def test_the_lines_are_below_the_table() -> None:
    """Whole numbers touch the table at its corners; rounding down by half is allowed for."""
    table = np.array([5.0, 4.0, 4.0, 6.0, 7.0, 10.0])
    for shift in (0.0, 0.5):
        lines = convex_below(table, shift)
        for m in np.arange(0, 12, 0.25):
            count = int(m + 0.5) if shift else int(m)
            last = len(table) - 1
            true = table[min(count, last)] + max(0, count - last) * (table[-1] - table[-2])
            if shift or m == int(m):
                assert max(s * m + c for s, c in lines) <= true + 1e-12
    assert max(s * 5 + c for s, c in convex_below(table, 0.0)) == pytest.approx(10.0)


def test_lines_from_the_fewest_messages_on_keep_the_latency() -> None:
    """10 + m us from the first message on, nothing without: the hull from 0 is 3 m (it ends at 15
    for 5 messages), from 2 messages on nothing is lost."""
    table = np.array([0.0, 11, 12, 13, 14, 15])
    at = np.arange(2, 6)

    def reached(low: int) -> np.ndarray:
        lines = convex_below(table, 0.0, low)
        return np.max([slope * at + constant for slope, constant in lines], axis=0)

    assert reached(2) == pytest.approx(10.0 + at)
    assert (reached(0) <= 3.0 * at + 1e-9).all()


def test_what_is_too_large_for_one_program() -> None:
    counts = np.ones((2, 1, 256), np.float32)
    assert not fits(Problem(counts, np.full(32, 9), 4))
    assert fits(Problem(counts[:, :, :64], np.full(8, 8), 1))
