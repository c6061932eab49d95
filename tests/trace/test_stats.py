"""The statistics pass: kernels against references, and passes against one another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.trace import counts as counts_module
from moesim.trace import kernels
from moesim.trace.counts import TraceCounts, count_trace, request_half
from moesim.trace.format import LoadTrace, Trace, TraceMeta, load_token_trace, save_trace
from moesim.trace.stats import batch_imbalance, load_stats, token_load, trace_stats
from tests.reference import trace as reference

MakeTrace = Callable[..., Trace]


@st.composite
def ragged_ids(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Ids [T, L, K], some -1, and the number of experts."""
    tokens, layers, experts = (draw(st.integers(1, n)) for n in (12, 4, 9))
    top_k = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    ids = rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k].astype(np.int16)
    ids[rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.3]))] = -1
    return ids, experts


@settings(max_examples=80, deadline=None)
@given(ragged_ids(), st.integers(0, 99))
def test_kernels_equal_their_references(given_ids: tuple[np.ndarray, int], seed: int) -> None:
    ids, experts = given_ids
    tokens, layers, _ = ids.shape
    rng = np.random.default_rng(seed)
    group = rng.integers(-1, 3, tokens)
    follows = rng.random(tokens) < 0.7
    for dtype in (np.int64, np.uint32):
        between = [np.zeros((layers - 1, experts, experts), dtype) for _ in range(2)]
        within = [np.zeros((layers, experts, experts), dtype) for _ in range(2)]
        kernels.count_pairs(ids, between[0], within[0])
        reference.count_pairs_reference(ids, between[1], within[1])
        np.testing.assert_array_equal(*between)
        np.testing.assert_array_equal(*within)
    load = [np.zeros((3, layers, experts), np.int64) for _ in range(2)]
    kernels.count_load(ids, group, load[0])
    reference.count_load_reference(ids, group, load[1])
    np.testing.assert_array_equal(*load)
    shared = [np.zeros(layers, np.int64) for _ in range(2)]
    kernels.count_reuse(ids, follows, shared[0])
    reference.count_reuse_reference(ids, follows, shared[1])
    np.testing.assert_array_equal(*shared)


def test_pairs_by_hand() -> None:
    """One token chose {2, 0} and then {1, 2}: within (0, 2) and (1, 2), between all four pairs."""
    ids = np.array([[[2, 0], [1, 2]]], np.uint8)
    between, within = np.zeros((1, 3, 3), np.int64), np.zeros((2, 3, 3), np.int64)
    kernels.count_pairs(ids, between, within)
    assert np.argwhere(within).tolist() == [[0, 0, 2], [1, 1, 2]]
    assert np.argwhere(between[0]).tolist() == [[0, 1], [0, 2], [2, 1], [2, 2]]


def test_reuse_by_hand(make_trace: MakeTrace) -> None:
    """Request 0 chose {0,1}, {1,2}, {1,2}; request 1 {1,2}: 1 and 2 of 2 are kept within request
    0, so 3 of 4; the first token of request 1 follows none. By chance: loads 1, 4, 3 of 8 a
    token, each token choosing 2: 2 x (1 + 16 + 9) / 64."""
    ids = np.array([[[0, 1]], [[1, 2]], [[2, 1]], [[1, 2]]], np.uint8)
    trace = make_trace(lengths=(3, 1), layers=1, experts=3, expert_ids=ids)
    reuse = trace_stats(trace).reuse
    assert reuse is not None
    assert reuse.num_pairs == 2
    assert reuse.overlap[0] == pytest.approx(3 / 4)
    assert reuse.by_load[0] == pytest.approx(52 / 64)


def assert_same_counts(a: TraceCounts, b: TraceCounts) -> None:
    for name in TraceCounts.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_chunks_do_not_show(make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one, two and five tokens count what a single one does."""
    trace = make_trace(lengths=(9, 4, 1, 7, 12), gates=True)
    whole = count_trace(trace)
    for tokens in (1, 2, 5):
        monkeypatch.setattr(counts_module, "_CHUNK_IDS", tokens * 6)
        monkeypatch.setattr(counts_module, "_MAX_PENDING_REQUESTS", 2)
        seen = Mock()
        assert_same_counts(count_trace(trace, seen), whole)
        assert seen.call_args.args == (33, 33)
        assert seen.call_count == -(-33 // tokens)


def test_a_directory_counts_like_a_file(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace(lengths=(9, 4, 20))
    for name in ("t.npz", "t"):
        save_trace(trace, tmp_path / name)
        assert_same_counts(count_trace(load_token_trace(tmp_path / name, "x")), count_trace(trace))


def test_counts_of_requests_phases_and_windows(make_trace: MakeTrace) -> None:
    """Rows of request 4, 9, 4, 4, 9 in windows of one token."""
    trace = make_trace(
        lengths=(5,),
        request_ids=np.array([4, 9, 4, 4, 9], np.int32),
        positions=np.array([0, 0, 1, 3, 1], np.int32),
        phases=np.array([0, 0, 0, 1, 1], np.uint8),
    )
    counts = count_trace(trace)
    np.testing.assert_array_equal(counts.request_ids, [4, 9])
    np.testing.assert_array_equal(counts.request_lengths, [3, 2])
    assert counts.num_prefill == 3
    assert counts.num_follows == 0
    assert counts.window_load.shape == (5, 2, 3, 8)
    for window in range(5):
        half = request_half(trace.request_ids[window : window + 1])[0]
        assert counts.window_load[window, half].sum() == 6
        assert counts.window_load[window, 1 - half].sum() == 0
    np.testing.assert_array_equal(counts.load, token_load(trace, np.arange(5)))


def test_halves_are_even_also_for_regular_ids() -> None:
    """Ids that rise by 1, 2, 3 or 10: between 40% and 60% in each half of 1,000."""
    for step in (1, 2, 3, 10):
        half = request_half(np.arange(0, 1000 * step, step, dtype=np.int32))
        assert 400 < half.sum() < 600


def test_what_is_too_much_to_count_is_left_out(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts_module, "MAX_PAIR_CELLS", 100)
    monkeypatch.setattr(counts_module, "MAX_GROUP_CELLS", 50)
    stats = trace_stats(make_trace())
    assert stats.affinity is None
    assert stats.co_activation is None
    assert stats.domains == ()
    assert len(stats.notices) == 2
    json.dumps(stats.to_dict(), allow_nan=False)


def test_statistics_as_json(make_trace: MakeTrace) -> None:
    for trace in (make_trace(), make_trace(lengths=(1,), layers=1, top_k=1), make_trace(experts=2)):
        out = json.loads(json.dumps(trace_stats(trace).to_dict(), allow_nan=False))
        assert out["num_tokens"] == trace.num_tokens
        assert out["meta"]["layer_ids"] == list(trace.meta.layer_ids)
        assert np.array(out["load"]).sum() == trace.expert_ids.size
        assert len(out["affinity"]["bits"]) == trace.num_layers - 1


def test_tokens_without_experts_are_no_load(make_trace: MakeTrace) -> None:
    """INV-1 on counts: every choice is counted once, and absent ones never."""
    ids = make_trace().expert_ids.astype(np.int16)
    ids[2, 1] = -1
    ids[5, 0, 1] = -1
    stats = trace_stats(make_trace(expert_ids=ids))
    np.testing.assert_array_equal(stats.load.sum(axis=1), [23, 22, 24])


def test_load_trace_statistics() -> None:
    load = np.array([[[4, 0]], [[0, 4]], [[0, 0]]], np.int64)
    stats = load_stats(LoadTrace(load, TraceMeta("m", 2, 1, (5,))))
    np.testing.assert_array_equal(stats.load, [[4, 4]])
    assert stats.skew.max_over_mean[0] == 1
    assert stats.step_divergence == 1.0
    assert stats.to_dict()["num_steps"] == 3


def test_imbalance_by_hand(make_trace: MakeTrace) -> None:
    """Four experts on two GPUs; every token chooses 0 and 1, so GPU 0 has all: max / mean is 2.
    On four GPUs as well, since two of four share the load; on one it is 1."""
    ids = np.tile(np.array([0, 1], np.uint8), (30, 2, 1))
    trace = make_trace(lengths=(10, 20), layers=2, experts=4, expert_ids=ids)
    for gpus, expected in ((2, 2.0), (4, 2.0), (1, 1.0)):
        found = batch_imbalance(trace, gpus, "prefill", 16, 5)
        assert (found.mean, found.p50, found.p99) == (expected,) * 3
    with pytest.raises(InputError, match="5 GPUs cannot share 4 experts"):
        batch_imbalance(trace, 5)


def test_imbalance_with_uneven_blocks(make_trace: MakeTrace) -> None:
    """Eight experts on three GPUs are split 3, 3, 2; uniform load of one choice of each expert
    gives 3 over 8/3."""
    ids = np.arange(8, dtype=np.uint8)[:, None, None]
    trace = make_trace(lengths=(8,), layers=1, top_k=1, expert_ids=ids)
    assert batch_imbalance(trace, 3, "prefill", 8, 1).mean == pytest.approx(9 / 8)


def test_real_affinity_has_little_bias(real_trace: Callable[[str], Trace]) -> None:
    """Half of the requests of the sample show the affinity of all of them, within 3%."""
    trace = real_trace("sample:debian-moe")
    half = trace.take(np.flatnonzero(request_half(trace.request_ids) == 0))
    whole, part = trace_stats(trace).affinity, trace_stats(half).affinity
    assert whole is not None
    assert part is not None
    np.testing.assert_allclose(part.bits, whole.bits, rtol=0.03)
