"""Layers and batches without load: left out of objective, bound and figures, and named."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from moesim.cluster import Cluster
from moesim.errors import InputError
from moesim.jobs.plan import make_plan
from moesim.jobs.plan_result import PlanResult
from moesim.placement import EMPTY, Placement, in_order
from moesim.planning.request import PlanRequest
from moesim.solvers.base import Problem
from moesim.solvers.objective import PlacementCost
from moesim.trace.empty import loaded_layers, only_layers
from moesim.trace.format import LoadTrace, TraceMeta


@pytest.fixture(scope="module")
def two(build: ModuleType) -> Cluster:
    made: Cluster = build.small_cluster(1, 2)
    return made


def load_trace(counts: list[list[list[int]]]) -> LoadTrace:
    """[S, L, E] counts of layers 3, 4, ..."""
    table = np.array(counts, np.int64)
    layers = tuple(range(3, 3 + table.shape[1]))
    return LoadTrace(table, TraceMeta("toy", table.shape[2], 2, layers))


def solve(loads: LoadTrace, cluster: Cluster) -> PlanResult:
    return make_plan(PlanRequest.of(loads, cluster, None, solver="greedy"))


def test_a_layer_without_load_is_left_out_and_named(two: Cluster) -> None:
    """Experts 4 3 2 1 on two GPUs: 4 + 1 and 3 + 2, so max / mean is 1. Layer 3 has no load: the
    objective is 1, not (0 + 1) / 2, and no figure has its 1 in it."""
    step = [[0, 0, 0, 0], [4, 3, 2, 1]]
    result = solve(load_trace([step] * 4), two)
    assert result.plan.objective_value == pytest.approx(1.0)
    assert result.plan.bound == pytest.approx(1.0)
    assert result.notices[0].startswith("layers 3 have no load in the trace (1 of 2)")
    linear = next(c for c in result.candidates if c.name == "linear")
    # Linear has 4 + 3 and 2 + 1: 7 over a mean of 5.
    assert linear.figures["imbalance"].value == pytest.approx(1.4)
    assert result.plan.layer_ids == (3, 4)
    table = result.plan.placement.physical_to_logical
    assert table[0].tolist() == [0, 1, 2, 3]
    assert sorted(table[1, :2].tolist()) in ([0, 3], [1, 2])
    assert result.plan.provenance["layers_without_load"] == [3]


def test_the_trace_hash_is_of_the_whole_trace(two: Cluster) -> None:
    loads = load_trace([[[0, 0], [3, 1]]] * 2)
    assert solve(loads, two).plan.provenance["trace"] == loads.content_hash()


def test_a_layer_that_is_empty_in_the_tuned_half_is_left_out(two: Cluster) -> None:
    """Two steps tune. Layer 3 has load in the last two alone, so nothing could be tuned on it."""
    tuned, later = [[0, 0], [2, 2]], [[5, 1], [2, 2]]
    result = solve(load_trace([tuned, tuned, later, later]), two)
    assert result.plan.objective_value == pytest.approx(1.0)
    assert "layers 3 have no load" in result.notices[0]


def test_batches_without_load_in_a_layer_have_no_value() -> None:
    """Experts 3 1 on two GPUs: max / mean is 3 / 2, whether a third of the batches is empty or
    not."""
    counts = np.array([[[3, 1]], [[0, 0]], [[6, 2]]], np.float32)
    cost = PlacementCost(Problem(counts, np.array([1, 1]), 1))
    placement = Placement(np.array([[0, 1]], np.int32), 2, 1, 2)
    assert cost.layer_values(placement)[0] == pytest.approx(1.5)
    assert cost.batch_counts(0).shape == (2, 3)
    assert cost.layer_counts(0).shape == (2, 2)


def test_steps_without_load_in_a_layer_are_no_part_of_the_figures(two: Cluster) -> None:
    """Held-out steps of layer 4: 3 1 twice, nothing twice; layer 3 even: mean of 1, 1, 1, 1, 1.5
    and 1.5 is 7 / 6, not (4 x 1 + 2 x 1.5 + 2 x 1) / 8 = 9 / 8."""
    full, half = [[2, 2], [3, 1]], [[2, 2], [0, 0]]
    result = solve(load_trace([full] * 4 + [full, half, full, half]), two)
    assert result.chosen.figures["imbalance"].value == pytest.approx(7 / 6)
    assert result.chosen.figures["balancedness_worst_layer"].value == pytest.approx(2 / 3)


def test_token_traces_with_a_hash_layer(build: ModuleType, two: Cluster) -> None:
    """-1 throughout in layer 1 of 3: planned as if it were not there, then placed in order."""
    trace = build.random_trace(np.random.default_rng(5), 896, 3, 6, 2)
    ids = trace.expert_ids.astype(np.int16)
    ids[:, 1] = -1
    hashed = replace(trace, expert_ids=ids)
    keep = loaded_layers(hashed)
    assert keep.tolist() == [True, False, True]
    plain = only_layers(hashed, keep)
    options = {"solver": "greedy", "batch_tokens": 40}
    found = make_plan(PlanRequest.of(hashed, two, None, **options))
    alone = make_plan(PlanRequest.of(plain, two, None, **options))
    assert found.plan.objective_value == alone.plan.objective_value
    assert found.plan.bound == alone.plan.bound
    table = found.plan.placement.physical_to_logical
    np.testing.assert_array_equal(table[keep], alone.plan.placement.physical_to_logical)
    assert table[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert "layers 1 have no load" in found.notices[0]
    empty = PlanRequest.of(replace(trace, expert_ids=np.full_like(ids, -1)), two, None, **options)
    with pytest.raises(InputError, match="no layer of the trace has any load"):
        make_plan(empty)


def test_in_order_fills_the_slots_in_use() -> None:
    """Slots 3 and 2 of GPUs of 3; 5 experts: 0 1 2 | 3 4. With replicas it goes on from 0."""
    uneven = Placement(np.array([[4, 1, 0, 3, 2, EMPTY]], np.int32), 2, 1, 5)
    assert in_order(uneven).tolist() == [0, 1, 2, 3, 4, EMPTY]
    spare = Placement(np.array([[0, 1, 2, 1, 2, 0]], np.int32), 2, 1, 3)
    assert in_order(spare).tolist() == [0, 1, 2, 0, 1, 2]
