"""The compiled loop against the readable one, over policies, shortage of memory and sharing."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from moesim.serving.config import Stall
from moesim.serving.requests import Requests
from tests.reference.serving import Rank, Service

STEP = {"step_us": 900.0, "row_us": 11.0, "context_us": 0.13, "pair_us": 0.017, "moe_us": 3.0}


def step_us(loads: list[tuple[int, int, int, float, int]]) -> float:
    """STEP, by hand."""
    slowest = max(
        (n + p) * STEP["row_us"] + c * STEP["context_us"] + pairs * STEP["pair_us"]
        for n, c, p, pairs, _ in loads
    )
    return STEP["step_us"] + slowest + STEP["moe_us"] * sum(n + p for n, _, p, _, _ in loads)


def random_requests(seed: int, count: int, shared: bool, priorities: int = 1) -> Requests:
    rng = np.random.default_rng(seed)
    blocks = None
    prompt = rng.integers(1, 300, count)
    if shared:
        families = [np.random.default_rng(f).integers(f * 100, f * 100 + 99, 9) for f in range(4)]
        blocks = []
        for i in range(count):
            family = families[int(rng.integers(4))]
            cut = int(rng.integers(0, 9))
            own = [10_000 + 10 * i + k for k in range(9 - cut)]
            blocks.append([*family[:cut].tolist(), *own][: int(prompt[i]) // 32])
    return Requests.of(
        np.cumsum(rng.exponential(0.0008, count)),
        prompt,
        rng.integers(1, 40, count),
        priority=rng.integers(0, priorities, count),
        blocks=blocks,
        block_tokens=32,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("router", ["round_robin", "least_loaded", "length_aware"])
@pytest.mark.parametrize("prefill_first", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_same_times(
    small: ModuleType, seed: int, router: str, prefill_first: bool, shared: bool, split: bool
) -> None:
    """Two replicas of two ranks with room for few requests: 24 sequences, 128 tokens per step."""
    requests = random_requests(seed, 80, shared, priorities=1 + seed)
    capacity, block = 640, 16
    deployment = small.small_deployment(
        dp=2, host={"steps_ahead": seed % 2}, max_batch_tokens=128, max_sequences=24
    )

    def instances(count: int) -> list[list[Rank]]:
        return [
            [Rank(capacity // block, block, 32 * shared, 24, 128, prefill_first) for _ in range(2)]
            for _ in range(count)
        ]

    stalls = ((3, 500.0), (5, 900.0)) if seed == 2 else ()
    service = Service(
        instances(2),
        step_us,
        instances(1) if split else [],
        router=router,
        transfer=(70.0, 1.5),
        steps_ahead=seed % 2,
        stalls=stalls,
    )
    slow = service.run(requests)
    step = small.tables(**STEP)
    if split:
        step = type(step)(*(np.concatenate([a, a]) for a in step))
    kv_bytes = deployment.model.kv_bytes_per_token(deployment.kv_dtype)
    fast = small.serve(
        requests,
        step,
        capacity=capacity,
        deployment=deployment,
        replicas=2,
        router=router,
        prefill_first=prefill_first,
        decode=deployment if split else None,
        transfer_gb_per_s=kv_bytes / 1.5e3,
        transfer_latency_us=70.0,
        stalls=tuple(Stall(*stall) for stall in stalls),
    )
    assert (fast.status == 1).all()
    np.testing.assert_allclose(
        fast.first_token_s, [r.first_us / 1e6 for r in slow], rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(
        fast.finish_s, [r.finish_us / 1e6 for r in slow], rtol=1e-9, atol=1e-9
    )
    assert fast.preempted.tolist() == [r.preempted for r in slow]
    assert fast.cached_tokens.tolist() == [r.cached for r in slow]
    assert fast.rank.tolist() == [r.rank for r in slow]
    assert fast.generated_tokens.tolist() == requests.output_tokens.tolist()


def test_cases_are_hard(small: ModuleType) -> None:
    """The cases above do preempt and do share: else they would hold nothing."""
    requests = random_requests(1, 80, True, priorities=2)
    deployment = small.small_deployment(dp=2, max_batch_tokens=128, max_sequences=24)
    result = small.serve(
        requests, small.tables(**STEP), capacity=640, deployment=deployment, replicas=2
    )
    assert result.metrics["preemptions"] > 10
    assert result.metrics["prefix_hit_share"] > 0.05
    alone = small.serve(
        replace(requests, priority=np.zeros(80, np.int64)),
        small.tables(**STEP),
        deployment=deployment,
        replicas=2,
        prefix_cache=False,
    )
    assert alone.metrics["preemptions"] == 0
