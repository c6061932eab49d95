"""Requests that all come at once, against the closed-loop load test of as many in flight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.serving.deployment import deploy
from moesim.serving.requests import Requests
from moesim.serving.run import simulate_serving
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
