"""Plain CSV, JSONL and npz with a column map."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesim.errors import FormatError, InputError
from moesim.trace.format import LoadTrace, Trace
from moesim.trace.importers import arrays, table


def test_csv_with_renamed_columns(tmp_path, options):
    """Two tokens of request "b" and one of "a", layers 4 and 7, top-2, rows out of order."""
    file = tmp_path / "r.csv"
    file.write_text(
        "seq,pos,layer_idx,e0,e1,phase,tok,lang\n"
        "b,0,4,1,2,prefill,50,de\n"
        "b,1,7,0,3,decode,51,de\n"
        "b,0,7,2,0,prefill,50,de\n"
        "a,0,4,3,1,prefill,52,en\n"
        "b,1,4,3,1,decode,51,de\n"
        "a,0,7,0,1,prefill,52,en\n"
    )
    columns = {
        "request": "seq",
        "position": "pos",
        "layer": "layer_idx",
        "experts": "e0+e1",
        "token": "tok",
        "domain": "lang",
    }
    trace = table.read([file], options(num_experts=4, columns=columns))
    assert isinstance(trace, Trace)
    assert trace.expert_ids.tolist() == [[[1, 2], [2, 0]], [[3, 1], [0, 3]], [[3, 1], [0, 1]]]
    assert trace.request_ids.tolist() == [0, 0, 1]
    assert trace.positions.tolist() == [0, 1, 0]
    assert trace.phases.tolist() == [0, 1, 0]
    assert trace.token_ids is not None
    assert trace.token_ids.tolist() == [50, 51, 52]
    assert trace.meta.layer_ids == (4, 7)
    assert trace.meta.domains == ("de", "en")
    assert trace.domain_ids is not None
    assert trace.domain_ids.tolist() == [0, 0, 1]


def test_one_expert_a_row_with_weights(tmp_path, options):
    file = tmp_path / "r.tsv"
    rows = ["request\tposition\tlayer\texpert\tweight"]
    rows += ["0\t0\t0\t5\t0.75", "0\t0\t0\t2\t0.25", "0\t1\t0\t1\t1.0"]
    file.write_text("\n".join(rows))
    assert table.detect(file)
    trace = table.read([file], options(num_experts=8))
    assert isinstance(trace, Trace)
    assert trace.expert_ids.tolist() == [[[5, 2]], [[1, -1]]]
    assert trace.gate_weights is not None
    assert trace.gate_weights.tolist() == [[[0.75, 0.25]], [[1.0, 0.0]]]


def test_jsonl_rows_and_nested_records(tmp_path, draw, options):
    ids = draw(4)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(
            json.dumps({"request": "q", "position": t, "layer": n, "experts": ids[t, n].tolist()})
            for t in range(4)
            for n in range(3)
        )
    )
    nested = tmp_path / "nested.jsonl"
    nested.write_text(
        "\n".join(json.dumps({"request": 7, "experts": ids[t].tolist()}) for t in range(4))
    )
    for file in (rows, nested):
        assert table.detect(file)
        trace = table.read([file, file], options(num_experts=8))
        assert isinstance(trace, Trace)
        np.testing.assert_array_equal(trace.expert_ids, np.concatenate([ids, ids]))
        assert trace.positions.tolist() == [0, 1, 2, 3] * 2
        assert trace.request_ids.tolist() == [0] * 4 + [1] * 4


def test_counts_table(tmp_path, options):
    file = tmp_path / "c.csv"
    file.write_text("step,layer,expert,count\n0,1,0,5\n0,1,2,7\n3,1,1,4\n3,1,1,1\n")
    load = table.read([file], options(num_experts=4, top_k=2))
    assert isinstance(load, LoadTrace)
    assert load.expert_load.tolist() == [[[5, 0, 7, 0]], [[0, 5, 0, 0]]]
    assert load.meta.layer_ids == (1,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("request,position,layer,expert\n0,0,0,x\n", "line 2: expert is 'x', not a number"),
        ("request,position,layer,expert\n0,0,0,1\n0,0,0,1.5\n", "line 3: expert is '1.5'"),
        ("request,position,layer,expert\n0,0,0,99999\n", "line 2: expert 99999 is no expert id"),
        ("request,position,layer,expert\n0,-3,0,1\n", "line 2: position is '-3'"),
        ("request,position,layer,expert\n0,0,0,1\n0,0,1,1\n0,1,1,2\n", "line 4: .* layer 0"),
        ("request,position,layer,expert\n0,0,0,3\n0,0,0,3\n", "expert 3 is chosen twice"),
        ("request,position,layer,experts\n0,0,0,1 2;x\n", "line 2: experts is '1 2;x'"),
        ("request,position,layer,expert,phase\n0,0,0,3,warm\n", "line 2: phase is 'warm'"),
        ("request,position,layer,expert\n", "has no rows"),
        ("request,position,layer,expert\n0,0,0,1,7\n", "line 2: has more fields than"),
        ("request,position,layer,expert\n0,0,0,1\n0,0\n", "line 3: expert is nan|not a number"),
        ("", "not a readable table"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, options, text, message):
    file = tmp_path / "r.csv"
    file.write_text(text)
    with pytest.raises(FormatError, match=message) as error:
        table.read([file], options(num_experts=8))
    assert str(file) in error.value.cause


def test_missing_columns_are_asked_for(tmp_path, options):
    file = tmp_path / "r.csv"
    file.write_text("seq,position,layer,expert\n0,0,0,1\n")
    with pytest.raises(InputError, match="no column for request") as error:
        table.read([file], options())
    assert "`columns` request=" in error.value.remedy
    with pytest.raises(InputError, match="no column 'sequence'"):
        table.read([file], options(columns={"request": "sequence"}))
    with pytest.raises(InputError, match="'requests' is not one of our columns"):
        table.read([file], options(columns={"requests": "seq"}))


def test_npz_with_renamed_arrays(tmp_path, draw, options):
    ids = draw(5)
    file = tmp_path / "r.npz"
    np.savez(file, routing=ids, seq=np.array([9, 9, 4, 4, 4]), expert_ids=ids * 0)
    trace = arrays.read(
        [file], options(num_experts=8, columns={"expert_ids": "routing", "request_ids": "seq"})
    )
    assert isinstance(trace, Trace)
    np.testing.assert_array_equal(trace.expert_ids, ids)
    assert trace.request_ids.tolist() == [1, 1, 0, 0, 0]
    with pytest.raises(InputError, match="no array 'routings'") as error:
        arrays.read([file], options(columns={"expert_ids": "routings"}))
    assert "routing, seq" in error.value.remedy


def test_npz_counts_and_bad_arrays(tmp_path, draw, options):
    file = tmp_path / "r.npz"
    np.savez(file, expert_load=np.ones((2, 3, 4), np.int64))
    assert arrays.detect(file)
    load = arrays.read([file], options(top_k=2))
    assert isinstance(load, LoadTrace)
    assert load.expert_load.shape == (2, 3, 4)
    np.savez(file, expert_ids=draw(3), positions=np.array([0, 1]))
    with pytest.raises(FormatError, match="positions must be of length 3, not 2"):
        arrays.read([file], options(num_experts=8))
    np.savez(file, expert_ids=draw(3).astype(float))
    with pytest.raises(FormatError, match="expert_ids: has type float64"):
        arrays.read([file], options(num_experts=8))
    np.savez(file, expert_ids=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match="pickled objects, which are never loaded"):
        arrays.read([file], options(num_experts=8))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(FormatError, match="not a readable"):
        arrays.read([file], options(num_experts=8))
