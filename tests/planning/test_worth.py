"""What plans are worth on domains and steps that were left out."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from moesim.errors import MismatchError
from moesim.placement import Placement
from moesim.planning.case import token_case
from moesim.planning.request import PlanRequest
from moesim.planning.unseen import solve_unseen
from moesim.planning.worth import Worth, excess_by_layer, folds_of, worth_by_domain, worth_by_step
from moesim.solvers.base import Problem, run_solver
from moesim.solvers.registry import find_solver


def problem_of(counts: np.ndarray, gpus: int, slots: int) -> Problem:
    capacity = np.full(gpus, slots // gpus, np.int64)
    return Problem(counts=counts.astype(np.float32), capacity=capacity, num_nodes=1)


def test_steps_that_differ_are_worth_less_unseen() -> None:
    """Four runs of four steps; in run i experts 2i and 2i + 1 of eight get all tokens, evenly. With
    all seen, a plan on two GPUs parts each pair: excess 0. A plan that lacks run i knows of both
    only that they get nothing."""
    steps = np.zeros((16, 2, 8), np.int64)
    for run in range(4):
        steps[4 * run : 4 * run + 4, :, 2 * run : 2 * run + 2] = 10
    found = worth_by_step(problem_of(steps, 2, 8), steps)
    assert found is not None
    assert found.what == "part of the steps"
    assert found.seen == pytest.approx(0.0)
    assert found.unseen >= 0.0
    assert set(found.by_name) == {"steps 0 to 3", "steps 4 to 7", "steps 8 to 11", "steps 12 to 15"}


def test_too_few_steps_tell_nothing() -> None:
    steps = np.ones((7, 1, 4), np.int64)
    assert worth_by_step(problem_of(steps, 2, 4), steps) is None


def test_domains_left_out_in_turn(build: ModuleType) -> None:
    """Popularity of experts is drawn anew for each domain: a plan that has seen both evens out
    both, one without b is as uneven there as chance has it."""
    parts = [
        build.random_trace(np.random.default_rng(seed), 256, 3, 8, 2, skew=1.5) for seed in (1, 2)
    ]
    ids = np.concatenate([part.expert_ids for part in parts])
    trace = build.make_trace(
        ids,
        8,
        request_ids=np.arange(512) // 8,
        domain_ids=np.arange(512) // 256,
        domains=("a", "b"),
    )
    case = token_case(
        PlanRequest.of(trace, build.small_cluster(1, 4), None, batch_tokens=64, check_memory=False)
    )
    data = case.data
    assert data is not None
    found = worth_by_domain(case.problem, trace, data.tune, data.held_out, "prefill", 64)
    assert found is not None
    assert set(found.by_name) == {"a", "b"}
    assert found.seen < found.unseen
    assert found.to_json()["narrow"] == found.narrow


def test_a_trace_without_domains_cannot_tell(build: ModuleType) -> None:
    trace = build.random_trace(np.random.default_rng(0), 128, 2, 8, 2)
    case = token_case(
        PlanRequest.of(trace, build.small_cluster(1, 4), None, batch_tokens=32, check_memory=False)
    )
    data = case.data
    assert data is not None
    assert worth_by_domain(case.problem, trace, data.tune, data.held_out, "prefill", 32) is None


def test_narrow_traces_name_what_to_capture() -> None:
    """0.4 against 0.1 is narrow, 0.12 against 0.1 is not."""
    narrow = Worth({"code": (0.1, 0.6), "prose": (0.1, 0.2)}, "domain", 2, "greedy")
    assert narrow.narrow
    (said,) = narrow.notices()
    assert "worst when left out: code 0.60, prose 0.20" in said
    assert not Worth({"code": (0.1, 0.12)}, "domain", 2, "greedy").narrow


def test_folds_are_about_equal() -> None:
    """9, 5, 4, 3, 1 into four: 9 | 5 | 4 | 3 + 1."""
    sizes = {"a": 9, "b": 5, "c": 4, "d": 3, "e": 1}
    assert folds_of(sizes) == [["a"], ["b"], ["c"], ["d", "e"]]


def test_unseen_takes_the_kind_of_batch_that_carries_over(build: ModuleType) -> None:
    """Each layer is that of one of the two plans; all layers together are chosen well."""
    parts = [
        build.random_trace(np.random.default_rng(seed), 128, 3, 8, 2, skew=1.5) for seed in range(4)
    ]
    trace = build.make_trace(
        np.concatenate([part.expert_ids for part in parts]),
        8,
        request_ids=np.arange(512) // 8,
        domain_ids=np.arange(512) // 128,
        domains=("a", "b", "c", "d"),
    )
    cluster = build.small_cluster(1, 4)
    asked = PlanRequest.of(trace, cluster, None, batch_tokens=32, check_memory=False)
    data = token_case(asked).data
    problem = token_case(asked).problem
    assert data is not None
    solver = find_solver("local_search")
    plain = run_solver(solver, problem)
    found = solve_unseen(solver, problem, plain, trace, data.tune, "prefill", 32, "split")
    assert found.unseen <= found.plain_unseen
    same = (
        found.solution.placement.physical_to_logical == plain.placement.physical_to_logical
    ).all(axis=1)
    assert (~same).sum() <= found.by_domain
    with pytest.raises(MismatchError, match="large enough"):
        solve_unseen(
            solver, problem, plain, trace, data.tune.select(data.tune.ids < 32), "prefill", 32, "lp"
        )


def test_excess_under_best_choice_by_hand() -> None:
    """Two GPUs hold experts 0, 1 and 0, 2; 8 tokens of 0, 4 of 1, none of 2. Equal shares: 8 and 4,
    excess 8 / 6 - 1; the best shares: 6 and 6."""
    placement = Placement(np.array([[0, 1, 0, 2]], np.int32), 2, 1, 3)
    counts = np.array([[[8, 4, 0]]], np.float32)
    speed = np.ones(2)
    assert excess_by_layer(placement, counts, "split", speed) == pytest.approx(8 / 6 - 1)
    assert excess_by_layer(placement, counts, "lp", speed) == pytest.approx(0.0)
