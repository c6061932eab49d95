"""Local search as a solver: its objective, seeds and threads, limits, and what it is worth."""

from __future__ import annotations

import os
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moesim.cost.routing import route
from moesim.cost.step import StepModel, build_step_model
from moesim.metrics import imbalance
from moesim.placement import EMPTY, Placement
from moesim.planning.traffic import sample_traffic
from moesim.solvers.base import OBJECTIVES, Problem, Solution
from moesim.solvers.methods.eplb import Eplb
from moesim.solvers.methods.greedy import Greedy
from moesim.solvers.methods.linear import Linear
from moesim.solvers.methods.local_search import LocalSearch
from moesim.trace.batches import index_requests

LAYERS, EXPERTS, GPUS = 3, 12, 4


@pytest.fixture(scope="module")
def step(build: ModuleType) -> StepModel:
    model = build.toy_model(LAYERS, EXPERTS, 3)
    return build_step_model(
        build.small_cluster(), model, all_to_all="nccl", calibration=build.toy_calibration()
    )


@pytest.fixture(scope="module")
def problem(build: ModuleType, step: StepModel) -> Problem:
    """Counts and messages of one random trace, equal GPUs, no replicas."""
    trace = build.random_trace(np.random.default_rng(2), 480, LAYERS, EXPERTS, 3)
    index, _ = index_requests(trace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesim.planning.traffic.TRAFFIC_TOKENS", 1200)
        traffic = sample_traffic(trace, index, "prefill", 60, step, 0)
    counts = np.zeros((8, LAYERS, EXPERTS), np.float32)
    for batch, layer in np.ndindex(8, LAYERS):
        ids = trace.expert_ids[60 * batch : 60 * batch + 60, layer]
        counts[batch, layer] = np.bincount(ids.ravel(), minlength=EXPERTS)
    return Problem(
        counts,
        np.full(GPUS, 3),
        2,
        expert_us=step.expert_tables_us(200),
        traffic=traffic,
        gpu_type=step.gpu_type,
    )


def mean_imbalance(problem: Problem, placement: Placement) -> float:
    """Objective balance from the placement alone: tokens shared equally by replicas."""
    count = placement.replica_count
    load = np.zeros((problem.num_batches, problem.num_layers, problem.num_gpus))
    for layer, slot in np.ndindex(problem.num_layers, placement.num_slots):
        expert = placement.physical_to_logical[layer, slot]
        if expert != EMPTY:
            gpu = slot // placement.slots_per_gpu
            load[:, layer, gpu] += problem.counts[:, layer, expert] / count[layer, expert]
    return float(imbalance(load, problem.speed).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"capacity": np.full(GPUS, 4)},
        {"capacity": np.array([6, 2, 3, 4]), "speed": np.array([1.0, 0.5, 0.5, 2.0])},
    ],
)
def test_balance(problem: Problem, changes: dict[str, Any]) -> None:
    """The objective is the mean imbalance of the placement, not above greedy's, where it starts."""
    given = replace(problem, **changes)
    solution = LocalSearch().solve(given)
    own = mean_imbalance(given, solution.placement)
    assert solution.objective_value == pytest.approx(own, rel=1e-4)
    assert own <= mean_imbalance(given, Greedy().solve(given).placement) * (1 + 1e-5)
    assert (solution.status, solution.notes) == ("feasible", ())


def test_batches_not_averages() -> None:
    """Experts 0 and 2 are chosen in every other batch, 1 and 3 in the others (C7).

    All averages are equal, so greedy and EPLB deal 0 2 | 1 3: each batch then has all its load on
    one of the two GPUs, imbalance 2. Any other pairing has 1.
    """
    counts = np.zeros((6, 1, 4), np.float32)
    counts[0::2, 0, [0, 2]] = 10
    counts[1::2, 0, [1, 3]] = 10
    given = Problem(counts, np.array([2, 2]), 1)
    for average in (Greedy(), Eplb()):
        assert mean_imbalance(given, average.solve(given).placement) == pytest.approx(2.0)
    assert LocalSearch().solve(given).objective_value == pytest.approx(1.0)


def layer_time(problem: Problem, step: StepModel, placement: Placement, build: ModuleType) -> Any:
    """Objective time from the step model alone, without launches: [L]."""
    traffic = problem.traffic
    assert traffic is not None
    trace = build.make_trace(traffic.expert_ids, EXPERTS)
    batches = build.cut(trace, *np.bincount(traffic.batch_idx).tolist())
    routed = route(trace, batches, placement, dedup=step.dedup, home=traffic.home)
    messages = step.cost(routed)
    gpu = np.zeros((problem.num_batches, LAYERS, GPUS))
    for layer, slot in np.ndindex(LAYERS, EXPERTS):
        tokens = problem.counts[:, layer, placement.physical_to_logical[layer, slot]]
        gpu[:, layer, slot // 3] += step.experts[0].expert_time_us(tokens, 1000, 100)
    return gpu.max(axis=2).mean(axis=0) + (messages.dispatch_us + messages.combine_us).mean(axis=0)


def test_time(problem: Problem, step: StepModel, build: ModuleType) -> None:
    """The objective is the step model's time of a layer, below that of linear and of greedy."""
    given = replace(problem, objective="time")
    solution = LocalSearch().solve(given)
    own = layer_time(given, step, solution.placement, build)
    assert solution.objective_value == pytest.approx(own.mean(), rel=1e-5)
    for other in (Greedy(), Linear()):
        placement = other.solve(given).placement
        assert (own <= layer_time(given, step, placement, build) * (1 + 1e-5)).all()


def test_traffic(problem: Problem, step: StepModel, build: ModuleType) -> None:
    """Fewer link-microseconds than linear, and load about as even as linear's or better."""
    given = replace(problem, objective="traffic")
    traffic = given.traffic
    assert traffic is not None
    trace = build.make_trace(traffic.expert_ids, EXPERTS)
    batches = build.cut(trace, *np.bincount(traffic.batch_idx).tolist())

    def crossing(solution: Solution) -> int:
        placement = solution.placement
        routed = route(trace, batches, placement, dedup=step.dedup, home=traffic.home)
        node = placement.node_of_gpu
        within = node[:, None] == node[None, :]
        # 2 us a message within a node, 4 between nodes.
        return int((routed.messages * np.where(within, 2, 4)).sum())

    solution, linear = LocalSearch().solve(given), Linear().solve(given)
    assert crossing(solution) < crossing(linear)
    ceiling = mean_imbalance(given, linear.placement)
    assert mean_imbalance(given, solution.placement) < ceiling * 1.05


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_same_seed_same_placement_on_any_number_of_threads(
    problem: Problem, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-6."""
    given = replace(problem, objective=objective, capacity=np.full(GPUS, 4))
    tables = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(os, "cpu_count", lambda n=threads: n)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=threads: set(range(n)))
        solution = LocalSearch().solve(given)
        tables.append((solution.placement.physical_to_logical.tobytes(), solution.objective_value))
    assert tables[0] == tables[1] == tables[2]


def test_other_seeds_search_elsewhere(problem: Problem) -> None:
    found = {
        LocalSearch()
        .solve(replace(problem, objective="time", seed=seed, capacity=np.full(GPUS, 5)))
        .placement.physical_to_logical.tobytes()
        for seed in range(4)
    }
    assert len(found) > 1


def test_time_limit_keeps_a_valid_placement(problem: Problem) -> None:
    """Layers not reached keep the greedy placement, and the status says so."""
    given = replace(problem, time_limit_s=0.0)
    solution = LocalSearch().solve(given)
    assert solution.status == "time_limit"
    assert "3 of 3 layers" in solution.notes[0]
    assert np.array_equal(
        np.sort(solution.placement.physical_to_logical.reshape(LAYERS, GPUS, -1), axis=2),
        np.sort(Greedy().solve(given).placement.physical_to_logical.reshape(LAYERS, GPUS, -1)),
    )


def test_progress_counts_layers(problem: Problem) -> None:
    seen: list[tuple[int, int]] = []
    LocalSearch().solve(problem, progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [LAYERS] * len(seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (LAYERS, LAYERS)


def test_slow_gpus_get_less(problem: Problem) -> None:
    speed = np.array([1.0, 1.0, 1.0, 0.25])
    given = replace(problem, capacity=np.full(GPUS, 6), speed=speed)
    placement = LocalSearch().solve(given).placement
    share = problem.counts.mean(axis=0) / placement.replica_count
    load = np.zeros(GPUS)
    for layer, slot in np.ndindex(LAYERS, placement.num_slots):
        expert = placement.physical_to_logical[layer, slot]
        if expert != EMPTY:
            load[slot // placement.slots_per_gpu] += share[layer, expert]
    # A quarter of the speed should take 1 / 13 of the load, 0.077.
    assert 0.05 < load[3] / load.sum() < 0.11
