"""Candidates of a router in the trace format: what is kept, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import FormatError
from moesim.trace.check import check_trace
from moesim.trace.format import Trace, TraceMeta, load_trace, save_trace
from moesim.trace.importers.base import ImportOptions
from moesim.trace.importers.registry import importer
from moesim.trace.ops import SliceSpec, merge_traces, slice_trace, write_slice
from moesim.trace.writer import TraceWriter

TOKENS, LAYERS, EXPERTS, TOP_K, LISTED = 24, 3, 8, 2, 4


def listed_trace(num_candidates: int = LISTED, seed: int = 0) -> Trace:
    """Scores of all experts at random; the first two candidates are the choices."""
    rng = np.random.default_rng(seed)
    scores = rng.random((TOKENS, LAYERS, EXPERTS)).astype(np.float16)
    order = np.argsort(-scores, axis=2, kind="stable")[..., :num_candidates]
    return Trace(
        expert_ids=order[..., :TOP_K].astype(np.uint8),
        request_ids=np.repeat(np.arange(4), 6).astype(np.int32),
        positions=np.tile(np.arange(6), 4).astype(np.int32),
        phases=np.zeros(TOKENS, np.uint8),
        meta=TraceMeta("toy", EXPERTS, TOP_K, (1, 2, 5)),
        candidate_ids=order.astype(np.uint8),
        candidate_scores=np.take_along_axis(scores, order, 2),
    )


def read(path: Path) -> Trace:
    trace = load_trace(path)
    assert isinstance(trace, Trace)
    return trace


@pytest.mark.parametrize("name", ["t.npz", "folder"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    trace = listed_trace()
    save_trace(trace, tmp_path / name)
    back = read(tmp_path / name)
    assert back.content_hash() == trace.content_hash()
    assert back.num_candidates == LISTED
    assert check_trace(back) == []


def test_slices_and_takes_keep_them(tmp_path: Path) -> None:
    trace = listed_trace()
    spec = SliceSpec(tokens=(3, 11), layer_ids=(1, 5))
    write_slice(trace, spec, tmp_path / "s.npz")
    assert trace.candidate_scores is not None
    for part in (slice_trace(trace, spec), read(tmp_path / "s.npz")):
        np.testing.assert_array_equal(
            part.candidate_scores, trace.candidate_scores[3:11][:, [0, 2]]
        )
    taken = trace.take(np.array([5, 2]))
    np.testing.assert_array_equal(taken.candidate_scores, trace.candidate_scores[[5, 2]])


def test_a_merge_keeps_as_many_as_all_have(tmp_path: Path) -> None:
    notices = merge_traces([listed_trace(5), listed_trace(3, seed=1)], tmp_path / "m.npz")
    assert notices == ["candidates cut to the first 3, which all of the traces have"]
    merged, first = read(tmp_path / "m.npz"), listed_trace(5)
    assert first.candidate_ids is not None
    assert merged.candidate_ids is not None
    np.testing.assert_array_equal(merged.candidate_ids[:TOKENS], first.candidate_ids[..., :3])


def test_a_merge_with_a_trace_without_them_leaves_them_out(tmp_path: Path) -> None:
    other = replace(listed_trace(), candidate_ids=None, candidate_scores=None)
    notices = merge_traces([listed_trace(), other], tmp_path / "m.npz")
    assert [n.split()[0] for n in notices] == ["candidate_ids", "candidate_scores"]
    assert read(tmp_path / "m.npz").num_candidates == 0


def test_import_of_plain_arrays_keeps_them(tmp_path: Path) -> None:
    trace = listed_trace()
    np.savez(tmp_path / "plain.npz", **trace.arrays())
    back = importer("npz").read([tmp_path / "plain.npz"], ImportOptions(num_experts=EXPERTS))
    assert isinstance(back, Trace)
    np.testing.assert_array_equal(back.candidate_ids, trace.candidate_ids)
    np.testing.assert_array_equal(back.candidate_scores, trace.candidate_scores)


def broken(**changes: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = {n: a.copy() for n, a in listed_trace().arrays().items()}
    arrays.update(changes)
    return {name: array for name, array in arrays.items() if array is not None}


def changed(name: str, place: tuple[int, int, int], value: float) -> dict[str, Any]:
    arrays = broken()
    arrays[name][place] = value
    return arrays


@pytest.mark.parametrize(
    ("arrays", "cause"),
    [
        (broken(candidate_scores=None), "no candidate_scores"),
        (broken(candidate_ids=np.zeros((TOKENS, LAYERS, 2), np.uint8)), "do not fit"),
        (broken(candidate_ids=np.zeros((TOKENS, LAYERS, 4), np.int64)), "int64"),
        (changed("candidate_ids", (7, 1, 3), 8), "token 7, layer 1: a candidate outside 0..7"),
        (changed("candidate_scores", (7, 1, 3), 2), "token 7, layer 1: candidates that are not in"),
        (changed("candidate_scores", (7, 1, 3), np.nan), "not finite"),
        (changed("candidate_scores", (7, 1, 3), -1), "below 0"),
    ],
)
def test_what_cannot_be_is_refused(arrays: dict[str, Any], cause: str, tmp_path: Path) -> None:
    meta = listed_trace().meta.to_json()
    np.savez(tmp_path / "bad.npz", meta=np.array(meta), **arrays)
    with pytest.raises(FormatError, match=cause):
        load_trace(tmp_path / "bad.npz")


def test_a_candidate_twice_is_refused(tmp_path: Path) -> None:
    arrays = broken()
    arrays["candidate_ids"][3, 2, 1] = arrays["candidate_ids"][3, 2, 0]
    np.savez(tmp_path / "bad.npz", meta=np.array(listed_trace().meta.to_json()), **arrays)
    with pytest.raises(FormatError, match="token 3, layer 2: a candidate twice"):
        load_trace(tmp_path / "bad.npz")


def test_as_many_candidates_as_choices_are_none(tmp_path: Path) -> None:
    arrays = broken()
    for name in ("candidate_ids", "candidate_scores"):
        arrays[name] = arrays[name][..., :TOP_K]
    np.savez(tmp_path / "bad.npz", meta=np.array(listed_trace().meta.to_json()), **arrays)
    with pytest.raises(FormatError, match="2 candidates of 8 experts"):
        load_trace(tmp_path / "bad.npz")


def test_choices_that_are_no_candidates_are_found() -> None:
    trace = listed_trace()
    ids = np.asarray(trace.expert_ids).copy()
    assert trace.candidate_ids is not None
    ids[5, 1, 0] = next(e for e in range(EXPERTS) if e not in trace.candidate_ids[5, 1])
    found = {f.code: f.count for f in check_trace(replace(trace, expert_ids=ids))}
    assert found["unlisted-choices"] == 1


def test_the_writer_wants_the_announced_number(tmp_path: Path) -> None:
    trace = listed_trace()
    dtypes = {name: array.dtype.name for name, array in trace.arrays().items()}
    with (
        pytest.raises(FormatError, match="candidate_ids has shape"),
        TraceWriter(tmp_path / "w.npz", trace.meta, dtypes, num_candidates=3) as out,
    ):
        out.append(**trace.arrays())
