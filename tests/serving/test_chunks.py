"""Experts that drafted tokens activate together: BlockFFN's chunks in speculative decoding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.serving.chunks import chunk_inclusion, chunk_saves, chunked
from moesim.serving.deployment import deploy
from moesim.serving.moe_load import MoeLoad, load_of_trace
from moesim.serving.step_cost import EngineStepCost
from moesim.trace.format import Trace, TraceMeta


def trace_of(ids: np.ndarray, experts: int, requests: int) -> Trace:
    """`requests` decodes of equal length with choices `ids` [T, L, K]."""
    each = len(ids) // requests
    return Trace(
        expert_ids=ids.astype(np.uint8),
        request_ids=np.repeat(np.arange(requests, dtype=np.int32), each),
        positions=np.tile(np.arange(each, dtype=np.int32), requests),
        phases=np.ones(len(ids), np.uint8),
        meta=TraceMeta("toy", experts, ids.shape[2], tuple(range(ids.shape[1]))),
    )


def test_shares_of_chunks_by_hand() -> None:
    """One request that chooses 0 0 1 1: chunks {0} and {1}, each expert in half of them with two
    tokens. One that chooses 0 1 0 1: both experts in both chunks, one token each."""
    load = MoeLoad(np.array([[0.5, 0.5]]), "toy")
    for text, share, tokens in (("0011", 0.5, 2.0), ("0101", 1.0, 1.0)):
        ids = np.array([int(c) for c in text]).reshape(4, 1, 1)
        found = chunk_inclusion(trace_of(ids, 2, 1), 2)
        assert found is not None
        assert found.tolist() == [[share, share]]
        assert chunked(load, found, 2).tokens_per_hit.tolist() == [[tokens, tokens]]
    assert chunk_inclusion(trace_of(ids, 2, 1), 5) is None


def test_tokens_are_as_many_as_independent_ones() -> None:
    """Chunks change which experts a step activates, not how often experts are chosen."""
    ids = np.repeat(np.random.default_rng(0).integers(0, 16, (4000, 3, 1)), 4, axis=0)
    trace = trace_of(ids, 16, 400)
    load = load_of_trace(trace)
    found = chunk_inclusion(trace, 4)
    assert found is not None
    counts = [chunked(load, found, 4).counts(65536.0, seed).sum() for seed in range(40)]
    assert np.mean(counts) == pytest.approx(65536 * 3, rel=0.02)


def test_a_step_of_equal_tokens_reads_fewer_experts() -> None:
    """Requests that stay with their eight experts for good: a chunk of four activates no more than
    one token does, so that few sequences save time; requests that change them at every token save
    less. Without a trace there is nothing to save."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        return np.stack([[rng.permutation(64)[:8] for _ in range(16)] for _ in range(count)])

    deployment = deploy("OLMoE-1B-7B", "h100-sxm-ib", tp=1, dp=1)
    saved = {}
    for name, ids in (("stays", np.repeat(draw(60), 8, axis=0)), ("changes", draw(480))):
        cost = EngineStepCost(replace(deployment, trace=trace_of(ids, 64, 60)))
        at = int(np.searchsorted(cost.moe_counts, 8))
        saved[name] = chunk_saves(cost, 3)[3, at] / cost._moe_total.times_us[at]
    assert saved["stays"] > 0.3
    assert abs(saved["changes"]) < 0.1
    assert not chunk_saves(EngineStepCost(deployment), 3).any()
