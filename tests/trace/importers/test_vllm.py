"""vLLM's routed_experts in every shape that it comes in."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest

from moesim.errors import FormatError, MismatchError
from moesim.trace.format import Trace
from moesim.trace.importers import vllm


def encode(array: np.ndarray) -> str:
    """As vllm/utils/serial_utils.py numpy2base64: the `.npy` bytes in base64."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def response(array: np.ndarray, num_prompt: int, num_output: int, **choice) -> dict:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "routed_experts": encode(array), **choice}],
        "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_output},
    }


def write_lines(path, records) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_responses_become_requests_in_order(tmp_path, draw, options):
    """5 prompt and 3 output tokens: 7 rows, positions 0..6, decode from position 5 on."""
    first, second = draw(7, seed=1), draw(4, seed=2)
    file = tmp_path / "responses.jsonl"
    write_lines(
        file,
        [response(first.astype(np.uint8), 5, 3), response(second.astype(np.uint8), 4, 1)],
    )
    assert vllm.detect(file)
    trace = vllm.read([file], options(num_experts=8, layer_ids=(1, 2, 3)))
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([first, second]))
    assert trace.expert_ids.dtype == np.uint8
    assert trace.request_ids.tolist() == [0] * 7 + [1] * 4
    assert trace.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    assert trace.phases.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert trace.meta.layer_ids == (1, 2, 3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32"])
def test_every_integer_type_and_npy_file(tmp_path, draw, options, notes, dtype):
    ids = draw(6)
    file = tmp_path / "one.npy"
    np.save(file, ids.astype(dtype))
    assert vllm.detect(file)
    trace = vllm.read([file], options(num_experts=8, phase="decode"))
    np.testing.assert_array_equal(trace.expert_ids, ids)
    assert trace.phases.tolist() == [1] * 6
    assert any("how long their prompt was" in note for note in notes)


def test_all_layer_shape_drops_dense_layers(tmp_path, draw, options, notes):
    """DeepSeek-like: layer 0 is dense, and its row is zeros, as the capture buffer starts."""
    ids = draw(5)
    padded = np.concatenate([np.zeros((5, 1, 2), np.int32), ids], axis=1)
    file = tmp_path / "one.npy"
    np.save(file, padded.astype(np.uint8))
    trace = vllm.read([file], options(num_experts=8))
    np.testing.assert_array_equal(trace.expert_ids, ids)
    assert trace.meta.layer_ids == (1, 2, 3)
    assert any("1 of 4 layers" in note for note in notes)
    named = vllm.read([file], options(num_experts=8, layer_ids=(1, 2, 3), num_hidden_layers=4))
    np.testing.assert_array_equal(named.expert_ids, ids)


def test_model_with_other_layers_is_refused(tmp_path, draw, options):
    file = tmp_path / "one.npy"
    np.save(file, draw(5).astype(np.uint8))
    with pytest.raises(MismatchError, match="3 layers, but the model has 26"):
        vllm.read([file], options(layer_ids=tuple(range(1, 27)), num_hidden_layers=27))
    with pytest.raises(MismatchError, match="2 experts per token, but the model has 6"):
        vllm.read([file], options(top_k=6))


def test_prompt_cut_off_by_the_request(tmp_path, draw, options):
    """routed_experts_prompt_start=3 of 5+3 tokens leaves 7-3=4 rows, from position 3."""
    file = tmp_path / "r.json"
    file.write_text(json.dumps(response(draw(4).astype(np.uint8), 5, 3)))
    trace = vllm.read([file], options(num_experts=8, short_records="last"))
    assert trace.positions.tolist() == [3, 4, 5, 6]
    assert trace.phases.tolist() == [0, 0, 1, 1]


def test_old_responses_hold_the_prompt_apart(tmp_path, draw, options):
    """Nested lists, prompt_routed_experts on the response: rows of both, in order."""
    prompt, output = draw(5, seed=1), draw(2, seed=2)
    record = {
        "prompt_routed_experts": prompt.tolist(),
        "prompt_token_ids": [11, 12, 13, 14, 15],
        "choices": [{"routed_experts": output.tolist(), "token_ids": [21, 22, 23]}],
    }
    file = tmp_path / "r.jsonl"
    write_lines(file, [record])
    trace = vllm.read([file], options(num_experts=8))
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([prompt, output]))
    assert trace.phases.tolist() == [0] * 5 + [1] * 2
    assert trace.token_ids is not None
    assert trace.token_ids.tolist() == [11, 12, 13, 14, 15, 21, 22]


def test_batch_output_lines_and_offline_dumps(tmp_path, draw, options):
    ids = draw(3)
    batch = {"custom_id": "a", "response": {"body": response(ids.astype(np.uint8), 2, 2)}}
    offline = {
        "prompt_token_ids": [1, 2],
        "outputs": [{"token_ids": [3, 4], "routed_experts": encode(ids)}],
    }
    file = tmp_path / "r.jsonl"
    write_lines(file, [batch, offline])
    trace = vllm.read([file], options(num_experts=8))
    assert trace.num_tokens == 6
    assert trace.phases.tolist() == [0, 0, 1] * 2


def test_base64_text_and_several_choices(tmp_path, draw, options):
    one, two = draw(3, seed=1), draw(3, seed=2)
    text = tmp_path / "r.b64"
    text.write_text(encode(one) + "\n" + encode(two) + "\n")
    assert vllm.detect(text)
    trace = vllm.read([text], options(num_experts=8))
    assert trace.request_ids.tolist() == [0, 0, 0, 1, 1, 1]
    record = response(one, 2, 2)
    record["choices"].append({"index": 1, "routed_experts": encode(two)})
    file = tmp_path / "r.jsonl"
    write_lines(file, [record])
    both = vllm.read([file], options(num_experts=8))
    np.testing.assert_array_equal(both.expert_ids, np.concatenate([one, two]))


def test_unrouted_tokens_are_dropped_with_a_notice(tmp_path, draw, options, notes):
    ids = draw(6)
    ids[2] = 0
    file = tmp_path / "one.npy"
    np.save(file, ids.astype(np.uint8))
    trace = vllm.read([file], options(num_experts=8))
    assert trace.positions.tolist() == [0, 1, 3, 4, 5]
    assert any("dropped 1 tokens" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routed_experts": "not base64!"}, r"line 1: choices\[0\]\.routed_experts: not base64"),
        ({"routed_experts": base64.b64encode(b"abcd").decode()}, "is not a .npy array"),
        ({"routed_experts": 7}, "must be base64 text or nested lists"),
        ({"routed_experts": [[[1, 2]], [[1]]]}, "rows of different lengths"),
        ({"routed_experts": [[[1.5, 2.0]]]}, "not nested lists of whole numbers"),
        ({"routed_experts": [[[3, 3]]]}, "expert 3 is chosen twice"),
        ({"routed_experts": [[[1, 9]]]}, r"expert id 9 is outside 0\.\.7"),
        ({"routed_experts": [[1, 2]]}, r"has shape \(1, 2\)"),
        ({"token_ids": "abc"}, "token_ids: must be a list of token ids"),
    ],
)
def test_errors_name_file_record_and_field(tmp_path, draw, options, change, message):
    record = response(draw(1, layers=1).astype(np.uint8), 1, 1)
    record["choices"][0].update(change)
    file = tmp_path / "r.jsonl"
    write_lines(file, [record])
    with pytest.raises(FormatError, match=message) as error:
        vllm.read([file], options(num_experts=8))
    assert str(file) in error.value.cause
    assert error.value.remedy


def test_truncated_array_and_pickle_are_refused(tmp_path, draw, options):
    data = base64.b64decode(encode(draw(4)))
    for bad in (data[:-7], data[:20]):
        file = tmp_path / "r.b64"
        file.write_text(base64.b64encode(bad).decode())
        with pytest.raises(FormatError, match="line 1"):
            vllm.read([file], options())
    objects = tmp_path / "o.npy"
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match="pickled objects, which are never loaded"):
        vllm.read([objects], options())


def test_more_rows_than_tokens_is_refused(tmp_path, draw, options):
    file = tmp_path / "r.jsonl"
    write_lines(file, [response(draw(9), 5, 3)])
    with pytest.raises(FormatError, match="9 rows, but the request only 8 tokens"):
        vllm.read([file], options())


def test_records_of_different_models_are_refused(tmp_path, draw, options):
    file = tmp_path / "r.jsonl"
    write_lines(file, [response(draw(3), 2, 2), response(draw(3, layers=4), 2, 2)])
    with pytest.raises(FormatError, match=r"line 2.*4 layers x 2.*line 1.*3 layers"):
        vllm.read([file], options())


def test_without_capture_the_remedy_names_the_flag(tmp_path, options):
    file = tmp_path / "r.jsonl"
    write_lines(file, [{"choices": [{"routed_experts": None}]}])
    assert not vllm.detect(file)
    with pytest.raises(FormatError) as error:
        vllm.read([file], options())
    assert "--enable-return-routed-experts" in error.value.remedy


def test_max_tokens_reads_the_head(tmp_path, draw, options):
    file = tmp_path / "one.npy"
    np.save(file, draw(9))
    trace = vllm.read([file, file], options(num_experts=8, max_tokens=12))
    assert isinstance(trace, Trace)
    assert trace.request_ids.tolist() == [0] * 9 + [1] * 3


def test_an_npy_whose_header_ends_early_is_of_no_format(tmp_path):
    """numpy's parser raises TokenError for it, which is no ValueError."""
    header = b"{'descr': '<i2', 'shape': (3,\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(12))
    assert not vllm.detect(path)
