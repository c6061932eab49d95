"""GPUs that fail while experts are placed anew on the way: on whom, from what, and nothing lost."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cli.main import run as cli
from moesim.errors import InfeasibleError, InputError
from moesim.placement import EMPTY, Placement
from moesim.planning.baselines import place_by_counts
from moesim.sim.fault_run import FaultRun
from moesim.sim.faults import Fault, FaultClock, Recovery
from moesim.sim.migrate import build_mover
from moesim.sim.rebalance import Rebalance, RebalanceRun
from moesim.sim.schedules.sequential import Sequential
from moesim.trace.format import save_trace

EXPERT_BYTES = 1e6
QUICK = {"detect_us": 100.0, "restart_us": 1000.0, "plan_us": 10.0}


def run_with(models, trace, batches, placement, faults, policy, solver="eplb", **recovery):
    def planner(counts, capacity):
        return place_by_counts(solver, counts, capacity, models.cluster)

    run = FaultRun(
        models, Sequential(), trace, placement, FaultClock(faults),
        Recovery(**{**QUICK, **recovery}),
        build_mover(models.cluster, models.links, EXPERT_BYTES),
        planner=lambda capacity: place_by_counts(
            "greedy", np.ones((1, 3, 64)), capacity, models.cluster
        ),
        rebalance=policy,
        window_planner=planner,
    )  # fmt: skip
    return run.run(batches), run


@pytest.fixture
def setting(trace, models_of, linear_of, batches_of):
    models = models_of(8)
    return models, trace, batches_of(trace, 12), linear_of(models)


def slots_of(run) -> np.ndarray:
    return run.current.physical_to_logical.reshape(3, 8, -1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_without_faults_it_is_the_run_that_places_anew(setting, asynchronous) -> None:
    models, trace, batches, placement = setting
    policy = Rebalance(3, plan_us=50.0, layer_us=10.0, asynchronous=asynchronous)
    result, _ = run_with(models, trace, batches, placement, [], policy)
    plain = RebalanceRun(
        models, Sequential(), trace, placement, policy,
        lambda counts, capacity: place_by_counts("eplb", counts, capacity, models.cluster),
        build_mover(models.cluster, models.links, EXPERT_BYTES),
    ).run(batches)  # fmt: skip
    np.testing.assert_allclose(result.step_us, plain.step_us, rtol=1e-12)
    assert result.extra["rebalance"] == plain.extra["rebalance"]
    assert result.extra["faults"]["steps_retried"] == 0


def test_placing_anew_on_the_survivors(setting) -> None:
    """GPU 3 fails for good in step 2; the plan after step 4 is for seven GPUs, with 10 slots each
    (64 / 7 rounded up, as 8 are too few), all 64 experts somewhere, none on GPU 3. The plan has the
    loads of the steps before and after the failure, and every batch is served once (INV-1)."""
    models, trace, batches, placement = setting
    policy = Rebalance(4, window_steps=4, plan_us=0.0, layer_us=0.0)
    plain = run_with(models, trace, batches, placement, [], Rebalance(100))[0]
    at = float(plain.step_us[:2].sum()) + 10.0
    result, run = run_with(
        models, trace, batches, placement, [Fault("gpu:3", at, gpus=(3,))], policy
    )
    table = slots_of(run)
    assert table.shape[2] == 10
    assert (table[:, 3] == EMPTY).all()
    for layer in range(3):
        assert set(table[layer].ravel().tolist()) - {EMPTY} == set(range(64))
    assert result.extra["rebalance"]["num_plans"] == 2
    assert result.tokens.sum() == batches.indptr[-1]
    assert result.extra["faults"]["steps_retried"] == 1
    assert result.gpu_busy[3:, 3].max() == 0
    reloaded = result.balancedness[2:4].mean()
    assert result.balancedness[4:].mean() > reloaded


def test_back_in_the_next_plan(setting) -> None:
    """GPU 3 is away from step 1 on and back before the last plan: it first serves what it held when
    it failed, then what the plan gives it."""
    models, trace, batches, placement = setting
    policy = Rebalance(2, window_steps=4, plan_us=0.0, layer_us=0.0)
    fault = Fault("gpu:3", 500.0, 3500.0, gpus=(3,))
    result, run = run_with(models, trace, batches, placement, [fault], policy)
    busy = result.gpu_busy[:, 3] > 0
    assert not busy[1:3].any()
    assert busy[-1]
    assert (slots_of(run)[:, 3] != EMPTY).any(axis=1).all()
    assert result.tokens.sum() == batches.indptr[-1]


def test_a_fault_ends_a_move_that_is_under_way(setting) -> None:
    """Asynchronous, 5 ms of host work a layer: the first plan begins after step 1 and is in
    its first layer when GPU 5 fails. What was planned is dropped; the next plan does not know the
    GPU."""
    models, trace, batches, placement = setting
    policy = Rebalance(2, asynchronous=True, plan_us=0.0, layer_us=5000.0)
    plain = run_with(models, trace, batches, placement, [], Rebalance(100))[0]
    at = float(plain.step_us[:3].sum()) + 10.0
    result, run = run_with(
        models, trace, batches, placement, [Fault("gpu:5", at, gpus=(5,))], policy
    )
    figures = result.extra["rebalance"]
    assert figures["num_abandoned"] == 1
    assert figures["num_plans"] >= 2
    assert (slots_of(run)[:, 5] == EMPTY).all()
    assert result.tokens.sum() == batches.indptr[-1]


def test_replan_goes_by_the_window(setting) -> None:
    """With --on-loss replan the loads of the window place the experts, not those of tuning: the
    planner that would fail is never asked."""
    models, trace, batches, placement = setting
    asked = []

    def window(counts, capacity):
        asked.append(capacity.tolist())
        return place_by_counts("greedy", counts, capacity, models.cluster)

    run = FaultRun(
        models, Sequential(), trace, placement,
        FaultClock([Fault("gpu:0", 900.0, gpus=(0,))]), Recovery(**{**QUICK, "on_loss": "replan"}),
        build_mover(models.cluster, models.links, EXPERT_BYTES),
        planner=lambda _: pytest.fail("asked for a plan from tuning requests"),
        rebalance=Rebalance(100), window_planner=window,
    )  # fmt: skip
    result = run.run(batches)
    assert asked == [[0, 10, 10, 10, 10, 10, 10, 10]]
    assert result.tokens.sum() == batches.indptr[-1]


def test_no_room_for_a_plan_on_fewer(setting) -> None:
    """Two spare slots of seven GPUs hold all 64 experts (10 each); with five GPUs 13 would be
    needed: recovery says no, with what to do."""
    models, trace, batches, placement = setting
    policy = Rebalance(2, plan_us=0.0, layer_us=0.0)
    one = [Fault("gpu:0", 300.0, gpus=(0,))]
    result, _ = run_with(models, trace, batches, placement, one, policy, spare_slots=2)
    assert result.tokens.sum() == batches.indptr[-1]
    three = [Fault("node", 300.0, gpus=(0, 1, 2))]
    with pytest.raises(InfeasibleError, match="no GPU has room"):
        run_with(models, trace, batches, placement, three, policy, spare_slots=2)


@settings(max_examples=25, deadline=None)
@given(
    faults=st.lists(
        st.tuples(st.integers(0, 7), st.floats(0, 8000), st.floats(100, 6000)), max_size=4
    ),
    every=st.integers(1, 4),
    asynchronous=st.booleans(),
    on_loss=st.sampled_from(["reload", "replan", "wait"]),
    layer_us=st.sampled_from([0.0, 300.0]),
)
def test_inv1_inv2_every_batch_once_whatever_fails(
    trace, models_of, linear_of, batches_of, faults, every, asynchronous, on_loss, layer_us
) -> None:
    """INV-1: every batch counts once. INV-2: at the end every expert has a slot on a GPU that is
    up, no GPU holds one twice (Placement would refuse), and GPUs that are down hold nothing."""
    models = models_of(8)
    batches, placement = batches_of(trace, 8), linear_of(models)
    given_faults = [Fault(f"gpu:{g}", at, at + span, gpus=(g,)) for g, at, span in faults]
    policy = Rebalance(every, 3, asynchronous, plan_us=20.0, layer_us=layer_us)
    result, run = run_with(models, trace, batches, placement, given_faults, policy, on_loss=on_loss)
    assert result.tokens.tolist() == np.diff(batches.indptr).tolist()
    table = slots_of(run)
    for layer in range(3):
        assert set(table[layer].ravel().tolist()) - {EMPTY} == set(range(64))
        for gpu in run.down:
            assert (table[layer, gpu] == EMPTY).all()
            assert run.held[layer][gpu] == set()


def test_inv6_same_bytes_from_the_command_line(capfd, tmp_path, trace) -> None:
    save_trace(trace, tmp_path / "t.npz")
    outs = []
    for name in "ab":
        line = tmp_path / f"{name}.json"
        code = cli(
            ["simulate", "--trace", str(tmp_path / "t.npz"), "--gpus", "8", "--steps", "8",
             "--fault", "gpu:2@1.5-4", "--detect", "0.1", "--restart", "0.5",
             "--rebalance-every", "2", "--rebalance-plan", "0.1", "--rebalance-async",
             "--timeline", str(line), "--json"]
        )  # fmt: skip
        assert code == 0
        outs.append((capfd.readouterr().out, line.read_bytes()))
    assert outs[0] == outs[1]
    plans = json.loads(outs[0][0])["plans"]
    assert list(plans) == ["linear", "linear, rebalanced"]
    assert "rebalance" not in plans["linear"]
    both = plans["linear, rebalanced"]
    assert both["faults"]["outages"][0]["fault"] == "gpu:2"
    assert both["rebalance"]["num_plans"] > 0


def test_a_planner_is_needed(setting) -> None:
    models, trace, _, placement = setting
    with pytest.raises(InputError, match="no planner"):
        FaultRun(
            models, Sequential(), trace, placement, FaultClock(), Recovery(),
            build_mover(models.cluster, models.links, 1.0), rebalance=Rebalance(2),
        )  # fmt: skip


def test_survivors_are_placed_as_a_smaller_group(models_of) -> None:
    """EPLB, which wants equal GPUs and nodes, on 7 of 8: each of the 7 has 10 slots."""
    cluster = models_of(8).cluster
    counts = np.random.default_rng(0).integers(0, 50, (4, 3, 64))
    capacity = np.full(8, 10)
    capacity[3] = 0
    placement: Placement = place_by_counts("eplb", counts, capacity, cluster)
    filled = (placement.physical_to_logical.reshape(3, 8, -1) != EMPTY).sum(axis=2)
    assert filled.tolist() == [[10, 10, 10, 0, 10, 10, 10, 10]] * 3
    whole = place_by_counts("eplb", counts, np.full(8, 8), cluster)
    same = place_by_counts("eplb", counts, np.full(8, 8), cluster)
    np.testing.assert_array_equal(whole.physical_to_logical, same.physical_to_logical)
