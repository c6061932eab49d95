"""Local search on messages: its running state against scratch and against the step cost."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cluster import Cluster, load_cluster
from moesim.cost.routing import Routed, route
from moesim.cost.step import StepModel, build_step_model
from moesim.model.names import load_model
from moesim.placement import Placement
from moesim.planning.traffic import binding_links, sample_traffic
from moesim.solvers.base import Traffic
from moesim.solvers.kernels.gains import make_messages, move_rows, move_us, replica_row, try_swap
from moesim.solvers.kernels.messages import search_messages
from moesim.solvers.kernels.placed import Costs, Goal, make_placed, make_work, mean_max
from moesim.solvers.kernels.traffic import (
    fill_flow,
    message_us,
    replica_gpus,
)
from moesim.solvers.objective import layer_tokens, make_flow, make_net
from moesim.trace.batches import Batches, index_requests
from moesim.trace.format import Trace

Slots = npt.NDArray[np.int64]
SHAPES = [(1, 4), (2, 2), (2, 1), (1, 2)]
DEDUPS = ["none", "gpu", "node"]


class Case:
    """A random trace on a toy cluster, its tuning traffic, and a placement without empty slots."""

    def __init__(
        self, build: ModuleType, seed: int, shape: tuple[int, int], dedup: Any, spare: int
    ) -> None:
        rng = np.random.default_rng(seed)
        nodes, per_node = shape
        gpus, self.experts, layers = nodes * per_node, 8, 2
        trace = build.random_trace(rng, 160, layers, self.experts, 4, missing=0.1, skew=0.7)
        calibration = build.toy_calibration(group_size=gpus, num_nodes=nodes)
        model = build.toy_model(layers, self.experts, 4)
        self.cluster: Cluster = build.small_cluster(nodes, per_node)
        self.step: StepModel = build_step_model(
            self.cluster, model, all_to_all="nccl", dedup=dedup, calibration=calibration
        )
        self.traffic: Traffic = sample_traffic(
            trace, index_requests(trace)[0], "prefill", 40, self.step, seed
        )
        per_gpu = self.experts // gpus + spare
        self.placement: Placement = build.random_placement(
            rng, layers, self.experts, gpus, nodes, per_gpu
        )
        self.capacity = np.full(gpus, per_gpu)
        # The sampled tokens again, as a trace of their own.
        ids = self.traffic.expert_ids
        self.sampled: Trace = build.make_trace(ids, self.experts)
        sizes = np.bincount(self.traffic.batch_idx)
        self.batches: Batches = build.cut(self.sampled, *sizes.tolist())

    @property
    def num_gpus(self) -> int:
        return self.cluster.num_gpus

    def slots(self, layer: int) -> Slots:
        return self.placement.physical_to_logical[layer].reshape(self.num_gpus, -1).astype(np.int64)

    def routed(self, placement: Placement) -> Routed:
        home = self.traffic.home
        return route(self.sampled, self.batches, placement, dedup=self.step.dedup, home=home)

    def state(
        self, slots: Slots, layer: int, *, by_time: bool, traffic: Traffic | None = None
    ) -> Any:
        """Tokens, net, filled flow, and the GPUs of each expert's replicas with their number."""
        traffic = traffic or self.traffic
        tokens = layer_tokens(traffic, layer, self.experts)
        net = make_net(traffic, self.num_gpus, self.cluster.num_nodes, by_time=by_time)
        flow = make_flow(tokens, net)
        gpus, count = replica_gpus(slots, self.capacity, self.experts)
        fill_flow(tokens, net, flow, gpus, count)
        return tokens, net, flow, gpus, count


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("dedup", DEDUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_message_time_is_that_of_the_step_model(
    build: ModuleType, shape: tuple[int, int], dedup: Any, spare: int
) -> None:
    """What the search minimises is what `StepModel.cost` predicts for the same tokens."""
    case = Case(build, 3, shape, dedup, spare)
    cost = case.step.cost(case.routed(case.placement))
    want = (cost.dispatch_us + cost.combine_us).mean(axis=0)
    for layer in range(2):
        _, net, flow, _, _ = case.state(case.slots(layer), layer, by_time=True)
        assert message_us(net, flow) == pytest.approx(want[layer], rel=1e-12)
        assert want[layer] > 0


@pytest.mark.parametrize("dedup", DEDUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_summed_link_time(build: ModuleType, shape: tuple[int, int], dedup: Any) -> None:
    """Objective traffic: every message counts what its slowest link takes for it, both ways.

    2,000 bytes at 1 GB/s are 2 us within a node, at 0.5 GB/s 4 us between nodes; and back.
    """
    case = Case(build, 4, shape, dedup, 1)
    routed = case.routed(case.placement)
    node = case.placement.node_of_gpu
    each = np.where(node[:, None] == node[None, :], 2 * 2.0, 2 * 4.0)
    np.fill_diagonal(each, 0)
    for layer in range(2):
        _, net, flow, _, _ = case.state(case.slots(layer), layer, by_time=False)
        assert np.asarray(net.pair_us) == pytest.approx(each)
        want = (routed.messages[:, layer] * each).sum() / len(case.batches)
        assert message_us(net, flow) == pytest.approx(want)


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(SHAPES),
    dedup=st.sampled_from(DEDUPS),
    spare=st.integers(0, 1),
    by_time=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_swaps_keep_the_message_state(
    build: ModuleType, seed: int, shape: tuple[int, int], dedup: Any, spare: int, by_time: bool
) -> None:
    """After random swaps every counter equals that of a state built from scratch, and a replica
    that moves alone changes the summed link time by what `move_us` says."""
    case = Case(build, seed, shape, dedup, spare)
    slots = case.slots(0)
    # An empty slot, which swaps may move around, instead of one replica.
    replicas = np.bincount(slots.ravel(), minlength=case.experts)
    doubled = np.argwhere(replicas[slots] > 1)
    if len(doubled):
        slots[tuple(doubled[0])] = case.experts
    tokens, net, flow, gpus, count = case.state(slots, 0, by_time=by_time)
    messages = make_messages(tokens, net, flow, slots, case.capacity)
    serving, trial = messages.serving, messages.trial
    rng = np.random.default_rng(seed)
    done = 0
    while done < 12:
        g1, g2 = rng.choice(case.num_gpus, 2, replace=False)
        s1, s2 = rng.integers(0, slots.shape[1], 2)
        e1, e2 = slots[g1, s1], slots[g2, s2]
        done += 1
        if e1 == e2 or (e1 in slots[g2] and e1 < 8) or (e2 in slots[g1] and e2 < 8):
            continue
        row1, row2 = replica_row(serving, e1, g1), replica_row(serving, e2, g2)
        if row1 >= 0:
            try_swap(messages, row1, g1, -1, g2)
            alone, _ = move_us(messages, row1, g2)
            assert trial.total[0] - flow.total[0] == pytest.approx(alone, abs=1e-9)
        try_swap(messages, row1, g1, row2, g2)
        move_rows(messages, row1, g1, row2, g2)
        slots[g1, s1], slots[g2, s2] = e2, e1
    for expert in range(case.experts):
        held = np.flatnonzero((slots == expert).any(axis=1))
        rows = slice(serving.first[expert], serving.first[expert + 1])
        gpus[expert, : count[expert]] = serving.place[rows]
        assert sorted(gpus[expert, : count[expert]]) == held.tolist()
    again = make_flow(tokens, net)
    fill_flow(tokens, net, again, gpus, count)
    assert np.array_equal(flow.load, again.load)
    for name in ("number", "one", "some"):
        for held, anew in ((flow.on_gpu, again.on_gpu), (flow.on_node, again.on_node)):
            assert np.array_equal(getattr(held, name), getattr(anew, name)), name
    assert flow.total[0] == pytest.approx(again.total[0])
    assert message_us(net, flow) == pytest.approx(message_us(net, again))


@pytest.mark.parametrize("dedup", DEDUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_search_improves_what_the_step_model_predicts(
    build: ModuleType, shape: tuple[int, int], dedup: Any
) -> None:
    """The value returned is load plus messages of the slots left behind, and not above the start's;
    exact, as no expert has replicas whose turns the order of swaps could change."""
    case = Case(build, 5, shape, dedup, 0)
    slots = case.slots(1)
    rng = np.random.default_rng(0)
    counts = rng.poisson(20, (case.experts, 30)).astype(np.float32)
    grains = 1024.0
    work = make_work(Costs(counts, np.full(1, grains), np.zeros((1, 1))), slots)
    unit = np.zeros(case.num_gpus, np.int64)

    def predicted(held: Slots) -> float:
        load = make_placed(work, held, case.capacity, unit).load
        table = case.placement.physical_to_logical.copy()
        table[1] = held.ravel()
        placement = Placement(table, case.num_gpus, case.cluster.num_nodes, case.experts)
        cost = case.step.cost(case.routed(placement))
        messages = float((cost.dispatch_us + cost.combine_us)[:, 1].mean())
        return float(mean_max(load)) / grains + messages

    start = predicted(slots)
    tokens, net, flow, _, _ = case.state(slots, 1, by_time=True)
    placed = make_placed(work, slots, case.capacity, unit)
    value = search_messages(placed, tokens, net, flow, Goal(0.0, 0.0, grains), 3, 0)
    assert value == pytest.approx(predicted(slots), rel=1e-6)
    assert value <= start * (1 + 1e-6)
    assert sorted(slots.ravel().tolist()) == list(range(case.experts))


def test_choices_beyond_the_gpus_are_counted_without_dedup(build: ModuleType) -> None:
    """Two GPUs, top-8: without deduplication one link carries up to 8 messages per token."""
    ids = np.tile(np.arange(8), (20, 1, 1))
    trace = build.make_trace(ids, 16, request_ids=np.arange(20) // 5)
    calibration = build.toy_calibration(group_size=2, num_nodes=1)
    step = build_step_model(
        build.small_cluster(1, 2), build.toy_model(1, 16, 8), dedup="none", calibration=calibration
    )
    traffic = sample_traffic(trace, index_requests(trace)[0], "prefill", 20, step, 0)
    slots = np.arange(16).reshape(2, 8)
    tokens = layer_tokens(traffic, 0, 16)
    net = make_net(traffic, 2, 1, by_time=True)
    flow = make_flow(tokens, net)
    fill_flow(tokens, net, flow, *replica_gpus(slots, np.array([8, 8]), 16))
    # The 10 tokens of GPU 1 send all 8 choices to GPU 0: 80 x 2 us after 10 us, and back.
    assert message_us(net, flow) == pytest.approx(2 * (10 + 160))


def test_tables_go_on_in_line(build: ModuleType) -> None:
    """More messages than the table has entries, as slow links may count, continue its last step."""
    case = Case(build, 6, (2, 2), "gpu", 0)
    short = replace(case.traffic, time_us=case.traffic.time_us[:, :, :4])
    values = []
    for traffic in (case.traffic, short):
        _, net, flow, _, _ = case.state(case.slots(0), 0, by_time=True, traffic=traffic)
        values.append(message_us(net, flow))
    assert int(np.asarray(flow.load).max()) > 4
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("h100-sxm-ib", 8),
        ("h100-sxm-ib", 16),
        ("h100-sxm-roce-leafspine", 32),
        ("a100-sxm-ib", 16),
        ("mixed-h100-a100", 16),
        ("l40s-pcie", 16),
        ("gb200-nvl72", 72),
    ],
)
def test_binding_links_lose_nothing(name: str, gpus: int) -> None:
    """The largest time over the kept links is that over all links, for any messages."""
    cluster = load_cluster(name, gpus)
    step = build_step_model(cluster, load_model("OLMoE-1B-7B"))
    time_us = step.message_tables_us(6000)
    keep = binding_links(step, time_us)
    assert 0 < len(keep) < len(step.link_group)
    assert (step.link_group[keep] >= 0).all()
    rng = np.random.default_rng(0)
    for density in (0.01, 0.1, 1.0):
        for size in (1, 5, 60, 400):
            sent = rng.poisson(size, (3, gpus, gpus)) * (rng.random((3, gpus, gpus)) < density)
            sent[:, np.arange(gpus), np.arange(gpus)] = 0
            load = step.link_messages(sent) * step.link_scale
            index = np.minimum(np.round(load).astype(np.int64), time_us.shape[2] - 1)
            group = np.maximum(step.link_group, 0)
            times = np.where(step.link_group >= 0, time_us[:, group, index], 0.0)
            assert times[..., keep].max(axis=2) == pytest.approx(times.max(axis=2), rel=1e-9)
