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
