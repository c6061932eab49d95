"""INV-7 for messages: no placement sends fewer, by hand and by enumeration."""

from __future__ import annotations

from functools import cache
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.placement import Placement
from moesim.solvers.base import Objective, Problem, Traffic
from moesim.solvers.bounds.messages import (
    even_pairs,
    fewest_messages,
    hull_at,
    message_bound,
    most_inside,
)
from moesim.solvers.objective import PlacementCost
from moesim.solvers.registry import find_solver


def traffic(
    ids: np.ndarray, home: list[int], gpus: int, per_node: int, dedup: int, batches: int = 1
) -> Traffic:
    """[T, K] choices; NVLink out of and into every GPU (group 0: 3 + m/2 us), between nodes its
    NIC besides (group 1: 10 + m us), on the source's rail and the destination's."""
    links = []
    for s, d in product(range(gpus), range(gpus)):
        near = [s, gpus + d]
        links.append(
            []
            if s == d
            else near
            if s // per_node == d // per_node
            else [2 * gpus + s, 3 * gpus + d]
        )
    count = np.arange(2 * ids.size + 1, dtype=np.float64)
    times = [np.where(count > 0, 3 + count / 2, 0), np.where(count > 0, 10 + count, 0), 0 * count]
    return Traffic(
        expert_ids=ids[:, None].astype(np.int16),
        home=np.array(home, np.int32),
        batch_idx=np.sort(np.arange(len(ids)) % batches).astype(np.int32),
        indptr=np.concatenate(([0], np.cumsum([len(x) for x in links]))).astype(np.int64),
        link_idx=np.array([x for row in links for x in row], np.int32),
        link_group=np.repeat([0, 0, 1, 1], gpus).astype(np.int8),
        link_scale=np.ones(4 * gpus),
        time_us=np.stack([np.stack(times), 2 * np.stack(times)]),
        dedup=dedup,
    )


def problem(
    sampled: Traffic, experts: int, capacity: list[int], nodes: int, goal: Objective
) -> Problem:
    return Problem(
        counts=np.ones((1, 1, experts), np.float32),
        capacity=np.array(capacity),
        num_nodes=nodes,
        objective=goal,
        expert_us=np.zeros((1, 3)) if goal == "time" else None,
        traffic=sampled,
    )


@cache
def every_table(capacity: tuple[int, ...], experts: int) -> list[np.ndarray]:
    """Every way to fill all slots with every expert somewhere and none twice on a GPU."""
    width, out = max(capacity), []
    spare = sum(capacity) - experts
    for extra in product(range(experts), repeat=spare):
        if list(extra) != sorted(extra):
            continue
        for deal in set(permutations([*range(experts), *extra])):
            rows, at = [], 0
            for size in capacity:
                rows.append(deal[at : at + size])
                at += size
            if all(list(r) == sorted(set(r)) for r in rows):
                out.append(np.array([[*r, *[-1] * (width - len(r))] for r in rows]).ravel())
    return out


def fewest(asked: Problem) -> float:
    """The least message term over all placements."""
    objective = PlacementCost(asked)
    values = []
    for table in every_table(tuple(asked.capacity.tolist()), asked.num_experts):
        placement = Placement(
            table[None].astype(np.int32), asked.num_gpus, asked.num_nodes, asked.num_experts
        )
        slots = objective.layer_slots(placement, 0)
        values.append(objective.message_value(slots, objective.tokens(0)))
    return min(values)


def test_all_experts_chosen() -> None:
    """Four tokens that choose all four experts, two of them on each of two GPUs: wherever they are
    at home, one message each. A message of objective traffic takes half a microsecond on its
    busiest link and one on the way back: 4 x 1.5 us."""
    ids = np.tile(np.arange(4), (4, 1))
    asked = problem(traffic(ids, [0, 0, 1, 1], 2, 2, 1), 4, [2, 2], 1, "traffic")
    assert fewest(asked) == pytest.approx(6.0)
    assert message_bound(PlacementCost(asked), 0) == pytest.approx(6.0)


def test_even_pairs() -> None:
    """8 choices: on one place 28 pairs, on two 4 + 4 (6 + 6), on three 3 + 3 + 2 (3 + 3 + 1)."""
    assert [even_pairs(8, r) for r in (1, 2, 3, 4, 8)] == [28, 12, 7, 4, 0]


def test_fewest_messages() -> None:
    """Ten tokens of 8 choices on two places of eight slots. All at home: 28 pairs, no message; all
    away: 28 pairs, one; four and four: 12 pairs, one."""
    tokens = np.bincount(np.full(10, 8))
    many = 1e9
    assert fewest_messages(tokens, 2, 8, many, many) == pytest.approx(0)
    assert fewest_messages(tokens, 2, 8, many, 40) == pytest.approx(5)
    # 120 pairs: none of the tokens can be in one place.
    assert fewest_messages(tokens, 2, 8, 120, many) == pytest.approx(10)
    # 200 pairs: half of them can, at home (40 choices there) while the others have four there (20).
    assert fewest_messages(tokens, 2, 8, 200, 60) == pytest.approx(5)
    # No choice at home at all, five places: 3 + 3 + 2 elsewhere, 7 pairs, three messages.
    assert fewest_messages(tokens, 5, 8, 70, 0) == pytest.approx(30)
    # One choice at home of seven others on three places: 3 + 1 + 1 pairs, three messages.
    assert fewest_messages(tokens, 5, 8, 50, 10) == pytest.approx(30)
    # Places of three slots: eight choices need three.
    assert fewest_messages(tokens, 4, 3, many, many) == pytest.approx(20)
    # Tokens without choices send nothing.
    assert fewest_messages(np.array([7, 0]), 3, 2, 0.0, 0.0) == 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([[2, 2, 2], [3, 3], [4, 2], [3, 2, 1]]))
def test_no_partition_has_more_inside(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.gamma(0.5, 3, (6, 6))
    weights = (weights + weights.T) * (1 - np.eye(6))
    most = 0.0
    for table in every_table(tuple(sizes), 6):
        rows = table.reshape(len(sizes), -1)
        held = [row[row >= 0] for row in rows]
        most = max(most, sum(weights[np.ix_(row, row)].sum() for row in held))
    assert most_inside(weights, np.array(sizes)) >= most - 1e-9


def test_two_cliques_are_found_exactly() -> None:
    """Experts 0, 1, 2 chosen together and 3, 4, 5: all weight lies inside two places of three."""
    weights = np.kron(np.eye(2), np.ones((3, 3))) * (1 - np.eye(6))
    assert most_inside(weights, np.array([3, 3])) == pytest.approx(12)
    # Three places of two: of each clique's three pairs one stays, and the odd ones share nothing.
    assert 4 <= most_inside(weights, np.array([2, 2, 2])) < 9


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0, 14))
def test_hull_is_the_largest_convex_function_below(values: list[float], x: float) -> None:
    """At x it is the least of all chords over x, the last value beyond the end."""
    found = hull_at(np.array(values), x)
    last = len(values) - 1
    chords = [
        values[a] if a == b else values[a] + (values[b] - values[a]) * (x - a) / (b - a)
        for a in range(len(values))
        for b in range(a, len(values))
        if a <= x <= b
    ]
    want = min(chords) if x <= last else None
    if want is not None:
        assert found == pytest.approx(want, abs=1e-9)


SHAPES = [([2, 2], 4, 1, 2), ([3, 3], 6, 1, 2), ([2, 2, 2], 6, 1, 3), ([2, 2, 1, 1], 6, 2, 2),
          ([3, 2], 4, 1, 2), ([2, 1, 1, 1], 4, 2, 2)]  # fmt: skip
"""Slots, experts, nodes, GPUs per node; the last two have a redundant slot."""


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from(SHAPES),
    top_k=st.integers(1, 4),
    dedup=st.integers(0, 2),
    batches=st.integers(1, 2),
    goal=st.sampled_from(["time", "traffic"]),
)
def test_no_placement_sends_less(
    seed: int,
    shape: tuple[list[int], int, int, int],
    top_k: int,
    dedup: int,
    batches: int,
    goal: Objective,
) -> None:
    """Groups of experts chosen together, some tokens with fewer choices than others."""
    capacity, experts, nodes, per_node = shape
    rng = np.random.default_rng(seed)
    scores = rng.random((8, experts)) + 2 * (np.arange(experts) % 2 == rng.integers(0, 2, (8, 1)))
    ids = np.argsort(-scores, axis=1)[:, :top_k]
    ids[rng.random(ids.shape) < 0.1] = -1
    gpus = len(capacity)
    home = rng.integers(0, gpus, 8).tolist()
    asked = problem(
        traffic(ids, home, gpus, per_node, dedup, batches), experts, capacity, nodes, goal
    )
    assert message_bound(PlacementCost(asked), 0) <= fewest(asked) + 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_the_integer_program_finds_the_fewest(seed: int) -> None:
    """Three and four choices per token, all kinds of deduplication, one node and two: proven."""
    capacity, experts, nodes, per_node = SHAPES[seed % 4]
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((8, experts)), axis=1)[:, : 3 + seed % 2]
    gpus = len(capacity)
    sampled = traffic(ids, (np.arange(8) % gpus).tolist(), gpus, per_node, seed % 3)
    asked = problem(sampled, experts, capacity, nodes, "traffic")
    solution = find_solver("ilp").solve(asked)
    objective = PlacementCost(asked)
    values = [
        objective.layer_values(Placement(t[None].astype(np.int32), gpus, nodes, experts))[0]
        for t in every_table(tuple(capacity), experts)
    ]
    assert solution.status == "optimal"
    assert solution.objective_value == pytest.approx(min(values), rel=1e-5)
