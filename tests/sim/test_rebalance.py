"""Placing anew on the way: what moves, what it costs, when it helps and when it hurts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from moesim.cluster import load_cluster
from moesim.errors import InputError, MismatchError
from moesim.placement import Placement
from moesim.planning.baselines import place_by_counts
from moesim.sim.event import run_event
from moesim.sim.migrate import build_mover
from moesim.sim.rearrange import weight_move
from moesim.sim.rebalance import Rebalance, RebalanceRun
from moesim.sim.schedules.sequential import Sequential


def rebalanced(models, trace, batches, placement, policy, planner=None, expert_bytes=1e6):
    def eplb(counts, capacity):
        return place_by_counts("eplb", counts, capacity, models.cluster)

    run = RebalanceRun(
        models,
        Sequential(),
        trace,
        placement,
        policy,
        planner or eplb,
        build_mover(models.cluster, models.links, expert_bytes),
    )
    return run.run(batches), run


@pytest.fixture
def setting(trace, models_of, linear_of, batches_of):
    models = models_of(8)
    return models, trace, batches_of(trace, 8), linear_of(models)


def test_no_plan_is_a_plain_run(setting) -> None:
    models, trace, batches, placement = setting
    plain = run_event(models, Sequential(), trace, batches, placement)
    result, _ = rebalanced(models, trace, batches, placement, Rebalance(100))
    np.testing.assert_allclose(result.step_us, plain.step_us, rtol=1e-12)
    assert result.extra["rebalance"]["num_plans"] == 0


def test_same_placement_moves_nothing(setting) -> None:
    """A plan equal to the present one costs its computing time alone: 2 x 500 us."""
    models, trace, batches, placement = setting
    policy = Rebalance(3, plan_us=500.0)
    result, _ = rebalanced(models, trace, batches, placement, policy, lambda *_: placement)
    figures = result.extra["rebalance"]
    assert figures["num_plans"] == 2
    assert figures["bytes_from_gpus"] == figures["bytes_from_host"] == 0
    assert figures["stall_us"] == pytest.approx(1000)
    assert result.elapsed_us == pytest.approx(result.step_us.sum() + 1000)


def test_swapping_two_gpus_by_hand(setting) -> None:
    """Layer 1 of GPUs 0 and 1 swapped: 8 experts of 1 MB each way on different links, at the
    fitted 285.1 GB/s of two GPUs: 8e6 / 285.1e3 = 28.06 us, after the route's latency of
    2 + 2 x 0.4 us and 100 us of host work. All other layers stay, and cost nothing."""
    models, trace, batches, placement = setting
    table = placement.physical_to_logical.reshape(3, 8, 8).copy()
    table[1, [0, 1]] = table[1, [1, 0]]
    swapped = Placement(table.reshape(3, -1), 8, 1, 64)
    policy = Rebalance(4, plan_us=0.0, layer_us=100.0)
    result, run = rebalanced(models, trace, batches, placement, policy, lambda *_: swapped)
    figures = result.extra["rebalance"]
    assert figures["bytes_from_gpus"] == 16e6
    assert figures["stall_us"] == pytest.approx(100 + 2.8 + 8e6 / 285.1e3, rel=1e-3)
    np.testing.assert_array_equal(run.slots, table)
    after = run_event(models, Sequential(), trace, batches, swapped)
    before = run_event(models, Sequential(), trace, batches, placement)
    np.testing.assert_allclose(result.step_us[:4], before.step_us[:4], rtol=1e-12)
    np.testing.assert_allclose(result.step_us[4:], after.step_us[4:], rtol=1e-12)


def test_async_does_not_stop_serving(trace, batches_of, models_of, linear_of) -> None:
    """The same bytes move and nothing stops, but where dispatch and combine need all of a link
    (PCIe), steps are slower while weights move beside them."""
    models = models_of(4, cluster="l40s-pcie")
    batches, placement = batches_of(trace, 8, 1024), linear_of(models)
    table = np.roll(placement.physical_to_logical.reshape(3, 4, 16), 1, axis=1)
    rolled = Placement(np.ascontiguousarray(table.reshape(3, -1)), 4, 1, 64)
    results = {}
    for beside in (False, True):
        policy = Rebalance(4, plan_us=10.0, layer_us=0.0, asynchronous=beside)
        results[beside], _ = rebalanced(
            models, trace, batches, placement, policy, lambda *_: rolled, 1e6
        )
        figures = results[beside].extra["rebalance"]
        assert figures["bytes_from_gpus"] == 3 * 64 * 1e6
        assert (figures["stall_us"] == 0) == beside
    plain = run_event(models, Sequential(), trace, batches, placement)
    assert results[True].elapsed_us == pytest.approx(results[True].step_us.sum())
    assert results[True].step_us[4] > plain.step_us[4] * 1.1
    assert results[False].step_us[3] == pytest.approx(plain.step_us[3])


def test_the_proportions_of_a_published_slowdown(trace, models_of, linear_of, batches_of) -> None:
    """vLLM pull request 50647: 24 synchronous rearrangements turn 463.11 s into 1,466.50 s. Each
    stops serving for (1466.50 - 463.11) / 24 = 41.81 s per 463.11 / 24 = 19.30 s served, 2.1667
    times as long. With stalls in that proportion to two of our steps, the same 24 make a run of 49
    steps 1 + 24 x 2 x 2.1667 / 49 = 3.12 times longer (3.17 in the limit of no step after the last
    plan)."""
    models = models_of(8)
    batches, placement = batches_of(trace, 49), linear_of(models)
    plain = run_event(models, Sequential(), trace, batches, placement)
    per_serving = (1466.50 - 463.11) / 463.11
    stall = per_serving * 2 * float(plain.step_us.mean())
    policy = Rebalance(2, plan_us=stall, layer_us=0.0)
    result, _ = rebalanced(models, trace, batches, placement, policy, lambda *_: placement)
    assert result.extra["rebalance"]["num_plans"] == 24
    slower = result.elapsed_us / plain.elapsed_us
    assert slower == pytest.approx(1 + 24 * 2 * per_serving / 49, rel=1e-9)
    assert 49 / 48 * (slower - 1) + 1 == pytest.approx(1466.50 / 463.11, rel=1e-9)


def test_better_balance_can_be_three_times_slower(setting) -> None:
    """A new plan after every step of a small model costs far more than balance can win back."""
    models, trace, batches, placement = setting
    plain = run_event(models, Sequential(), trace, batches, placement)
    policy = Rebalance(2, window_steps=2, plan_us=100.0, layer_us=100.0)
    result, _ = rebalanced(models, trace, batches, placement, policy, expert_bytes=2e6)
    assert result.balancedness.mean() > plain.balancedness.mean() * 1.05
    slower = result.elapsed_us / plain.elapsed_us
    assert slower > 1.2
    eager = Rebalance(1, window_steps=2, plan_us=500.0, layer_us=200.0)
    worst, _ = rebalanced(models, trace, batches, placement, eager, expert_bytes=2e6)
    assert worst.elapsed_us / plain.elapsed_us > 3
    assert worst.balancedness.mean() > plain.balancedness.mean()


def test_free_rebalancing_pays(setting) -> None:
    """With nothing to pay but the bytes of tiny experts, better balance is faster steps."""
    models, trace, batches, placement = setting
    plain = run_event(models, Sequential(), trace, batches, placement)
    policy = Rebalance(1, window_steps=8, plan_us=0.0, layer_us=0.0)
    result, _ = rebalanced(models, trace, batches, placement, policy, expert_bytes=1.0)
    assert result.balancedness[4:].mean() > plain.balancedness[4:].mean()
    assert result.waiting_us[4:].mean() < plain.waiting_us[4:].mean()


def test_threshold_leaves_balanced_gpus_alone(setting) -> None:
    models, trace, batches, placement = setting
    result, _ = rebalanced(models, trace, batches, placement, Rebalance(2, threshold=0.0))
    assert result.extra["rebalance"]["num_plans"] == 0
    assert result.extra["rebalance"]["num_skipped"] == 3


def test_other_slots_are_refused(setting) -> None:
    models, trace, batches, placement = setting
    wide = np.repeat(placement.physical_to_logical.reshape(3, 8, 8), 1, axis=2)
    wide = np.concatenate([wide, np.roll(wide, 1, axis=1)], axis=2).reshape(3, -1)
    bigger = Placement(np.ascontiguousarray(wide), 8, 1, 64)
    with pytest.raises(MismatchError, match="slots"):
        rebalanced(models, trace, batches, placement, Rebalance(2), lambda *_: bigger)


@pytest.mark.parametrize(
    "values",
    [{"every_steps": 0}, {"every_steps": 1, "window_steps": 0}, {"every_steps": 1, "plan_us": -1},
     {"every_steps": 1, "layer_us": math.nan}, {"every_steps": 1, "threshold": math.nan}],
)  # fmt: skip
def test_refused_policies(values) -> None:
    with pytest.raises(InputError):
        Rebalance(**values)


def test_weights_through_the_host_take_their_bytes(setting) -> None:
    """GPUs 0 and 1 change places: each of the 8 experts that they hold is 1 MB at 0.5 GB/s, 2 ms;
    both receive at once, layer after layer, with 300 us of host time each."""
    models, trace, batches, placement = setting
    each = placement.slots_per_gpu
    order = [*range(each, 2 * each), *range(each), *range(2 * each, placement.num_slots)]
    swapped = replace(placement, physical_to_logical=placement.physical_to_logical[:, order])
    policy = Rebalance(5, plan_us=100.0, layer_us=300.0, gb_per_s=0.5, through="gloo")
    result, _ = rebalanced(models, trace, batches, placement, policy, lambda *_: swapped)
    figures = result.extra["rebalance"]
    assert figures["num_plans"] == 1
    layers = placement.num_layers
    assert figures["stall_us"] == pytest.approx(100.0 + layers * (300.0 + each * 2000.0))
    assert figures["bytes_from_gpus"] == 2 * each * layers * 1e6


def test_measured_moves_are_of_their_gpu() -> None:
    """H200s have vLLM's figures, through gloo half a GB/s and less host time than NCCL's; H100s
    have none, nor has NCCL beside the steps. Without a library H200s take NCCL's host time over the
    links, H100s the fit."""
    h200 = load_cluster("h200-sxm-ib", num_gpus=8)
    gloo, nccl = (weight_move(h200, False, name) for name in ("gloo", "nccl"))
    assert gloo.gb_per_s is not None
    assert 0.4 < gloo.gb_per_s < 0.7
    assert nccl.gb_per_s is None
    assert 3000 < nccl.layer_us < 6000
    with pytest.raises(InputError, match="beside the steps was not measured on h200-sxm"):
        weight_move(h200, True, "nccl")
    with pytest.raises(InputError, match="not measured on h100-sxm"):
        weight_move(load_cluster("h100-sxm-ib", num_gpus=8), False, "gloo")
    with pytest.raises(InputError, match="both `rebalance_layer` and `rebalance_through`"):
        weight_move(h200, False, "gloo", 1000.0)
    assert weight_move(h200, True).layer_us == nccl.layer_us
    fit = weight_move(load_cluster("h100-sxm-ib", num_gpus=8), True)
    assert (fit.layer_us, fit.basis) == (9000.0, "assumed")


def test_a_rate_is_a_rate() -> None:
    with pytest.raises(InputError, match="gb_per_s"):
        Rebalance(3, gb_per_s=0.0)
