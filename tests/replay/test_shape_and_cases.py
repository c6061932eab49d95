"""Model shapes and plans that do not belong together are refused with cause and remedy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import FormatError, InputError, MismatchError, UnknownNameError
from moesim.replay.cases import build_batches, load_plans, pick_layers
from moesim.replay.shape import ExpertShape, load_shape
from moesim.trace.format import load_token_trace


def test_shape_sizes() -> None:
    # Mixtral: 3 * 4096 * 14336 weights of 2 bytes = 352,321,536 bytes; a row 4096 * 2 = 8192.
    shape = ExpertShape("mixtral", 4096, 14336, 8, 2)
    assert (shape.expert_bytes, shape.row_bytes) == (352_321_536, 8192)


def test_shape_round_trip(tmp_path) -> None:
    shape = ExpertShape("olmoe", 2048, 1024, 64, 8)
    text = json.dumps(shape.to_json())
    (tmp_path / "s.json").write_text(text)
    assert load_shape(text) == load_shape(str(tmp_path / "s.json")) == shape


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"top_k": 65}, FormatError, "top_k 65 exceeds 64"),
        ({"hidden_size": 0}, FormatError, "hidden_size is 0"),
        ({"hidden_size": 2048.5}, FormatError, "hidden_size is 2048.5"),
        ({"hidden_size": True}, FormatError, "hidden_size is True"),
        ({"dtype": "bf61"}, UnknownNameError, "unknown dtype"),
        ({"dtype": 5}, FormatError, "must be text"),
        ({"moe_intermediate_size": 1 << 40}, FormatError, "moe_intermediate_size"),
        ({"width": 3}, FormatError, "unknown field 'width'"),
    ],
)
def test_bad_shape(change: dict, error: type, match: str) -> None:
    raw = {**ExpertShape("olmoe", 2048, 1024, 64, 8).to_json(), **change}
    with pytest.raises(error, match=match):
        load_shape(json.dumps(raw))


@pytest.mark.parametrize("text", ["{", "[1]", "{}", "{" * 5000, "nowhere.json"])
def test_unreadable_shape(text: str) -> None:
    with pytest.raises(InputError) as caught:
        load_shape(text)
    assert caught.value.remedy


def test_plans_that_do_not_belong(inputs) -> None:
    trace = load_token_trace(inputs.trace, "test")
    plan = str(inputs.plans["linear"])
    assert load_plans([plan], inputs.shape, trace, 2)[0].name == "linear"
    with pytest.raises(MismatchError, match="for 2 GPUs, the replay has 4 ranks"):
        load_plans([plan], inputs.shape, trace, 4)
    with pytest.raises(MismatchError, match="trace has 8 experts per layer, model 'tiny' has 16"):
        load_plans([plan], replace(inputs.shape, num_experts=16), trace, 2)
    with pytest.raises(MismatchError, match="2 experts per token, model 'tiny' has 1"):
        load_plans([plan], replace(inputs.shape, top_k=1), trace, 2)
    other = inputs.add_plan("other_experts", list(range(10)), 2, num_experts=10)
    with pytest.raises(MismatchError, match="plan other_experts places 10 experts"):
        load_plans([str(other)], inputs.shape, trace, 2)
    moved = inputs.add_plan("other_layers", list(range(8)), 2, layer_ids=(1, 2, 3))
    with pytest.raises(MismatchError, match=r"1 to 3.*0 to 2"):
        load_plans([str(moved)], inputs.shape, trace, 2)
    with pytest.raises(InputError, match="same file name"):
        load_plans([plan, plan], inputs.shape, trace, 2)
    with pytest.raises(InputError, match="cannot read plan"):
        load_plans([str(inputs.folder / "none.json")], inputs.shape, trace, 2)


def test_batches_are_exact_and_held_out(inputs) -> None:
    from moesim.trace.batches import index_requests, split_requests

    trace = load_token_trace(inputs.trace, "test")
    tuning = set(split_requests(index_requests(trace)[0])[0].token_idx.tolist())
    for tokens, phase in ((16, "decode"), (2000, "prefill")):
        batches, notice = build_batches(trace, tokens, 2, 2)
        assert [b.phase for b in batches] == [phase, phase]
        for batch in batches:
            assert len(batch.token_idx) == 2 * tokens
            assert np.bincount(batch.home).tolist() == [tokens, tokens]
            assert not tuning & set(batch.token_idx.tolist())
        assert ("repeat" in notice) == (tokens == 2000)
    assert not np.array_equal(batches[0].token_idx, batches[1].token_idx)
    again, _ = build_batches(trace, 2000, 2, 2)
    np.testing.assert_array_equal(again[1].token_idx, batches[1].token_idx)


def test_pick_layers() -> None:
    assert pick_layers(26, 8).tolist() == [0, 4, 7, 11, 14, 18, 21, 25]
    assert pick_layers(3, 8).tolist() == pick_layers(3, 0).tolist() == [0, 1, 2]
