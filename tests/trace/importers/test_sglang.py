"""SGLang's return_routed_experts: int32 without a shape."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from moesim.errors import FormatError, InputError
from moesim.trace.importers import sglang, vllm


def encode(array: np.ndarray) -> str:
    """As srt/managers/detokenizer_manager.py: the bytes of int32 values in base64."""
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def native(array: np.ndarray, num_prompt: int, num_output: int) -> dict:
    return {
        "text": "...",
        "meta_info": {
            "id": "r",
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "routed_experts": encode(array),
        },
    }


def test_native_answers_one_a_line(tmp_path, draw, options):
    """prompt 3 + output 2 - 1 = 4 rows; layer 0 dense (zeros), so 3 of 4 layers stay."""
    ids = draw(4)
    padded = np.concatenate([np.zeros((4, 1, 2), np.int32), ids], axis=1)
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(native(padded, 3, 2)) for _ in range(2)))
    assert sglang.detect(file)
    assert not vllm.detect(file)
    trace = sglang.read([file], options(top_k=2, num_experts=8))
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([ids, ids]))
    assert trace.meta.layer_ids == (1, 2, 3)
    assert trace.phases.tolist() == [0, 0, 0, 1] * 2
    assert trace.request_ids.tolist() == [0] * 4 + [1] * 4


def test_start_len_moves_positions(tmp_path, draw, options):
    """routed_experts_start_len=2 of 3+2 tokens: 4-2=2 rows from position 2."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps([native(draw(2), 3, 2)]))
    known = {"top_k": 2, "num_experts": 8, "num_hidden_layers": 3}
    trace = sglang.read([file], options(short_records="last", **known))
    assert trace.positions.tolist() == [2, 3]
    assert trace.phases.tolist() == [0, 1]


def test_openai_answers(tmp_path, draw, options):
    ids = draw(4)
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    new = {"choices": [{}], "usage": usage, "sglext": {"routed_experts": encode(ids)}}
    old = {"choices": [{"sglext": {"routed_experts": encode(ids)}}], "usage": usage}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(new) + "\n" + json.dumps(old) + "\n")
    assert sglang.detect(file)
    trace = sglang.read([file], options(top_k=2, num_experts=8))
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([ids, ids]))


def test_raw_bytes_need_the_model(tmp_path, draw, options, notes):
    ids = draw(5)
    file = tmp_path / "a.bin"
    file.write_bytes(ids.astype("<i4").tobytes())
    trace = sglang.read([file], options(top_k=2, num_experts=8, num_hidden_layers=3))
    np.testing.assert_array_equal(trace.expert_ids, ids)
    assert any("how long their prompt was" in note for note in notes)
    with pytest.raises(InputError, match="layers is not known") as error:
        sglang.read([file], options(top_k=2))
    assert "`num_hidden_layers`" in error.value.remedy
    with pytest.raises(InputError, match="experts per token is not known"):
        sglang.read([file], options())
    with pytest.raises(FormatError, match="30 ids are no whole number of tokens of 4 layers"):
        sglang.read([file], options(top_k=2, num_hidden_layers=4))
    file.write_bytes(ids.astype("<i4").tobytes()[:-1])
    with pytest.raises(FormatError, match="119 bytes are no whole number of int32"):
        sglang.read([file], options(top_k=2, num_hidden_layers=3))


def test_errors_name_record_and_field(tmp_path, draw, options):
    record = native(draw(4), 1, 1)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(record))
    cause = r"line 1: meta_info\.routed_experts has 4 rows, but the request only 2 tokens"
    with pytest.raises(FormatError, match=cause):
        sglang.read([file], options(top_k=2, num_hidden_layers=3))
    record["meta_info"]["routed_experts"] = "%%"
    file.write_text(json.dumps(record))
    with pytest.raises(FormatError, match=r"line 1: meta_info\.routed_experts: not base64"):
        sglang.read([file], options(top_k=2, num_hidden_layers=3))
    record["meta_info"]["prompt_tokens"] = "three"
    record["meta_info"]["routed_experts"] = encode(draw(1))
    file.write_text(json.dumps(record))
    with pytest.raises(FormatError, match="prompt_tokens must be a whole number"):
        sglang.read([file], options(top_k=2, num_hidden_layers=3))
