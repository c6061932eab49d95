"""GPUs, nodes and links that fail: what is served, what it costs, what cannot go on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moesim.cluster import load_cluster
from moesim.cost.routing import Routed, home_ranks, route
from moesim.errors import InfeasibleError, InputError, UnknownNameError
from moesim.placement import Placement
from moesim.planning.baselines import place_by_counts
from moesim.sim.event import run_event
from moesim.sim.fault_run import FaultRun
from moesim.sim.faults import (
    Fault,
    FaultClock,
    Recovery,
    parse_fault,
    reloaded,
    without_gpus,
)
from moesim.sim.migrate import HOST, Move, build_mover, holdings, plan_moves
from moesim.sim.outage import bypass
from moesim.sim.schedules.sequential import Sequential
from moesim.sim.timeline import StepTimeline

EXPERT_BYTES = 1e6
QUICK = {"detect_us": 100.0, "restart_us": 1000.0, "plan_us": 10.0}


def replicated(models, layers: int = 3) -> Placement:
    """Every expert on two GPUs: GPU g has experts 8g..8g+7 and those of its neighbour."""
    gpus = models.num_gpus
    own = np.arange(64).reshape(gpus, -1)
    rows = np.concatenate([own, np.roll(own, -1, axis=0)], axis=1)
    table = rows.astype(np.int32).reshape(1, -1)
    return Placement(np.repeat(table, layers, axis=0), gpus, models.cluster.num_nodes, 64)


def run_with(models, trace, batches, placement, faults=(), links=(), planner=None, **recovery):
    run = FaultRun(
        models,
        Sequential(),
        trace,
        placement,
        FaultClock(faults),
        Recovery(**{**QUICK, **recovery}),
        build_mover(models.cluster, models.links, EXPERT_BYTES),
        link_faults=links,
        planner=planner,
    )
    return run.run(batches), run


def test_no_fault_is_a_plain_run(trace, batches, models_of, linear_of) -> None:
    models = models_of(8)
    plain = run_event(models, Sequential(), trace, batches, linear_of(models))
    result, _ = run_with(models, trace, batches, linear_of(models))
    np.testing.assert_allclose(result.step_us, plain.step_us, rtol=1e-12)
    assert result.extra["faults"]["availability"] == pytest.approx(1.0)
    assert result.extra["faults"]["steps_retried"] == 0


def test_replicas_take_over(trace, batches, models_of) -> None:
    """GPU 3 fails 50 us into step 1. That step is lost, 100 us pass until it is noticed and
    1,000 us to form the group; nothing is moved, since every expert has a second copy. Then steps 1
    and 2 run on seven GPUs. All three batches are served once (INV-1)."""
    models = models_of(8)
    placement = replicated(models)
    plain = run_event(models, Sequential(), trace, batches, placement)
    at = plain.step_us[0] + 50
    result, run = run_with(models, trace, batches, placement, [Fault("gpu:3", at, gpus=(3,))])
    figures = result.extra["faults"]
    assert result.tokens.tolist() == plain.tokens.tolist()
    assert figures["steps_retried"] == 1
    assert figures["bytes_from_gpus"] == figures["bytes_from_host"] == 0
    outage = figures["outages"][0]
    assert outage["wasted_us"] == pytest.approx(50)
    assert outage["time_to_recover_us"] == pytest.approx(50 - 50 + 1100 + result.step_us[1])
    assert result.elapsed_us == pytest.approx(result.step_us.sum() + 50 + 1100)
    assert figures["availability"] == pytest.approx(result.step_us.sum() / result.elapsed_us)
    assert result.gpu_busy[0, 3] > 0
    assert result.gpu_busy[1:, 3].max() == 0
    assert (run.current.physical_to_logical.reshape(3, 8, -1)[:, 3] == -1).all()


def test_a_gpu_comes_back(trace, models_of, batches_of) -> None:
    """Back after 2 ms: it loads its experts from the host beside the steps, then joins."""
    models = models_of(8)
    batches = batches_of(trace, 12)
    placement = replicated(models)
    fault = Fault("gpu:3", 500.0, 2500.0, gpus=(3,))
    result, run = run_with(models, trace, batches, placement, [fault])
    busy = result.gpu_busy[:, 3] > 0
    assert busy[0] or busy[-1]
    assert not busy[1]
    assert busy[-1]
    assert result.extra["faults"]["bytes_from_host"] == 3 * 16 * EXPERT_BYTES
    assert run.current.physical_to_logical.tolist() == placement.physical_to_logical.tolist()
    assert result.tokens.sum() == batches.indptr[-1]


def test_a_fault_of_a_gpu_that_is_down_costs_no_step(trace, models_of, batches_of) -> None:
    """GPU 3 fails at 500 us until 2,500, and again in a later step until 4,000: it stays away
    longer, no second step is lost, and it is one outage."""
    models = models_of(8)
    batches = batches_of(trace, 12)
    faults = [Fault("gpu:3", 500.0, 2500.0, gpus=(3,)), Fault("again", 1900.0, 4000.0, gpus=(3,))]
    result, run = run_with(models, trace, batches, replicated(models), faults)
    figures = result.extra["faults"]
    assert figures["steps_retried"] == 1
    assert [outage["fault"] for outage in figures["outages"]] == ["gpu:3"]
    assert run.down == {3: 4000.0}
    assert result.tokens.sum() == batches.indptr[-1]


def test_a_gpu_that_fails_while_loading_loads_again(trace, models_of, batches_of) -> None:
    """GPU 3 is back at 2,500 us and from the next step on loads 48 MB, at 85 % of 64 GB/s.
    Before it is done it is down again from 3,000 to 3,050 us, and loads anew beside the first
    copies, which nobody stops: 96 MB take 1,765 us, and not earlier does it serve."""
    models = models_of(8)
    batches = batches_of(trace, 24)
    line = StepTimeline(models.links, 8, 24)
    faults = [Fault("gpu:3", 500.0, 2500.0, gpus=(3,)), Fault("gpu:3", 3000.0, 3050.0, gpus=(3,))]
    run = FaultRun(
        models, Sequential(), trace, replicated(models), FaultClock(faults),
        Recovery(detect_us=0.0, restart_us=0.0),
        build_mover(models.cluster, models.links, EXPERT_BYTES), timeline=line,
    )  # fmt: skip
    result = run.run(batches)
    back = [e["ts"] for e in line.events if e["name"] == "GPU 3 back"]
    assert len(back) == 1
    steps_end = 500.0 + np.cumsum(result.step_us[1:])
    assert back[0] > steps_end[steps_end >= 2500.0][0] + 96e6 / (0.85 * 64e3)
    assert result.extra["faults"]["bytes_from_host"] == 2 * 48 * EXPERT_BYTES


def test_nothing_passes_a_gpu_that_is_down(trace, batches, models_of) -> None:
    """DeepEP sends a token between nodes to the GPU of its own rank, which forwards it. With GPU 3
    down from the start another one of its node does: no byte leaves or reaches GPU 3 (on a network
    without rails, whose routes pass other GPUs)."""
    models = models_of(16, all_to_all="deepep", cluster="h100-sxm-roce-leafspine")
    result, run = run_with(
        models, trace, batches, replicated(models), [Fault("gpu:3", 0.0, gpus=(3,))]
    )
    at_3 = ["gpu:3" in name.split("->") for name in models.links.names]
    assert sum(at_3) >= 4
    assert run.engine.network.bytes[at_3].sum() == 0
    assert run.engine.network.bytes.sum() > 0
    assert result.extra["faults"]["bytes_from_host"] == 0


def test_the_worst_of_a_links_faults_counts(trace, batches, models_of, linear_of) -> None:
    """Half a link for good, a fifth of it from 20 to 40 us: then half again, not all of it."""
    models = models_of(8)
    faults = [Fault("half", 10.0, links=(0,), room=0.5), Fault("fifth", 20.0, 40.0, (), (0,), 0.2)]
    seen = []
    for until in (15.0, 30.0, 50.0):
        _, run = run_with(models, trace, batches, linear_of(models), links=())
        for fault in faults:
            run._change_links(fault)
        start = run.engine.now_us
        run.engine.wait(until)
        assert run.engine.now_us == start + until
        seen.append(run.engine.network.room[0])
    assert seen == [0.5, 0.2, 0.5]


def test_reload_of_lost_experts(trace, batches, models_of, linear_of) -> None:
    """Without replicas GPU 0's 8 experts in each of 3 layers come from the hosts of the others, and
    every expert has a slot again (INV-2)."""
    models = models_of(8)
    placement = linear_of(models)
    result, run = run_with(models, trace, batches, placement, [Fault("gpu:0", 10.0, gpus=(0,))])
    assert result.extra["faults"]["outages"][0]["lost_experts"] == 24
    assert result.extra["faults"]["bytes_from_host"] == 24 * EXPERT_BYTES
    slots = run.current.physical_to_logical.reshape(3, 8, -1)
    assert (slots[:, 0] == -1).all()
    assert sorted(set(slots[0].ravel().tolist()) - {-1}) == list(range(64))
    assert result.tokens.sum() == batches.indptr[-1]


def test_replan_on_what_is_left(trace, batches, models_of, linear_of) -> None:
    """63 or more slots on seven GPUs: ceil(64 / 7) = 10 each. Experts that a living GPU holds come
    from there, the lost ones from a host."""
    models = models_of(8)
    counts = np.random.default_rng(0).random((4, 3, 64))

    def planner(capacity):
        assert capacity.tolist() == [0, *[10] * 7]
        return place_by_counts("greedy", counts, capacity, models.cluster)

    fault = Fault("gpu:0", 10.0, gpus=(0,))
    result, run = run_with(
        models, trace, batches, linear_of(models), [fault], planner=planner, on_loss="replan"
    )
    figures = result.extra["faults"]
    slots = run.current.physical_to_logical.reshape(3, 8, -1)
    assert figures["bytes_from_host"] == (np.isin(slots, range(8))).sum() * EXPERT_BYTES
    assert figures["bytes_from_gpus"] > 0
    assert (run.current.physical_to_logical.reshape(3, 8, -1)[:, 0] == -1).all()


def test_wait_until_it_is_back(trace, batches, models_of, linear_of) -> None:
    models = models_of(8)
    fault = Fault("gpu:0", 10.0, 5000.0, gpus=(0,))
    result, _ = run_with(models, trace, batches, linear_of(models), [fault], on_loss="wait")
    assert result.elapsed_us > 5000 + result.step_us.sum()
    assert result.tokens.sum() == batches.indptr[-1]
    assert result.extra["faults"]["bytes_from_host"] == 24 * EXPERT_BYTES


def test_verdicts(trace, batches, models_of, linear_of) -> None:
    """An expert that is nowhere is a verdict with a remedy, exit code 1."""
    models = models_of(8)
    fault = Fault("gpu:0", 10.0, gpus=(0,))
    cases = [
        ({"on_loss": "fail"}, "redundant"),
        ({"on_loss": "wait"}, "never comes back"),
        ({"on_loss": "reload", "spare_slots": 0}, "spare"),
    ]
    for recovery, remedy in cases:
        with pytest.raises(InfeasibleError, match="expert 0 of layer 0") as caught:
            run_with(models, trace, batches, linear_of(models), [fault], **recovery)
        assert remedy in caught.value.remedy
        assert caught.value.exit_code == 1
    every = [Fault(f"gpu:{g}", 10.0, gpus=(g,)) for g in range(8)]
    with pytest.raises(InfeasibleError, match="all GPUs"):
        run_with(models, trace, batches, replicated(models), every)


def test_a_node_fails(trace, batches, models_of) -> None:
    """Two nodes, every expert on both: the second node serves alone, no byte crosses a NIC."""
    models = models_of(16, all_to_all="deepep")
    row = np.tile(np.arange(64, dtype=np.int32), 2)
    placement = Placement(np.tile(row, (3, 1)), 16, 2, 64)
    fault = parse_fault("node:0@0", models.cluster)
    assert fault.gpus == tuple(range(8))
    result, _ = run_with(models, trace, batches, placement, [fault])
    assert result.gpu_busy[:, :8].max() == 0
    assert result.bytes_by_class(models.links).keys() == {"nvlink"}


def test_a_relay_that_is_down_is_bypassed(trace, batches, models_of) -> None:
    """DeepEP relays over the GPU of equal local rank. With GPU 9 down, what it would relay goes
    through GPU 10; tokens into a node stay the same, and none touch GPU 9."""
    models = models_of(16, all_to_all="deepep")
    row = np.tile(np.arange(64, dtype=np.int32), 2)
    placement = Placement(np.tile(row, (3, 1)), 16, 2, 64)
    left, _ = without_gpus(placement.physical_to_logical.reshape(3, 16, -1), [9])
    alive = Placement(left.reshape(3, -1), 16, 2, 64)
    home = home_ranks(trace, batches, 16) % 8
    routed = route(trace, batches, alive, dedup="node", home=home.astype(np.int32))
    before = routed.messages[:, :, :8, 8:].sum()
    copy = Routed(
        routed.slot_tokens, routed.messages.copy(), routed.gpu_fan_out, routed.node_fan_out,
        routed.num_tokens,
    )  # fmt: skip
    bypass(copy, [9], np.asarray(models.cluster.node_of_gpu))
    assert routed.messages[:, :, 9].sum() > 0
    assert copy.messages[:, :, 9].sum() == copy.messages[:, :, :, 9].sum() == 0
    assert copy.messages[:, :, :8, 8:].sum() == before
    assert np.trace(copy.messages.sum(axis=(0, 1))) == 0


def test_links_degrade_and_return(trace, batches, models_of, linear_of) -> None:
    """INV-9 backwards: with one NVLink port at a hundredth of its rate, steps are slower, and as
    before once it is back."""
    models = models_of(8)
    placement = linear_of(models)
    plain = run_event(models, Sequential(), trace, batches, placement)
    link = models.links.names.index("gpu:3->nvswitch:0")
    until = float(plain.step_us[0] * 1.5)
    fault = Fault("link", 0.0, until, links=(link,), room=0.01)
    result, _ = run_with(models, trace, batches, placement, links=[fault])
    assert result.step_us[0] > plain.step_us[0] * 1.02
    assert result.step_us[2] == pytest.approx(plain.step_us[2], rel=1e-9)
    np.testing.assert_allclose(result.link_bytes, plain.link_bytes, rtol=1e-9)


def test_a_link_that_stays_down_is_a_verdict(trace, batches, models_of, linear_of) -> None:
    models = models_of(8)
    link = models.links.names.index("gpu:3->nvswitch:0")
    fault = Fault("link", 0.0, links=(link,), room=0.0)
    with pytest.raises(InfeasibleError, match="down"):
        run_with(models, trace, batches, linear_of(models), links=[fault])


def test_faults_at_a_rate() -> None:
    """Seeded exponential lifetimes: 4 GPUs, mean 100, repaired after 10 on average: over a horizon
    of 100,000 each fails about 100,000 / 110 = 909 times."""
    clock = FaultClock(num_gpus=4, mtbf_us=100, repair_us=10, seed=1)
    count, last = 0, 0.0
    while clock.next_us < 100_000:
        fault = clock.pop()
        assert fault.at_us >= last
        last = fault.at_us
        count += 1
    assert count == pytest.approx(4 * 909, rel=0.05)
    first = FaultClock(num_gpus=4, mtbf_us=100, repair_us=10, seed=1).pop()
    assert first == FaultClock(num_gpus=4, mtbf_us=100, repair_us=10, seed=1).pop()
    assert FaultClock(num_gpus=4).next_us == math.inf


def test_random_faults_serve_everything(trace, models_of, batches_of) -> None:
    """INV-1 under many failures: availability falls, every batch is served once."""
    models = models_of(8)
    batches = batches_of(trace, 10)
    run = FaultRun(
        models, Sequential(), trace, replicated(models),
        FaultClock(num_gpus=8, mtbf_us=6_000, repair_us=2000, seed=2),
        Recovery(**QUICK), build_mover(models.cluster, models.links, EXPERT_BYTES),
    )  # fmt: skip
    result = run.run(batches)
    assert result.tokens.sum() == batches.indptr[-1]
    assert len(result.extra["faults"]["outages"]) >= 2
    assert 0.05 < result.extra["faults"]["availability"] < 0.95


def test_failures_faster_than_recovery_are_a_verdict(trace, batches, models_of) -> None:
    """Eight GPUs that last 500 us on average, and 1,100 us to recover: no step ever ends."""
    models = models_of(8)
    run = FaultRun(
        models, Sequential(), trace, replicated(models),
        FaultClock(num_gpus=8, mtbf_us=500, repair_us=100, seed=2),
        Recovery(**QUICK), build_mover(models.cluster, models.links, EXPERT_BYTES),
    )  # fmt: skip
    with pytest.raises(InfeasibleError, match="in a row"):
        run.run(batches)


def test_moves_prefer_the_same_node() -> None:
    """Two nodes of two GPUs. GPU 1 wants expert 0, which GPU 0 (its node) and GPU 2 hold; GPU 3
    wants expert 5, which nobody holds: from its host."""
    held = [[{0, 1}, {2}, {0}, {3}]]
    wanted = np.array([[[0, 1], [2, 0], [0, -1], [3, 5]]], np.int32)
    moves = plan_moves(held, wanted, np.array([0, 0, 1, 1]))
    assert moves == [Move(0, 0, 1, 1), Move(0, HOST, 3, 1)] or {
        (m.source, m.target) for m in moves
    } == {(0, 1), (HOST, 3)}


def test_host_loads_take_the_copy_rate(models_of) -> None:
    """One 50.36 MB expert at the fitted pinned-copy rate of the H100, 50.36 GB/s: 1 ms."""
    models = models_of(8)
    mover = build_mover(models.cluster, models.links, 50.36e6)
    flow = mover.flows([Move(0, HOST, 2, 1)])[0]
    assert flow.alone_us == pytest.approx(1000, rel=1e-3)
    assert mover.bytes([Move(0, HOST, 2, 3), Move(0, 1, 2, 2)]) == (2 * 50.36e6, 3 * 50.36e6)


def test_tables() -> None:
    table = np.array([[[0, 1], [1, 2], [3, -1]]], np.int32)
    left, lost = without_gpus(table, [0])
    assert lost == [(0, 0)]
    filled = reloaded(left, lost, [0], 2)
    assert filled is not None
    assert holdings(filled)[0] == [set(), {1, 2}, {0, 3}]
    assert reloaded(left, [(0, 0), (0, 9)], [0], 2) is None
    wide = reloaded(left, [(0, 0), (0, 9)], [0], 3)
    assert wide is not None
    assert wide.shape == (1, 3, 3)


def test_parse() -> None:
    cluster = load_cluster("h100-sxm-ib", 16)
    assert parse_fault("gpu:3@50-200", cluster) == Fault("gpu:3", 5e4, 2e5, gpus=(3,))
    link = parse_fault("link:gpu:3->nvswitch:0=0.5@50", cluster)
    assert cluster.routes().link_name[link.links[0]] == "gpu:3->nvswitch:0"
    assert (link.room, link.until_us) == (0.5, math.inf)


@pytest.mark.parametrize(
    "text",
    ["", "gpu:3", "gpu:x@1", "gpu:16@1", "gpu:-1@1", "gpu:3@5-2", "gpu:3@nan", "gpu:3=0.5@1",
     "node:2@1", "link:nvswitch@1", "link:gpu:3->nvswitch:0=2@1", "gpu:3@-1", "disk:1@1"],
)  # fmt: skip
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InputError):
        parse_fault(text, load_cluster("h100-sxm-ib", 16))


def test_refused_recoveries() -> None:
    with pytest.raises(UnknownNameError):
        Recovery(on_loss="pray")  # type: ignore[arg-type]
    with pytest.raises(InputError):
        Recovery(detect_us=math.nan)
    with pytest.raises(InputError):
        FaultClock(num_gpus=1, mtbf_us=0)
