"""Placements that survive the loss of one GPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.solvers.base import Problem, run_solver
from moesim.solvers.methods.two_copies import TwoCopies, covered
from moesim.solvers.registry import find_solver


def problem_of(load: np.ndarray, gpus: int, slots: int) -> Problem:
    return Problem(load.astype(np.float32), np.full(gpus, slots, np.int64), num_nodes=1)


def test_most_loaded_get_the_second_copies() -> None:
    """Six experts in eight slots on four GPUs: second copies of 9 and 7 of 24 tokens."""
    load = np.array([[[9, 1, 7, 2, 2, 3]]])
    found = run_solver(TwoCopies(), problem_of(load, 4, 2))
    assert found.placement.replica_count.tolist() == [[2, 1, 2, 1, 1, 1]]
    assert "2 of 6 experts, with 66.7% of the choices" in found.notes[0]
    assert "no placement with these slots covers more than 66.7%" in found.notes[0]


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_any_gpu_may_fail_where_slots_allow(seed: int, per_gpu: int) -> None:
    """With two slots an expert every expert is still somewhere when a GPU is gone."""
    rng = np.random.default_rng(seed)
    gpus = 4
    experts = gpus * per_gpu // 2
    found = run_solver(
        find_solver("two_copies"), problem_of(rng.integers(0, 50, (3, 2, experts)), gpus, per_gpu)
    ).placement
    table = found.physical_to_logical.reshape(2, gpus, -1)
    for lost in range(gpus):
        for layer in table:
            assert set(np.delete(layer, lost, axis=0).ravel().tolist()) == set(range(experts))


def test_more_slots_than_two_each_go_on_by_load() -> None:
    """Two experts in six slots on three GPUs: three copies each, whatever their load."""
    found = run_solver(TwoCopies(), problem_of(np.array([[[9, 1]]]), 3, 2)).placement
    assert found.replica_count.tolist() == [[3, 3]]


def test_covered_share_by_hand() -> None:
    assert covered(np.array([[3.0, 1.0]]), np.array([[2, 1]])) == pytest.approx(0.75)
