"""The three published models against enumeration (INV-7), and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.solvers.base import Problem, Traffic, run_solver
from moesim.solvers.ilp.chain import assign, chain_cost, solve_chain, transitions
from moesim.solvers.ilp.engine import ENGINES, Outcome
from moesim.solvers.ilp.moetuner import even_clusters, swapped
from moesim.solvers.ilp.transmissions import home_choices, least_cost
from moesim.solvers.registry import find_solver

NAMES = ("moetuner", "exflow", "transmissions")


def all_assignments(capacity: list[int], items: int) -> list[np.ndarray]:
    """Every [items] of GPUs within capacity."""
    slots = np.repeat(np.arange(len(capacity)), capacity).tolist()
    return [np.array(p) for p in sorted(set(permutations(slots, items)))]


def traffic(ids: np.ndarray, gpus: int, nodes: int) -> Traffic:
    """Tokens dealt to homes in turn; a message costs 1 us within a node and 10 us between."""
    links = gpus * gpus
    node = np.arange(gpus) // (gpus // nodes)
    scale = np.where(node[:, None] == node[None], 1.0, 10.0).ravel()
    own = np.eye(gpus, dtype=bool).ravel()
    indptr = np.concatenate(([0], np.cumsum(~own)))
    count = np.arange(1000, dtype=np.float64)
    return Traffic(
        expert_ids=ids.astype(np.int16),
        home=(np.arange(len(ids)) % gpus).astype(np.int32),
        batch_idx=np.zeros(len(ids), np.int32),
        indptr=indptr.astype(np.int64),
        link_idx=np.flatnonzero(~own).astype(np.int32),
        link_group=np.zeros(links, np.int8),
        link_scale=scale,
        time_us=np.stack([np.stack([count / 2] * 3)] * 2),
        dedup=1,
    )


def problem(ids: np.ndarray, experts: int, capacity: list[int], nodes: int = 1) -> Problem:
    layers = ids.shape[1]
    counts = np.zeros((1, layers, experts), np.float32)
    for layer in range(layers):
        chosen = ids[:, layer].ravel()
        counts[0, layer] = np.bincount(chosen[chosen >= 0], minlength=experts)
    return Problem(
        counts,
        np.array(capacity),
        nodes,
        "traffic",
        traffic=traffic(ids, len(capacity), nodes),
        time_limit_s=30.0,
    )


def test_transitions_by_hand() -> None:
    """Tokens 01 -> 2, 0 -> 2 and 1 -> (none): two steps 0 -> 2, one step 1 -> 2."""
    ids = np.array([[[0, 1], [2, -1]], [[0, -1], [2, -1]], [[1, -1], [-1, -1]]])
    together = transitions(traffic(ids, 1, 1), 3)
    assert together.tolist() == [[[0, 0, 2], [0, 0, 1], [0, 0, 0]]]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([[2, 1], [2, 2], [1, 1, 1]]), st.integers(1, 3))
def test_chain_reaches_the_optimum(seed: int, capacity: list[int], layers: int) -> None:
    """INV-7 for MoETuner's second stage and ExFlow: enumeration over all layers."""
    rng = np.random.default_rng(seed)
    items = int(rng.integers(len(capacity), sum(capacity) + 1))
    together = rng.integers(0, 9, (layers - 1, items, items)).astype(np.float64)
    distance = rng.integers(1, 9, (len(capacity),) * 2).astype(np.float64)
    np.fill_diagonal(distance, 0)
    one = all_assignments(capacity, items)
    best = min(chain_cost(together, distance, np.stack(g)) for g in product(one, repeat=layers))
    start = np.tile(one[0], (layers, 1))
    found = solve_chain(together, distance, np.array(capacity), start, time_limit_s=30)
    assert found.outcome is Outcome.OPTIMAL
    assert found.bound <= best * (1 + 1e-6) + 1e-6
    assert found.cost == pytest.approx(best)
    assert chain_cost(together, distance, found.gpu) == pytest.approx(found.cost)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(4))
def test_even_clusters_reach_the_optimum(seed: int, engine: str) -> None:
    """INV-7 for MoETuner's first stage: all ways to part six experts into three pairs."""
    load = np.random.default_rng(seed).gamma(0.7, 10, 6)
    start = np.repeat(np.arange(3), 2)
    best = min(np.bincount(g, load).max() for g in all_assignments([2, 2, 2], 6))
    cluster, outcome = even_clusters(load, start, 30.0, engine=engine)
    assert outcome is Outcome.OPTIMAL
    assert np.bincount(cluster).tolist() == [2, 2, 2]
    assert best <= np.bincount(cluster, load).max() <= best * (1 + 1.1e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(4))
def test_transmissions_reach_the_optimum(seed: int, engine: str) -> None:
    """INV-7: five experts on GPUs of 3, 1 and 2 slots, by enumeration and by assignment."""
    cost = np.random.default_rng(seed).random((5, 3))
    rows = np.arange(5)
    best = min(cost[rows, g].sum() for g in all_assignments([3, 1, 2], 5))
    picked, outcome = least_cost(cost, np.array([3, 1, 2]), 30.0, engine=engine)
    assert outcome is Outcome.OPTIMAL
    assert cost[rows, picked].sum() == pytest.approx(best)
    assert cost[rows, assign(cost, np.array([3, 1, 2]))].sum() == pytest.approx(best)
    assert (np.bincount(picked, minlength=3) <= [3, 1, 2]).all()


def test_exflow_keeps_tokens_where_they_are() -> None:
    """Tokens step 0 -> 3, 1 -> 2, 2 -> 1, 3 -> 0: placed so that none changes GPU."""
    ids = np.array([[[0], [3]], [[1], [2]], [[2], [1]], [[3], [0]]])
    solution = find_solver("exflow").solve(problem(ids, 4, [2, 2]))
    table = solution.placement.physical_to_logical.reshape(2, 2, 2)
    gpu = [[int(np.flatnonzero((layer == e).any(axis=1))[0]) for e in range(4)] for layer in table]
    assert [gpu[1][3 - e] for e in range(4)] == gpu[0]
    assert "0.0%" in solution.notes[0]


def test_exflow_prefers_the_node_to_the_gpu() -> None:
    """Four GPUs of one expert on two nodes, steps from every expert to two others. A node with
    0 and 3 in the first layer and 1 and 2 in the second keeps all steps 0 -> 1, 0 -> 2 and 3 -> 2,
    the other node all of 1 -> 0, 2 -> 3 and 2 -> 0; on GPUs only one step each can stay, the one
    of which there are 9, so that of 30 steps 9 + 5 + 5 + 9 stay and two do not."""
    steps = [(0, 1)] * 9 + [(2, 3)] * 9 + [(1, 0)] * 5 + [(3, 2)] * 5 + [(0, 2)] + [(2, 0)]
    ids = np.array(steps)[:, :, None]
    solution = find_solver("exflow").solve(problem(ids, 4, [1, 1, 1, 1], nodes=2))
    gpu = np.argsort(solution.placement.physical_to_logical, axis=1)
    first, second = (gpu[layer, ids[:, layer, 0]] for layer in range(2))
    assert (first // 2 == second // 2).all()
    assert (first == second).sum() == 28


def test_moetuner_pairs_heavy_with_light_and_follows_tokens() -> None:
    """Loads 4, 3, 2, 1 in both layers: pairs {0, 3} and {1, 2} sum to 5. Tokens of 0 step to 3
    and of 1 to 2, so that with clusters matched across layers no token changes GPU."""
    steps = [(0, 0)] * 4 + [(1, 1)] * 3 + [(2, 2)] * 2 + [(3, 3)]
    ids = np.array(steps)[:, :, None]
    solution = find_solver("moetuner").solve(problem(ids, 4, [2, 2]))
    table = solution.placement.physical_to_logical.reshape(2, 2, 2)
    assert {frozenset(r) for r in table[0].tolist()} == {frozenset({0, 3}), frozenset({1, 2})}
    assert [set(r) for r in table[0].tolist()] == [set(r) for r in table[1].tolist()]
    assert "2 of 2 layers within 0.1%" in solution.notes[0]


def test_transmissions_move_experts_to_their_homes() -> None:
    """Home 0 chooses expert 2 and home 1 expert 0, always: each goes to its home."""
    ids = np.array([[[2]], [[0]]] * 5)
    tiny = problem(ids, 4, [2, 2])
    assert tiny.traffic is not None
    assert home_choices(tiny.traffic, 0, tiny).tolist() == [[0, 0, 5, 0], [5, 0, 0, 0]]
    table = find_solver("transmissions").solve(tiny).placement.physical_to_logical.reshape(2, 2)
    assert 2 in table[0]
    assert 0 in table[1]


@pytest.mark.parametrize("name", NAMES)
def test_same_problem_same_bytes_and_valid(name: str) -> None:
    """INV-2 and INV-6, with choices missing."""
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((60, 3, 8)), axis=2)[:, :, :2]
    ids[rng.random(ids.shape) < 0.1] = -1
    one = problem(ids, 8, [2, 2, 2, 2], nodes=2)
    first, second = (find_solver(name).solve(one).placement for _ in range(2))
    assert first.physical_to_logical.tobytes() == second.physical_to_logical.tobytes()
    assert (first.replica_count == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_they_refuse(name: str) -> None:
    ids = np.zeros((4, 2, 1), np.int64)
    with pytest.raises(InputError, match="6 slots for 4 experts"):
        run_solver(find_solver(name), problem(ids, 4, [3, 3]))
    blind = replace(problem(ids, 4, [2, 2]), objective="balance", traffic=None)
    with pytest.raises(InputError, match="needs to see tokens"):
        run_solver(find_solver(name), blind)


def test_moetuner_refuses_unequal_gpus() -> None:
    with pytest.raises(InputError, match="same number of slots"):
        run_solver(find_solver("moetuner"), problem(np.zeros((4, 2, 1), np.int64), 4, [3, 1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_search_still_returns_a_placement(name: str) -> None:
    ids = np.argsort(np.random.default_rng(2).random((30, 2, 8)), axis=2)[:, :, :2]
    stopped = replace(problem(ids, 8, [4, 4]), stop=lambda: True)
    assert find_solver(name).solve(stopped).status == "time_limit"


def test_even_clusters_swap_experts_by_hand() -> None:
    """Loads 5 4 3 2 1 1, clusters {5 4 3} and {2 1 1}: sums 12 and 4, mean 8. Of all swaps 5 with 1
    and 5 with 2 leave 8 to 8 and 9 to 7: the first is taken, and is the floor."""
    load = np.array([5.0, 4, 3, 2, 1, 1])
    cluster, near = swapped(load, np.array([0, 0, 0, 1, 1, 1]))
    assert near
    assert sorted(np.bincount(cluster, load)) == [8, 8]
    assert np.bincount(cluster).tolist() == [3, 3]


def test_moetuner_does_not_depend_on_the_clock() -> None:
    """64 experts on 8 GPUs, more than the integer program takes: the same plan whatever the limit,
    as long as it is not reached."""
    ids = np.random.default_rng(3).integers(0, 64, (400, 3, 2))
    ids[..., 1] = (ids[..., 0] + 1 + ids[..., 1] % 63) % 64
    given = problem(ids, 64, [8] * 8)
    tables = [
        find_solver("moetuner").solve(replace(given, time_limit_s=limit)) for limit in (20.0, 200.0)
    ]
    assert {one.status for one in tables} == {"feasible"}
    one, other = (t.placement.physical_to_logical for t in tables)
    assert one.tolist() == other.tolist()
