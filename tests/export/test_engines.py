"""What each engine's file looks like, what is refused, and the lines to start with."""

from __future__ import annotations

import io
import json
import shlex

import numpy as np
import pytest
import yaml

from moesim.errors import FormatError, InputError, MismatchError, UnknownNameError
from moesim.exporters import eplb, megatron, omni_infer, sglang, tensorrt_llm, vllm, vllm_ascend
from moesim.exporters import vllm_pr41141 as pr41141
from moesim.exporters.base import ExportOptions, ReadOptions
from moesim.exporters.registry import EXPORTERS, exporter
from moesim.model.names import load_model
from moesim.placement import Placement, Plan

SMALL = Plan(
    "my model",
    (1, 3),
    Placement(np.array([[2, 0, 1, 2], [0, 1, 2, 1]], np.int32), 2, 1, 3),
    replica_policy="nearest",
)


def flags(line: str) -> dict[str, str]:
    """`--name value` pairs of a command line as the shell splits it."""
    words = shlex.split(line)
    return {w: words[i + 1] for i, w in enumerate(words[:-1]) if w.startswith("--")}


def test_sglang_has_rows_for_dense_layers_and_one_key(tmp_path):
    """5 hidden layers, MoE in 1 and 3: rows 0, 2, 4 are slot p = expert p mod 3."""
    data = json.loads(sglang.encode(SMALL, ExportOptions(num_hidden_layers=5)))
    assert data == {
        "physical_to_logical_map": [
            [0, 1, 2, 0],
            [2, 0, 1, 2],
            [0, 1, 2, 0],
            [0, 1, 2, 1],
            [0, 1, 2, 0],
        ]
    }
    (line,) = sglang.launch(SMALL, tmp_path / "a b.json")
    found = flags(line)
    assert found["--init-expert-location"] == str(tmp_path / "a b.json")
    assert found["--model-path"] == "my model"
    assert found["--ep-num-redundant-experts"] == "1"
    assert found["--expert-parallel-size"] == "2"
    assert found["--ep-dispatch-algorithm"] == "static"


def test_sglang_needs_the_number_of_layers():
    with pytest.raises(InputError, match="dense ones included, is not known") as error:
        sglang.encode(SMALL, ExportOptions())
    assert "`num_hidden_layers`" in error.value.remedy
    with pytest.raises(MismatchError, match="the plan has layer 3, but the model only 3"):
        sglang.encode(SMALL, ExportOptions(num_hidden_layers=3))


def test_sglang_reads_counts_and_other_keys_as_what_they_are():
    options = ReadOptions("f.json", num_gpus=2)
    with pytest.raises(FormatError, match="counts for SGLang's own balancer"):
        sglang.decode(b'{"logical_count": [[1]]}', options)
    with pytest.raises(FormatError, match="wrong keys"):
        sglang.decode(b'{"physical_to_logical_map": [[0]], "note": 1}', options)
    with pytest.raises(InputError, match="does not say how many GPUs"):
        sglang.decode(b'{"physical_to_logical_map": [[0]]}', ReadOptions("f.json"))


def test_tensorrt_llm_yaml(tmp_path):
    raw = yaml.safe_load(tensorrt_llm.encode(SMALL, ExportOptions()))
    assert raw == {
        "num_slots": 4,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": {1: [2, 0, 1, 2], 3: [0, 1, 2, 1]},
    }
    lines = tensorrt_llm.launch(SMALL, tmp_path / "b.yaml")
    extra = yaml.safe_load("\n".join(lines[1:5]))
    assert extra["moe_config"]["load_balancer"] == str(tmp_path / "b.yaml")
    assert flags(lines[-1])["--ep_size"] == "2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_slots: 4\nlayer_updates_per_iter: 2\n", "online balancing"),
        ("num_slots: 4\ninitial_global_assignments: {1: [0, 1]}", "2 slots, num_slots is 4"),
        ("num_slots: 2\ninitial_global_assignments: {a: [0, 1]}", "'a' is no layer"),
        ("num_slots: 2\ninitial_global_assignments: {1: [0, x]}", r"\[1\] must be a list"),
        ("num_slots: 2\nslots: 3", "unknown key slots"),
        ("- 1\n", "no mapping"),
        ("!!python/object/apply:os.system ['true']", "not YAML of plain data"),
        ("a: [1", "not YAML"),
    ],
)
def test_tensorrt_llm_bad_files(text, message):
    with pytest.raises(FormatError, match=message) as error:
        tensorrt_llm.decode(text.encode(), ReadOptions("f.yaml", num_gpus=2))
    assert "f.yaml" in error.value.cause


def test_pr41141_record(tmp_path):
    """Layers counted from 0 among MoE layers; redundancy 4 - 3 = 1."""
    record = json.loads(pr41141.encode(SMALL, ExportOptions()))
    assert record == {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 1,
        "num_slots": 4,
        "initial_global_assignments": {"0": [2, 0, 1, 2], "1": [0, 1, 2, 1]},
    }
    (line,) = pr41141.launch(SMALL, tmp_path / "m.jsonl")
    config = json.loads(flags(line)["--eplb-config"])
    assert config == {
        "num_redundant_experts": 1,
        "initial_mapping_path": str(tmp_path / "m.jsonl"),
        "disable_online_rebalancing": True,
    }
    stats = {"record_type": "eplb_load_stats"}
    other = {**record, "initial_global_assignments": {"0": [0, 1, 2, 0], "1": [0, 1, 2, 0]}}
    text = "\n".join(json.dumps(r) for r in (stats, other, record))
    found = pr41141.decode(text.encode(), ReadOptions("m", num_gpus=2, layer_ids=(1, 3)))
    np.testing.assert_array_equal(
        found.placement.physical_to_logical, SMALL.placement.physical_to_logical
    )


def test_vllm_ascend_file(tmp_path):
    raw = json.loads(vllm_ascend.encode(SMALL, ExportOptions()))
    assert raw["moe_layer_count"] == 2
    assert raw["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 2,
        "device_list": [
            {"device_id": 0, "device_expert": [0, 1]},
            {"device_id": 1, "device_expert": [2, 1]},
        ],
    }
    (line,) = vllm_ascend.launch(SMALL, tmp_path / "map.json")
    config = json.loads(flags(line)["--additional-config"])
    assert config == {"eplb_config": {"expert_map_path": str(tmp_path / "map.json")}}


def test_omni_infer_array(tmp_path, uneven_plan):
    pattern = np.load(io.BytesIO(omni_infer.encode(SMALL, ExportOptions())))
    assert pattern.dtype == np.int32
    assert pattern.tolist() == [[[1, 0, 1], [1, 1, 0]], [[0, 1, 1], [0, 1, 1]]]
    uneven = np.load(io.BytesIO(omni_infer.encode(uneven_plan, ExportOptions())))
    assert uneven.tolist() == [[[1, 1, 0, 0, 1]], [[0, 0, 1, 1, 0]]]
    (line,) = omni_infer.launch(SMALL, tmp_path / "p.npy")
    config = json.loads(flags(line)["--additional-config"])["omni_placement_config"]
    assert config["max_moe_layer_num"] == 2
    bad = io.BytesIO()
    np.save(bad, np.full((2, 1, 3), 2))
    with pytest.raises(FormatError, match="values other than 0 and 1"):
        omni_infer.decode(bad.getvalue(), ReadOptions("p.npy"))


def test_eplb_tensors_agree():
    raw = np.load(io.BytesIO(eplb.encode(SMALL, ExportOptions())))
    assert raw["physical_to_logical"].tolist() == [[2, 0, 1, 2], [0, 1, 2, 1]]
    assert raw["logical_to_physical"].tolist() == [
        [[1, -1], [2, -1], [0, 3]],
        [[0, -1], [1, 3], [2, -1]],
    ]
    assert raw["replica_count"].tolist() == [[1, 1, 2], [1, 2, 1]]
    out = io.BytesIO()
    np.savez(out, physical_to_logical=raw["physical_to_logical"], replica_count=np.ones((2, 3)))
    with pytest.raises(FormatError, match="replica_count does not fit"):
        eplb.decode(out.getvalue(), ReadOptions("t.npz", num_gpus=2))
    swapped = raw["logical_to_physical"][:, :, ::-1]
    out = io.BytesIO()
    np.savez(out, physical_to_logical=raw["physical_to_logical"], logical_to_physical=swapped)
    assert eplb.decode(out.getvalue(), ReadOptions("t.npz", num_gpus=2)).placement.num_slots == 4


def test_replicas_and_uneven_slots_are_refused_with_the_reason(make_plan, uneven_plan):
    replicas = make_plan()
    for module in (vllm, megatron):
        with pytest.raises(MismatchError, match=r"holds every expert once.*copies of expert"):
            module.encode(replicas, ExportOptions())
    for engine in set(EXPORTERS.own) - {"omni-infer"}:
        with pytest.raises(MismatchError, match="same number of experts"):
            exporter(engine).encode(uneven_plan, ExportOptions(num_hidden_layers=1))


def test_vllm_refuses_what_is_neither_linear_nor_round_robin(make_plan):
    with pytest.raises(MismatchError, match="no released vLLM loads a placement") as error:
        vllm.encode(make_plan(slots_per_gpu=2), ExportOptions())
    assert "--to megatron --apply" in error.value.remedy


def test_all_moe_layers_of_the_model_are_wanted(make_plan):
    spec = load_model("Mixtral-8x7B")
    plan = make_plan(layer_ids=(0, 1), slots_per_gpu=3)
    for engine in ("sglang", "tensorrt-llm", "vllm-pr41141", "vllm-ascend", "omni-infer"):
        with pytest.raises(MismatchError, match="wants every MoE layer, but the plan has 2 layers"):
            exporter(engine).encode(plan, ExportOptions(spec=spec))
    other = make_plan(experts=16, layer_ids=tuple(range(32)), slots_per_gpu=5)
    with pytest.raises(MismatchError, match="the plan has 16 experts, Mixtral-8x7B 8"):
        sglang.encode(other, ExportOptions(spec=spec))
    whole = make_plan(layer_ids=tuple(range(32)))
    assert len(json.loads(sglang.encode(whole, ExportOptions(spec=spec))).popitem()[1]) == 32


def test_every_exporter_has_the_protocol():
    for name in EXPORTERS.own:
        module = exporter(name)
        assert name == module.NAME
        assert module.TITLE
        assert module.ACCEPTED_BY
        assert module.SUFFIX.startswith(".")
    with pytest.raises(UnknownNameError) as error:
        exporter("tensorrtllm")
    assert "did you mean 'tensorrt-llm'" in error.value.remedy
