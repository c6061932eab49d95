"""Files of kinds that public issues and repositories describe, made small, with our own values."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from moesim.errors import FormatError, InputError
from moesim.exporters import sglang as sglang_export
from moesim.exporters import vllm_ascend
from moesim.exporters.base import ReadOptions
from moesim.jobs.import_trace import import_files
from moesim.serving.arrivals import load_requests
from moesim.trace.importers import sglang, sglang_recorder, table, vllm


def write(path, text):
    path.write_text(text)
    return path


def test_sglang_csv_of_each_rank(tmp_path, options, notes):
    """sgl-project/sglang issue 5275: a CSV of layer_id, expert_id, count a rank. 5 + 2 and 1 + 4
    choices of layer 3's experts are one step, not two that tune and evaluate."""
    files = [
        write(
            tmp_path / f"expert_distribution_rank{rank}_timestamp17.5.csv",
            f"layer_id,expert_id,count\n3,0,{counts[0]}\n3,1,{counts[1]}\n",
        )
        for rank, counts in enumerate([(5, 1), (2, 4)])
    ]
    load = import_files(files, options(top_k=1))
    assert load.expert_load.tolist() == [[[7, 5]]]
    assert load.meta.layer_ids == (3,)
    assert any("of 2 ranks by their names" in note for note in notes)
    plain = [file.rename(tmp_path / f"{i}.csv") for i, file in enumerate(files)]
    assert table.read(plain, options(top_k=1)).expert_load.shape[0] == 2
    assert any("each is a step of its own" in note for note in notes)


def test_rows_of_layer_and_expert_alone_are_counted(tmp_path, options, notes):
    """ggml-org/llama.cpp pull request 28544: a row for every choice, which token is not said. Layer
    0's expert 1 is chosen twice, expert 0 once; layer 1's expert 0 once."""
    file = write(tmp_path / "moe_trace.csv", "layer,expert\n0,1\n0,0\n1,0\n0,1\n")
    load = import_files([file], options(top_k=1))
    assert load.expert_load.tolist() == [[[1, 2], [1, 0]]]
    assert any("4 rows are counted" in note for note in notes)


@pytest.mark.parametrize(
    "record",
    [
        {"schema": "glm52-routing-trace-export/v2", "layers": {"3": {"executed_topk": [[1, 2]]}}},
        {"step": 0, "layer": 1, "rank": 0, "topk": 2, "indices": [[0, 1]]},
        {"token_ids": [1, 2], "routed_experts": {"data": "AAE=", "shape": [1, 1, 2], "start": 0}},
    ],
    ids=["JustVugg/colibri issue 119", "Megatron-LM pull request 5220", "verifiers pull 1672"],
)
def test_routing_that_is_not_known_is_refused_by_name(record, tmp_path, options):
    file = write(tmp_path / "routing.json", json.dumps(record) + "\n")
    with pytest.raises(InputError, match="is of no known format"):
        import_files([file], options())


def test_counts_in_the_wrong_rows(tmp_path, options, notes):
    """kvcache-ai/sglang pull request 46: all layers' counts landed in row 0."""
    counts = np.zeros((4, 8), int)
    counts[0] = 3
    file = write(tmp_path / "c.json", json.dumps({"logical_count": counts.tolist()}))
    sglang_recorder.read([file], options(top_k=2))
    assert any("may have filled the wrong rows" in note for note in notes)


def test_counts_by_the_ranks_that_tokens_came_from(tmp_path, options, notes):
    """Forks of the recorder add `logical_count_layout`: its ranks are no steps."""
    record = {"logical_count": [[[1, 2]], [[3, 4]]], "logical_count_layout": "rank_layer_expert"}
    load = sglang_recorder.read([write(tmp_path / "c.json", json.dumps(record))], options(top_k=1))
    assert load.expert_load.tolist() == [[[4, 6]]]
    record["logical_count_layout"] = "other"
    with pytest.raises(FormatError, match="logical_count_layout must be rank_layer_expert"):
        sglang_recorder.read([write(tmp_path / "c.json", json.dumps(record))], options(top_k=1))


def test_turns_that_return_only_their_own_rows(tmp_path, draw, options, notes):
    """sgl-project/sglang pull request 24851: turn 2 asks for rows from 6 on. Of 9 prompt and 3
    output tokens it has 5 rows, fewer than prompt tokens: a slice, which --short-records last puts
    at positions 6 to 10."""
    answers = [
        {"prompt_tokens": p, "completion_tokens": o, "routed_experts": encoded}
        for p, o, encoded in (
            (4, 3, base64.b64encode(draw(6).astype("<i4").tobytes()).decode()),
            (9, 3, base64.b64encode(draw(5).astype("<i4").tobytes()).decode()),
        )
    ]
    text = "".join(json.dumps({"text": "x", "meta_info": answer}) + "\n" for answer in answers)
    file = write(tmp_path / "turns.jsonl", text)
    known = {"top_k": 2, "num_experts": 8, "num_hidden_layers": 3}
    sglang.read([file], options(**known))
    assert any("1 of them have fewer rows than prompt tokens, as slices" in n for n in notes)
    trace = sglang.read([file], options(short_records="last", **known))
    assert trace.positions[trace.request_ids == 1].tolist() == [6, 7, 8, 9, 10]


def test_a_recorder_that_drops_tokens(tmp_path, options, notes):
    """sgl-project/sglang issue 12823: tokens lost in large batches leave requests without their
    beginning."""
    torch = pytest.importorskip("torch", reason="writing .pt files needs torch")
    ids = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.int32)
    record = {
        "forward_pass_id": 0,
        "rank": 0,
        "input_ids": [5, 6],
        "positions": [7, 30],
        "forward_mode": 2,
        "topk_ids_of_layer": ids,
    }
    mapping = torch.tensor([[0, 1, 2, 3]])
    file = tmp_path / "r.pt"
    torch.save({"records": [record], "last_physical_to_logical_map": mapping}, file)
    sglang_recorder.read([file], options(num_experts=4))
    assert any("2 of 2 requests begin after position 0" in note for note in notes)


def test_responses_without_any_id(tmp_path, options):
    """vllm-project/vllm pull request 49184: a kernel that routes inside returned zeros alone."""
    choice = {"routed_experts": np.zeros((4, 3, 2), int).tolist()}
    text = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    with pytest.raises(FormatError, match="no layer routes to any expert") as error:
        vllm.read([write(tmp_path / "r.jsonl", text)], options(num_experts=8))
    assert "empty buffer" in error.value.remedy


def test_an_aborted_request(tmp_path, draw, options, notes):
    """vllm-project/vime pull request 49: an abort before the first token has no record, and one
    with rows for its prompt alone has no decoded token."""
    rows = draw(5).tolist()
    records = [
        {"choices": [{"routed_experts": None, "finish_reason": "abort"}]},
        {
            "choices": [{"routed_experts": rows, "finish_reason": "abort"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 0},
        },
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    trace = vllm.read([write(tmp_path / "r.jsonl", text)], options(num_experts=8))
    assert trace.phases.tolist() == [0] * 5
    assert any("passed over 1 responses" in note for note in notes)


def test_dynamo_times_have_fractions(tmp_path):
    """ai-dynamo/dynamo's Mooncake rows have milliseconds as floats: asked for, not guessed."""
    rows = [{"timestamp": 13.25 * i, "input_length": 9, "output_length": 2} for i in range(3)]
    file = write(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FormatError, match="is no whole number"):
        load_requests(file)
    assert load_requests(file, time_unit="ms").span_s == pytest.approx(0.0265)


def test_turns_by_delay_are_refused(tmp_path):
    """Rows of a session that wait for the one before have a delay in place of a time."""
    first = {"session_id": "a", "timestamp": 0, "input_length": 9, "output_length": 2}
    then = {"session_id": "a", "delay": 50, "input_length": 9, "output_length": 2}
    text = f"{json.dumps(first)}\n{json.dumps(then)}\n"
    with pytest.raises(FormatError, match="line 2 lacks one of timestamp"):
        load_requests(write(tmp_path / "s.jsonl", text))


def test_vidur_and_splitwise(tmp_path):
    """microsoft/vidur's and Mutinifni/splitwise-sim's CSV files, both in seconds."""
    vidur = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,37,5\n2.0,20,15\n"
    found = load_requests(write(tmp_path / "v.csv", vidur))
    assert found.arrival_s.tolist() == [0.0, 1.5]
    assert found.output_tokens.tolist() == [5, 15]
    head = (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size"
    )
    split = f"{head}\n0,2,0,0.5,1,37,5\n1,2,0,2.5,1,20,15\n"
    found = load_requests(write(tmp_path / "s.csv", split))
    assert found.arrival_s.tolist() == [0.0, 2.0]
    with pytest.raises(FormatError, match=r"line 3: batch_size is '4'"):
        load_requests(write(tmp_path / "s.csv", split.replace("2.5,1", "2.5,4")))


def test_columns_that_are_not_read_are_named(tmp_path):
    """Azure's multimodal log of 2024 counts images, whose tokens are not in ContextTokens."""
    text = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 10:00:00.1,1,37,4\n"
    assert "not read: NumImages" in load_requests(write(tmp_path / "l.csv", text)).notices


def test_ascend_maps_count_layers_both_ways(notes):
    """vllm-project/vllm-ascend pull request 1223: redundant experts, layers by their number."""
    devices = [
        {"device_id": d, "device_expert": [2 * d, 2 * d + 1, (2 * d + 2) % 4]} for d in (0, 1)
    ]
    layers = [{"layer_id": layer, "device_list": devices} for layer in (3, 4)]
    data = json.dumps({"moe_layer_count": 2, "layer_list": layers}).encode()
    plan = vllm_ascend.decode(data, ReadOptions("map.json", layer_ids=(3, 4)))
    assert plan.layer_ids == (3, 4)
    assert plan.placement.num_slots == 6
    with pytest.raises(FormatError, match="layer_id is not each of 0 to 1 once"):
        vllm_ascend.decode(data, ReadOptions("map.json"))


def test_a_placement_is_no_trace(tmp_path, options):
    file = write(tmp_path / "map.json", json.dumps({"physical_to_logical_map": [[0, 1]]}))
    with pytest.raises(FormatError, match="is a placement, not a trace") as error:
        import_files([file], options())
    assert "moesim import-plan" in error.value.remedy


def test_maps_of_several_models_are_refused():
    """A proposed vLLM format holds a map for each model class, the MTP one too."""
    maps = {"A": {"physical_to_logical_map": [[0, 1]]}, "AMTP": {}}
    data = json.dumps({"version": 2, "model_maps": maps}).encode()
    with pytest.raises(FormatError, match="wrong keys"):
        sglang_export.decode(data, ReadOptions("maps.json", num_gpus=2))
