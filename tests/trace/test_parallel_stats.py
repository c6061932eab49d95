"""Counts of parts, merged, are the counts of the whole."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.trace.parallel as parallel
from moesim.backend import open_backend
from moesim.errors import InputError, MismatchError
from moesim.trace.counts import TraceCounts, count_trace, merge_counts
from moesim.trace.format import Trace, TraceMeta, load_trace, save_trace
from moesim.trace.stats import trace_stats

LAYERS, EXPERTS, TOP_K = 3, 6, 2


def make_trace(num_tokens: int, seed: int = 0) -> Trace:
    """Random routing of requests of 1 to 9 tokens with domains, the phases mixed."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((num_tokens, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K]
    lengths = rng.integers(1, 10, num_tokens)
    requests = np.repeat(np.arange(num_tokens), lengths)[:num_tokens]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    positions = np.arange(num_tokens) - starts[requests]
    return Trace(
        expert_ids=ids.astype(np.uint8),
        request_ids=(requests * 7 % 101).astype(np.int32),
        positions=positions.astype(np.int32),
        phases=(positions > 3).astype(np.uint8),
        domain_ids=(requests % 3).astype(np.int16),
        meta=TraceMeta("m", EXPERTS, TOP_K, (0, 1, 2), ("a", "b", "c")),
    )


def same(a: TraceCounts, b: TraceCounts) -> None:
    for field in dataclasses.fields(TraceCounts):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y, err_msg=field.name)
        else:
            assert x == y, field.name


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_parts_in_any_order_make_the_whole(num_tokens: int, cuts: list[int], order: object) -> None:
    trace = make_trace(num_tokens)
    ends = sorted({0, num_tokens, *(c for c in cuts if c < num_tokens)})
    parts = [count_trace(trace, tokens=slice(a, b)) for a, b in itertools.pairwise(ends)]
    order.shuffle(parts)  # type: ignore[attr-defined]
    assert sum(p.num_tokens for p in parts) == num_tokens
    same(merge_counts(parts), count_trace(trace))


def test_merging_nothing() -> None:
    with pytest.raises(ValueError, match="no parts"):
        merge_counts([])


@pytest.mark.parametrize("backend", ["serial", "local:2"])
@pytest.mark.parametrize("name", ["trace", "trace.npz"])
def test_backends_give_the_figures_of_a_single_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, name: str
) -> None:
    save_trace(make_trace(5000), tmp_path / name)
    trace = load_trace(tmp_path / name)
    assert isinstance(trace, Trace)
    monkeypatch.setattr(parallel, "chunk_tokens", lambda *_: 500)
    seen: list[tuple[int, int]] = []
    with open_backend(backend) as opened:
        found = parallel.trace_stats_on(opened, trace, lambda *now: seen.append(now))
    assert found.to_dict() == trace_stats(trace).to_dict()
    assert len(seen) == opened.num_workers * parallel.PARTS_PER_WORKER
    assert seen[-1] == (5000, 5000)


def test_a_trace_in_memory_is_refused() -> None:
    with open_backend("serial") as opened, pytest.raises(InputError, match="in memory"):
        parallel.trace_stats_on(opened, make_trace(10))


def test_a_trace_that_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_trace(make_trace(100), tmp_path / "t.npz")
    trace = load_trace(tmp_path / "t.npz")
    assert isinstance(trace, Trace)
    monkeypatch.setattr(parallel, "chunk_tokens", lambda *_: 10)
    with open_backend("serial") as opened:
        parallel.trace_stats_on(opened, trace)
    save_trace(make_trace(99), tmp_path / "t.npz")
    with open_backend("serial") as opened, pytest.raises(MismatchError, match="another trace"):
        parallel.trace_stats_on(opened, trace)
