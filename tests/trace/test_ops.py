"""Slices and merges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.trace import counts as counts_module
from moesim.trace.format import Trace, load_token_trace, save_trace
from moesim.trace.ops import (
    UNLABELLED,
    SliceSpec,
    merge_traces,
    select_tokens,
    slice_trace,
    write_slice,
)

MakeTrace = Callable[..., Trace]

# Slices. The toy trace has requests of 5, 3 and 4 tokens in the domains even, odd, even.


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        (SliceSpec(), range(12)),
        (SliceSpec(tokens=(3, 6)), [3, 4, 5]),
        (SliceSpec(tokens=(10, 99)), [10, 11]),
        (SliceSpec(request_ids=(1,)), [5, 6, 7]),
        (SliceSpec(request_ids=(2, 0)), [*range(5), *range(8, 12)]),
        (SliceSpec(per_request=2), [0, 1, 5, 6, 8, 9]),
        (SliceSpec(domains=("odd",)), [5, 6, 7]),
        (SliceSpec(domains=("even", "odd"), tokens=(4, 7)), [4, 5, 6]),
        (SliceSpec(phase="decode"), [4, 11]),
        (SliceSpec(phase="prefill", per_request=1, domains=("even",)), [0, 8]),
    ],
)
def test_conditions_hold_together(make_trace: MakeTrace, spec: SliceSpec, rows: Any) -> None:
    phases = np.zeros(12, np.uint8)
    phases[[4, 11]] = 1
    trace = make_trace(phases=phases)
    assert np.flatnonzero(select_tokens(trace, spec)).tolist() == list(rows)


def test_first_tokens_go_by_position_not_by_row(make_trace: MakeTrace) -> None:
    positions = np.array([4, 3, 2, 1, 0, 0, 1, 2, 9, 5, 6, 7], np.int32)
    keep = select_tokens(make_trace(positions=positions), SliceSpec(per_request=2))
    assert np.flatnonzero(keep).tolist() == [3, 4, 5, 6, 9, 10]


def test_layers_are_named_by_their_absolute_number(make_trace: MakeTrace) -> None:
    """The toy layers are 1, 2 and 3; they keep the order of the trace."""
    trace = make_trace(gates=True)
    part = slice_trace(trace, SliceSpec(layer_ids=(3, 1), tokens=(0, 4)))
    assert part.meta.layer_ids == (1, 3)
    np.testing.assert_array_equal(part.expert_ids, trace.expert_ids[:4, [0, 2]])
    assert part.gate_weights is not None
    assert trace.gate_weights is not None
    np.testing.assert_array_equal(part.gate_weights, trace.gate_weights[:4, [0, 2]])
    with pytest.raises(InputError, match="layer 0 is not in"):
        slice_trace(trace, SliceSpec(layer_ids=(0,)))


def test_samples_of_requests(make_trace: MakeTrace) -> None:
    """INV-6; whole requests, only of those that the other conditions leave, and all in turn."""
    trace = make_trace(lengths=(2,) * 20)
    seen = set()
    for seed in range(12):
        spec = SliceSpec(num_requests=3, domains=("odd",), seed=seed)
        ids = trace.request_ids[select_tokens(trace, spec)]
        assert (np.unique(ids, return_counts=True)[1] == 2).all()
        assert len(np.unique(ids)) == 3
        assert (ids % 2 == 1).all()
        np.testing.assert_array_equal(ids, trace.request_ids[select_tokens(trace, spec)])
        seen |= set(ids.tolist())
    assert seen == set(range(1, 20, 2))


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (SliceSpec(tokens=(5, 5)), "tokens 5:5"),
        (SliceSpec(tokens=(50, 60)), "keeps no tokens"),
        (SliceSpec(tokens=(0, 5), domains=("odd",)), "keeps no tokens"),
        (SliceSpec(request_ids=(1, 9)), "no request 9"),
        (SliceSpec(num_requests=4), "a sample of 4 requests, but there are 3"),
        (SliceSpec(num_requests=0), "a sample of 0 requests"),
        (SliceSpec(per_request=0), "0 tokens per request"),
        (SliceSpec(phase="decode"), "keeps no tokens"),
        (SliceSpec(domains=("oddd",)), "unknown domain 'oddd'"),
    ],
)
def test_slices_that_cannot_be(make_trace: MakeTrace, spec: SliceSpec, part: str) -> None:
    with pytest.raises(InputError, match=part) as caught:
        slice_trace(make_trace(), spec)
    assert caught.value.remedy


def test_an_unknown_domain_is_answered_with_the_nearest(make_trace: MakeTrace) -> None:
    with pytest.raises(UnknownNameError) as caught:
        slice_trace(make_trace(), SliceSpec(domains=("evn",)))
    assert caught.value.nearest == "even"
    with pytest.raises(InputError, match="has no domains"):
        slice_trace(make_trace(domain_ids=None), SliceSpec(domains=("even",)))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 8), length=st.integers(1, 12), chunk=st.integers(1, 5))
def test_written_slices_equal_those_in_memory(
    make_trace: MakeTrace,
    tmp_path_factory: pytest.TempPathFactory,
    first: int,
    length: int,
    chunk: int,
) -> None:
    trace = make_trace(gates=True)
    spec = SliceSpec(tokens=(first, first + length), layer_ids=(2,))
    path = tmp_path_factory.mktemp("s") / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts_module, "_CHUNK_IDS", chunk * 6)
        num_tokens = write_slice(trace, spec, path)
    expected = slice_trace(trace, spec)
    assert num_tokens == expected.num_tokens
    assert load_token_trace(path, "x").content_hash() == expected.content_hash()


def test_a_slice_says_what_it_is_of(make_trace: MakeTrace) -> None:
    trace = make_trace()
    once = slice_trace(trace, SliceSpec(num_requests=2, seed=5))
    twice = slice_trace(once, SliceSpec(per_request=3))
    assert twice.meta.source["kind"] == "test"
    assert twice.meta.source["slice"] == [{"num_requests": 2, "seed": 5}, {"per_request": 3}]
    assert once.meta.source["slice_of"] == trace.content_hash()


def test_the_bundled_sample_is_the_slice_that_it_says(real_trace: Callable[[str], Trace]) -> None:
    """The first 320 tokens of every request of the full capture."""
    full, sample = real_trace("debian-moe.npz"), real_trace("sample:debian-moe")
    part = slice_trace(full, SliceSpec(per_request=320))
    for name, array in sample.arrays().items():
        np.testing.assert_array_equal(part.arrays()[name], array)


# Merges


def merged(tmp_path: Path, *traces: Trace) -> tuple[Trace, list[str]]:
    path = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
    notices = merge_traces(traces, path)
    return load_token_trace(path, "x"), notices


def test_requests_are_numbered_anew_and_domains_united(
    make_trace: MakeTrace, tmp_path: Path
) -> None:
    """Requests 7, 3, 7 become 1, 0, 1; those of the second trace follow. The domains of the
    second, odd and new, are 1 and 2 of even, odd, new."""
    first = make_trace(lengths=(3,), request_ids=np.array([7, 3, 7], np.int32))
    second = make_trace(
        lengths=(1, 2), domains=("odd", "new"), domain_ids=np.array([0, 1, 1], np.int16)
    )
    both, notices = merged(tmp_path, first, second)
    assert notices == []
    assert both.request_ids.tolist() == [1, 0, 1, 2, 3, 3]
    assert both.meta.domains == ("even", "odd", "new")
    assert both.domain_ids is not None
    assert both.domain_ids.tolist() == [0, 0, 0, 1, 2, 2]
    np.testing.assert_array_equal(both.positions, [0, 1, 2, 0, 0, 1])
    np.testing.assert_array_equal(
        both.expert_ids, np.concatenate((first.expert_ids, second.expert_ids))
    )
    assert [p["content_hash"] for p in both.meta.source["parts"]] == [
        first.content_hash(),
        second.content_hash(),
    ]


def test_chunks_do_not_show_in_a_merge(
    make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = [make_trace(gates=True, seed=s) for s in range(3)]
    whole, _ = merged(tmp_path, *traces)
    monkeypatch.setattr(counts_module, "_CHUNK_IDS", 12)
    seen: list[tuple[int, int]] = []
    merge_traces(traces, tmp_path / "again", lambda *at: seen.append(at))
    again = load_token_trace(tmp_path / "again", "x")
    assert again.content_hash() == whole.content_hash()
    assert seen[-1] == (36, 36)
    assert len(seen) == 18


def test_cut_and_joined_a_trace_is_itself_again(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace(gates=True)
    parts = [slice_trace(trace, SliceSpec(request_ids=(r,))) for r in range(3)]
    both, _ = merged(tmp_path, *parts)
    for name, array in trace.arrays().items():
        np.testing.assert_array_equal(both.arrays()[name], array)


def test_what_not_all_have_is_left_out(make_trace: MakeTrace, tmp_path: Path) -> None:
    both, notices = merged(
        tmp_path,
        make_trace(gates=True, step_ids=np.zeros(12, np.int32)),
        make_trace(step_ids=np.arange(12, dtype=np.int32), domain_ids=None),
        make_trace(step_ids=np.zeros(12, np.int32)),
    )
    assert notices == ["gate_weights left out: not all of the traces have them"]
    assert both.gate_weights is None
    assert both.step_ids is not None
    np.testing.assert_array_equal(both.step_ids, [0] * 12 + [*range(1, 13)] + [13] * 12)
    assert both.meta.domains == ("even", "odd", UNLABELLED)
    assert both.domain_ids is not None
    assert (both.domain_ids[12:24] == 2).all()


def test_types_are_widened(make_trace: MakeTrace, tmp_path: Path) -> None:
    narrow = make_trace(gates=True)
    ids = narrow.expert_ids.astype(np.int16)
    ids[0, 0, 1] = -1
    assert narrow.gate_weights is not None
    wide = replace(narrow, expert_ids=ids, gate_weights=narrow.gate_weights.astype(np.float16))
    both, _ = merged(tmp_path, narrow, wide)
    assert both.expert_ids.dtype == np.int16
    assert both.gate_weights is not None
    assert both.gate_weights.dtype == np.float32
    assert both.expert_ids[12, 0, 1] == -1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model": "other"}, "different models: 'toy' in one trace, 'other' in another"),
        ({"experts": 9}, "different numbers of experts: 8"),
        ({"top_k": 3}, "different top-k: 2"),
        ({"layers": 2}, "different layers: 3 from 1 to 3"),
        ({"layer_ids": (1, 2, 4)}, "different layers"),
    ],
)
def test_unlike_traces_are_refused_by_name(
    make_trace: MakeTrace, tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    with pytest.raises(MismatchError, match=part):
        merge_traces([make_trace(), make_trace(**change)], tmp_path / "m")
    with pytest.raises(InputError, match="at least two"):
        merge_traces([make_trace()], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_merging_does_not_touch_its_sources(make_trace: MakeTrace, tmp_path: Path) -> None:
    save_trace(make_trace(), tmp_path / "a")
    before = load_token_trace(tmp_path / "a", "x").content_hash()
    trace = load_token_trace(tmp_path / "a", "x")
    merge_traces([trace, trace], tmp_path / "b")
    assert load_token_trace(tmp_path / "a", "x").content_hash() == before
    assert load_token_trace(tmp_path / "b", "x").num_tokens == 24
