"""The statistics of vLLM's pull request 41141, in both revisions of the format."""

from __future__ import annotations

import json

import pytest

from moesim.errors import FormatError, InputError, MismatchError
from moesim.trace.importers import eplb_stats

META = {
    "record_type": "eplb_load_meta",
    "version": 1,
    "model": "test-model",
    "num_ranks": 2,
    "num_groups": 1,
    "num_nodes": 1,
    "num_layers": 2,
    "num_redundant_experts": 2,
}


def stats(step, load, mapping):
    return {
        "record_type": "eplb_load_stats",
        "version": 1,
        "step": step,
        "num_ranks": 2,
        "expert_load": load,
        "p2l_map": mapping,
    }


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_replicas_are_added_up(tmp_path, options, notes):
    """6 slots, 4 experts: slots 4 and 5 repeat experts 0 and 1, then 3 and 2 after a move."""
    file = write(
        tmp_path / "s.jsonl",
        [
            {"record_type": "session_metadata"},
            META,
            stats(0, [[10, 1, 5, 2, 3, 4], [2, 8, 1, 3, 0, 1]], [[0, 1, 2, 3, 0, 1]] * 2),
            stats(9, [[1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]], [[0, 1, 2, 3, 3, 2]] * 2),
        ],
    )
    assert eplb_stats.detect(file)
    load = eplb_stats.read([file], options(top_k=2))
    assert load.expert_load.tolist() == [
        [[13, 5, 5, 2], [2, 9, 1, 3]],
        [[1, 1, 2, 2], [2, 2, 4, 4]],
    ]
    assert load.meta.layer_ids == (0, 1)
    assert any("1 session_metadata" in note for note in notes)
    named = eplb_stats.read([file], options(top_k=2, layer_ids=(3, 4)))
    assert named.meta.layer_ids == (3, 4)


def test_top_k_must_be_known(tmp_path, options):
    file = write(tmp_path / "s.jsonl", [stats(0, [[1, 2]], [[0, 1]])])
    with pytest.raises(InputError, match="experts per token is not known"):
        eplb_stats.read([file], options())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (stats(0, [[1, 2]], [[0, 1, 0]]), r"line 1: counts have shape \(1, 2\), but the map"),
        (stats(0, [[1, 2], [1]], [[0, 1]]), "line 1: expert_load: rows of different lengths"),
        (stats(0, [[1, "2"]], [[0, 1]]), "line 1: expert_load: not nested lists of whole"),
        (stats(0, [[1, 2]], [[0, -1]]), "line 1: p2l_map: layer 0, slot 1: -1 is no expert"),
        (stats(0, [[1, -2]], [[0, 1]]), "line 1: expert_load: layer 0, slot 1: negative count"),
        (stats(0, [], [[0, 1]]), "line 1: expert_load must be a list of rows"),
        ({**stats(0, [[1]], [[0]]), "version": 2}, "line 1: version must be 1, not 2"),
        ({"step": 1}, "line 1: record_type must be there"),
        (META, "has no eplb_load_stats record"),
    ],
)
def test_errors_name_line_and_field(tmp_path, options, record, message):
    file = write(tmp_path / "s.jsonl", [record])
    with pytest.raises(FormatError, match=message) as error:
        eplb_stats.read([file], options(top_k=2))
    assert str(file) in error.value.cause


def test_other_shapes_and_models_are_refused(tmp_path, options):
    file = write(
        tmp_path / "s.jsonl",
        [stats(0, [[1, 2]], [[0, 1]]), stats(1, [[1, 2], [1, 2]], [[0, 1], [0, 1]])],
    )
    with pytest.raises(FormatError, match=r"line 2: expert_load is for \(2, 2\) layers x experts"):
        eplb_stats.read([file], options(top_k=2))
    file = write(file, [stats(0, [[1, 2]], [[0, 1]])])
    with pytest.raises(MismatchError, match="records 1 layers, but the model has 3 MoE layers"):
        eplb_stats.read([file], options(top_k=2, layer_ids=(0, 1, 2)))
