"""The streaming writer."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import FormatError, InputError
from moesim.trace.format import Trace, load_token_trace, load_trace
from moesim.trace.writer import TraceWriter, id_dtype

MakeTrace = Callable[..., Trace]


@pytest.mark.parametrize("name", ["t.npz", "t"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 12), max_size=6))
def test_pieces_add_up_to_the_trace(
    make_trace: MakeTrace, tmp_path_factory: pytest.TempPathFactory, name: str, cuts: list[int]
) -> None:
    trace = make_trace(gates=True)
    edges = [0, *sorted(cuts), 12]
    path = tmp_path_factory.mktemp("w") / name
    with TraceWriter.like(path, trace) as out:
        for first, stop in pairwise(edges):
            out.append(**{n: a[first:stop] for n, a in trace.arrays().items()})
        assert out.num_tokens == 12
    assert load_token_trace(path, "x").content_hash() == trace.content_hash()
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_same_pieces_same_bytes(make_trace: MakeTrace, tmp_path: Path) -> None:
    """INV-6, and the pieces do not show in the file."""
    trace = make_trace()
    for name, step in (("a.npz", 5), ("b.npz", 12)):
        with TraceWriter.like(tmp_path / name, trace) as out:
            for first in range(0, 12, step):
                out.append(**{n: a[first : first + step] for n, a in trace.arrays().items()})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("name", ["t.npz", "t"])
def test_failure_leaves_nothing(make_trace: MakeTrace, tmp_path: Path, name: str) -> None:
    trace = make_trace()
    with suppress(ZeroDivisionError), TraceWriter.like(tmp_path / name, trace) as out:
        out.append(**trace.arrays())
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_is_replaced_only_at_the_end(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace, target = make_trace(), tmp_path / "t.npz"
    target.write_text("old")
    with TraceWriter.like(target, trace) as out:
        out.append(**trace.arrays())
        assert target.read_text() == "old"
    assert load_token_trace(target, "x").num_tokens == 12


def test_no_tokens_make_an_empty_trace(make_trace: MakeTrace, tmp_path: Path) -> None:
    for name in ("t.npz", "t"):
        with TraceWriter.like(tmp_path / name, make_trace()):
            pass
        loaded = load_trace(tmp_path / name)
        assert isinstance(loaded, Trace)
        assert loaded.expert_ids.shape == (0, 3, 2)


def test_a_header_has_room_for_any_size(make_trace: MakeTrace, tmp_path: Path) -> None:
    """10^18 tokens of 10^6 layers would still fit the header's 256 bytes."""
    with TraceWriter.like(tmp_path / "t", make_trace()) as out:
        empty = out._header("expert_ids")
        out._num_tokens = 10**18
        full = out._header("expert_ids")
        out._num_tokens = 0
    assert len(empty) == len(full) == 256
    assert empty.endswith(b" \n")
    assert full.endswith(b" \n")


def test_wider_integers_are_taken_if_they_fit(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace()
    wide = {n: a.astype(np.int64) for n, a in trace.arrays().items()}
    with TraceWriter.like(tmp_path / "t", trace) as out:
        out.append(**wide)
        wide["expert_ids"][0, 0, 0] = 256
        with pytest.raises(FormatError, match="expert_ids has values that uint8 cannot hold"):
            out.append(**wide)
    assert load_token_trace(tmp_path / "t", "x").content_hash() == trace.content_hash()


def test_pieces_are_checked(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace()
    arrays = trace.arrays()
    with TraceWriter.like(tmp_path / "t", trace) as out:
        with pytest.raises(FormatError, match="array gate_weights is not announced"):
            out.append(**arrays, gate_weights=np.zeros((12, 3, 2), np.float32))
        with pytest.raises(FormatError, match="array phases is missing"):
            out.append(**{n: a for n, a in arrays.items() if n != "phases"})
        with pytest.raises(FormatError, match="phases has shape"):
            out.append(**{**arrays, "phases": arrays["phases"][:5]})
        with pytest.raises(FormatError, match="expert_ids has shape"):
            out.append(**{**arrays, "expert_ids": arrays["expert_ids"][:, :2]})
        assert out.num_tokens == 0
    assert load_trace(tmp_path / "t", validate=False)


def test_announcements_are_checked(make_trace: MakeTrace, tmp_path: Path) -> None:
    meta = make_trace().meta
    for dtypes, part in (
        ({"expert_ids": "int64"}, "expert_ids cannot be int64"),
        ({"expert_ids": "uint8", "gate_weights": "float64"}, "gate_weights cannot be float64"),
        ({"expert_ids": "uint8", "notes": "int8"}, "no array called notes"),
        ({"domain_ids": "int16"}, "expert_ids are missing"),
    ):
        with pytest.raises(FormatError, match=part):
            TraceWriter(tmp_path / "t", meta, dtypes)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(make_trace: MakeTrace, tmp_path: Path) -> None:
    (tmp_path / "dir.npz").mkdir()
    (tmp_path / "file").write_text("x")
    for path, part in (
        (tmp_path / "dir.npz", "is a directory"),
        (tmp_path / "file", "exists already"),
        (tmp_path / "missing" / "t", "cannot write"),
        (tmp_path / "missing" / "t.npz", "cannot write"),
        (tmp_path / "file" / "t", "cannot write"),
    ):
        with pytest.raises(InputError, match=part):
            TraceWriter.like(path, make_trace())
    assert (tmp_path / "file").read_text() == "x"


def test_the_smallest_type_for_ids() -> None:
    """256 experts have ids to 255, which uint8 holds."""
    assert [id_dtype(n) for n in (1, 256, 257, 32_767)] == ["uint8", "uint8", "uint16", "uint16"]
    assert id_dtype(8, ragged=True) == "int16"


@pytest.mark.parametrize("name", ["t.npz", "t"])
def test_a_full_disk_says_so(
    make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Files whose every write fails, also the flush of what was buffered when they are closed."""

    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    trace = make_trace()
    out = TraceWriter.like(tmp_path / name, trace)
    for file in out._files.values():
        file.close()
    out._files = {array: Full() for array in out._files}
    with pytest.raises(InputError, match="No space left") as caught, out:
        out.append(**trace.arrays())
    assert "room" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []
