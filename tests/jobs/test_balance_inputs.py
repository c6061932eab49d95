"""`moesim.balance` from a placement in use and from expert counts, and what it refuses there."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

import moesim
from moesim.errors import InputError, MismatchError
from moesim.jobs.balance_result import BalanceResult
from moesim.trace.format import LoadTrace
from tests.jobs.test_balance import compare, skewed


def counted(build: ModuleType, steps: int = 40) -> LoadTrace:
    """Every step has 400 choices in each of 3 layers; expert 0 gets half of them in all steps."""
    trace = skewed(build, 1.0)
    load = np.full((steps, 3, 16), 200 / 15)
    load[:, :, 0] = 200.0
    return LoadTrace(np.round(load * 15).astype(np.int64), replace(trace.meta, num_experts=16))


def from_counts(build: ModuleType, loads: LoadTrace, **options: object) -> BalanceResult:
    return moesim.balance(
        loads,
        cluster=build.small_cluster(1, 4),
        model=build.toy_model(3, 16, 2),
        **({"steps": 400, "batch_tokens": 64, "phase": "prefill"} | options),
    )


def test_counts_are_judged_by_balance_on_the_later_half(build: ModuleType) -> None:
    """In order, GPU 0 has expert 0 and three more: 1/2 + 3/30 of the load, 2.4 times the mean. With
    one more slot each, two GPUs share expert 0: EPLB comes near 1."""
    result = from_counts(build, counted(build), schemes=("eplb-once+r", "eplb-sglang+r"))
    none, once, again = result.rows
    assert result.num_judged == 20
    assert none.imbalance.value == pytest.approx(2.4, rel=0.01)
    assert once.imbalance.value < 1.3
    assert again.imbalance.value < 1.3
    assert once.parts_us["dispatch"] == none.parts_us["combine"] == 0
    assert once.against_none.high < 0
    assert "the later half, 20 recorded steps" in result.summary()
    assert any("dispatch and combine are not counted" in notice for notice in result.notices)


def test_what_needs_tokens_is_refused_by_name(build: ModuleType) -> None:
    loads = counted(build)
    for name in ("plan", "eplb-once+r-lp", "moonep", "online+r"):
        with pytest.raises(InputError, match="token-level routing") as error:
            from_counts(build, loads, schemes=(name,))
        assert name in str(error.value)
    with pytest.raises(InputError, match="drift"):
        from_counts(build, loads, schemes=("eplb-once+r",), drift=True)
    with pytest.raises(InputError, match="7 recorded steps with load"):
        from_counts(build, counted(build, 7), schemes=("eplb-once+r",))


def test_a_placement_in_use_is_what_doing_nothing_means(build: ModuleType, tmp_path) -> None:
    """From the plan itself, the same plan changes nothing and moves nothing; from linear placement
    in a plan file it is worth what it is worth, and the move is priced."""
    given = {"cluster": build.small_cluster(1, 4), "model": build.toy_model(3, 16, 2)}
    tune = {"batch_tokens": 64, "redundant_experts": 0, **given}
    trace = skewed(build, 1.0)
    file = tmp_path / "in-use.json"
    moesim.plan(trace, solver="linear", **tune).save(file)
    plain = compare(build, schemes=("plan-balance",))
    linear = compare(build, schemes=("plan-balance",), old_plan=file)
    row = linear.rows[1]
    assert row.against_none == plain.rows[1].against_none
    assert row.outcome.switch_us > 0
    assert row.switch_pays_from_steps is not None
    assert "moving there once stops serving for" in linear.verdict()[0]
    best = tmp_path / "best.json"
    moesim.plan(trace, solver="local_search", objective="balance", **tune).save(best)
    same = compare(build, schemes=("plan-balance",), old_plan=best)
    assert same.rows[0].imbalance.value < plain.rows[0].imbalance.value
    with pytest.raises(MismatchError, match="placement in use has 16 experts, the comparison 8"):
        moesim.balance(
            build.random_trace(np.random.default_rng(0), 512, 3, 8, 2, request_tokens=16),
            cluster=given["cluster"],
            model=build.toy_model(3, 8, 2),
            old_plan=file,
        )


def test_plans_from_counts_never_see_what_they_are_judged_on(build: ModuleType) -> None:
    """Expert 0 is hot in the first half, expert 8 in the second. A single plan for the whole log is
    made from the first half, so it does not help on the second: no better than experts in order."""
    loads = counted(build)
    load = loads.expert_load.copy()
    load[20:] = np.roll(load[20:], 8, axis=2)
    result = from_counts(
        build, replace(loads, expert_load=load), schemes=("eplb-vllm+r",), phase="decode"
    )
    none, eplb = result.rows
    assert eplb.imbalance.value > 0.9 * none.imbalance.value
    with pytest.raises(InputError, match="break_even"):
        from_counts(build, loads, break_even=True)
