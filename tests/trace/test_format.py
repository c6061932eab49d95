"""The trace format: round trips, equal hashes, and refusal of what is not a trace."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import FormatError, InputError, MismatchError, UnknownNameError
from moesim.trace.format import (
    LoadTrace,
    Trace,
    TraceMeta,
    load_token_trace,
    load_trace,
    parse_meta,
    require_tokens,
    sample_names,
    save_trace,
)

MakeTrace = Callable[..., Trace]


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=True)
    return out.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def members(trace: Trace, **changed: np.ndarray | None) -> dict[str, bytes]:
    """The .npy members of a trace, with arrays replaced, added or (None) left out."""
    arrays: dict[str, Any] = {"meta": np.array(trace.meta.to_json()), **trace.arrays(), **changed}
    return {name: npy(array) for name, array in arrays.items() if array is not None}


def header(shape: object, descr: object = "|u1", fortran: object = False) -> bytes:
    """A .npy header that says what it likes."""
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    text = text.ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def refused(path: Path) -> FormatError:
    with pytest.raises(FormatError) as caught:
        load_trace(path)
    assert "\n" not in caught.value.cause
    assert caught.value.remedy
    return caught.value


# Round trips


@pytest.mark.parametrize("name", ["trace.npz", "folder"])
@pytest.mark.parametrize("gates", [False, True])
def test_round_trip_keeps_every_array_and_type(
    make_trace: MakeTrace, tmp_path: Path, name: str, gates: bool
) -> None:
    trace = make_trace(gates=gates, token_ids=np.arange(12, dtype=np.int32))
    save_trace(trace, tmp_path / name)
    back = load_token_trace(tmp_path / name, "a test")
    assert back.meta == trace.meta
    assert list(back.arrays()) == list(trace.arrays())
    for key, array in trace.arrays().items():
        assert back.arrays()[key].dtype == array.dtype
        np.testing.assert_array_equal(back.arrays()[key], array)
    assert isinstance(back.expert_ids, np.memmap) == (name == "folder")


def test_hash_is_that_of_the_content_not_of_the_form(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace(gates=True)
    for name in ("a.npz", "b"):
        save_trace(trace, tmp_path / name)
    hashes = {load_token_trace(tmp_path / name, "a test").content_hash() for name in ("a.npz", "b")}
    assert hashes == {trace.content_hash()}
    other = trace.expert_ids.copy()
    other[-1, -1] = other[-1, -1, ::-1]
    assert replace(trace, expert_ids=other).content_hash() != trace.content_hash()
    assert replace(trace, meta=replace(trace.meta, model="b")).content_hash() not in hashes


def test_saving_twice_gives_the_same_bytes(make_trace: MakeTrace, tmp_path: Path) -> None:
    """INV-6 for trace files."""
    for name in ("a.npz", "b.npz"):
        save_trace(make_trace(), tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_existing_directory_is_left_alone(make_trace: MakeTrace, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        save_trace(make_trace(), tmp_path / "there")
    with pytest.raises(InputError, match="cannot write"):
        save_trace(make_trace(), tmp_path / "missing" / "t.npz")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


def test_minus_one_stands_for_fewer_choices(make_trace: MakeTrace, tmp_path: Path) -> None:
    ids = make_trace().expert_ids.astype(np.int16)
    ids[3, 1] = (5, -1)
    ids[4, 1] = (-1, -1)
    save_trace(make_trace(expert_ids=ids), tmp_path / "t.npz")
    np.testing.assert_array_equal(load_token_trace(tmp_path / "t.npz", "x").expert_ids, ids)


def test_load_trace_of_counts(tmp_path: Path) -> None:
    load = np.arange(2 * 3 * 4, dtype=np.int64).reshape(2, 3, 4)
    counts = LoadTrace(load, TraceMeta("toy", 4, 2, (0, 1, 2)))
    for name in ("c.npz", "c"):
        save_trace(counts, tmp_path / name)
        back = load_trace(tmp_path / name)
        assert isinstance(back, LoadTrace)
        np.testing.assert_array_equal(back.expert_load, load)
        with pytest.raises(MismatchError, match="moesim plan needs token-level"):
            require_tokens(back, "moesim plan")
    for wrong in (load.astype(np.int32), load[:, :2], load - 1, load[:0]):
        path = write_zip(
            tmp_path / "w.npz",
            {"meta": npy(np.array(counts.meta.to_json())), "expert_load": npy(wrong)},
        )
        assert "expert_load" in refused(path).cause


def test_samples_by_name() -> None:
    assert "debian-moe" in sample_names()
    trace = load_token_trace("sample:debian-moe", "a test")
    assert (trace.num_layers, trace.num_experts, trace.top_k) == (12, 64, 8)
    with pytest.raises(UnknownNameError, match="'debian-moe'"):
        load_trace("sample:debian-mo")


def test_take_keeps_the_order_asked_for(make_trace: MakeTrace) -> None:
    trace = make_trace()
    some = trace.take(np.array([7, 2]))
    np.testing.assert_array_equal(some.expert_ids, trace.expert_ids[[7, 2]])
    np.testing.assert_array_equal(some.positions, [2, 2])
    assert some.num_tokens == 2


# Contents that contradict the format


def test_ids_out_of_range(make_trace: MakeTrace, tmp_path: Path) -> None:
    for dtype, bad in ((np.uint8, 8), (np.int16, -2), (np.uint16, 300)):
        ids = make_trace().expert_ids.astype(dtype)
        ids[6, 2, 1] = bad
        save_trace(make_trace(expert_ids=ids), tmp_path / "t.npz")
        error = refused(tmp_path / "t.npz")
        assert f"token 6, layer 2: expert id {bad} is outside 0..7" in error.cause
    load_trace(tmp_path / "t.npz", validate=False)


def test_an_expert_chosen_twice(make_trace: MakeTrace, tmp_path: Path) -> None:
    ids = make_trace().expert_ids.copy()
    ids[4, 1] = (3, 3)
    save_trace(make_trace(expert_ids=ids), tmp_path / "t.npz")
    assert "token 4, layer 1: expert 3 is chosen twice" in refused(tmp_path / "t.npz").cause


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gates_that_are_not_finite(make_trace: MakeTrace, tmp_path: Path, bad: float) -> None:
    gates = make_trace(gates=True).gate_weights
    assert gates is not None
    gates = gates.copy()
    gates[3, 0, 1] = bad
    save_trace(make_trace(gate_weights=gates), tmp_path / "t.npz")
    assert "gate_weights are not all finite" in refused(tmp_path / "t.npz").cause


@pytest.mark.parametrize(
    ("name", "array", "part"),
    [
        ("expert_ids", np.zeros((12, 3, 2), np.int64), "expert_ids has type int64"),
        ("expert_ids", np.zeros((12, 3, 2), ">i2"), "expert_ids has type >i2"),
        ("expert_ids", np.zeros((12, 3, 2), [("a", "u1")]), "expert_ids has type"),
        ("expert_ids", np.zeros((12, 2, 2), np.uint8), "expert_ids has shape (12, 2, 2)"),
        ("expert_ids", np.zeros(12, np.uint8), "expert_ids has shape (12,)"),
        ("expert_ids", np.zeros((), np.uint8), "expert_ids has shape ()"),
        ("request_ids", np.zeros(12, np.int64), "request_ids has type int64"),
        ("request_ids", np.zeros(11, np.int32), "request_ids has shape (11,)"),
        ("request_ids", np.full(12, -1, np.int32), "request_ids has negative values"),
        ("positions", np.full(12, -1, np.int32), "positions has negative values"),
        ("phases", np.full(12, 2, np.uint8), "phases must be 0"),
        ("domain_ids", np.full(12, 2, np.int16), "domain_ids go from 2 to 2, but meta.domains"),
        ("domain_ids", np.full(12, -1, np.int16), "domain_ids go from -1 to -1"),
        ("gate_weights", np.zeros((12, 3, 2), np.float64), "gate_weights has type float64"),
        ("gate_weights", np.zeros((12, 3, 1), np.float32), "gate_weights has shape (12, 3, 1)"),
        ("step_ids", np.zeros((12, 1), np.int32), "step_ids has shape (12, 1)"),
        ("phases", None, "array phases is missing"),
        ("expert_ids", None, "array expert_ids is missing"),
        ("meta", None, "there is no array called meta"),
        ("meta", np.array("[]"), 'meta does not say format "moesim-trace"'),
        ("meta", np.array("{"), "meta is not JSON"),
        ("meta", np.zeros(3), "meta is not JSON"),
    ],
)
def test_wrong_arrays_are_named(
    make_trace: MakeTrace, tmp_path: Path, name: str, array: np.ndarray | None, part: str
) -> None:
    path = write_zip(tmp_path / "t.npz", members(make_trace(), **{name: array}))
    assert part in refused(path).cause


def test_arrays_of_other_names_are_ignored(make_trace: MakeTrace, tmp_path: Path) -> None:
    extra = np.array([{"a": 1}], dtype=object)
    path = write_zip(tmp_path / "t.npz", members(make_trace(), notes=extra))
    assert load_token_trace(path, "x").num_tokens == 12


def test_an_empty_trace_is_valid_and_useless(make_trace: MakeTrace, tmp_path: Path) -> None:
    empty = make_trace().take(slice(0, 0))
    for name in ("e.npz", "e"):
        save_trace(empty, tmp_path / name)
        loaded = load_trace(tmp_path / name)
        assert isinstance(loaded, Trace)
        assert loaded.num_tokens == 0
        with pytest.raises(FormatError, match="no tokens"):
            load_token_trace(tmp_path / name, "a test")


# Hostile and damaged files


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["expert_ids", "request_ids", "meta"])
def test_pickles_are_never_loaded(
    make_trace: MakeTrace, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = np.array([Boom()], dtype=object)
    path = write_zip(tmp_path / "t.npz", members(make_trace(), **{name: hostile}))
    assert "pickled objects" in refused(path).cause
    save_trace(make_trace(), tmp_path / "folder")
    (tmp_path / "folder" / "phases.npy").write_bytes(npy(hostile))
    refused(tmp_path / "folder")
    assert "pickle was loaded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "data",
    [
        header((10**15, 3, 2)),
        header((12, 3, 2)) + b"\0" * 71,
        header((-12, 3, 2)) + b"\0" * 72,
        header((-1, 0, 2)),
        header((0, -1)),
        header((12.5, 3)),
        header((True, 3, 2)) + b"\0" * 6,
        header((2,) * 70),
        header((12, 3, 2), "|V0"),
        header((0, 3, 2), "|V0"),
        header((12, 3, 2), "|S0"),
        header((12, 3, 2), "|O") + b"\0" * 600,
        header((12, 3, 2), "nonsense"),
        header((12, 3, 2), [("a", "O")]) + b"\0" * 600,
        header((12, 3, 2), fortran="yes") + b"\0" * 72,
        header("(12, 3, 2)"),
        b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 117 + b"\n",
        b"\x93NUMPY\x01\x00\x76\x00" + b"-" * 117 + b"\n",
        b"\x93NUMPY\x01\x00\x76\x00" + b"{}".ljust(117) + b"\n",
        b"\x93NUMPY\x01\x00\xff\xff",
        b"\x93NUMPY\x03\x00\x76\x00\x00\x00" + "{é}".encode().ljust(117) + b"\n",
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY",
        b"\x80\x04N.",
        b"",
    ],
)
def test_headers_that_lie(make_trace: MakeTrace, tmp_path: Path, data: bytes) -> None:
    path = write_zip(tmp_path / "t.npz", {**members(make_trace()), "expert_ids": data})
    assert str(path) in refused(path).cause
    save_trace(make_trace(), tmp_path / "folder")
    (tmp_path / "folder" / "expert_ids.npy").write_bytes(data)
    refused(tmp_path / "folder")


def test_a_member_that_claims_more_than_memory(
    make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zip bomb: few bytes in the file that unpack to more than the machine has."""
    path = bomb(make_trace(), tmp_path)
    assert path.stat().st_size < (6 << 24) / 500
    monkeypatch.setattr("moesim.trace.npyio.memory_bytes", lambda: 1 << 27)
    error = refused(path)
    assert "claim 100664180 bytes" in error.cause
    assert "directory" in error.remedy


def test_contradictions_are_found_before_anything_is_unpacked(
    make_trace: MakeTrace, tmp_path: Path
) -> None:
    """100 MB of ids in 100 kB of file; the small arrays are for 12 tokens."""
    path = bomb(make_trace(), tmp_path)
    tracemalloc.start()
    try:
        error = refused(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "request_ids has shape (12,), wanted (16777216,)" in error.cause
    assert peak < 10 << 20


def bomb(trace: Trace, folder: Path) -> Path:
    big = header((1 << 24, 3, 2)) + bytes(6 << 24)
    return write_zip(folder / "t.npz", {**members(trace), "expert_ids": big})


def test_a_size_in_the_zip_directory_that_lies(make_trace: MakeTrace, tmp_path: Path) -> None:
    """The array claims 3.2 GB and the zip directory 4.3 GB; there are 10 bytes."""
    lie = header((12, 1 << 27, 2)) + bytes(10)
    path = write_zip(tmp_path / "t.npz", {**members(make_trace()), "expert_ids": lie})
    raw = bytearray(path.read_bytes())
    at = raw.rfind(b"expert_ids.npy") - 46
    assert raw[at : at + 4] == b"PK\x01\x02"
    raw[at + 24 : at + 28] = b"\xfe\xff\xff\xff"
    path.write_bytes(raw)
    assert "expert_ids has shape (12, 134217728, 2), but meta says" in refused(path).cause


def test_an_array_that_ends_early(make_trace: MakeTrace, tmp_path: Path) -> None:
    """The zip directory promises 72 bytes of ids more than there are."""
    raw = members(make_trace())
    path = write_zip(tmp_path / "t.npz", {**raw, "expert_ids": raw["expert_ids"][:-72]})
    data = bytearray(path.read_bytes())
    at = data.rfind(b"expert_ids.npy") - 46
    size = struct.unpack("<I", data[at + 24 : at + 28])[0]
    data[at + 24 : at + 28] = struct.pack("<I", size + 72)
    path.write_bytes(data)
    assert "expert_ids: truncated" in refused(path).cause


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(
    make_trace: MakeTrace, tmp_path: Path, data: st.DataObject
) -> None:
    """Cut anywhere or with any bytes changed, a file gives a trace or a FormatError."""
    path = write_zip(tmp_path / "t.npz", members(make_trace(gates=True)))
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del raw[data.draw(st.integers(0, len(raw) - 1), label="at") :]
    for _ in range(data.draw(st.integers(0, 4), label="changes")):
        if raw:
            where = data.draw(st.integers(0, len(raw) - 1), label="where")
            raw[where] = data.draw(st.integers(0, 255), label="byte")
    path.write_bytes(raw)
    with suppress(FormatError):
        load_trace(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_directories_are_refused_or_read(
    make_trace: MakeTrace, tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "t"
    if not folder.exists():
        save_trace(make_trace(), folder)
    name = data.draw(st.sampled_from(["expert_ids.npy", "phases.npy", "meta.json"]))
    whole = (folder / name).read_bytes()
    raw = bytearray(whole)
    where = data.draw(st.integers(0, len(raw) - 1))
    raw[where] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(1, len(raw))) :]
    (folder / name).write_bytes(raw)
    try:
        with suppress(FormatError):
            load_trace(folder)
    finally:
        (folder / name).write_bytes(whole)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not a zip")
    assert "not a readable .npz" in refused(tmp_path / "text.npz").cause
    (tmp_path / "empty").mkdir()
    assert "no meta.json" in refused(tmp_path / "empty").cause
    (tmp_path / "empty" / "meta.json").write_bytes(b"\xff\xfe")
    assert "not readable text" in refused(tmp_path / "empty").cause
    with pytest.raises(InputError, match="no trace at"):
        load_trace(tmp_path / "missing.npz")
    with pytest.raises(InputError, match="no trace at"):
        load_trace("x" * 5000)
    with pytest.raises(InputError):
        load_trace("nul\0name")


# Meta


GOOD = {
    "format": "moesim-trace",
    "version": 1,
    "model": "m",
    "num_experts": 8,
    "top_k": 2,
    "layer_ids": [0, 2],
}


def test_meta_round_trip() -> None:
    meta = TraceMeta("m", 8, 2, (0, 2), ("a", "é"), "MIT", {"kind": "x", "n": [1, 2]})
    assert parse_meta(meta.to_json(), "t") == meta
    assert parse_meta(json.dumps(GOOD), "t").num_layers == 2
    assert parse_meta(json.dumps({**GOOD, "source": "a note"}), "t").source == {"note": "a note"}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"version": 2}, "trace version 2, this moesim reads 1"),
        ({"num_experts": 0}, "meta.num_experts"),
        ({"num_experts": True}, "meta.num_experts"),
        ({"num_experts": "8"}, "meta.num_experts"),
        ({"num_experts": 1 << 15}, "meta.num_experts"),
        ({"top_k": 9}, "meta.top_k must be at most num_experts (8)"),
        ({"top_k": 2.0}, "meta.top_k"),
        ({"layer_ids": []}, "meta.layer_ids"),
        ({"layer_ids": [1, 1]}, "meta.layer_ids"),
        ({"layer_ids": [-1]}, "meta.layer_ids"),
        ({"layer_ids": {"0": 1}}, "meta.layer_ids"),
        ({"domains": "a"}, "meta.domains"),
        ({"domains": [1]}, "meta.domains"),
        ({"model": 5}, "meta.model"),
        ({"license": ["MIT"]}, "meta.license"),
        ({"format": "other"}, "format"),
    ],
)
def test_meta_fields_are_checked(change: dict[str, Any], part: str) -> None:
    with pytest.raises(FormatError, match=r"^t: ") as caught:
        parse_meta(json.dumps({**GOOD, **change}), "t")
    assert part in caught.value.cause


@pytest.mark.parametrize("text", ["", "[" * 100_000, "null", "NaN", '"x"', "9" * 5000])
def test_meta_that_is_no_object(text: str) -> None:
    with pytest.raises(FormatError):
        parse_meta(text, "t")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"expert_load": np.full((2, 1, 4), -1)}, "negative counts"),
        ({"expert_load": np.ones((2, 1, 4))}, "wanted int64"),
        ({"expert_load": np.ones((2, 2, 4), np.int64)}, "wanted int64"),
        ({"expert_ids": np.zeros((3, 1, 2), np.uint8)}, "holds expert_load and expert_ids"),
    ],
)
def test_load_traces_that_are_wrong(
    tmp_path: Path, changed: dict[str, np.ndarray], message: str
) -> None:
    meta = TraceMeta("toy", 4, 2, (0,))
    arrays = {"expert_load": np.ones((2, 1, 4), np.int64), **changed}
    np.savez(tmp_path / "l.npz", allow_pickle=False, **arrays, meta=np.array(meta.to_json()))
    with pytest.raises(FormatError, match=message) as error:
        load_trace(tmp_path / "l.npz")
    assert "l.npz" in error.value.cause


@pytest.mark.parametrize("name", ["azure.csv", "mooncake.jsonl", "dump.JSON"])
def test_a_request_log_or_dump_is_told_where_to_go(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(InputError, match="a routing trace is a") as caught:
        load_trace(file)
    assert "moesim serve --requests" in caught.value.remedy


def test_a_name_with_a_lone_surrogate_has_a_hash(make_trace: MakeTrace) -> None:
    trace = make_trace()
    odd = replace(trace, meta=replace(trace.meta, model="a\ud800b"))
    assert len({trace.content_hash(), odd.content_hash()}) == 2
