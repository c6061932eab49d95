"""Batches as serving sees them: every token once, and what packs them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from routing_traces import random_scores, scored_trace

from moesim.routing.partition import serving_batches
from moesim.trace.format import Trace


def made(lengths: list[int], prompts: list[int]) -> Trace:
    """Requests of so many tokens, of which the first so many are prompts."""
    request = np.repeat(np.arange(len(lengths)), lengths)
    scores = random_scores(np.random.default_rng(0), len(request), 1, 4)
    trace = scored_trace(scores, 1, request_ids=request)
    first = np.array(prompts)[request]
    return replace(trace, phases=(np.asarray(trace.positions) >= first).astype(np.uint8))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_every_token_is_in_one_batch(
    requests: list[tuple[int, int]], prefill: int, decode: int, seed: int
) -> None:
    """And no batch is larger than asked, nor mixes phases; a decode batch has one token a request,
    and a request's tokens come in order."""
    trace = made([n for n, _ in requests], [p for _, p in requests])
    batches = serving_batches(trace, prefill, decode, seed)
    together = np.concatenate(batches)
    assert sorted(together.tolist()) == list(range(trace.num_tokens))
    for batch in batches:
        phase = set(np.asarray(trace.phases)[batch].tolist())
        assert len(phase) == 1
        assert len(batch) <= (decode if phase == {1} else prefill)
        if phase == {1}:
            assert len(set(np.asarray(trace.request_ids)[batch].tolist())) == len(batch)
    for number in range(len(requests)):
        own = together[np.asarray(trace.request_ids)[together] == number]
        assert (np.diff(own) > 0).all()


def test_a_request_that_ends_makes_place_for_the_next() -> None:
    """Requests of 3, 1 and 1 decode tokens, two at a time: whatever the order, 5 tokens in at most
    3 or 4 steps and never more than 2 in one."""
    batches = serving_batches(made([3, 1, 1], [0, 0, 0]), decode_tokens=2, seed=0)
    assert [len(b) for b in batches] in ([2, 2, 1], [2, 1, 1, 1])


def test_an_engines_steps_are_the_batches() -> None:
    trace = replace(made([4, 4], [4, 4]), step_ids=np.array([1, 0, 1, 0, 2, 2, 1, 0], np.int32))
    assert [b.tolist() for b in serving_batches(trace)] == [[1, 3, 7], [0, 2, 6], [4, 5]]
