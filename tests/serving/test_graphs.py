"""Rows that CUDA graphs add to a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.serving.batch import BatchShape
from moesim.serving.deployment import deploy
from moesim.serving.engines import ENGINES
from moesim.serving.graphs import computed_rows, graph_limit, graph_rows
from moesim.serving.step_cost import EngineStepCost


@pytest.mark.parametrize(
    ("rows", "computed"),
    [
        (0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (250, 256), (256, 256),
        (257, 272), (500, 512), (512, 512), (513, 513), (2.5, 4), (8.5, 16),
    ],
)  # fmt: skip
def test_sizes_are_vllms(rows: float, computed: float) -> None:
    """1, 2, 4, every 8th up to 256, every 16th up to 512; beyond, no graph and nothing added."""
    assert graph_rows(float(rows), 512.0) == computed
    assert computed_rows(np.array([float(rows)]), 512.0)[0] == computed


def test_all_ranks_compute_as_many_as_the_largest() -> None:
    """9 and 0 sequences: 16 rows on both; 600 and 3 are beyond the graphs."""
    steps = np.array([[9.0, 0.0], [600.0, 3.0], [0.0, 0.0]])
    want = [[16.0, 16.0], [600.0, 3.0], [0.0, 0.0]]
    np.testing.assert_array_equal(computed_rows(steps, 512.0), want)


def test_only_where_the_engine_pads() -> None:
    """vLLM to 512, or to twice the most sequences; SGLang and TensorRT-LLM are not known to."""
    plain = {"tp": 1, "max_batch_tokens": 8192}
    assert graph_limit(deploy("OLMoE-1B-7B", "h200-sxm-ib", **plain)) == 512
    assert graph_limit(deploy("OLMoE-1B-7B", "h200-sxm-ib", max_sequences=64, **plain)) == 128
    for engine in ("sglang", "trtllm"):
        assert graph_limit(deploy("OLMoE-1B-7B", "h200-sxm-ib", engine=engine, **plain)) == 0


def test_nine_sequences_cost_what_sixteen_do_but_for_attention_and_head() -> None:
    """All that goes by rows is that of 16; cached tokens and logits are of 9."""
    deployment = deploy("Qwen3-30B-A3B", "h200-sxm-ib", tp=1)
    parts = {
        n: EngineStepCost(deployment).breakdown(
            BatchShape.of(decode_tokens=n, decode_context_tokens=n * 540)
        )
        for n in (9, 16)
    }
    for name in ("experts", "projections", "elementwise", "router"):
        np.testing.assert_array_equal(parts[9][name], parts[16][name])
    assert parts[9]["attention"] < parts[16]["attention"]
    bare = replace(deployment, engine=replace(ENGINES["vllm"], graph_rows=0))
    nine = BatchShape.of(decode_tokens=9, decode_context_tokens=9 * 540)
    assert EngineStepCost(bare).step_us(nine) < 0.85 * EngineStepCost(deployment).step_us(nine)


@pytest.mark.parametrize("dp", [1, 2])
def test_plain_numbers_and_arrays_agree(dp: int) -> None:
    cost = EngineStepCost(deploy("Qwen3-30B-A3B", "h200-sxm-ib", tp=1, dp=dp))
    for n in (1, 3, 9, 255, 300, 513):
        decode = [float(n), 0.0][:dp]
        context = [n * 700.0, 0.0][:dp]
        none = [0.0] * dp
        batch = BatchShape.of(decode_tokens=decode, decode_context_tokens=context)
        one = cost.one_us(decode, context, none, none, none)
        assert one == pytest.approx(float(cost.step_us(batch)), rel=1e-12)


def test_the_host_enqueues_only_what_no_graph_replays() -> None:
    """A prompt of 512 tokens is replayed; one of 513 takes 850 us more for each of 48 layers."""
    deployment = deploy("Qwen3-30B-A3B", "h200-sxm-ib", tp=1)
    cost = EngineStepCost(deployment)
    host = [
        float(cost.breakdown(BatchShape.of(prefill_tokens=float(n)))["host"]) for n in (512, 513)
    ]
    assert host == pytest.approx([0.0, 850.0 * 48])
    assert cost.one_us([0.0], [0.0], [512.0], [512 * 513 / 2], [1.0]) == pytest.approx(
        float(cost.step_us(BatchShape.of(prefill_tokens=512.0)))
    )
