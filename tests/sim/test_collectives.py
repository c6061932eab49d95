"""Hierarchical exchanges, tokens that stay, and reduced dimensions: who sends what to whom."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cluster import load_cluster
from moesim.cost.routing import Routed, home_ranks, route
from moesim.errors import InputError, UnknownNameError
from moesim.model.names import load_model
from moesim.placement import Placement
from moesim.sim.analytic import run_analytic
from moesim.sim.coherent import coherent_work, gather_flow
from moesim.sim.collectives.bi_level import split_levels
from moesim.sim.collectives.registry import NAMES, build_exchange
from moesim.sim.collectives.two_level import two_level_messages
from moesim.sim.event import run_event
from moesim.sim.home import HomeModel
from moesim.sim.prepare import Models, one_batch
from moesim.sim.schedules.context_coherent import ContextCoherent
from moesim.sim.schedules.sequential import Sequential
from moesim.trace.batches import Batches
from moesim.trace.format import Trace, TraceMeta


def test_two_level_by_hand() -> None:
    """Two nodes of two GPUs. GPU 0 (node 0, rank 0) sends 5 to GPU 3 (node 1, rank 1): first to
    GPU 1, which has the rank, then on to GPU 3. GPU 1's 7 for GPU 0 stay within the node, GPU 2's
    4 for GPU 0 have the right rank already."""
    messages = np.zeros((4, 4), np.int64)
    messages[0, 3], messages[1, 0], messages[2, 0] = 5, 7, 4
    within, between = two_level_messages(messages, 2)
    assert {(s, d): within[s, d] for s, d in np.argwhere(within)} == {(0, 1): 5, (1, 0): 7}
    assert {(s, d): between[s, d] for s, d in np.argwhere(between)} == {(1, 3): 5, (2, 0): 4}


matrices = st.lists(st.integers(0, 9), min_size=36, max_size=36)


@given(matrices, st.sampled_from([1, 2, 3]))
@settings(max_examples=50, deadline=None)
def test_two_level_conserves(values: list[int], num_nodes: int) -> None:
    """INV-3: the second stage carries between nodes what was to go there, at most N - 1 messages a
    GPU, and every GPU ends up with what was sent to it."""
    messages = np.array(values).reshape(6, 6)
    np.fill_diagonal(messages, 0)
    within, between = two_level_messages(messages, num_nodes)
    node = np.arange(6) // (6 // num_nodes)
    crosses = node[:, None] != node[None, :]
    assert between.sum() == messages[crosses].sum()
    assert between[~crosses].sum() == 0
    assert within[crosses].sum() == 0
    assert (between > 0).sum(axis=1).max() <= num_nodes - 1
    holds = messages.sum(axis=1) + within.sum(axis=0) - within.sum(axis=1)
    holds = holds + between.sum(axis=0) - between.sum(axis=1)
    np.testing.assert_array_equal(holds, messages.sum(axis=0))


@given(matrices)
@settings(max_examples=30, deadline=None)
def test_levels_split(values: list[int]) -> None:
    messages = np.array(values).reshape(6, 6)
    within, between = split_levels(messages, 2)
    np.testing.assert_array_equal(within + between, messages)
    assert between[:3, :3].sum() == between[3:, 3:].sum() == 0
    assert within[:3, 3:].sum() == within[3:, :3].sum() == 0


def test_hierarchical_times_add_up(trace, batches, models_of, linear_of) -> None:
    """Each stage alone takes its curve's time for the busiest link, the exchange their sum."""
    for name in ("two-level", "bi-level"):
        models = models_of(16, all_to_all=name, home=False)
        routed = route(trace, batches, linear_of(models), dedup=models.exchange.dedup)
        stages = models.exchange.dispatch(routed)
        closed = run_analytic(models, trace, batches, linear_of(models))
        both = sum(s.us.sum(axis=1) for s in stages)
        assert len(stages) == 2
        np.testing.assert_allclose(closed.breakdown_us()["dispatch"], both.mean())
        intra = next(s for s in stages if s.within_node)
        inter = next(s for s in stages if not s.within_node)
        classes = np.array(models.links.classes)
        assert intra.link_bytes[..., classes != "nvlink"].sum() == 0
        assert inter.link_bytes[..., classes == "nic"].sum() > 0
        busiest = inter.link_bytes[..., classes == "nic"].max(axis=-1)
        expected = models.exchange.inter.time_us(0.0, busiest)
        np.testing.assert_allclose(inter.us, expected)


@pytest.mark.parametrize(("gpus", "wins"), [(16, False), (64, False), (256, True)])
def test_two_level_wins_where_peers_are_many(gpus: int, wins: bool) -> None:
    """One message of 2,048 bf16 elements from every GPU to every other, on H100s in nodes of 8.

    Latency of one all-to-all: 7.105 us within the node, 12 us between, and 0.13 us for each GPU of
    another node. In two stages: 7.105 us, then (among one GPU per node: 6.162 us as of two) 18.162
    us and 0.13 us for each other node. On 256 GPUs that is 19.105 + 248 x 0.13 = 51.3 us against
    25.267 + 31 x 0.13 = 29.3 us; on 64, 26.4 us against 26.2 us, and the bytes that cross NVLink
    once more decide."""
    cluster, model = load_cluster("h100-sxm-ib", gpus), load_model("qwen3-30b-a3b")
    messages = np.ones((1, 1, gpus, gpus), np.int32)
    messages[..., np.arange(gpus), np.arange(gpus)] = 0
    none = np.zeros((1, 1), np.int64)
    routed = Routed(np.zeros((1, 1, gpus), np.int32), messages, none, none, np.array([gpus]))
    us, latency = {}, {}
    for name in ("nccl", "two-level"):
        stages = build_exchange(name, cluster, model, phase="decode")[2].dispatch(routed)
        us[name] = sum(float(stage.us[0, 0]) for stage in stages)
        latency[name] = sum(stage.latency_us for stage in stages)
    nodes = gpus // 8
    assert latency["nccl"] == pytest.approx(7.105 + 12 + 0.13 * (gpus - 8))
    assert latency["two-level"] == pytest.approx(7.105 + 6.162 + 12 + 0.13 * (nodes - 1))
    assert (us["two-level"] < us["nccl"]) == wins


def test_bi_level_sends_once_a_node(trace, batches, models_of, linear_of) -> None:
    """SMILE's point: bytes between nodes are deduplicated by node, those of 2DH by GPU."""
    sent = {}
    for name in ("two-level", "bi-level"):
        models = models_of(16, all_to_all=name, home=False)
        result = run_analytic(models, trace, batches, linear_of(models))
        sent[name] = result.bytes_by_class(models.links)["nic"]
    assert sent["bi-level"] < 0.5 * sent["two-level"]


def test_node_limited_dispatch_by_hand() -> None:
    """DeepEP on two nodes of 8: a token of GPU 2 with experts on GPUs 9, 9, 12 and 3. Normal mode:
    once to node 1, to GPU 10 of equal local rank, which forwards it to 9 and 12; once to GPU 3 of
    its own node. Low latency: straight to each chosen expert's GPU, twice to GPU 9."""
    trace = toy([[[36, 37, 48, 12]]])
    row = np.arange(64, dtype=np.int32)[None]
    placement = Placement(row, 16, 2, 64)
    batch = Batches(np.array([0]), np.array([0, 1]), "decode", 1)
    home = np.array([2], np.int32)

    def sent(dedup: str) -> dict[tuple[int, int], int]:
        messages = route(trace, batch, placement, dedup=dedup, home=home).messages[0, 0]
        return {(int(s), int(d)): int(messages[s, d]) for s, d in np.argwhere(messages)}

    assert sent("node") == {(2, 3): 1, (2, 10): 1, (10, 9): 1, (10, 12): 1}
    assert sent("none") == {(2, 3): 1, (2, 9): 2, (2, 12): 1}
    assert sent("gpu") == {(2, 3): 1, (2, 9): 1, (2, 12): 1}


def toy(ids: list[list[list[int]]], gates: list[list[list[float]]] | None = None) -> Trace:
    table = np.array(ids, np.uint8)
    count, layers, top_k = table.shape
    return Trace(
        expert_ids=table,
        request_ids=np.arange(count, dtype=np.int32),
        positions=np.zeros(count, np.int32),
        phases=np.ones(count, np.uint8),
        meta=TraceMeta("debian-moe", 64, top_k, tuple(range(layers))),
        gate_weights=None if gates is None else np.array(gates, np.float32),
    )


def coherent(trace: Trace, home: list[int], models_of) -> tuple:
    models = models_of(8, all_to_all="nccl")
    layers = trace.num_layers
    row = np.arange(64, dtype=np.int32)
    placement = Placement(np.tile(row, (layers, 1)), 8, 1, 64)
    models = Models(
        models.cluster, models.step, models.links, models.exchange,
        HomeModel(models.cluster, load_model("debian-moe"), tuple(range(layers))),
    )  # fmt: skip
    count = trace.num_tokens
    batch = Batches(np.arange(count), np.array([0, count]), "decode", count)
    return coherent_work(models, trace, batch, placement, np.array(home, np.int32)), models


def test_tokens_stay_with_their_expert(models_of) -> None:
    """Top-1, 8 experts per GPU. A token of GPU 0 chooses experts 9, 10, 33 in three layers: it goes
    to GPU 1, stays there, goes to GPU 4; nothing comes back (one all-to-all, none in layer 1)."""
    (work, routed), _ = coherent(toy([[[9], [10], [33]]]), [0], models_of)
    moves = [tuple(np.argwhere(layer)[0]) if layer.any() else None for layer in routed.messages[0]]
    assert moves == [(0, 1), None, (1, 4)]
    assert all(s.link_bytes.sum() == 0 for s in work.chunks[0].combine)
    assert work.home.attention_us[:, [0, 1, 4]].argmax(axis=1).tolist() == [0, 1, 1]
    assert routed.slot_tokens.sum() == 3


def test_several_experts_meet_at_the_leader(models_of) -> None:
    """Top-2 with gates: experts 9 (0.3) and 40 (0.7). From GPU 0 to GPUs 1 and 5; the result of GPU
    1 goes to GPU 5, where the token goes on with expert 41 on the spot and 0 on GPU 0, which comes
    back to GPU 5."""
    trace = toy([[[9, 40], [41, 0]]], [[[0.3, 0.7], [0.9, 0.1]]])
    (work, routed), _ = coherent(trace, [0], models_of)
    sent = [sorted(map(tuple, np.argwhere(layer).tolist())) for layer in routed.messages[0]]
    assert sent == [[(0, 1), (0, 5)], [(5, 0)]]
    back = work.chunks[0].combine[0].link_bytes[0]
    assert (back.sum(axis=1) > 0).all()


def test_coherent_serves_every_choice(trace, batches, models_of, linear_of) -> None:
    """INV-1 and INV-3 on a real step; and with one expert per token half of the messages are saved
    at the least: no combine."""
    models = models_of(8, all_to_all="nccl")
    placement = linear_of(models)
    batch = one_batch(batches, 0)
    home = home_ranks(trace, batch, 8)
    _, routed = coherent_work(models, trace, batch, placement, home)
    assert routed.slot_tokens.sum() == len(batch.token_idx) * 3 * 8
    result = run_event(models, ContextCoherent(), trace, batches, placement)
    plain = run_event(models, Sequential(), trace, batches, placement)
    assert result.tokens.tolist() == plain.tokens.tolist()
    assert result.parts_us.shape == plain.parts_us.shape
    top1 = Trace(
        trace.expert_ids[:, :, :1], trace.request_ids, trace.positions, trace.phases,
        TraceMeta("debian-moe", 64, 1, (0, 1, 2)),
    )  # fmt: skip
    stay = run_event(models, ContextCoherent(), top1, batches, placement)
    go_home = run_event(models, Sequential(), top1, batches, placement)
    gathered = gather_flow(models, 256).bytes.sum() * len(batches)
    assert stay.link_bytes.sum() - gathered < 0.55 * go_home.link_bytes.sum()


def test_gather_is_a_ring(models_of) -> None:
    """8 GPUs, 256 tokens of 768 x 2 bytes: each sends 7/8 of 393,216 bytes on, over its up and its
    neighbour's down link."""
    flow = gather_flow(models_of(8, all_to_all="nccl"), 256)
    assert len(flow.link_idx) == 16
    assert flow.bytes.tolist() == pytest.approx([256 * 768 * 2 * 7 / 8] * 16)


def test_coherent_refuses(trace, batches, models_of, linear_of) -> None:
    models = models_of(16, all_to_all="deepep")
    with pytest.raises(InputError, match="deepep"):
        run_event(models, ContextCoherent(), trace, batches, linear_of(models))
    models = models_of(8, all_to_all="nccl")
    prefill = Batches(batches.token_idx, batches.indptr, "prefill", 256)
    with pytest.raises(InputError, match="decode"):
        run_event(models, ContextCoherent(), trace, prefill, linear_of(models))


def test_reduced_messages(trace, batches, linear_of, models_of) -> None:
    """BigMac with r = 1/4: a quarter of the bytes, experts of a quarter of the hidden size and four
    times the width, so of the same weights and operations, projections added; both fidelities
    agree (INV-8)."""
    cluster, model = load_cluster("h100-sxm-ib", 8), load_model("debian-moe")
    step, links, exchange = build_exchange(None, cluster, model, reduce=0.25, phase="decode")
    home = HomeModel(cluster, model, (0, 1, 2), reduce=0.25)
    models = Models(cluster, step, links, exchange, home)
    whole = models_of(8)
    a = run_analytic(models, trace, batches, linear_of(models))
    b = run_event(models, Sequential(), trace, batches, linear_of(models))
    full = run_analytic(whole, trace, batches, linear_of(whole))
    np.testing.assert_allclose(a.step_us, b.step_us, rtol=1e-12)
    np.testing.assert_allclose(a.parts_us, b.parts_us, rtol=1e-9)
    np.testing.assert_allclose(a.link_bytes, full.link_bytes / 4)
    shape = step.hidden_size, step.intermediate_size
    assert shape == (whole.step.hidden_size / 4, whole.step.intermediate_size * 4)
    assert a.breakdown_us()["compute"] == pytest.approx(full.breakdown_us()["compute"])
    assert a.breakdown_us()["dense"] > full.breakdown_us()["dense"]
    assert a.breakdown_us()["dispatch"] < full.breakdown_us()["dispatch"]


def test_refused_exchanges() -> None:
    cluster, model = load_cluster("h100-sxm-ib", 8), load_model("debian-moe")
    with pytest.raises(UnknownNameError, match="deepp"):
        build_exchange("deepp", cluster, model)
    for name in ("two-level", "bi-level"):
        with pytest.raises(InputError, match="one node"):
            build_exchange(name, cluster, model)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="reduced"):
            build_exchange(None, cluster, model, reduce=share)
    assert "deepep_ll" in NAMES
