"""Files made after public reports, beside the checkout: read where they lie, never copied.

Every folder has a NOTE.txt with its source. Without the folder these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import FormatError, InputError, MismatchError
from moesim.exporters.base import ExportOptions, ReadOptions
from moesim.exporters.registry import exporter
from moesim.jobs.import_trace import import_files
from moesim.model.names import load_model
from moesim.serving.arrivals import load_requests
from moesim.trace.check import check_trace
from moesim.trace.format import LoadTrace, Trace
from moesim.trace.importers.base import ImportOptions

CASES = Path(__file__).parents[2] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there")


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def read(notes: list[str]):
    def load(case: str, model: str | None = None, **known: object) -> Trace | LoadTrace:
        file = CASES / case
        if file.suffix == ".pt":
            pytest.importorskip("torch", reason="reading .pt files needs torch")
        if model is not None:
            spec = load_model(str(CASES / model) if model.endswith(".json") else model)
            known = {
                "num_experts": spec.num_experts,
                "top_k": spec.top_k,
                "num_hidden_layers": spec.num_hidden_layers,
                "layer_ids": spec.moe_layer_ids,
                **known,
            }
        return import_files([file], ImportOptions(notify=notes.append, **known))  # type: ignore[arg-type]

    return load


def said(notes: list[str], text: str) -> bool:
    return any(text in note for note in notes)


def test_bailian() -> None:
    found = load_requests(CASES / "req_bailian/qwen_like_blksz_16.jsonl")
    assert (len(found), found.block_tokens) == (400, 16)
    assert found.span_s == pytest.approx(53, abs=1)
    with pytest.raises(FormatError, match="no whole number"):
        load_requests(CASES / "req_bailian/guidellm.jsonl")


def test_u64() -> None:
    assert load_requests(CASES / "req_u64/m.jsonl").block_ids.tolist() == [0, 1, 0, 2, 0, 3]


def test_sglang_n2(read, notes) -> None:
    trace = read("tr_sglang_n2/resp_top.jsonl", top_k=4, num_hidden_layers=4)
    assert int((trace.phases == 0).sum()) == 300
    assert int((trace.phases == 1).sum()) == 110
    assert sorted(set(trace.positions.tolist())) == list(range(41))


def test_vllm_preempt(read, notes) -> None:
    trace = read("tr_vllm_preempt/resp.jsonl")
    third = trace.request_ids == 3
    assert trace.positions[third].tolist() == list(range(48))
    assert int((trace.phases[third] == 1).sum()) == 8
    assert trace.token_ids[third][0] == 1000
    assert said(notes, "1 of 10 records are short")


def test_fused_shared_slots(read, notes) -> None:
    trace = read("tr_255/resp.jsonl", "DeepSeek-V2-Lite")
    assert (trace.num_tokens, trace.top_k, trace.num_layers) == (6 * 39, 6, 26)
    assert said(notes, "255 throughout")


@pytest.mark.parametrize("file", ["tr_allzero/resp.jsonl", "tr_allzero/req0.npy"])
def test_all_zero(read, file: str) -> None:
    with pytest.raises(FormatError, match="no layer routes") as error:
        read(file)
    assert "record some traffic" not in error.value.remedy


@pytest.mark.parametrize(("file", "tokens"), [("resp.jsonl", 1450), ("resp40.jsonl", 1770)])
def test_cuda_graph_copies(read, notes, file: str, tokens: int) -> None:
    trace = read(f"tr_cudagraph_dup/{file}", num_experts=32)
    assert trace.num_tokens == tokens
    assert said(notes, "only 20 different routings")
    assert "repeated-decode" in {finding.code for finding in check_trace(trace)}


def test_zero_computation_experts(read) -> None:
    with pytest.raises(FormatError, match=r"outside 0\.\.511"):
        read("tr_longcat_zero/resp.jsonl", num_experts=512)
    trace = read("tr_longcat_zero/resp.jsonl", num_experts=512, zero_experts=256)
    assert int(trace.expert_ids.max()) < 512
    assert int(trace.expert_ids.min()) == -1


def test_hash_layers(read, notes) -> None:
    model = "rec_dsv4/config.json"
    load = read("rec_dsv4/expert_distribution_recorder_1.pt", model)
    assert load.meta.num_layers == 43
    assert said(notes, "layers 0, 1, 2 are MoE layers, but hold no choice")


@pytest.mark.parametrize(
    ("file", "model", "layers"),
    [
        ("glm_air_mtp.pt", "GLM-4.5-Air", 45),
        ("glm_air_plain.pt", "GLM-4.5-Air", 45),
        ("with_mtp.pt", "DeepSeek-V2-Lite", 26),
        ("mtp_none.pt", "DeepSeek-V2-Lite", 26),
    ],
)
def test_megatron_mtp(read, file: str, model: str, layers: int) -> None:
    from moesim.trace.importers.torch_file import load_pt

    trace = read(f"meg_mtp/{file}", model)
    first = load_pt(CASES / "meg_mtp" / file)
    assert trace.num_layers == layers
    np.testing.assert_array_equal(trace.expert_ids[:, 0], first[0])


def test_layers_without_load(read, build) -> None:
    from moesim.jobs.plan import make_plan
    from moesim.planning.request import PlanRequest

    load = read("plan_zero_layers/zl_half.npz", top_k=2, layer_ids=(0, 1, 2, 3))
    result = make_plan(PlanRequest.of(load, build.small_cluster(1, 8), None, solver="greedy"))
    assert result.plan.objective_value >= 1
    assert result.plan.bound >= 1 - 1e-5
    assert said(list(result.notices), "layers 0, 1 have no load")


def decode(case: str, engine: str, notes: list[str], **known: object):
    options = ReadOptions(str(CASES / case), notify=notes.append, **known)  # type: ignore[arg-type]
    return exporter(engine).decode((CASES / case).read_bytes(), options)


def test_eplb_with_doubles(notes) -> None:
    plan = decode("pl_eplb22/eplb_own.json", "sglang", notes, num_gpus=32, num_experts=256)
    assert plan.placement.double_replicas
    assert said(notes, "hold an expert that their GPU has already")


def test_shared_expert_in_every_list(notes) -> None:
    plan = decode("pl_mix_placement/map.json", "vllm-ascend", notes, num_experts=256)
    assert plan.placement.num_experts == 256
    assert plan.placement.num_slots == 256
    with pytest.raises(InputError, match="as a shared expert does"):
        decode("pl_mix_placement/map.json", "vllm-ascend", notes)


def test_tensorrt_mtp(notes) -> None:
    spec = load_model("DeepSeek-V3")
    known = {"num_gpus": 32, "num_hidden_layers": 61, "layer_ids": spec.moe_layer_ids}
    plan = decode("pl_trt13974/eplb_mtp.yaml", "tensorrt-llm", notes, **known)
    assert plan.layer_ids == spec.moe_layer_ids
    written = exporter("tensorrt-llm").encode(plan, ExportOptions(spec=spec, mtp_layers=1))
    assert b"\n  61: " in written


def test_sglang_json(read, notes) -> None:
    load = read("sg_logical_json/rank0_only.json", top_k=8)
    assert load.meta.num_experts == 256
    assert said(notes, "every choice is of experts 0..15 of 256")
    with pytest.raises(MismatchError, match="row 0 of 61 holds routing"):
        read("sg_logical_json/rank0_only.json", "DeepSeek-V3")
    assert read("sg_logical_json/float_counts.npz", top_k=2).meta.num_experts == 64
    plan = decode(
        "sg_logical_json/map62.json",
        "sglang",
        notes,
        num_gpus=8,
        num_hidden_layers=61,
        layer_ids=tuple(range(3, 61)),
    )
    assert plan.placement.num_layers == 58


@pytest.mark.parametrize(
    ("file", "page"),
    [("topo_smi/topo.txt", "docs/topologies.md"), ("nccl_log/alltoall.log", "docs/calibration.md")],
)
def test_other_text_names_its_page(read, file: str, page: str) -> None:
    with pytest.raises(FormatError, match="not a trace") as error:
        read(file)
    assert page in error.value.remedy


def test_odd_names_and_headers(read, notes) -> None:
    from moesim.errors import plain

    read("rel_escape-in-notes/e.jsonl", top_k=2)
    assert all("\x1b" not in plain(note, 1000) for note in notes)
    with pytest.raises(FormatError, match="unknown type"):
        read("rel_safetensors-dtype-list/stat")
    with pytest.raises(FormatError, match="wrong keys"):
        decode("rel_import-plan-sglang-scalar/seven.json", "sglang", notes, num_gpus=4)
