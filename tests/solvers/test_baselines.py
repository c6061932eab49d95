"""Linear, round robin and greedy placement by hand; replica repair; the registry; Problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InfeasibleError, InputError, UnknownNameError
from moesim.placement import EMPTY
from moesim.solvers.base import Problem, Solution, Traffic
from moesim.solvers.methods.greedy import Greedy, replica_counts
from moesim.solvers.methods.linear import Linear
from moesim.solvers.methods.round_robin import RoundRobin
from moesim.solvers.registry import find_solver, solver_names
from moesim.solvers.repair import separate_replicas


def problem(load: list[float], capacity: list[int], **options: Any) -> Problem:
    """One layer, one batch."""
    return Problem(
        np.array(load, np.float32)[None, None],
        np.array(capacity),
        options.pop("nodes", 1),
        **options,
    )


def rows(solution: Solution) -> list[list[int]]:
    """Experts of each GPU in the first layer, empty slots left out."""
    placement = solution.placement
    table = placement.physical_to_logical[0].reshape(placement.num_gpus, -1)
    return [[int(e) for e in row if e != EMPTY] for row in table]


def test_linear() -> None:
    """Experts in order, redundant slots from 0 again, as vLLM and SGLang start."""
    assert rows(Linear().solve(problem([1] * 6, [2, 2, 2]))) == [[0, 1], [2, 3], [4, 5]]
    assert rows(Linear().solve(problem([1] * 6, [4, 1, 3]))) == [[0, 1, 2, 3], [4], [5, 0, 1]]


def test_round_robin() -> None:
    assert rows(RoundRobin().solve(problem([1] * 6, [2, 2, 2]))) == [[0, 3], [1, 4], [2, 5]]
    # Expert 0's replica would come to GPU 0, which holds it: it goes to GPU 1, 1's to GPU 2, ...
    assert rows(RoundRobin().solve(problem([1] * 3, [2, 2, 2]))) == [[0, 2], [1, 0], [2, 1]]
    # GPU 0 has room for one: 0 | 1 2, then expert 0 to GPU 1.
    assert rows(RoundRobin().solve(problem([1] * 3, [1, 3]))) == [[0], [1, 2, 0]]
    # After 0, 1 the only room is on GPU 0, which holds 0: the slot goes to expert 1.
    assert rows(RoundRobin().solve(problem([1] * 2, [2, 1]))) == [[0, 1], [1]]


def test_greedy_by_hand() -> None:
    """Loads 7 5 4 3 3 2, heaviest first to the lightest: 7 | 5, 5 + 4, 7 + 3, then 3 and 2.

    A: 7; B: 5; 4 -> B (9); 3 -> A (10); 3 -> B (12, full at three slots); 2 -> A (12).
    """
    assert rows(Greedy().solve(problem([7, 5, 4, 3, 3, 2], [3, 3]))) == [[0, 3, 5], [1, 2, 4]]


def test_greedy_on_unequal_gpus() -> None:
    """Loads 6 4 2 at speeds 2 : 1. 6 ends at 3 or 6; 4 at (6 + 4) / 2 = 5 or at 4; 2 at 4."""
    given_speed = problem([6, 4, 2], [2, 1], speed=np.array([2.0, 1.0]))
    assert rows(Greedy().solve(given_speed)) == [[0, 2], [1]]


def test_greedy_replicates_the_heaviest() -> None:
    # 12 3 3 on four slots: expert 0 gets two, shares 6 6 3 3: 6 + 3 on both.
    assert rows(Greedy().solve(problem([12, 3, 3], [2, 2]))) == [[0, 1], [0, 2]]


def test_replica_counts() -> None:
    # 12 4 1: 12 -> 6 -> 4, now level with expert 1's 4, which comes second in order.
    assert replica_counts(np.array([12, 4, 1]), 5, 4).tolist() == [3, 1, 1]
    # At most one a GPU: the third copy of expert 0 goes to expert 1.
    assert replica_counts(np.array([12, 4, 1]), 5, 2).tolist() == [2, 2, 1]
    assert replica_counts(np.zeros(3), 3, 2).tolist() == [1, 1, 1]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 6))
def test_replica_counts_minimise_the_largest_share(load: list[int], gpus: int, spare: int) -> None:
    """No other way to hand out the copies has a smaller largest load a replica."""
    slots = min(len(load) + spare, gpus * len(load))
    count = replica_counts(np.array(load), slots, gpus)
    assert count.sum() == slots
    assert count.min() >= 1
    assert count.max() <= gpus
    others = np.indices([gpus] * len(load)).reshape(len(load), -1).T + 1
    others = others[others.sum(axis=1) == slots]
    best = (np.array(load) / others).max(axis=1).min()
    assert (np.array(load) / count).max() == pytest.approx(best)


def test_repair_swaps_the_nearest_load() -> None:
    # Expert 0 twice on GPU 0. Shares: 0: 4, 1: 1, 2: 3, 3: 9. Of GPU 1's slots 2 is the nearest.
    slots = np.array([[[0, 0, 1], [2, 3, -1]]])
    assert separate_replicas(slots, np.array([[8.0, 1, 3, 9]])) == 1
    assert slots.tolist() == [[[0, 2, 1], [0, 3, -1]]]


def test_repair_does_not_use_slots_that_are_not_there() -> None:
    """-1 lies beyond a GPU's capacity: a replica must not be moved there."""
    slots = np.array([[[0, 0], [1, -1]]])
    assert separate_replicas(slots, np.array([[4.0, 0.0]])) == 1
    assert slots.tolist() == [[[0, 1], [0, -1]]]


def test_repair_gives_hopeless_slots_away() -> None:
    # Three replicas of expert 0 on two GPUs: the third becomes expert 2, the most load a replica
    # among what GPU 0 lacks.
    slots = np.array([[[0, 0, 1], [0, 2, 3]]])
    assert separate_replicas(slots, np.array([[30.0, 1, 9, 5]])) == 1
    assert slots.tolist() == [[[0, 2, 1], [0, 2, 3]]]


@given(seed=st.integers(0, 2**32), gpus=st.integers(1, 5), experts=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_repair_always_succeeds(seed: int, gpus: int, experts: int) -> None:
    """INV-2 after repair, from any table that holds every expert and fits the capacities."""
    rng = np.random.default_rng(seed)
    capacity = rng.integers(0, experts + 1, gpus)
    if capacity.sum() < experts:
        capacity[:] = experts
    some = rng.integers(0, experts, capacity.sum() - experts)
    held = rng.permutation(np.concatenate((np.arange(experts), some)))
    slots = np.full((1, gpus, experts), EMPTY)
    for gpu, part in enumerate(np.split(held, np.cumsum(capacity)[:-1])):
        slots[0, gpu, : len(part)] = part
    separate_replicas(slots, rng.integers(0, 9, (1, experts)).astype(float))
    assert set(slots.ravel()) - {EMPTY} == set(range(experts))
    for gpu in range(gpus):
        row = slots[0, gpu]
        assert (row[: capacity[gpu]] != EMPTY).all()
        assert (row[capacity[gpu] :] == EMPTY).all()
        assert len(set(row[: capacity[gpu]])) == capacity[gpu]


def test_registry() -> None:
    for name in solver_names():
        assert find_solver(name).name == name
    with pytest.raises(UnknownNameError) as caught:
        find_solver("local-serch")
    assert caught.value.nearest == "local_search"


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"load": [1, np.nan, 1]}, "NaN"),
        ({"load": [1, np.inf, 1]}, "infinities"),
        ({"load": [1, -1, 1]}, "negatives"),
        ({"capacity": [4, -1]}, "negative number of slots"),
        ({"nodes": 2, "capacity": [1, 1, 1]}, "do not divide over 2 nodes"),
        ({"nodes": 0}, "do not divide over 0 nodes"),
        ({"speed": np.ones(3)}, "as many positive speeds"),
        ({"speed": np.array([1.0, 0.0])}, "as many positive speeds"),
        ({"gpu_type": np.zeros(1, np.int64)}, "as many positive speeds"),
        ({"num_groups": 2}, "do not divide into 2 groups"),
        ({"num_groups": 0}, "do not divide into 0 groups"),
        ({"objective": "traffic"}, "objective traffic needs token-level traffic"),
        ({"objective": "time"}, "objective time needs token-level traffic"),
    ],
)
def test_problem_refuses(options: dict[str, Any], cause: str) -> None:
    options = {"load": [1, 1, 1], "capacity": [2, 2], **options}
    with pytest.raises(InputError, match=cause) as caught:
        problem(**options)
    assert caught.value.remedy


def test_problem_needs_expert_times_for_time() -> None:
    none = np.zeros(0, np.int32)
    traffic = Traffic(none, none, none, none, none, none, none, none, 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expert times"):
        problem([1, 1], [1, 1], objective="time", traffic=traffic)


@pytest.mark.parametrize(
    ("capacity", "cause"),
    [([1, 1], "3 experts do not fit 2 slots on 2 GPUs"), ([4, 1], "hold an expert twice")],
)
def test_infeasible_problems(capacity: list[int], cause: str) -> None:
    with pytest.raises(InfeasibleError, match=cause) as caught:
        problem([1, 1, 1], capacity)
    assert caught.value.exit_code == 1
    assert caught.value.remedy


def test_empty_counts_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(0, 1, 2\)"):
        Problem(np.zeros((0, 1, 2), np.float32), np.array([2]), 1)


def test_gap() -> None:
    placement = Linear().solve(problem([1, 1], [1, 1])).placement
    assert Solution(placement, "feasible", 2.0, 1.5).gap == pytest.approx(0.25)
    assert Solution(placement, "feasible", 2.0).gap is None
    # A bound above the value by rounding is no negative gap.
    assert Solution(placement, "optimal", 2.0, 2.0 + 1e-12).gap == 0.0
