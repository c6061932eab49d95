"""The command: options, summary, notices on stderr, and no partial file."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from moesim.cli.trace_import import import_trace, parse_layer_ids
from moesim.errors import FormatError, InputError, MoesimError
from moesim.trace.format import load_trace

app = typer.Typer()
app.command()(import_trace)


def run(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_import_writes_a_trace(tmp_path, draw):
    file, out = tmp_path / "r.npy", tmp_path / "t.npz"
    ids = draw(40, layers=4, top_k=2, experts=8)
    ids[:, 0] = 0
    np.save(file, ids.astype(np.uint8))
    result = run(file, "--out", out, "--num-experts", 8, "--domain", "code", "--license", "CC0-1.0")
    assert "40 tokens of 1 requests, 3 MoE layers, top-2 of 8 experts" in result.stdout
    assert "note: format: vllm" in result.stderr
    assert "note:" not in result.stdout
    trace = load_trace(out)
    np.testing.assert_array_equal(trace.expert_ids, ids[:, 1:])
    assert trace.meta.domains == ("code",)
    assert trace.meta.license == "CC0-1.0"
    assert trace.meta.source == {"kind": "imported", "format": "vllm", "files": ["r.npy"]}
    again = json.loads(run(file, "--out", out, "--num-experts", 8, "--json").stdout)
    assert again["num_tokens"] == 40
    assert again["layer_ids"] == [1, 2, 3]


def test_model_supplies_shape(tmp_path, draw):
    file, out = tmp_path / "a.bin", tmp_path / "t.npz"
    ids = draw(4, layers=27, top_k=6, experts=64)
    ids[:, 0] = 0
    file.write_bytes(ids.astype("<i4").tobytes())
    run(file, "--from", "sglang", "--model", "DeepSeek-V2-Lite", "--out", out)
    trace = load_trace(out)
    np.testing.assert_array_equal(trace.expert_ids, ids[:, 1:])
    assert trace.meta.model == "DeepSeek-V2-Lite"
    assert trace.meta.layer_ids == tuple(range(1, 27))


def test_failure_leaves_the_old_file_or_none(tmp_path, draw):
    file, out = tmp_path / "r.npy", tmp_path / "t.npz"
    np.save(file, draw(5))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(FormatError):
        run(file, "--from", "vllm", "--out", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.npy"]
    out.write_bytes(b"old")
    with pytest.raises(MoesimError):
        run(file, "--from", "vllm", "--out", out)
    assert out.read_bytes() == b"old"


def test_a_table_with_names_of_its_own(tmp_path):
    """The example of the engines page: --columns says that it is a plain table."""
    page = (Path(__file__).parents[3] / "docs" / "engines.md").read_text()
    (line,) = [x for x in page.splitlines() if x.startswith("moesim trace import routing.csv")]
    words = shlex.split(line)[3:]
    file = tmp_path / "routing.csv"
    rows = ["seq_id,pos,layer_idx,e0,e1", "0,0,0,1,2", "0,0,1,7,0", "4,0,0,3,5", "4,0,1,2,6"]
    file.write_text("\n".join(rows))
    words = [str(tmp_path / x) if x in ("routing.csv", "t.npz") else x for x in words]
    result = run(*words)
    assert "note: format: table" in result.stderr
    trace = load_trace(tmp_path / "t.npz")
    assert trace.expert_ids.tolist() == [[[1, 2], [7, 0]], [[3, 5], [2, 6]]]
    assert len(set(trace.request_ids.tolist())) == 2


def test_usage_errors(tmp_path, draw):
    file = tmp_path / "r.npy"
    np.save(file, draw(5))
    for args, message in [
        ([], "no files were named"),
        ([file], "--out is missing"),
        ([file, "--out", "t.npz", "--phase", "warm"], "--phase 'warm'"),
        ([file, "--out", "t.npz", "--columns", "a"], "--columns 'a'"),
        ([file, "--out", "t.npz", "--layer-ids", "3-1"], "not ascending"),
        ([file, "--out", "t.npz", "--num-experts", 0], "--num-experts 0"),
        ([file, "--out", "t.npz", "--from", "nope"], "unknown trace format"),
        ([tmp_path / "x", "--out", "t.npz"], "no such file or folder"),
    ]:
        with pytest.raises(MoesimError, match=message):
            run(*args)


def boom_file(path):
    """A pickle that would make a folder beside itself."""

    class Boom:
        def __reduce__(self):
            return (os.mkdir, (str(path.parent / "ran"),))

    np.save(path, np.array([Boom()], dtype=object), allow_pickle=True)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"choices": [', "line 1: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8 text"),
        ("a.jsonl", b"{}", "is of no known format"),
        ("a.npy", b"\x93NUMPY\x01\x00", "a.npy"),
        ("a.npz", b"PK\x03\x04", "not a readable .npz file"),
        ("a.pt", b"junk", "a.pt"),
        ("a.bin", b"junk", "is of no known format"),
    ],
)
def test_files_of_no_format_say_why(tmp_path, name, content, message):
    """Without --from: what is wrong with the file, not only that its format is unknown."""
    if name.endswith(".pt"):
        pytest.importorskip("torch")
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(MoesimError, match=message) as error:
        run(file, "--out", tmp_path / "t.npz")
    assert str(file) in error.value.cause
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_pickles_of_no_format_never_run(tmp_path):
    file = boom_file(tmp_path / "a.npy")
    with pytest.raises(FormatError, match="holds pickled objects, which are never loaded"):
        run(file, "--out", tmp_path / "t.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


def test_responses_without_routing_are_counted(tmp_path, draw):
    """Of three responses one has no routed_experts, as an error's has."""
    file = tmp_path / "r.jsonl"
    whole = {"choices": [{"routed_experts": draw(5).tolist()}]}
    file.write_text("\n".join(json.dumps(x) for x in (whole, {"error": {"code": 400}}, whole)))
    result = run(file, "--out", tmp_path / "t.npz", "--num-experts", 8)
    assert "passed over 1 responses without routed_experts" in result.stderr
    assert "10 tokens of 2 requests" in result.stdout


def test_list_names_all_formats():
    assert "sglang-recorder" in run("--list").stdout
    assert "tensorrt-llm" in json.loads(run("--list", "--json").stdout)


def test_layer_ids_text():
    assert parse_layer_ids("1-3,7") == (1, 2, 3, 7)
    for text in ("", "a", "1-", "3,3", "1-99999999"):
        with pytest.raises(InputError):
            parse_layer_ids(text)
