"""Maps of load and traffic: hand-counted, and the same batches as the plan's evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.cluster import load_cluster
from moesim.errors import MismatchError
from moesim.jobs.plan import make_plan
from moesim.model.names import load_model
from moesim.placement import Placement, Plan
from moesim.planning.maps import plan_maps
from moesim.planning.request import PlanRequest


def many(build: Any, experts: int = 8) -> Any:
    rng = np.random.default_rng(3)
    ids = np.argsort(-rng.gumbel(size=(1200, 2, experts)), axis=2)[:, :, :2]
    return build.make_trace(ids, experts, request_ids=np.repeat(np.arange(40), 30))


def test_the_maps_repeat_the_evaluation_to_the_last_digit(build: Any) -> None:
    trace = many(build)
    cluster = load_cluster("h100-sxm-ib", num_gpus=4)
    request = PlanRequest.of(trace, cluster, None, solver="greedy", batch_tokens=120, seed=3)
    plan = make_plan(request).plan
    found = plan_maps(trace, plan, cluster)
    assert found.same_trace
    assert found.message_bytes is None
    assert all(made.layer_parts_us is None for made in found.maps.values())
    assert list(found.maps) == ["linear", "eplb", "greedy"]
    for name, made in found.maps.items():
        figure = plan.evaluation["plans"][name]["imbalance"]["value"]
        assert made.busiest.mean() == pytest.approx(figure, abs=1e-12)
        assert made.gpu_load.sum() == pytest.approx(120 * 2 * 2)
        assert (np.diag(made.messages) == 0).all()


def test_the_times_by_layer_add_up_to_the_evaluation(build: Any) -> None:
    rng = np.random.default_rng(3)
    ids = np.argsort(-rng.gumbel(size=(1200, 8, 64)), axis=2)[:, :, :8]
    trace = build.make_trace(ids, 64, request_ids=np.repeat(np.arange(40), 30))
    cluster = load_cluster("h100-sxm-ib", num_gpus=4)
    model = load_model("debian-olmoe")
    request = PlanRequest.of(trace, cluster, model, solver="greedy", batch_tokens=120, seed=3)
    plan = make_plan(request).plan
    found = plan_maps(trace, plan, cluster, model)
    for name, made in found.maps.items():
        assert made.layer_parts_us is not None
        assert made.layer_parts_us.shape == (8, 3)
        figures = plan.evaluation["plans"][name]
        for part, us in zip(("dispatch", "compute", "combine"), made.layer_parts_us.T, strict=True):
            assert us.sum() == pytest.approx(figures[f"{part}_us"]["value"], rel=1e-9)


def test_messages_are_counted_once_a_gpu(build: Any) -> None:
    # Every token chooses experts 2 and 3, both on GPU 1. Homes: the first half of a batch on GPU 0,
    # the second on GPU 1. Of 20 tokens, 10 are sent from GPU 0 to GPU 1 once, none back.
    ids = np.tile(np.array([2, 3]), (400, 1, 1))
    trace = build.make_trace(ids, 4, request_ids=np.repeat(np.arange(40), 10))
    placement = Placement(np.array([[0, 1, 2, 3]], np.int32), 2, 1, 4)
    plan = Plan(
        "toy", (0,), placement, solver="mine", evaluation={"batch_tokens": 20, "num_batches": 4}
    )
    found = plan_maps(trace, plan)
    assert found.dedup == "gpu"
    own = found.maps["mine"]
    assert own.messages.tolist() == [[0, 10], [0, 0]]
    assert own.gpu_load.tolist() == [[0, 40]]
    assert own.busiest.tolist() == [2, 2, 2, 2]
    assert not found.same_trace
    assert found.notes


def test_a_trace_of_another_shape_is_refused(build: Any) -> None:
    placement = Placement(np.array([[0, 1, 2, 3]], np.int32), 2, 1, 4)
    with pytest.raises(MismatchError):
        plan_maps(many(build), Plan("toy", (0,), placement))
