"""Records with too few rows, and responses of several choices."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest

from moesim.errors import FormatError
from moesim.trace.importers import sglang, vllm
from moesim.trace.importers.rows import RowReader


def npy(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.uint8), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def bare(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("short", "positions", "decode"), [("first", [0, 1, 2, 3], 1), ("last", [2, 3, 4, 5], 3)]
)
def test_a_short_record_is_read_as_asked(options, notes, short, positions, decode):
    """3 prompt and 4 output tokens have 6 rows. Of 4, the first are positions 0 to 3, of which 3
    is decoded; the last are positions 2 to 5, of which 3, 4 and 5 are."""
    reader = RowReader(options(short_records=short))
    found, phases = reader.place(4, 3, 4, "here")
    assert found.tolist() == positions
    assert int(phases.sum()) == decode
    reader.place(6, 3, 4, "here")
    reader.report()
    assert any("1 of 2 records are short, by 2 rows in all" in note for note in notes)
    other = "last" if short == "first" else "first"
    assert any(f"`short_records` {other}" in note for note in notes)


def test_a_start_that_is_stated_is_no_guess(options, notes):
    """Rows from position 2 of 6: 3 rows are 2, 3, 4, and one is missing at the end."""
    reader = RowReader(options(short_records="last"))
    positions, _ = reader.place(3, 3, 4, "here", start=2)
    assert positions.tolist() == [2, 3, 4]
    with pytest.raises(FormatError, match="has 6 rows from position 2, but the request only 7"):
        reader.place(6, 3, 4, "here", start=2)


def test_vllm_preempted_request_keeps_its_first_tokens(tmp_path, draw, options, notes):
    """2 prompt and 3 output tokens: 4 rows; the second record has 3. Token ids from the start."""
    ids = draw(4)
    records = [
        {
            "prompt_token_ids": [10, 11],
            "choices": [{"routed_experts": npy(rows), "token_ids": [20, 21, 22]}],
            "usage": {"prompt_tokens": 2, "completion_tokens": 3},
        }
        for rows in (ids, ids[:3])
    ]
    trace = vllm.read([write(tmp_path / "r.jsonl", records)], options(num_experts=8))
    assert trace.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert trace.phases.tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert trace.token_ids.tolist() == [10, 11, 20, 21, 10, 11, 20]
    assert any("1 of 2 records are short" in note for note in notes)


def test_sglang_usage_of_two_choices_is_of_neither(tmp_path, draw, options, notes):
    """One prompt of 3 tokens, two choices, 7 output tokens together; the first choice's record has
    5 rows: 3 prefill, 2 decode, from position 0. As one choice it would be read from 4 on."""
    ids = draw(5)
    record = {
        "choices": [{"index": 0}, {"index": 1}],
        "sglext": {"routed_experts": bare(ids)},
        "usage": {"prompt_tokens": 3, "completion_tokens": 7},
    }
    file = write(tmp_path / "r.jsonl", [record])
    trace = sglang.read([file], options(top_k=2, num_experts=8, num_hidden_layers=3))
    np.testing.assert_array_equal(trace.expert_ids, ids)
    assert trace.positions.tolist() == [0, 1, 2, 3, 4]
    assert trace.phases.tolist() == [0, 0, 0, 1, 1]
    assert any("1 responses hold several choices" in note for note in notes)
    assert not any("short" in note for note in notes)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_list_of_prompts_says_nothing_of_one(tmp_path, draw, options, notes, engine):
    """A completion of two prompts counts 4 prompt tokens together: neither's length is known."""
    ids = draw(3)
    choices = [{"index": i, "text": "x"} for i in range(2)]
    for choice in choices:
        if engine == "vllm":
            choice["routed_experts"] = npy(ids)
        else:
            choice["sglext"] = {"routed_experts": bare(ids)}
    usage = {"prompt_tokens": 4, "completion_tokens": 4}
    record = {"object": "text_completion", "choices": choices, "usage": usage}
    file = write(tmp_path / "r.jsonl", [record])
    reader = vllm if engine == "vllm" else sglang
    trace = reader.read([file], options(top_k=2, num_experts=8, num_hidden_layers=3))
    assert trace.positions.tolist() == [0, 1, 2] * 2
    assert trace.phases.tolist() == [0] * 6
    assert any("2 requests do not say how long their prompt was" in note for note in notes)


def test_sglang_shared_slots_follow_from_the_request(tmp_path, draw, options, notes):
    """12 tokens (11 rows of 3 layers) with 2 routed ids and a third slot of 255."""
    ids = draw(11)
    padded = np.concatenate([ids, np.full((11, 3, 1), 255)], axis=2)
    answer = {"prompt_tokens": 8, "completion_tokens": 4, "routed_experts": bare(padded)}
    file = write(tmp_path / "r.jsonl", [{"text": "x", "meta_info": answer}])
    trace = sglang.read([file], options(top_k=2, num_experts=8, num_hidden_layers=3))
    np.testing.assert_array_equal(trace.expert_ids, ids)
    assert any("left out 1 of 3 ids per token, which are 255" in note for note in notes)
