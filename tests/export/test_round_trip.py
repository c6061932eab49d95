"""Every engine's file reads back to the placement that it was written from, for random plans."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import MoesimError
from moesim.exporters.base import ExportOptions, ReadOptions
from moesim.exporters.registry import EXPORTERS, exporter
from moesim.placement import EMPTY, Placement, Plan

WITH_REPLICAS = ("sglang", "tensorrt-llm", "vllm-pr41141", "vllm-ascend", "omni-infer", "eplb")


@st.composite
def plans(draw: st.DrawFn, replicas: bool = True, uneven: bool = False) -> Plan:
    """Random placements with replicas, and with empty slots at the end of GPUs."""
    gpus = draw(st.sampled_from([1, 2, 3, 4, 8]))
    least = draw(st.integers(1, 4))
    experts = gpus * least
    extra = draw(st.integers(0, 3)) if replicas and gpus > 1 else 0
    slots = min(experts, least + extra)
    nodes = draw(st.sampled_from([n for n in (1, 2, 4) if gpus % n == 0]))
    layers = draw(st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True).map(sorted))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    table = np.full((len(layers), gpus, slots + uneven), EMPTY, np.int32)
    for layer in range(len(layers)):
        base = rng.permutation(experts).reshape(gpus, least)
        for gpu in range(gpus):
            others = rng.permutation(np.setdiff1d(np.arange(experts), base[gpu]))
            count = slots - least
            if uneven and len(others) > count:
                count += int(rng.integers(0, 2))
            held = np.concatenate([base[gpu], others[:count]])
            table[layer, gpu, : len(held)] = rng.permutation(held)
    placement = Placement(table.reshape(len(layers), -1), gpus, nodes, experts)
    return Plan("", tuple(layers), placement)


def reading(plan: Plan, where: str = "file") -> ReadOptions:
    placement = plan.placement
    return ReadOptions(
        where,
        num_gpus=placement.num_gpus,
        num_nodes=placement.num_nodes,
        num_experts=placement.num_experts,
        layer_ids=plan.layer_ids,
    )


def assert_same(found: Plan, plan: Plan) -> None:
    np.testing.assert_array_equal(
        found.placement.physical_to_logical, plan.placement.physical_to_logical
    )
    assert found.layer_ids == plan.layer_ids
    assert found.placement.num_gpus == plan.placement.num_gpus
    assert found.placement.num_nodes == plan.placement.num_nodes
    assert found.placement.num_experts == plan.placement.num_experts


@pytest.mark.parametrize("engine", [e for e in WITH_REPLICAS if e != "omni-infer"])
@settings(max_examples=40, deadline=None)
@given(plan=plans())
def test_slots_come_back_in_order(engine: str, plan: Plan) -> None:
    module = exporter(engine)
    data = module.encode(plan, ExportOptions(num_hidden_layers=31))
    assert module.encode(plan, ExportOptions(num_hidden_layers=31)) == data  # INV-6
    assert_same(module.decode(data, reading(plan)), plan)


@settings(max_examples=40, deadline=None)
@given(plan=plans(uneven=True))
def test_omni_infer_keeps_each_devices_set(plan: Plan) -> None:
    """The array has no order within a device; sizes may differ between devices."""
    module = exporter("omni-infer")
    found = module.decode(module.encode(plan, ExportOptions()), reading(plan)).placement

    def sets(placement: Placement) -> list[list[set[int]]]:
        table = placement.physical_to_logical.reshape(placement.num_layers, placement.num_gpus, -1)
        return [[set(gpu.tolist()) - {EMPTY} for gpu in layer] for layer in table]

    assert sets(found) == sets(plan.placement)


@settings(max_examples=40, deadline=None)
@given(plan=plans(replicas=False))
def test_permutations_come_back(plan: Plan) -> None:
    module = exporter("megatron")
    data = module.encode(plan, ExportOptions())
    assert_same(module.decode(data, ReadOptions("file")), plan)


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_vllm_strategies_come_back(strategy: str) -> None:
    """8 experts on 4 GPUs: linear 01|23|45|67, round robin 04|15|26|37."""
    row = np.arange(8) if strategy == "linear" else np.array([0, 4, 1, 5, 2, 6, 3, 7])
    plan = Plan("", (1, 2), Placement(np.tile(row, (2, 1)).astype(np.int32), 4, 1, 8))
    module = exporter("vllm")
    data = module.encode(plan, ExportOptions())
    assert f"expert-placement-strategy: {strategy}" in data.decode()
    assert_same(module.decode(data, reading(plan)), plan)


junk = st.sampled_from([None, True, -1, 1 << 40, 0.5, "", "x", [], [[]], {}, {"a": 1}, [1, "2"]])


@pytest.mark.parametrize("engine", sorted(EXPORTERS.own))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(plan=plans(), cut=st.floats(0, 1), raw=st.binary(max_size=8), truncate=st.booleans())
def test_damaged_files_are_refused_by_name(
    engine: str, plan: Plan, cut: float, raw: bytes, truncate: bool
) -> None:
    """Whatever happens to the bytes: a plan, or an error that names the file."""
    module = exporter(engine)
    try:
        data = module.encode(plan, ExportOptions(num_hidden_layers=31))
    except MoesimError:
        return
    at = int(cut * len(data))
    damaged = data[:at] if truncate else data[:at] + raw + data[at + len(raw) :]
    refusal = None
    try:
        module.decode(damaged, reading(plan, "/somewhere/file.x"))
    except MoesimError as error:
        refusal = error
    if refusal is not None:
        assert "/somewhere/file.x" in refusal.cause
        assert refusal.remedy


@pytest.mark.parametrize("engine", ["sglang", "vllm-pr41141", "vllm-ascend", "megatron"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_wrong_values_are_refused_by_name(engine: str, data: st.DataObject) -> None:
    plan = Plan("", (1, 2), Placement(np.tile(np.arange(4, dtype=np.int32), (2, 1)), 2, 1, 4))
    module = exporter(engine)
    raw = json.loads(module.encode(plan, ExportOptions(num_hidden_layers=3)))
    owner = raw
    for _ in range(data.draw(st.integers(0, 4))):
        keys = sorted(owner) if isinstance(owner, dict) else list(range(len(owner)))
        inner = [k for k in keys if isinstance(owner[k], dict | list) and owner[k]]
        if not inner:
            break
        owner = owner[data.draw(st.sampled_from(inner))]
    keys = sorted(owner) if isinstance(owner, dict) else list(range(len(owner)))
    owner[data.draw(st.sampled_from(keys))] = data.draw(junk)
    refusal = None
    try:
        module.decode(json.dumps(raw).encode(), reading(plan, "/somewhere/file.x"))
    except MoesimError as error:
        refusal = error
    if refusal is not None:
        assert "/somewhere/file.x" in refusal.cause
