"""Co-clustering: planted clusters, sizes, load limits, determinism."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.placement import EMPTY
from moesim.solvers.base import Problem
from moesim.solvers.methods.coclustering import (
    Coclustering,
    balanced_clusters,
    co_activation,
    embed,
)


def planted(rng: np.random.Generator, clusters: int, size: int, batches: int) -> np.ndarray:
    """[B, 1, E] counts: batches of one cluster's experts each, in a shuffled order of experts."""
    owner = rng.permutation(np.repeat(np.arange(clusters), size))
    counts = np.zeros((batches, 1, len(owner)), np.float32)
    for b in range(batches):
        mine = owner == b % clusters
        counts[b, 0] = np.where(mine, rng.integers(8, 12, len(owner)), rng.integers(0, 2))
    return counts


@pytest.mark.parametrize(("gpus", "nodes"), [(2, 1), (4, 1), (4, 2), (8, 2)])
def test_planted_clusters_are_found(gpus: int, nodes: int) -> None:
    """Batches choose experts of one of `gpus` clusters: each GPU gets one cluster whole."""
    rng = np.random.default_rng(gpus)
    counts = planted(rng, gpus, 4, 64)
    problem = Problem(counts=counts, capacity=np.full(gpus, 4), num_nodes=nodes)
    placement = Coclustering().solve(problem).placement
    cluster = np.array([int(np.argmax(counts[:gpus, 0, e])) for e in range(4 * gpus)])
    found = cluster[placement.physical_to_logical[0].reshape(gpus, 4)]
    assert (found == found[:, :1]).all()


def test_spectrum_of_two_blocks_by_hand() -> None:
    """Tokens choose experts 0, 1 together, or 2, 3. A = two blocks of ones; with D1 = 2 and D2 = 3
    the normalised Gram matrix has 1/2 within blocks and 0 between. Its first vector after the
    constant one is (1, 1, -1, -1) / 2, or with sign turned."""
    counts = np.array([[1, 1, 0, 0]] * 3 + [[0, 0, 1, 1]] * 3, np.float32)[:, None, :]
    problem = Problem(counts=counts, capacity=np.array([2, 2]), num_nodes=1)
    together = co_activation(problem, 0)
    block = np.full((2, 2), 0.5)
    want = np.block([[block, np.zeros((2, 2))], [np.zeros((2, 2)), block]])
    assert together == pytest.approx(want)
    place = embed(together, 2)
    assert np.sign(place[0]) == np.sign(place[1]) != np.sign(place[2])


def test_exact_assignment_for_given_sizes() -> None:
    """On a line, the best clusters of 2 and 3 items are the contiguous ones; none of the ten ways
    to cut has a smaller sum of squares."""
    place = np.array([[0.0], [0.1], [5.0], [5.1], [5.2]])
    found = balanced_clusters(place, np.array([2, 3]), np.ones(5), seed=0)

    def spread(chosen: tuple[int, ...]) -> float:
        rest = [i for i in range(5) if i not in chosen]
        return sum(
            float(((place[list(p)] - place[list(p)].mean(axis=0)) ** 2).sum())
            for p in (chosen, rest)
        )

    mine = tuple(np.flatnonzero(found == 0).tolist())
    assert len(mine) == 2
    assert spread(mine) == min(spread(c) for c in itertools.combinations(range(5), 2))


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(2, 1), (4, 2), (6, 3), (5, 1)]),
    experts=st.integers(1, 14),
    spare=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_valid_and_deterministic(
    seed: int, shape: tuple[int, int], experts: int, spare: int
) -> None:
    """INV-2 (the placement's constructor checks it), INV-6, and unequal capacities."""
    rng = np.random.default_rng(seed)
    gpus, nodes = shape
    capacity = np.full(gpus, min(experts, -(-experts // gpus) + spare))
    if capacity.sum() - experts >= 1 and capacity[-1] > 1:
        capacity[-1] -= 1
    problem = Problem(
        counts=rng.integers(0, 9, (6, 2, experts)).astype(np.float32),
        capacity=capacity,
        num_nodes=nodes,
        seed=int(rng.integers(100)),
    )
    one, two = (Coclustering().solve(problem).placement for _ in range(2))
    assert np.array_equal(one.physical_to_logical, two.physical_to_logical)
    used = (one.physical_to_logical != EMPTY).reshape(2, gpus, -1).sum(axis=2)
    assert (used == capacity).all()


def test_tokens_of_a_cluster_stay_on_their_gpu(build: ModuleType) -> None:
    """With co-chosen experts together no token needs two GPUs; linear placement needs two."""
    from moesim.cost.routing import route
    from moesim.solvers.methods.linear import Linear

    pairs = [[0, 4], [1, 5], [2, 6], [3, 7]]
    trace = build.make_trace(np.array(pairs * 8)[:, None, :], 8)
    counts = np.zeros((32, 1, 8), np.float32)
    for b, pair in enumerate(pairs * 8):
        counts[b, 0, pair] = 1
    problem = Problem(counts=counts, capacity=np.full(4, 2), num_nodes=1)
    batches = build.cut(trace, 32)
    for solver, fan_out in ((Coclustering(), 32), (Linear(), 64)):
        placement = solver.solve(problem).placement
        assert route(trace, batches, placement).gpu_fan_out.tolist() == [[fan_out]]
