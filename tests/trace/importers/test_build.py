"""What all importers share: dense layers, padding, ids, warm-up rows, detection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import FormatError, InputError, MismatchError, UnknownNameError
from moesim.jobs.import_trace import import_files
from moesim.trace.format import LoadTrace, Trace, TraceMeta
from moesim.trace.importers.build import Segment, assemble, assemble_load, to_logical
from moesim.trace.importers.registry import IMPORTERS, detect_format, importer
from moesim.trace.importers.warmup import warmup_steps, warmup_tokens


def segment(ids, request=0, **fields):
    count = len(ids)
    return Segment(ids, "here", request, np.arange(count), np.zeros(count, np.uint8), **fields)


def test_narrowest_type_that_holds_the_ids(draw, options):
    assert assemble([segment(draw(3))], options(num_experts=256), {}).expert_ids.dtype == np.uint8
    assert assemble([segment(draw(3))], options(num_experts=257), {}).expert_ids.dtype == np.uint16
    ids = draw(3)
    ids[1, 2, 1] = -1
    assert assemble([segment(ids)], options(num_experts=8), {}).expert_ids.dtype == np.int16


def test_experts_are_counted_from_the_ids_with_a_notice(draw, options, notes):
    ids = draw(3, experts=4)
    assert assemble([segment(ids)], options(), {}).num_experts == ids.max() + 1
    assert any("largest id seen plus one" in note for note in notes)


def test_moe_layer_without_routing_is_kept_and_named(draw, options, notes):
    """Hash layers are not recorded: no choice (-1) in any token, not expert 0 twice."""
    ids = draw(3)
    ids[:, 1] = 0
    trace = assemble([segment(ids)], options(num_experts=8, layer_ids=(4, 5, 6)), {})
    assert (trace.expert_ids[:, 1] == -1).all()
    np.testing.assert_array_equal(trace.expert_ids[:, [0, 2]], ids[:, [0, 2]])
    assert any("layers 5 are MoE layers, but hold no choice" in note for note in notes)


def test_rows_that_are_thrown_away_must_be_empty(draw, options, notes):
    """3 rows for a model of 3 layers of which 1 and 2 are MoE: row 0 must hold padding."""
    known = {"num_experts": 8, "layer_ids": (1, 2), "num_hidden_layers": 3}
    with pytest.raises(MismatchError, match="row 0 of 3 holds routing, but layer 0"):
        assemble([segment(draw(3))], options(**known, num_mtp_layers=0), {})
    ids = draw(3)
    ids[:, 0] = 0
    trace = assemble([segment(ids)], options(**known), {})
    np.testing.assert_array_equal(trace.expert_ids, ids[:, 1:])


def test_rows_beyond_the_models_layers_are_mtp_layers(draw, options, notes):
    """MoE rows only: 3 rows for 2 MoE layers of 3 are these 2 and one MTP layer, not all hidden
    layers. With no MTP layer in the model, 3 rows do not fit."""
    ids = draw(3)
    known = {"num_experts": 8, "layer_ids": (1, 2), "num_hidden_layers": 3}
    trace = assemble([segment(ids)], options(**known), {}, moe_only=True)
    np.testing.assert_array_equal(trace.expert_ids, ids[:, :2])
    assert any("left out the last 1 of 3 rows" in note and "MTP" in note for note in notes)
    with pytest.raises(MismatchError, match="records 3 layers, but the model has 2 MoE layers"):
        assemble([segment(ids)], options(**known, num_mtp_layers=0), {}, moe_only=True)
    either = assemble([segment(ids)], options(**known), {})  # row 0 is not empty: not layer 0
    np.testing.assert_array_equal(either.expert_ids, ids[:, :2])
    hidden = np.concatenate([np.zeros((3, 1, 2), np.int32), ids], axis=1)
    trace = assemble([segment(hidden)], options(**known), {})  # dense, two MoE, MTP
    np.testing.assert_array_equal(trace.expert_ids, ids[:, :2])


def test_slots_of_fused_shared_experts_are_left_out(draw, options, notes):
    """A third id, 255 in all 12 x 3 cells, is no routed expert; one in 31 cells may be chance."""
    ids = np.concatenate([draw(12), np.full((12, 3, 1), 255, np.int32)], axis=2)
    trace = assemble([segment(ids)], options(num_experts=8, top_k=2), {})
    np.testing.assert_array_equal(trace.expert_ids, ids[:, :, :2])
    assert any("left out 1 of 3 ids per token, which are 255 throughout" in n for n in notes)
    with pytest.raises(MismatchError, match="records 3 experts per token"):
        assemble([segment(ids[:10])], options(num_experts=8, top_k=2), {})


def test_zero_computation_experts_are_no_choice(options, notes):
    """4 real experts and 2 without computation: ids 4 and 5 become -1; 6 is out of range."""
    ids = np.array([[[0, 5]], [[4, 1]], [[2, 3]]], np.int32)
    trace = assemble([segment(ids)], options(num_experts=4, zero_experts=2), {})
    assert trace.expert_ids.tolist() == [[[0, -1]], [[-1, 1]], [[2, 3]]]
    assert any("2 choices are of zero-computation experts (4..5)" in note for note in notes)
    with pytest.raises(FormatError, match=r"expert id 5 is outside 0\.\.3") as error:
        assemble([segment(ids)], options(num_experts=4), {})
    assert "without computation" in error.value.remedy


def test_token_numbers_in_errors_count_dropped_rows(draw, options):
    ids = draw(4)
    ids[0] = 0
    ids[3, 0, 0] = 77
    with pytest.raises(FormatError, match="token 3, layer 0: expert id 77"):
        assemble([segment(ids)], options(num_experts=8), {})


def test_no_tokens_at_all(options):
    with pytest.raises(FormatError, match="no routed tokens"):
        assemble([segment(np.zeros((0, 2, 2), np.int32))], options(), {})
    with pytest.raises(FormatError, match="no layer routes"):
        assemble([segment(np.zeros((4, 2, 2), np.int32))], options(num_experts=4), {})


def test_gates_and_optional_columns_need_every_segment(draw, options):
    gates = np.ones((3, 3, 2), np.float32)
    both = assemble(
        [segment(draw(3), gate_weights=gates, token_ids=np.arange(3)), segment(draw(3), 1)],
        options(num_experts=8),
        {},
    )
    assert both.gate_weights is None
    assert both.token_ids is None
    with pytest.raises(FormatError, match="weights have shape"):
        assemble([segment(draw(3), gate_weights=gates[:2])], options(num_experts=8), {})
    bad = gates.copy()
    bad[2, 1, 0] = np.inf
    with pytest.raises(FormatError, match="token 2, layer 1: a weight is inf"):
        assemble([segment(draw(3), gate_weights=bad)], options(num_experts=8), {})


def test_counts_of_slots_to_counts_of_experts():
    """Slots 0 and 2 hold expert 1: 5 + 7 = 12."""
    out = to_logical(np.array([[5, 6, 7]]), np.array([[1, 0, 1]]), "here")
    assert out.tolist() == [[6, 12]]


def test_counts_of_another_model(options):
    with pytest.raises(MismatchError, match="counts 4 experts, but the model has 8"):
        assemble_load(np.ones((1, 2, 4), np.int64), options(num_experts=8, top_k=2), {}, "here")


def meta(top_k: int, experts: int, layers: int) -> TraceMeta:
    return TraceMeta("m", experts, top_k, tuple(range(layers)))


def test_warmup_run_of_tokens(draw, options, notes):
    """40 rows alike from row 10 on are found; a run of 31 is not; neighbours stay."""
    ids = draw(100)
    ids[10:50] = ids[10]
    ids[60:91] = ids[60]
    trace = assemble([segment(ids)], options(num_experts=8), {})
    assert np.flatnonzero(warmup_tokens(trace)).tolist() == list(range(10, 50))
    short = assemble([segment(ids[:5])], options(num_experts=8), {})
    assert not warmup_tokens(short).any()


def test_warmup_steps_of_counts():
    """64 tokens all to experts 1 and 3 in both layers: a warm-up; uneven or few: not."""
    alike = np.array([[0, 64, 0, 64], [64, 64, 0, 0]])
    uneven = np.array([[0, 64, 0, 64], [60, 64, 4, 0]])
    few = np.array([[0, 4, 0, 4], [4, 4, 0, 0]])
    load = LoadTrace(np.stack([alike, uneven, few]), meta(2, 4, 2))
    assert warmup_steps(load).tolist() == [True, False, False]


def test_import_drops_warmup_unless_told_otherwise(tmp_path, draw, options, notes):
    ids = draw(200)
    ids[:64] = ids[0]
    file = tmp_path / "r.npy"
    np.save(file, ids)
    trace = import_files([file], options(num_experts=8))
    assert isinstance(trace, Trace)
    np.testing.assert_array_equal(trace.expert_ids, ids[64:])
    assert trace.positions[0] == 64
    assert any("dropped 64 tokens of constant routing" in note for note in notes)
    kept = import_files([file], options(num_experts=8), keep_warmup=True)
    assert isinstance(kept, Trace)
    assert kept.num_tokens == 200
    np.save(file, ids[:64])
    with pytest.raises(FormatError, match="all 64 tokens are routed alike"):
        import_files([file], options(num_experts=8))


def test_every_importer_has_the_protocol():
    for name in IMPORTERS.own:
        module = importer(name)
        assert name == module.NAME
        assert module.TITLE
        assert not module.detect(Path("/nonexistent/file.xyz"))
    with pytest.raises(UnknownNameError) as error:
        importer("sglan")
    assert "did you mean 'sglang'" in error.value.remedy


def test_detection_refuses_to_guess(tmp_path, draw):
    with pytest.raises(InputError, match="no such file"):
        detect_format([tmp_path / "none.npy"])
    text = tmp_path / "notes.md"
    text.write_text("hello")
    with pytest.raises(InputError, match=r"notes\.md: is of no known format") as error:
        detect_format([text])
    assert "--from" in error.value.remedy
    array, rows = tmp_path / "a.npy", tmp_path / "b.jsonl"
    np.save(array, draw(3))
    rows.write_text(json.dumps({"request": 0, "position": 0, "layer": 0, "experts": [1, 2]}))
    assert detect_format([array]) == "vllm"
    assert detect_format([rows]) == "table"
    with pytest.raises(InputError, match=r"a\.npy is vllm, b\.jsonl is table"):
        detect_format([array, rows])
