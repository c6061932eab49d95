"""The loop's step times against `EngineStepCost`, on real deployments, and interpolated mixes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numba import njit

from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import deploy
from moesim.serving.requests import Requests
from moesim.serving.routing import DomainRouting
from moesim.serving.state import RANK
from moesim.serving.step_cost import EngineStepCost
from moesim.serving.step_kernel import _moe_us, drafting_us, step_us
from moesim.serving.step_table import tables_of
from moesim.studies.recommend.layouts import slowed
from moesim.trace.format import load_token_trace


@njit
def loop_step_us(tables: Any, ranks: Any, shares: Any) -> float:
    return step_us(tables, 0, ranks, 0, len(ranks), 0, 0.0, shares)[0]


@njit
def loop_drafting_us(tables: Any, ranks: Any, shares: Any) -> float:
    return drafting_us(tables, 0, ranks, 0, len(ranks), 2, 1.0, shares)


@njit
def loop_moe_us(tables: Any, tokens: float, shares: Any) -> float:
    return _moe_us(tables, 0, tokens, shares)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("deepseek-v3", {"dp": 32}),
        ("deepseek-v3", {"dp": 32, "two_batch_overlap": "both", "redundant_experts": 32}),
        ("deepseek-v3", {"dp": 16, "expert_gpus": 16}),
        ("gpt-oss-120b", {"tp": 4}),
        ("GLM-5.2", {"tp": 8, "dp": 2}),
        ("Qwen3-235B-A22B", {"tp": 4, "dp": 2}),
        ("Mixtral-8x7B", {"tp": 2, "engine": "sglang"}),
    ],
)
def test_same_as_step_cost(model: str, options: dict[str, Any]) -> None:
    """Decodes, prompts, both, and ranks with nothing, within the tables and beyond their ends."""
    cost = EngineStepCost(deploy(model, "h100-sxm-ib", **options))
    tables = tables_of([cost])
    rng = np.random.default_rng(0)
    dp = cost.deployment.dp
    for scale in (1, 3, 30, 300, 3000, 30000):
        for kind in range(4):
            ranks = np.zeros(dp, RANK)
            ranks["decode_rows"] = rng.integers(0, scale + 1, dp) * (kind != 1)
            ranks["decode_context"] = ranks["decode_rows"] * rng.integers(1, 3000, dp)
            ranks["prefill_rows"] = rng.integers(1, scale + 1, dp) * (kind in (1, 2))
            ranks["prefill_pairs"] = ranks["prefill_rows"] * rng.integers(1, 5000, dp)
            ranks["prefill_sequences"] = np.minimum(ranks["prefill_rows"], 3)
            expected = cost.step_us(
                BatchShape.of(
                    ranks["decode_rows"],
                    ranks["decode_context"],
                    ranks["prefill_rows"],
                    ranks["prefill_pairs"],
                    ranks["prefill_sequences"],
                )
            )
            assert loop_step_us(tables, ranks, np.ones(1)) == pytest.approx(
                float(expected), rel=1e-9
            )


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("deepseek-v3", {"dp": 32, "mtp": True}),
        ("deepseek-v3", {"dp": 32, "two_batch_overlap": "both"}),
        ("GLM-5.2", {"tp": 8, "dp": 2, "engine": "sglang"}),
    ],
)
def test_slower_steps_are_so_many_times_as_long(model: str, options: dict[str, Any]) -> None:
    """Every time of the tables is slowed: decodes, prompts, both, and what drafts."""
    tables = tables_of([EngineStepCost(deploy(model, "h100-sxm-ib", **options))])
    slow, shares = slowed(tables, 1.25), np.zeros(1)
    for decode, prompt in ((8, 0), (0, 4000), (64, 4000), (300, 0)):
        ranks = np.zeros(int(options["dp"]), RANK)
        ranks["decode_rows"], ranks["decode_context"] = decode, decode * 5000
        ranks["prefill_rows"], ranks["prefill_pairs"] = prompt, prompt * 3000
        for steps in (loop_step_us, loop_drafting_us):
            plain = steps(tables, ranks, shares)
            assert steps(slow, ranks, shares) == pytest.approx(1.25 * plain)


def test_two_roles_keep_their_own_times() -> None:
    """Tables of unlike length are padded without changing a time."""
    costs = [
        EngineStepCost(deploy("OLMoE-1B-7B", "h100-sxm-ib", dp=dp, max_batch_tokens=most))
        for dp, most in ((1, 512), (4, 16384))
    ]
    both = tables_of(costs)
    ranks = np.zeros(1, RANK)
    ranks["decode_rows"], ranks["decode_context"] = 700, 70000
    alone = tables_of(costs[:1])
    assert loop_step_us(both, ranks, np.ones(1)) == pytest.approx(
        loop_step_us(alone, ranks, np.ones(1)), rel=1e-12
    )


@pytest.fixture(scope="module")
def routing() -> DomainRouting:
    """Four domains of the bundled trace."""
    trace = load_token_trace("sample:debian-moe", "test")
    return DomainRouting(trace.take(np.flatnonzero(np.asarray(trace.domain_ids) < 4)))


def test_domains_of_requests(routing: DomainRouting) -> None:
    """As many of each domain as the trace has requests of it, to 3 standard errors; the mix and the
    drift shift them."""
    requests = Requests.of(np.linspace(0, 100, 4000), np.ones(4000), np.ones(4000))
    names = [name for name, _ in routing.groups]
    weights = routing.weights()
    drawn = np.bincount(routing.label(requests).domain, minlength=len(names)) / 4000
    assert np.all(np.abs(drawn - weights) < 3.5 * np.sqrt(weights / 4000))
    only = replace(routing, mix={names[2]: 1.0}).label(requests)
    assert set(only.domain.tolist()) == {2}
    early = replace(routing, drift_s=100.0).label(requests).domain
    # At the start the first domains are likely, half a period later those half way.
    assert (early[:400] == 0).sum() > 2 * (early[1800:2200] == 0).sum()


def test_mix_of_domains(routing: DomainRouting) -> None:
    """One domain alone and equal shares of all are exact; between them, against tables of the mixed
    tokens themselves, within 1.5 % of the MoE layers' time."""
    deployment = deploy("debian-moe", "h100-sxm-ib", dp=8)
    cost = EngineStepCost(deployment)
    table = routing.moe_tables(cost)
    tables = tables_of([cost], [table])
    counts = cost._moe_total.counts
    num = len(table) - 1
    for place in (20, 40, len(counts) - 1):
        for d in (0, num - 1):
            alone = loop_moe_us(tables, counts[place], np.eye(num)[d])
            assert alone == pytest.approx(table[d, place], rel=1e-12)
        even = loop_moe_us(tables, counts[place], np.full(num, 1 / num))
        assert even == pytest.approx(table[-1, place], rel=1e-12)
    rng = np.random.default_rng(1)
    domain = np.asarray(routing.trace.domain_ids)
    for _ in range(2):
        shares = rng.dirichlet(np.full(num, 0.7))
        rows = [
            rng.choice(np.flatnonzero(np.isin(domain, ids)), int(share * 20000))
            for (_, ids), share in zip(routing.groups, shares, strict=True)
        ]
        mixed = routing.trace.take(np.concatenate(rows))
        truth = EngineStepCost(replace(deployment, trace=mixed))._moe_total
        for place in (20, 40, len(counts) - 1):
            guess = loop_moe_us(tables, counts[place], shares)
            assert guess == pytest.approx(truth.times_us[place], rel=0.015)


def test_routing_refuses(routing: DomainRouting) -> None:
    with pytest.raises(UnknownNameError, match="domain"):
        DomainRouting(routing.trace, mix={"cod": 1.0})
    with pytest.raises(InputError, match="all 0"):
        DomainRouting(routing.trace, mix={routing.groups[0][0]: 0.0})
    with pytest.raises(InputError, match="drift"):
        DomainRouting(routing.trace, drift_s=0.0)
    with pytest.raises(MismatchError, match="experts"):
        routing.moe_tables(EngineStepCost(deploy("Mixtral-8x7B", "h100-sxm-ib", tp=2)))
