"""Layers for multi-token prediction: rows in plans, memory, steps, and engines' files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moesim
from moesim.cluster import load_cluster
from moesim.cost.step import calibration_of_gpu
from moesim.errors import InfeasibleError, InputError
from moesim.model.names import load_model
from moesim.model.spec import ModelSpec
from moesim.placement import Placement, Plan, in_order, load_plan
from moesim.planning.mtp import mtp_ids, plan_with_mtp, with_mtp, without_mtp
from moesim.planning.request import check_memory
from moesim.trace.format import LoadTrace

TRACE = "sample:debian-moe"
DRAFTER = 1_000_000


def drafting() -> ModelSpec:
    """debian-moe, 12 layers of 64 experts, with a thirteenth for multi-token prediction."""
    base = load_model("debian-moe")
    experts = base.num_experts * base.expert_params
    return replace(base, mtp_layers=1, mtp_moe_layers=1, mtp_params=experts + DRAFTER)


def asked(**more: Any) -> dict[str, Any]:
    return {"cluster": "h100-sxm-ib", "gpus": 8, "model": drafting(), **more}


def linear(model: ModelSpec) -> Plan:
    rows = np.tile(np.arange(64, dtype=np.int32), (model.num_moe_layers, 1))
    return Plan("debian-moe", model.moe_layer_ids, Placement(rows, 8, 1, 64))


def test_a_trace_without_the_layer_takes_the_last_ones_routing() -> None:
    model, trace = drafting(), moesim.load_trace(TRACE)
    assert mtp_ids(model) == (12,)
    made, notes = with_mtp(trace, model)
    assert made.meta.layer_ids == (*trace.meta.layer_ids, 12)
    np.testing.assert_array_equal(made.expert_ids[:, 12], trace.expert_ids[:, 11])
    assert "assumed to be chosen as the last layer's" in notes[0]
    assert with_mtp(made, model) == (made, [])
    left, notes = without_mtp(made, model)
    np.testing.assert_array_equal(left.expert_ids, trace.expert_ids)
    assert "layers 12 of the trace" in notes[0]


def test_the_plan_has_its_row_and_says_why(tmp_path: Path) -> None:
    """The other rows are those of the plan without; a trace with the layer has it planned."""
    given = asked(solver="greedy")
    counts = np.random.default_rng(0).poisson(50, (12, 13, 64)).astype(np.int64)
    meta = moesim.load_trace(TRACE).meta
    recorded = LoadTrace(counts, replace(meta, layer_ids=tuple(range(13))))
    trace = LoadTrace(counts[:, :12], meta)
    without, made = moesim.plan(trace, **given), moesim.plan(trace, **given, mtp=True)
    table = made.plan.placement.physical_to_logical
    np.testing.assert_array_equal(table[:12], without.plan.placement.physical_to_logical)
    np.testing.assert_array_equal(table[12], in_order(without.plan.placement))
    assert made.plan.provenance["mtp_layers"] == [12]
    assert any("placed in order" in note for note in made.notices)
    planned = moesim.plan(recorded, **given, mtp=True)
    assert planned.plan.layer_ids == (*range(12), 12)
    assert not any("placed in order" in note for note in planned.notices)
    left = moesim.plan(recorded, **given)
    assert left.plan.layer_ids == tuple(range(12))
    assert any("left out without" in note for note in left.notices)
    back = load_plan(made.save(tmp_path / "p.json"))
    own, rows = back.mtp_apart()
    assert own.layer_ids == without.plan.layer_ids
    assert rows == {12: in_order(own.placement).tolist()}


def test_memory_holds_the_layer() -> None:
    """8 slots of 13 layers, not 12, and the drafter's own weights in 16 bits."""
    model, cluster = drafting(), load_cluster("h100-sxm-ib", 8)
    slots = np.full(8, 8, np.int64)
    need = 8 * 13 * model.expert_bytes() + model.non_expert_bytes() + 2 * DRAFTER
    for spare, fits in ((1.0, True), (-1.0, False)):
        hbm = (need + spare) / 0.95 / 1e9
        small = replace(cluster, gpus=tuple(replace(g, hbm_gb=hbm) for g in cluster.gpus))
        check_memory(model, small, slots)
        if fits:
            check_memory(model, small, slots, mtp=True)
        else:
            with pytest.raises(InfeasibleError, match="13 layers"):
                check_memory(model, small, slots, mtp=True)


def test_a_step_by_hand() -> None:
    """With linear rows the layer takes what the last one takes, the projection of 2 x hidden to
    hidden, and the output head once more; on every GPU as many tokens."""
    model = drafting()
    given = asked(plan=linear(model), phase="prefill", batch_tokens=4096, steps=2)
    one = moesim.simulate(TRACE, **given, fidelity="analytic")
    both = [
        moesim.simulate(TRACE, **given, mtp=True, fidelity=how) for how in ("analytic", "event")
    ]
    closed, event = (run.first for run in both)
    np.testing.assert_allclose(event.step_us, closed.step_us, rtol=1e-12)
    assert any("assumed to be chosen" in note for note in both[0].notices)
    dense = calibration_of_gpu(one.models.cluster.gpus[0], None, True).dense
    rows = one.first.tokens / 8
    joined = dense.gemm_us(rows, model.hidden_size, 2 * model.hidden_size, model.dense_dtype)
    parts = {
        n: closed.breakdown_us()[n] - one.first.breakdown_us()[n] for n in ("attention", "gate")
    }
    own = one.first.breakdown_us()
    assert parts["gate"] == pytest.approx(own["gate"] / 12, rel=1e-6)
    assert parts["attention"] == pytest.approx(own["attention"] / 12 + joined.mean(), rel=0.01)
    assert "one token drafted" in both[0].summary()


def test_files_of_engines(tmp_path: Path) -> None:
    """TensorRT-LLM's file has the plan's row; SGLang keeps its own order, which is said."""
    model = drafting()
    plan, _ = plan_with_mtp(linear(model), (12,))
    table = plan.placement.physical_to_logical.copy()
    table[12] = table[12][::-1]
    plan = replace(plan, placement=replace(plan.placement, physical_to_logical=table))
    notes: list[str] = []
    out = tmp_path / "t.yaml"
    moesim.export(plan, to="tensorrt-llm", out=out, model=model, notify=notes.append)
    assert f"  12: {json.dumps(list(range(63, -1, -1)))}" in out.read_text(encoding="utf-8")
    assert not any("placed in order" in note for note in notes)
    moesim.export(plan, to="sglang", out=tmp_path / "s.json", model=model, notify=notes.append)
    assert any("keeps its own order" in note for note in notes)


def test_models_without_the_layer() -> None:
    for run in (moesim.plan, moesim.simulate):
        with pytest.raises(InputError, match="no multi-token-prediction layer with experts"):
            run(TRACE, cluster="h100-sxm-ib", gpus=8, mtp=True)
