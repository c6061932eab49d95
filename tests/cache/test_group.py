"""Caching plans of several GPUs, and `moesim plan --offload`."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moesim.caching.group import hosted_experts, parse_group, plan_group
from moesim.caching.workload import Request
from moesim.cli.main import run
from moesim.cluster.gpus import load_gpu
from moesim.errors import FormatError, InfeasibleError
from moesim.model.names import AttentionSpec, ModelSpec
from moesim.placement import Placement, load_plan
from moesim.trace.format import load_token_trace, save_trace


def toy_model() -> ModelSpec:
    return ModelSpec(
        "toy", "made up", 2, (0, 1), 4096, 4096, 8, 2, 1000, AttentionSpec("gqa", 32, 8, 128)
    )


def two_gpus() -> Placement:
    """Experts 0..3 and 7 on GPU 0, 3..7 on GPU 1 (3 and 7 twice), in both layers."""
    return Placement(np.array([[0, 1, 2, 3, 7, 3, 4, 5, 6, 7]] * 2, np.int32), 2, 1, 8)


def test_hosted_by_hand() -> None:
    hosted = hosted_experts(two_gpus())
    assert np.flatnonzero(hosted[0, 0]).tolist() == [0, 1, 2, 3, 7]
    assert np.flatnonzero(hosted[1, 1]).tolist() == [3, 4, 5, 6, 7]


def test_each_gpu_keeps_its_own_experts(toys: ModuleType) -> None:
    """Ten experts of 100.7 MB per GPU; 4 slots fit, so no plan pins or caches an expert that the
    GPU does not host, and each GPU sees less than all accesses."""
    model = toy_model()
    trace = toys.random_trace(0, num_requests=16, tokens=30)
    fixed = model.non_expert_bytes() + model.kv_bytes(100) + 1_000_000_000
    request = Request(
        (fixed + 4.5 * model.expert_bytes()) / 1e9, 2, 100, prefetch="none", max_steps=60
    )
    gpus = (load_gpu("l40s"),) * 2
    found = plan_group(trace, two_gpus(), model, gpus, request)
    hosted = hosted_experts(two_gpus())
    for g, plan in enumerate(found.plans):
        assert plan.num_slots == 4
        assert not (plan.pinned_mask() & ~hosted[g]).any()
        assert 0 < found.results[g].hit_rate < 1
    data = json.loads(json.dumps(found.to_dict()))
    again = parse_group(data)
    assert [p.to_dict() for p in again] == [p.to_dict() for p in found.plans]
    with pytest.raises(FormatError, match="list of gpus"):
        parse_group(data | {"gpus": []})


def test_a_gpu_whose_experts_fit_keeps_them_all(toys: ModuleType) -> None:
    trace = toys.random_trace(0, num_requests=16, tokens=20)
    request = Request(8.0, 2, 100, max_steps=40)
    found = plan_group(trace, two_gpus(), toy_model(), (load_gpu("l40s"),) * 2, request)
    for g, plan in enumerate(found.plans):
        assert (plan.pinned_mask() == hosted_experts(two_gpus())[g]).all()
        assert found.results[g].hit_rate == 1.0
    with pytest.raises(InfeasibleError):
        plan_group(trace, two_gpus(), toy_model(), (load_gpu("l40s"),) * 2, Request(1.2, 2, 100))


def test_plan_offload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first 12,000 tokens of the bundled trace."""
    out = tmp_path / "plan.json"
    part = tmp_path / "trace.npz"
    save_trace(load_token_trace("sample:debian-moe", "a test").take(slice(12_000)), part)
    command = [
        "plan", "--trace", str(part), "--gpus", "2", "--solver", "eplb", "--offload",
        "--hbm", "1.5", "--out", str(out), "--json",
    ]  # fmt: skip
    assert run(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in data["cache"]] == ["GPU 0", "GPU 1"]
    plan = load_plan(out)
    caches = parse_group(plan.cache)
    assert len(caches) == 2
    assert all(0 < c.num_slots < 384 for c in caches)
