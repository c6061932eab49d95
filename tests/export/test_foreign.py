"""Files of engines that no plan of ours looks like: what is read, what is said, what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.errors import FormatError, InputError, MismatchError
from moesim.exporters import omni_infer, sglang, tensorrt_llm, vllm_ascend
from moesim.exporters.base import ExportOptions, ReadOptions, filled
from moesim.model.names import load_model
from moesim.placement import Placement, Plan, load_plan, parse_plan


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def reading(notes: list[str]) -> Any:
    def make(**fields: Any) -> ReadOptions:
        return ReadOptions("file", notify=notes.append, **fields)

    return make


def location(rows: list[list[int]]) -> bytes:
    return json.dumps({"physical_to_logical_map": rows}).encode()


# Experts 0 1 2 and a second slot of 2 on GPU 1 of two: slots 0 1 | 2 2.
DOUBLE = [[0, 1, 2, 2], [0, 1, 2, 0]]


def test_double_replicas_are_read_with_a_notice(tmp_path, reading, notes):
    plan = sglang.decode(location(DOUBLE), reading(num_gpus=2, layer_ids=(4, 5)))
    assert plan.placement.physical_to_logical.tolist() == DOUBLE
    assert plan.placement.double_replicas
    assert any("1 slots hold an expert that their GPU has already" in n for n in notes)
    assert any("layer 4, GPU 1, expert 2" in n for n in notes)
    plan.save(tmp_path / "p.json")
    assert load_plan(tmp_path / "p.json").placement.double_replicas
    with pytest.raises(MismatchError, match="omni-infer's array"):
        omni_infer.encode(plan, ExportOptions())


def test_our_own_plans_keep_inv_2():
    """Without the mark of a foreign file a double replica is refused, in plan files, too."""
    table = np.array(DOUBLE, np.int32)
    with pytest.raises(FormatError, match="layer 0: GPU 1 holds expert 2 twice"):
        Placement(table, 2, 1, 3)
    whole = Plan("", (0, 1), Placement(table, 2, 1, 3, double_replicas=True)).to_json()
    raw = json.loads(whole)
    assert parse_plan(raw).placement.double_replicas
    del raw["double_replicas"]
    with pytest.raises(FormatError, match="holds expert 2 twice"):
        parse_plan(raw)
    plain = Plan("", (0,), Placement(np.array([[0, 1]], np.int32), 2, 1, 2)).to_json()
    assert "double_replicas" not in json.loads(plain)


def test_rows_of_mtp_layers_are_left_out(reading, notes):
    """Three hidden layers, MoE in 1 and 2; a fourth row is of the MTP layer."""
    rows = [[0, 1], [1, 0], [0, 1], [1, 0]]
    options = reading(num_gpus=2, layer_ids=(1, 2), num_hidden_layers=3)
    plan = sglang.decode(location(rows), options)
    assert plan.layer_ids == (1, 2)
    assert plan.placement.physical_to_logical.tolist() == [[1, 0], [0, 1]]
    assert any("left out rows 3 to 3" in n and "MTP" in n for n in notes)
    notes.clear()
    sglang.decode(location(rows), reading(num_gpus=2, layer_ids=(1, 2)))
    assert any("left out rows 0, 3, which are not of the MoE layers" in n for n in notes)
    file = {
        "num_slots": 2,
        "initial_global_assignments": dict(enumerate(rows)),
        "layer_updates_per_iter": 0,
    }
    data = yaml.safe_dump(file).encode()
    plan = tensorrt_llm.decode(data, reading(num_gpus=2, num_hidden_layers=3))
    assert plan.layer_ids == (0, 1, 2)
    assert any("left out layers 3:" in n for n in notes)


def test_mtp_rows_are_written_where_asked(notes):
    """TensorRT-LLM looks every layer up, MTP ones too, and fails on one that is not there."""
    plan = Plan("m", (1, 2), Placement(np.array([[1, 0, 1, 0]] * 2, np.int32), 2, 1, 2))
    options = ExportOptions(num_hidden_layers=3, mtp_layers=1, notify=notes.append)
    written = yaml.safe_load(tensorrt_llm.encode(plan, options))["initial_global_assignments"]
    assert written == {1: [1, 0, 1, 0], 2: [1, 0, 1, 0], 3: [0, 1, 0, 1]}
    assert any("layers 3 are for multi-token prediction" in n for n in notes)
    tensorrt_llm.encode(plan, ExportOptions(notify=notes.append))
    assert any("stops with a KeyError" in n for n in notes)


def ascend(layers: list[list[tuple[int, list[int]]]], ids: list[Any] | None = None) -> bytes:
    """Layers of (device_id, experts); `layer_id` 0, 1, ... unless given."""
    entries = [
        {
            "layer_id": index if ids is None else ids[index],
            "device_count": len(devices),
            "device_list": [{"device_id": d, "device_expert": e} for d, e in devices],
        }
        for index, devices in enumerate(layers)
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": entries}).encode()


def test_ascend_devices_and_layers_go_by_their_ids(reading):
    """Layer 1 first, device 1 first: ids count, not the order of the lists."""
    data = ascend([[(1, [0]), (0, [1])], [(0, [0]), (1, [1])]], ids=[1, 0])
    plan = vllm_ascend.decode(data, reading())
    assert plan.placement.physical_to_logical.tolist() == [[0, 1], [1, 0]]
    assert plan.layer_ids == (0, 1)
    absolute = ascend([[(0, [0]), (1, [1])], [(0, [1]), (1, [0])]], ids=[5, 3])
    plan = vllm_ascend.decode(absolute, reading(layer_ids=(3, 5)))
    assert plan.layer_ids == (3, 5)
    assert plan.placement.physical_to_logical.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (ascend([[(0, [0]), (0, [1])]]), "device_id is not each of 0 to 1 once"),
        (ascend([[(0, [0]), (2, [1])]]), "device_id is not each of 0 to 1 once"),
        (ascend([[(0, [0])], [(0, [0])]], ids=[0, 0]), "layer_id is not each of 0 to 1 once"),
        (ascend([[(0, [0])]], ids=["0"]), "must have a whole number layer_id"),
        (
            ascend([[(0, [0]), (1, [1])]]).replace(b'"device_count": 2', b'"device_count": 3'),
            "device_count is 3, but device_list has 2",
        ),
    ],
)
def test_ascend_ids_that_contradict_are_refused(reading, data, cause):
    with pytest.raises(FormatError, match=cause):
        vllm_ascend.decode(data, reading())


def test_ascend_devices_may_hold_different_numbers(reading, notes):
    """Device 1 has one expert less: its last slot is empty."""
    plan = vllm_ascend.decode(ascend([[(0, [0, 1]), (1, [2])]]), reading())
    assert plan.placement.physical_to_logical.tolist() == [[0, 1, 2, -1]]
    assert any("devices hold 1 to 2 experts" in n for n in notes)


def test_a_shared_expert_in_every_list_is_no_routed_one(reading, notes):
    """Two routed experts a device and expert 4 on both: 4 routed experts, if that is said."""
    data = ascend([[(0, [0, 1, 4]), (1, [2, 3, 4])]])
    plan = vllm_ascend.decode(data, reading(num_experts=4))
    assert plan.placement.physical_to_logical.tolist() == [[0, 1, 2, 3]]
    assert any("left out the slots of shared experts (4)" in n for n in notes)
    with pytest.raises(InputError, match="expert 4 has a slot on each of the 2 GPUs") as error:
        vllm_ascend.decode(data, reading())
    assert "`num_experts` 4 if it is shared, 5 if it is routed, or" in error.value.remedy
    five = vllm_ascend.decode(data, reading(num_experts=5))
    assert five.placement.num_experts == 5


def test_remedies_speak_of_the_files_maker(reading):
    with pytest.raises(FormatError, match="expert 1 has no slot") as error:
        sglang.decode(location([[0, 2, 2, 0]]), reading(num_gpus=2, num_experts=3))
    assert "moesim plan" not in error.value.remedy
    assert "ask whoever made it" in error.value.remedy
    with pytest.raises(MismatchError, match="4 slots do not divide over 3 GPUs") as mismatch:
        sglang.decode(location([[0, 1, 2, 3]]), reading(num_gpus=3))
    assert "that the file was made for" in mismatch.value.remedy


def test_layers_that_route_by_token_id_are_filled(notes):
    """The plan has layers 1 and 2 of a model with MoE layers 0 to 2 of 2 experts."""
    plan = Plan("m", (1, 2), Placement(np.array([[1, 0]] * 2, np.int32), 2, 1, 2))
    whole = filled(plan, ExportOptions(fill_layers=(0,), notify=notes.append))
    assert whole.layer_ids == (0, 1, 2)
    assert whole.placement.physical_to_logical.tolist() == [[0, 1], [1, 0], [1, 0]]
    assert any("layers 0 are not in the plan" in n for n in notes)
    assert filled(plan, ExportOptions()) is plan
    spec = load_model("DeepSeek-V3")
    with pytest.raises(MismatchError, match="layer 2 is no MoE layer of DeepSeek-V3"):
        filled(plan, ExportOptions(spec=spec, fill_layers=(2,)))


@pytest.mark.parametrize(
    ("made_for", "flag"),
    [("nccl", "--moe-a2a-backend none"), ("deepep_ll", "--moe-a2a-backend deepep"), (None, "")],
)
def test_sglang_starts_with_the_plans_all_to_all(tmp_path, notes, made_for, flag):
    table = Placement(np.array([[0, 1]], np.int32), 2, 1, 2)
    plan = Plan("org/model", (0,), table, evaluation={"all_to_all": made_for} if made_for else {})
    (line,) = sglang.launch(plan, tmp_path / "x.json", ExportOptions(notify=notes.append))
    assert flag in line
    assert ("--moe-a2a-backend" in line) == bool(flag)
    assert "--model-path org/model" in line
    assert any("does not say which all-to-all" in n for n in notes) == (made_for is None)


def test_sglang_without_an_all_to_all_chooses_replicas_at_random(tmp_path, notes):
    table = Placement(np.array([[0, 1, 1, 0]], np.int32), 2, 1, 2)
    plan = Plan("m", (0,), table, replica_policy="nearest", evaluation={"all_to_all": "nccl"})
    (line,) = sglang.launch(plan, tmp_path / "x.json", ExportOptions(notify=notes.append))
    assert "--ep-dispatch-algorithm dynamic" in line
    assert any("chosen as nearest" in n for n in notes)


def test_launch_lines_name_the_given_model_without_control_characters(tmp_path):
    table = Placement(np.array([[0, 1]], np.int32), 2, 1, 2)
    plan = Plan("a\x1b[31m\udc80b", (0,), table)
    (line,) = sglang.launch(plan, tmp_path / "x.json")
    assert "\x1b" not in line
    assert "\udc80" not in line
    (named,) = sglang.launch(plan, tmp_path / "x.json", ExportOptions(model_id="org/given"))
    assert "--model-path org/given" in named
    plan.save(tmp_path / "p.json")
    assert load_plan(tmp_path / "p.json").model == plan.model


def test_a_bare_number_is_no_map(reading):
    with pytest.raises(FormatError, match="wrong keys"):
        sglang.decode(b"7", reading(num_gpus=2))
    with pytest.raises(FormatError, match="counts for SGLang's own balancer") as error:
        sglang.decode(b'{"logical_count": [[1]]}', reading(num_gpus=2))
    assert "moesim trace import" in error.value.remedy
