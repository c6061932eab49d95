"""EPLB: the published example, the algorithm written plainly, and its place as a solver."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.solvers.base import Problem, run_solver
from moesim.solvers.methods.eplb import Eplb, rebalance_experts

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "eplb_readme.json").read_text(encoding="utf-8")
)
SIZES = ("num_replicas", "num_groups", "num_nodes", "num_gpus")


def as_counts(weight: object) -> np.ndarray:
    """One batch whose counts are `weight`."""
    return np.asarray(weight, np.float32)[None]


def test_published_example() -> None:
    got = rebalance_experts(np.array(GOLDEN["weight"]), *(GOLDEN[name] for name in SIZES))
    assert got.tolist() == GOLDEN["phy2log"]


def test_published_example_as_a_solver() -> None:
    problem = Problem(as_counts(GOLDEN["weight"]), np.full(8, 2), 2, num_groups=4)
    solution = Eplb().solve(problem)
    assert solution.placement.physical_to_logical.tolist() == GOLDEN["phy2log"]
    assert solution.notes == ()
    assert solution.status == "feasible"


def test_global_policy_by_hand() -> None:
    """3 groups do not divide over 2 nodes: replicas and packing over all GPUs.

    Loads 8 4 2; the fourth slot goes to expert 0: shares 4 4 2 4, sorted 0(4) 1(4) 0'(4) 2(2).
    Heaviest first to the lightest GPU with room: 0 -> A, 1 -> B, 0' -> A or B, equal: A is first
    and would hold expert 0 twice, as published; the solver then moves it apart.
    """
    weight = np.array([[8, 4, 2]])
    assert rebalance_experts(weight, 4, 3, 2, 2).tolist() == [[0, 0, 1, 2]]
    solution = Eplb().solve(Problem(as_counts(weight), np.array([2, 2]), 2, num_groups=3))
    assert [set(row) for row in solution.placement.physical_to_logical.reshape(2, 2)] == [
        {0, 1},
        {0, 2},
    ]
    assert "1 replicas moved to another GPU" in solution.notes[0]


def plain_layer(load: list[float], replicas: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """The README's three steps with lists: groups to nodes, replicas in nodes, replicas to GPUs."""

    def pack(weights: list[float], packs: int) -> list[list[int]]:
        size = len(weights) // packs
        held: list[list[int]] = [[] for _ in range(packs)]
        if size == 1:
            return [[i] for i in range(packs)]
        for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
            room = [p for p in range(packs) if len(held[p]) < size]
            held[min(room, key=lambda p: sum(weights[i] for i in held[p]))].append(item)
        return held

    if groups % nodes:
        groups, nodes = 1, 1
    size = len(load) // groups
    out = []
    for members in pack([sum(load[g * size : (g + 1) * size]) for g in range(groups)], nodes):
        experts = [g * size + i for g in members for i in range(size)]
        copies = list(range(len(experts)))
        while len(copies) < replicas // nodes:
            share = [load[e] / copies.count(i) for i, e in enumerate(experts)]
            copies.append(share.index(max(share)))
        share = [load[experts[i]] / copies.count(i) for i in copies]
        for held in pack(share, gpus // nodes):
            out += [experts[copies[c]] for c in held]
    return out


@given(
    seed=st.integers(0, 2**32),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 4),
    nodes=st.integers(1, 3),
    per_node=st.integers(1, 3),
    spare=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_equals_a_plain_writing(
    seed: int, groups: int, group_size: int, nodes: int, per_node: int, spare: int
) -> None:
    experts, gpus = groups * group_size, nodes * per_node
    replicas = gpus * (-(-experts // gpus) + spare)
    # Powers of two times small odd numbers: sums and shares by 2, 4 are exact, and ties happen.
    load = np.random.default_rng(seed).integers(1, 64, experts) * 64.0
    got = rebalance_experts(load[None], replicas, groups, nodes, gpus)[0].tolist()
    assert got == plain_layer(load.tolist(), replicas, groups, nodes, gpus)


@pytest.mark.parametrize(
    "sizes", [(16, 5, 2, 8), (17, 4, 2, 8), (8, 4, 2, 8), (16, 4, 3, 8), (16, 4, 2, 0)]
)
def test_sizes_that_do_not_divide(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(InputError, match="replicas of 12 experts"):
        rebalance_experts(np.array(GOLDEN["weight"]), *sizes)


def test_more_replicas_than_gpus_are_given_away() -> None:
    """One expert has nearly all load: the algorithm wants 6 replicas of it on 3 GPUs."""
    weight = np.array([[1000, 1, 1, 1]])
    assert (rebalance_experts(weight, 9, 1, 1, 3) == 0).sum() == 6
    solution = Eplb().solve(Problem(as_counts(weight), np.full(3, 3), 1))
    assert solution.placement.replica_count[0, 0] == 3
    assert solution.placement.replica_count.sum() == 9


def test_unequal_slots_are_refused_with_another_solver_named() -> None:
    with pytest.raises(InputError, match="same number of slots") as caught:
        run_solver(Eplb(), Problem(np.ones((1, 1, 4), np.float32), np.array([3, 2]), 1))
    assert "greedy" in caught.value.remedy
