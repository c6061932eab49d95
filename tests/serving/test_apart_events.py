"""A step between two pools, event by event: against the closed form, and its invariants."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import moesim
from moesim.cli.main import run as run_command
from moesim.errors import InputError
from moesim.serving.apart import ping_pong_us
from moesim.serving.apart_events import ApartStep, exchange_stages, simulate_apart
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import deploy
from moesim.serving.step_cost import EngineStepCost


def made(parts: int, dp: int = 8, expert_gpus: int = 8) -> EngineStepCost:
    options = {"dp": dp, "expert_gpus": expert_gpus, "micro_batches": parts}
    return EngineStepCost(deploy("Qwen3-30B-A3B", "h200-sxm-ib", **options))


def batch(dp: int = 8, rows: float = 96.0) -> BatchShape:
    ones = np.ones(dp)
    return BatchShape.of(rows * ones, rows * 2000 * ones)


def parts_of(cost: EngineStepCost, shape: BatchShape) -> tuple[float, float, int]:
    cut = shape.cut(cost.deployment.micro_batches)
    layers = cost.deployment.model.num_moe_layers
    own, experts, _ = cost._own_experts_and_comm_us(cut)
    return float(own) / layers, float(experts) / layers, layers


def test_one_part_alone_is_the_closed_form() -> None:
    """Nothing contends: each layer takes attention, dispatch, experts and combine (INV-8)."""
    cost = made(1)
    run = simulate_apart(cost, batch())
    own, experts, layers = parts_of(cost, batch())
    assert run.step_us == pytest.approx(layers * (own + experts + sum(run.exchange_us)))
    assert run.attention_busy == pytest.approx(layers * own / run.step_us)


def test_bytes_of_the_exchange_by_hand() -> None:
    """Low-latency kernels send a row once for each of its 8 experts, 2,048 elements in bf16 as the
    experts are, and take as many back; all of it between the two nodes, through the NICs
    of both, and the network carries both parts of every layer."""
    cost = made(2)
    sent = exchange_stages(cost, batch().cut(2))
    routes = cost.deployment.cluster.routes()
    nic = np.array(routes.link_class_names)[routes.link_class] == "nic"
    for stage, size in zip(sent, (2.0, 2.0), strict=True):
        out = stage.link_bytes[0][:, nic].sum(axis=1) / 2
        assert out == pytest.approx(8 * 48 * 8 * 2048 * size)
    run = simulate_apart(cost, batch())
    assert run.link_bytes.sum() == pytest.approx(2 * sum(s.link_bytes.sum() for s in sent))


@pytest.mark.parametrize(
    ("comm", "copies", "dtype"),
    [
        ("nccl", None, "bf16"),
        ("nccl", None, "fp8"),
        ("deepep", 1.0, "bf16"),
        ("deepep", 1.0, "fp8"),
    ],
)
def test_a_row_goes_once_to_each_gpu_or_node(comm: str, copies: float | None, dtype: str) -> None:
    """Over the network once to each GPU that holds one of its experts, or once to their node, from
    where NVLink takes it on; 48 rows from each of 8 GPUs. DeepEP sends fp8 rows, with a scale of 4
    bytes per 128 elements, to fp8 experts."""
    options = {"dp": 8, "expert_gpus": 8, "micro_batches": 2, "moe_comm": comm}
    options["expert_dtype"] = dtype
    cost = EngineStepCost(deploy("Qwen3-30B-A3B", "h200-sxm-ib", **options))
    dispatch, _ = exchange_stages(cost, batch().cut(2))
    routes = cost.deployment.cluster.routes()
    nic = np.array(routes.link_class_names)[routes.link_class] == "nic"
    size = 2048 * (1 + 4 / 128 if (comm, dtype) == ("deepep", "fp8") else 2.0)
    shares = cost._of_moe.chosen_share.sum(axis=1) if copies is None else copies
    out = dispatch.link_bytes[0][:, nic].sum(axis=1) / 2
    assert out.mean() == pytest.approx(8 * 48 * size * np.mean(shares), rel=1e-3)


def check(cost: EngineStepCost, shape: BatchShape) -> ApartStep:
    run = simulate_apart(cost, shape)
    own, experts, layers = parts_of(cost, shape)
    parts = cost.deployment.micro_batches
    assert (run.peak_used <= 1 + 1e-9).all()
    through = layers * (own + experts + sum(run.exchange_us))
    assert run.step_us >= through * (1 - 1e-9)
    assert run.step_us >= parts * layers * max(own, experts) * (1 - 1e-9)
    assert run.step_us <= parts * through * (1 + 1e-9)
    return run


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize(("dp", "expert_gpus"), [(8, 8), (12, 4), (4, 12)])
def test_never_below_its_bounds_and_near_the_closed_form(
    parts: int, dp: int, expert_gpus: int
) -> None:
    """A link carries no more than it can (INV-3), no pool works at two parts at once, and the step
    is within 2% of the closed form with the same times of each way."""
    cost = made(parts, dp, expert_gpus)
    run = check(cost, batch(dp))
    own, experts, layers = parts_of(cost, batch(dp))
    every = (own, experts, sum(run.exchange_us), max(run.exchange_us))
    own_us, experts_us, both_us, way_us = (np.array(t * layers) for t in every)
    closed = ping_pong_us(own_us, experts_us, both_us, parts, layers, way_us)
    assert run.step_us == pytest.approx(float(closed), rel=0.02)


def test_without_pools() -> None:
    cost = EngineStepCost(deploy("Qwen3-30B-A3B", "h200-sxm-ib", dp=8))
    with pytest.raises(InputError, match="share their GPUs"):
        simulate_apart(cost, batch())


def test_serve_says_what_the_pools_do(tmp_path: Path) -> None:
    drawn = "poisson:rate=4,requests=40,prompt=200,output=20"
    asked = {"model": "Qwen3-30B-A3B", "cluster": "h200-sxm-ib", "seed": 1, "gpus": 8}
    served = moesim.serve(drawn, replicas=1, expert_gpus=2, **asked)
    pools = served.record["pools"]
    assert (pools["attention_gpus"], pools["expert_gpus"]) == (6, 2)
    for name in ("attention_busy", "experts_busy", "exchange_share"):
        assert 0 < pools[name] <= 1
    assert "two pools, a decode step of" in served.summary()
    run, page = tmp_path / "run.json", tmp_path / "page.html"
    run.write_text(json.dumps(served.to_json()), encoding="utf-8")
    assert run_command(["report", str(run), "--out", str(page)], debug=True) == 0
    assert "Attention and experts apart" in page.read_text(encoding="utf-8")
    assert moesim.serve(drawn, replicas=1, **asked).record["pools"] is None
