"""Requests, their split, and batches drawn from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.trace.batches import (
    HELD_OUT_FRACTION,
    RequestIndex,
    draw_batches,
    draw_prefill_requests,
    index_requests,
    resample_requests,
    split_requests,
)
from moesim.trace.format import Trace

MakeTrace = Callable[..., Trace]


def index_of(lengths: list[int], first_id: int = 0) -> RequestIndex:
    indptr = np.concatenate(([0], np.cumsum(lengths)))
    return RequestIndex(
        np.arange(first_id, first_id + len(lengths)), indptr, np.arange(int(indptr[-1]))
    )


def test_index_groups_by_request_in_order_of_position(make_trace: MakeTrace) -> None:
    """File order: request 7 at positions 1, 0, request 3 at 5, request 7 at 2."""
    trace = make_trace(lengths=(4,))
    trace = make_trace(
        lengths=(4,),
        request_ids=np.array([7, 7, 3, 7], np.int32),
        positions=np.array([1, 0, 5, 2], np.int32),
    )
    index, notice = index_requests(trace)
    assert notice == ""
    np.testing.assert_array_equal(index.ids, [3, 7])
    np.testing.assert_array_equal(index.indptr, [0, 1, 4])
    np.testing.assert_array_equal(index.token_idx, [2, 1, 0, 3])


def test_index_of_one_phase(make_trace: MakeTrace) -> None:
    """Requests of 2 and 2 tokens; the second is all decode."""
    trace = make_trace(lengths=(2, 2), phases=np.array([0, 1, 1, 1], np.uint8))
    prefill, _ = index_requests(trace, "prefill")
    decode, _ = index_requests(trace, "decode")
    np.testing.assert_array_equal(prefill.token_idx, [0])
    np.testing.assert_array_equal(decode.token_idx, [1, 2, 3])
    np.testing.assert_array_equal(decode.ids, [0, 1])


def test_a_missing_phase_is_replaced_and_said(make_trace: MakeTrace) -> None:
    index, notice = index_requests(make_trace(lengths=(2, 3)), "decode")
    assert notice == "the trace has no decode tokens: its prefill tokens are used instead"
    assert len(index.token_idx) == 5


def test_cap_and_select() -> None:
    index = index_of([3, 1, 4])
    capped = index.cap(2)
    np.testing.assert_array_equal(capped.token_idx, [0, 1, 3, 4, 5])
    np.testing.assert_array_equal(capped.indptr, [0, 2, 3, 5])
    chosen = index.select(np.array([True, False, True]))
    np.testing.assert_array_equal(chosen.ids, [0, 2])
    np.testing.assert_array_equal(chosen.token_idx, [0, 1, 2, 4, 5, 6, 7])


@settings(max_examples=60)
@given(count=st.integers(2, 60), first=st.integers(0, 10**6), seed=st.integers(0, 2**40))
def test_split_shares_no_request_and_loses_none(count: int, first: int, seed: int) -> None:
    index = index_of([2] * count, first)
    tuning, held_out = split_requests(index, seed)
    assert len(tuning.ids) > 0
    assert len(held_out.ids) > 0
    assert set(tuning.ids) | set(held_out.ids) == set(index.ids)
    assert not set(tuning.ids) & set(held_out.ids)
    assert not set(tuning.token_idx) & set(held_out.token_idx)
    again = split_requests(index, seed)
    np.testing.assert_array_equal(again[0].ids, tuning.ids)


def test_the_side_of_a_request_does_not_depend_on_the_others() -> None:
    whole, _ = split_requests(index_of([1] * 1000))
    part, _ = split_requests(index_of([1] * 400, 300))
    assert set(part.ids) == set(whole.ids) & set(range(300, 700))


def test_split_is_near_even_and_moves_with_the_seed() -> None:
    """1000 fair coins: within 5 standard deviations (79) of the fraction."""
    sides = [len(split_requests(index_of([1] * 1000), seed)[1].ids) for seed in range(5)]
    assert all(abs(n - 1000 * HELD_OUT_FRACTION) < 79 for n in sides)
    first, second = (split_requests(index_of([1] * 1000), s)[1].ids for s in (0, 1))
    assert set(first) != set(second)


def test_split_needs_two_requests() -> None:
    with pytest.raises(InputError, match=r"1 request\(s\)"):
        split_requests(index_of([5]))


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 5, 2**70])
def test_any_whole_number_is_a_seed_of_the_split(seed: int) -> None:
    with np.errstate(over="raise"):
        tuning, held_out = split_requests(index_of([1] * 10), seed)
    assert len(tuning.ids) + len(held_out.ids) == 10


def test_batches_refuse_a_negative_seed() -> None:
    with pytest.raises(InputError, match="seed -1 is negative"):
        draw_batches(index_of([3, 3]), "decode", 2, 1, -1)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    budget=st.integers(1, 80),
    seed=st.integers(0, 1000),
)
def test_prefill_batches_pack_whole_requests(lengths: list[int], budget: int, seed: int) -> None:
    index = index_of(lengths)
    batches = draw_batches(index, "prefill", budget, 3, seed)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    assert len(batches) == 3
    for b in range(3):
        tokens = batches[b]
        assert 0 < len(tokens) <= budget
        taken = list(dict.fromkeys(owner[tokens]))
        expected = np.concatenate(
            [np.arange(index.indptr[r], index.indptr[r] + min(lengths[r], budget)) for r in taken]
        )
        np.testing.assert_array_equal(tokens, expected)
        left = budget - len(tokens)
        others = [min(n, budget) for r, n in enumerate(lengths) if r not in taken]
        assert all(n > left for n in others)


def test_a_long_request_is_cut_to_the_budget() -> None:
    batches = draw_batches(index_of([100]), "prefill", 7, 2, 0)
    np.testing.assert_array_equal(batches[1], np.arange(7))


def test_prefill_skips_what_does_not_fit() -> None:
    """Of lengths 6, 5 and 3, a budget of 8 takes 5 and 3 together, or 6 alone."""
    seen = set()
    for seed in range(30):
        taken = draw_prefill_requests(np.array([6, 5, 3]), 8, np.random.default_rng(seed))
        seen.add(tuple(sorted(taken)))
    assert seen == {(0,), (1, 2)}


def test_decode_takes_one_token_of_each_request() -> None:
    lengths = [4, 1, 6, 3, 9]
    owner = np.repeat(np.arange(5), lengths)
    batches = draw_batches(index_of(lengths), "decode", 5, 20, 1)
    for b in range(20):
        assert sorted(owner[batches[b]]) == [0, 1, 2, 3, 4]
    at = np.unique(np.concatenate([batches[b] for b in range(20)]))
    assert len(at) > 15


def test_decode_with_fewer_requests_than_the_batch() -> None:
    """7 tokens of 3 requests: each is used two or three times."""
    owner = np.repeat(np.arange(3), 1000)
    batches = draw_batches(index_of([1000] * 3), "decode", 7, 10, 0)
    for b in range(10):
        assert sorted(np.bincount(owner[batches[b]], minlength=3)) == [2, 2, 3]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_same_seed_same_batches(phase: str) -> None:
    """INV-6."""
    index = index_of([5, 9, 2, 7] * 10)
    first, again, other = (
        draw_batches(index, phase, 16, 4, seed)  # type: ignore[arg-type]
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.token_idx, again.token_idx)
    np.testing.assert_array_equal(first.indptr, again.indptr)
    assert not np.array_equal(first.token_idx, other.token_idx)


@pytest.mark.parametrize(("tokens", "batches"), [(0, 1), (-3, 1), (1, 0)])
def test_impossible_batches(tokens: int, batches: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        draw_batches(index_of([3, 3]), "prefill", tokens, batches, 0)


def test_tuning_and_held_out_batches_share_no_token() -> None:
    tuning, held_out = split_requests(index_of([3, 8, 5, 2] * 12))
    for phase in ("prefill", "decode"):
        a = draw_batches(tuning, phase, 20, 30, 0)  # type: ignore[arg-type]
        b = draw_batches(held_out, phase, 20, 30, 0)  # type: ignore[arg-type]
        assert not set(a.token_idx) & set(b.token_idx)


def test_bootstrap_keeps_requests_whole() -> None:
    index = index_of([3, 1, 4, 2])
    again = resample_requests(index, 5)
    assert len(again.ids) == 4
    for i, request in enumerate(again.ids):
        first, stop = index.indptr[request], index.indptr[request + 1]
        np.testing.assert_array_equal(
            again.token_idx[again.indptr[i] : again.indptr[i + 1]], np.arange(first, stop)
        )
