"""Megatron-Core's RouterReplay lists and router traces."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesim.errors import FormatError, InputError, MismatchError
from moesim.trace.importers import megatron


def jsonl(path, records) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def trace_record(step, rank, layer, ids, **extra):
    return {
        "step": step,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": layer,
        "rank": rank,
        "num_tokens": len(ids),
        "topk": len(ids[0]),
        "top_indices": ids,
        **extra,
    }


def test_replay_lists(tmp_path, draw, options, notes):
    torch = pytest.importorskip("torch", reason="writing .pt files needs torch")
    ids = draw(5)
    one, stacked, many = tmp_path / "one.pt", tmp_path / "stack.pt", tmp_path / "many.pt"
    torch.save([torch.tensor(ids[:, layer]).long() for layer in range(3)], one)
    torch.save(torch.tensor(ids), stacked)
    torch.save([[torch.tensor(ids[:, layer]) for layer in range(3)] for _ in range(2)], many)
    for file, copies in ((one, 1), (stacked, 1), (many, 2)):
        assert megatron.detect(file)
        trace = megatron.read([file], options(num_experts=8, layer_ids=(1, 2, 3)))
        np.testing.assert_array_equal(trace.expert_ids, np.concatenate([ids] * copies))
        assert trace.request_ids.tolist() == [0] * 5 + [1] * 5 * (copies - 1)
    assert any("does not name requests" in note for note in notes)
    torch.save([torch.tensor(ids[:, 0]), torch.tensor(ids[:4, 1])], one)
    with pytest.raises(FormatError, match="layers have different shapes"):
        megatron.read([one], options())
    torch.save([None, None], one)
    with pytest.raises(FormatError, match="item 0: recorded nothing") as error:
        megatron.read([one], options())
    assert "RECORD" in error.value.remedy
    torch.save([torch.tensor(ids[:, layer]).float() for layer in range(3)], one)
    with pytest.raises(FormatError, match="type float32, wanted whole numbers"):
        megatron.read([one], options())


def test_router_traces_of_ranks_merge_by_step(tmp_path, options, notes):
    """Two steps on two ranks; rows in any order; multi-token prediction left out."""
    ids = {(s, r, n): [[n, 4 + s], [n + 1, 6 + r]] for s in (0, 1) for r in (0, 1) for n in (1, 2)}
    files = []
    for rank in (1, 0):
        file = tmp_path / f"router_trace_rank{rank}.jsonl"
        records = [trace_record(s, r, n, v) for (s, r, n), v in ids.items() if r == rank]
        mtp = trace_record(0, rank, 0, [[0, 1]], mtp_idx=0)
        jsonl(file, [*reversed(records), {**mtp, "block": "mtp"}])
        files.append(file)
    assert megatron.detect(files[0])
    trace = megatron.read(files, options(num_experts=8))
    assert trace.meta.layer_ids == (1, 2)
    assert trace.step_ids is not None
    assert trace.step_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert trace.rank_ids is not None
    assert trace.rank_ids.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert trace.expert_ids[0].tolist() == [[1, 4], [2, 4]]
    assert trace.expert_ids[7].tolist() == [[2, 7], [3, 7]]
    assert any("2 records of multi-token" in note for note in notes)


def test_errors_name_line_and_field(tmp_path, options):
    file = tmp_path / "router_trace_rank0.jsonl"
    good = trace_record(0, 0, 1, [[0, 1]])
    cases = [
        ([{**good, "top_indices": [[0, 1], [2]]}], "line 1: top_indices: rows of different"),
        ([{**good, "top_indices": [0, 1]}], "line 1: top_indices must be rows of expert ids"),
        ([{**good, "step": -1}], "line 1: step must be a whole number"),
        ([good, good], "line 2: step 0 of rank 0 has layer 1 already"),
        ([good, {**good, "layer": 2, "step": 1}], "step 0 of rank 0 lacks layer 2"),
        ([good, {**good, "layer": 2, "top_indices": [[0, 1], [1, 2]]}], "different shapes"),
    ]
    for records, message in cases:
        jsonl(file, records)
        with pytest.raises(FormatError, match=message) as error:
            megatron.read([file], options(num_experts=8))
        assert str(file) in error.value.cause
    file.write_text('{"step": 0\n')
    with pytest.raises(FormatError, match="line 1: not JSON"):
        megatron.read([file], options())


def test_kinds_are_not_mixed(tmp_path, options):
    with pytest.raises(InputError, match="together"):
        megatron.read([tmp_path / "a.pt", tmp_path / "b.jsonl"], options())


def test_mtp_layers_are_told_from_hidden_layers(tmp_path, draw, options, notes):
    """Three MoE layers of four hidden ones and an MTP layer are four tensors, as many as hidden
    layers: the last is left out, not the first. It is None where MTP did not run."""
    torch = pytest.importorskip("torch", reason="writing .pt files needs torch")
    ids = draw(5, layers=4)
    layers = [torch.tensor(ids[:, layer]) for layer in range(4)]
    known = {"num_experts": 8, "layer_ids": (1, 2, 3), "num_hidden_layers": 4}
    file = tmp_path / "replay.pt"
    for last, said in ((layers[3], "left out the last 1 of 4 rows"), (None, "recorded nothing")):
        torch.save([*layers[:3], last], file)
        trace = megatron.read([file], options(**known))
        np.testing.assert_array_equal(trace.expert_ids, ids[:, :3])
        assert any(said in note and "MTP" in note for note in notes)


def test_equal_steps_of_ranks_are_one(tmp_path, options, notes):
    """Tensor-parallel ranks route the same tokens: one record of two, and no home ranks."""
    file = tmp_path / "router_trace_rank0.jsonl"
    jsonl(file, [trace_record(0, rank, 1, [[0, 1], [2, 3]]) for rank in (0, 1)])
    trace = megatron.read([file], options(num_experts=4))
    assert trace.num_tokens == 2
    assert trace.rank_ids is None
    assert any("1 of 2 records are left out" in note for note in notes)


def test_layers_that_the_model_lacks_are_refused(tmp_path, options):
    file = tmp_path / "router_trace_rank0.jsonl"
    jsonl(file, [trace_record(0, 0, 9, [[0, 1], [2, 3]])])
    with pytest.raises(MismatchError, match="has layers 9, which are no MoE layers of the model"):
        megatron.read([file], options(num_experts=4, layer_ids=(1, 2)))
