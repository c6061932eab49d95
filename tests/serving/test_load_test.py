"""Requests that all come at once, against the closed-loop load test of as many in flight."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesim.serving import static
from moesim.serving.deployment import deploy
from moesim.serving.engines import engine_profile
from moesim.serving.requests import Requests
from moesim.serving.run import simulate_serving
from moesim.serving.speculative import Speculation
from moesim.serving.static import LoadTest, run_load_test
from moesim.serving.step_cost import EngineStepCost


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("gpt-oss-20b", {"tp": 1}),
        ("gpt-oss-120b", {"tp": 2, "engine": "sglang"}),
        ("Qwen3-235B-A22B", {"tp": 4, "dp": 2}),
    ],
)
@pytest.mark.parametrize("count", [1, 8, 50])
def test_same_latencies(model: str, options: dict[str, Any], count: int) -> None:
    """Two programs that share nothing but the cost of a step: every TTFT is the same, and every
    TPOT but for whether a token attends to itself (one in a thousand cached tokens)."""
    deployment = deploy(model, "h100-sxm-ib", **options)
    closed = run_load_test(
        EngineStepCost(deployment), LoadTest(1000, 60, count, num_requests=count)
    )
    requests = Requests.of(np.zeros(count), [1000] * count, [60] * count)
    opened = simulate_serving(deployment, requests)
    np.testing.assert_allclose(opened.ttft_s * 1e3, closed.ttft_ms, rtol=1e-4)
    np.testing.assert_allclose(opened.tpot_s * 1e3, closed.tpot_ms, rtol=1e-4)


@pytest.mark.parametrize(
    ("admission", "ttft", "tpot"),
    [("prompt", [1.0, 1.0], [1.0, 11 / 7]), ("whole", [1.0, 9.0], [1.0, 1.0])],
)
def test_full_cache(
    monkeypatch: pytest.MonkeyPatch, admission: str, ttft: list[float], tpot: list[float]
) -> None:
    """Two prompts of 4 and answers of 8 tokens, steps of 1 ms, room for 16 tokens. Admitted by
    prompt, both get their first token in step 1 and 3 more in steps 2 to 4; then 4 + 4 tokens of
    each fill the cache and the second is preempted. The first ends in step 8; step 9 computes the
    second's 8 tokens again and gives its fifth, step 12 its last: (12 - 1) / 7 a token. With room
    for whole answers (12 tokens) the second starts when the first ends: steps 9 to 16."""
    plain = {"request_ms": 0.0, "prompt_token_us": 0.0, "steps_ahead": 0, "admission": admission}
    engine = replace(engine_profile("vllm"), **plain)
    deployment = deploy("OLMoE-1B-7B", "h100-sxm-ib", tp=1, engine=engine)
    memory = SimpleNamespace(kv_token_capacity=16)
    monkeypatch.setattr(static, "require_fit", lambda *_: memory)
    cost: Any = SimpleNamespace(deployment=deployment, one_us=lambda *_: 1000.0)
    result = run_load_test(cost, LoadTest(4, 8, 2, num_requests=2))
    np.testing.assert_allclose(result.ttft_ms, ttft)
    np.testing.assert_allclose(result.tpot_ms, tpot)


def test_speculation_gives_its_mean_of_tokens_per_step() -> None:
    """Prompt of 4, answer of 11 tokens; steps of 1 ms, a drafted token 0.1 ms more. Two drafts
    at acceptance 0.5 give 1 + 0.5 + 0.25 = 1.75 tokens in 1 + 2 x 0.1 ms: 10 tokens after the first
    take 10 / 1.75, that is 6 steps of 1.2 ms, 0.72 ms per token."""
    plain = {"request_ms": 0.0, "prompt_token_us": 0.0, "steps_ahead": 0}
    engine = replace(engine_profile("vllm"), **plain)
    deployment = deploy("OLMoE-1B-7B", "h100-sxm-ib", tp=1, engine=engine)
    cost: Any = SimpleNamespace(deployment=deployment, one_us=lambda *_: 1000.0)
    speculation = Speculation(acceptance=0.5, max_drafts=2, draft_share=0.1, fixed=True)
    result = run_load_test(cost, LoadTest(4, 11, 1, num_requests=1), speculation)
    np.testing.assert_allclose(result.ttft_ms, [1.0])
    np.testing.assert_allclose(result.tpot_ms, [0.72])


@pytest.mark.parametrize(("balance_steps", "ttft"), [(0, 1.0), (3, 4.0)])
def test_prompts_wait_for_one_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, balance_steps: int, ttft: float
) -> None:
    """Two ranks of two requests, steps of 1 ms. Step 1 computes all prompts; the first request ends
    with step 2 and a fifth comes to its rank, beside one that decodes. The other rank has no
    prompt: the fifth runs in step 3 (1 ms), or waits for three steps and runs in step 6 (4 ms)."""
    plain = {"request_ms": 0.0, "prompt_token_us": 0.0, "steps_ahead": 0}
    engine = replace(engine_profile("vllm"), **plain)
    deployment = deploy("OLMoE-1B-7B", "h100-sxm-ib", tp=1, dp=2, engine=engine)
    lengths = {4: np.full(5, 4), 9: np.array([2, 9, 9, 9, 3])}
    monkeypatch.setattr(static, "_lengths", lambda _rng, longest, *_: lengths[longest])
    cost: Any = SimpleNamespace(deployment=deployment, one_us=lambda *_: 1000.0)
    test = LoadTest(4, 9, 4, num_requests=5)
    result = run_load_test(cost, test, balance_steps=balance_steps)
    np.testing.assert_allclose(result.ttft_ms, [1.0, 1.0, 1.0, 1.0, ttft])


@pytest.mark.parametrize(("num_gpus", "outside_ms"), [(1, 5.0), (2, 7.0), (8, 11.0)])
def test_more_ranks_take_longer_to_reach(num_gpus: int, outside_ms: float) -> None:
    """3 ms, and 2 ms once and for every doubling of the ranks: 3 + 2 x (1 + log2 n)."""
    engine = replace(engine_profile("vllm"), request_ms=3.0, request_rank_ms=2.0)
    assert engine.outside_us(num_gpus, 0.0) == pytest.approx(1e3 * outside_ms)
