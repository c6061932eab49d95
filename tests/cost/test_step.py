"""The analytic step cost: by hand, link by link, and over kinds of GPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moesim.cluster import Cluster, load_cluster
from moesim.cost.routing import Routed, route
from moesim.cost.step import NIC, NVLINK, OTHER, StepModel, build_step_model
from moesim.errors import MismatchError, UnknownNameError
from moesim.model.names import load_model
from moesim.placement import Placement

PLACEMENT = Placement(np.array([[0, 5, 1, 2, 3, 4, 0, 5]], np.int32), 4, 2, 6)


def routed_by_hand(build: ModuleType, dedup: Any) -> Routed:
    """The four tokens worked out in test_routing."""
    trace = build.make_trace([[[1, 2]], [[3, 4]], [[4, 0]], [[0, 3]]], 6)
    home = np.array([1, 1, 0, 0], np.int32)
    return route(trace, build.cut(trace, 4), PLACEMENT, dedup=dedup, home=home)


def toy_step(build: ModuleType, cluster: Cluster, **options: Any) -> StepModel:
    options.setdefault("calibration", build.toy_calibration())
    return build_step_model(cluster, build.toy_model(1, 6, 2), **options)


def only(num_gpus: int, rows: dict[tuple[int, int], int]) -> Routed:
    """One batch and layer with the given messages and no expert work."""
    sent = np.zeros((1, 1, num_gpus, num_gpus), np.int32)
    for pair, count in rows.items():
        sent[0, 0][pair] = count
    none = np.zeros((1, 1), np.int64)
    return Routed(np.zeros((1, 1, num_gpus), np.int32), sent, none, none, np.ones(1, np.int64))


def test_layer_by_hand_dedup_gpu(build: ModuleType) -> None:
    step = toy_step(build, build.small_cluster(), all_to_all="nccl")
    assert step.dedup == "gpu"
    cost = step.cost(routed_by_hand(build, "gpu"))
    # Messages 1->2: 1, 0->2: 2, 0->3: 1, each 1,000 x 2 bytes. The busiest NIC link carries
    # 3 x 2,000 bytes: 20 us + 6,000 B / 0.5 GB/s = 20 + 12 = 32 us. NVLink carries none: 10 us.
    # The way back is the mirror image.
    assert cost.dispatch_us.tolist() == [[pytest.approx(32.0)]]
    assert cost.combine_us.tolist() == [[pytest.approx(32.0)]]
    # An expert of n tokens: 3 x 1,000 x 100 x 2 B / 1,000 GB/s = 0.6 us for its weights, and
    # n x 6 x 1,000 x 100 flop / 10 TFLOPS = 0.06 n us. A layer's launch is 5 us.
    # GPU 0: one expert of 1; GPU 1: two of 1; GPU 2: two of 2; GPU 3: one of 1.
    want = [5 + 0.66, 5 + 2 * 0.66, 5 + 2 * 0.72, 5 + 0.66]
    assert cost.compute_us[0, 0] == pytest.approx(want)
    assert cost.layer_us[0, 0] == pytest.approx(32 + 6.44 + 32)
    assert cost.step_us == pytest.approx(cost.layer_us.sum(axis=1))


def test_layer_by_hand_dedup_node(build: ModuleType) -> None:
    step = toy_step(build, build.small_cluster(), all_to_all="deepep")
    assert step.dedup == "node"
    cost = step.cost(routed_by_hand(build, "node"))
    # 0->2: 2 and 1->3: 1 over NICs, 3->2 and 2->3: 1 each over NVLink.
    # NIC 20 + 4,000 / 500 = 28 us, NVLink 10 + 2,000 / 1,000 = 12 us: the larger.
    assert cost.dispatch_us[0, 0] == pytest.approx(28.0)
    assert cost.combine_us[0, 0] == pytest.approx(28.0)


def test_element_sizes(build: ModuleType) -> None:
    """fp8 has one byte an element and one float32 scale for 128 elements (C2)."""
    step = toy_step(build, build.small_cluster(), all_to_all="nccl", dispatch_dtype="fp8")
    assert step.dispatch_bytes == 1000 * (1 + 4 / 128)
    assert step.combine_bytes == 2000
    cost = step.cost(routed_by_hand(build, "gpu"))
    assert cost.dispatch_us[0, 0] == pytest.approx(20 + 3 * 1031.25 / 500)
    assert cost.combine_us[0, 0] == pytest.approx(32.0)


@pytest.mark.parametrize(
    ("library", "expert_dtype", "size"),
    [("nccl", "fp8", 2.0), ("deepep", "fp8", 1 + 4 / 128), ("deepep", "mxfp4", 2.0)],
)
def test_deepep_sends_fp8_rows_to_fp8_experts(
    build: ModuleType, library: str, expert_dtype: str, size: float
) -> None:
    cluster = load_cluster("h100-sxm-ib", 16)
    model = load_model("DeepSeek-V3")
    step = build_step_model(cluster, model, all_to_all=library, expert_dtype=expert_dtype)  # type: ignore[arg-type]
    assert (step.dispatch_bytes, step.combine_bytes) == (7168 * size, 7168 * 2.0)
    assert ("rows dispatched in fp8" in step.notes[0]) == (size < 2)


def test_slow_gpu_computes_slower(build: ModuleType) -> None:
    cluster = build.small_cluster().with_speed(2, 0.5)
    cost = toy_step(build, cluster, all_to_all="nccl").cost(routed_by_hand(build, "gpu"))
    # 1.44 us of experts at half speed, the launch as before.
    assert cost.compute_us[0, 0, 2] == pytest.approx(5 + 2.88)
    assert cost.compute_us[0, 0, 3] == pytest.approx(5.66)
    assert cost.dispatch_us[0, 0] == pytest.approx(32.0)


def test_experts_of_two_matrices(build: ModuleType) -> None:
    """Without a gate projection an expert has two thirds of the weights and operations."""
    model = build.toy_model(1, 6, 2, ffn_matrices=2)
    step = build_step_model(build.small_cluster(), model, calibration=build.toy_calibration())
    assert step.expert_tables_us(2)[0] == pytest.approx([0, 0.44, 0.48])


def test_idle_layer_costs_nothing(build: ModuleType) -> None:
    trace = build.make_trace(np.full((4, 1, 2), -1), 6)
    cost = toy_step(build, build.small_cluster()).cost(
        route(trace, build.cut(trace, 4), PLACEMENT, dedup="node")
    )
    assert cost.step_us.tolist() == [0.0]


def test_eager_launches(build: ModuleType) -> None:
    """Host time is added to each collective where calls are not replayed from a CUDA graph."""
    figures = load_cluster("h100-sxm-ib", 8), load_model("Qwen3-30B-A3B")
    graph, eager = build_step_model(*figures), build_step_model(*figures, eager=True)
    messages = only(8, {(0, 1): 100})
    added = eager.cost(messages).dispatch_us - graph.cost(messages).dispatch_us
    assert added[0, 0] == pytest.approx(eager.dispatch.overhead_us)
    assert added[0, 0] > 0


def test_pcie_carries_what_has_no_nvlink(build: ModuleType) -> None:
    """Group OTHER: latency of the collective, then bytes at 85 % of the link's rate."""
    cluster = build.small_cluster(1, 2, fabric="pcie", slot=64.0)
    calibration = build.toy_calibration(group_size=2, num_nodes=1)
    step = toy_step(build, cluster, calibration=calibration, all_to_all="nccl")
    # 272 x 2,000 B / (64 GB/s x 0.85 = 54,400 B/us) = 10 us, after 10 us.
    cost = step.cost(only(2, {(0, 1): 272}))
    assert cost.dispatch_us[0, 0] == pytest.approx(20.0)
    assert not (step.link_group == NVLINK).any()


@pytest.mark.parametrize("name", ["h100-sxm-ib", "h100-sxm-roce-leafspine", "l40s-pcie"])
@pytest.mark.parametrize("dedup", ["gpu", "node", "none"])
def test_cost_link_by_link(build: ModuleType, name: str, dedup: Any) -> None:
    """The same figures from every message's own route, in plain loops."""
    cluster = load_cluster(name, 16)
    model = load_model("OLMoE-1B-7B")
    step = build_step_model(cluster, model, dedup=dedup, combine_dtype="fp16")
    rng = np.random.default_rng(1)
    trace = build.random_trace(rng, 60, 2, 20, 4)
    placement = build.random_placement(rng, 2, 20, 16, cluster.num_nodes, 2)
    routed = route(trace, build.cut(trace, 20, 40), placement, dedup=dedup)
    cost = step.cost(routed)
    routes = cluster.routes()
    for b, layer in np.ndindex(2, 2):
        sent = routed.messages[b, layer]
        way = np.zeros((2, routes.num_links))
        for src, dst in np.argwhere(sent):
            way[0, routes.links(src, dst)] += sent[src, dst] * step.dispatch_bytes
            way[1, routes.links(dst, src)] += sent[src, dst] * step.combine_bytes
        assert cost.link_bytes[b, layer] == pytest.approx(way.sum(axis=0))
        for i, (curve, got) in enumerate(
            ((step.dispatch, cost.dispatch_us), (step.combine, cost.combine_us))
        ):
            busy = {
                group: max(
                    (
                        way[i, link] * step.link_scale[link]
                        for link in np.flatnonzero(step.link_group == group)
                    ),
                    default=0.0,
                )
                for group in (NVLINK, NIC, OTHER)
            }
            time = float(curve.time_us(busy[NVLINK], busy[NIC]))
            if busy[OTHER]:
                rate = step.other_gb_per_s * 0.85 * 1000
                time = max(time, curve.latency_us + busy[OTHER] / rate)
            assert got[b, layer] == pytest.approx(time)
        for gpu in range(16):
            tokens = routed.slot_tokens[b, layer, 2 * gpu : 2 * gpu + 2]
            expert = step.experts[0].expert_time_us(tokens, 2048, 1024).sum()
            launch = step.experts[0].layer_launch_us() if tokens.any() else 0.0
            assert cost.compute_us[b, layer, gpu] == pytest.approx(expert + launch)


def test_mixed_cluster_charges_a_slow_gpu_once(build: ModuleType) -> None:
    """Between A100s, a mixed cluster costs what a cluster of A100s does; H100s are not slower."""
    model = load_model("OLMoE-1B-7B")
    mixed = load_cluster("mixed-h100-a100")
    pure = load_cluster("a100-sxm-ib")
    slow = [g for g in range(16) if mixed.gpus[g].name == "a100-sxm"]
    fast = [g for g in range(16) if mixed.gpus[g].name == "h100-sxm"]
    assert len(slow) == len(fast) == 8
    of_mixed = build_step_model(mixed, model, all_to_all="nccl")
    of_pure = build_step_model(pure, model, all_to_all="nccl")
    among = of_mixed.cost(only(16, {(slow[0], slow[1]): 5000})).dispatch_us
    assert among == pytest.approx(of_pure.cost(only(16, {(0, 1): 5000})).dispatch_us)
    faster = of_mixed.cost(only(16, {(fast[0], fast[1]): 5000})).dispatch_us
    assert (faster < among).all()
    across = of_mixed.cost(only(16, {(fast[0], slow[0]): 5000})).dispatch_us
    assert across == pytest.approx(of_pure.cost(only(16, {(0, 8): 5000})).dispatch_us)
    assert len(of_mixed.experts) == 2


def test_tables_are_the_cost_of_one_link(build: ModuleType) -> None:
    """`message_tables_us`, which solvers look up, agrees with `cost` link group by link group."""
    step = toy_step(build, build.small_cluster(), all_to_all="nccl")
    tables = step.message_tables_us(50)
    assert (tables[:, :, 0] == 0).all()
    # 3 x 2,000 B over NVLink take 10 + 6 us, but the all-to-all spans nodes: its NIC part takes
    # 20 us at least. 7 x 2,000 B over NVLink take 24 us, over a NIC 20 + 28 us.
    for pair, group, count, want in (
        ((0, 1), NVLINK, 3, 20.0),
        ((0, 1), NVLINK, 7, 24.0),
        ((0, 2), NIC, 7, 48.0),
    ):
        cost = step.cost(only(4, {pair: count}))
        assert cost.dispatch_us[0, 0] == cost.combine_us[0, 0] == pytest.approx(want)
        assert tables[:, group, count] == pytest.approx(want)


def test_one_gpu(build: ModuleType) -> None:
    cluster = load_cluster("h100-sxm-ib", 1)
    step = build_step_model(cluster, load_model("OLMoE-1B-7B"))
    trace = build.random_trace(np.random.default_rng(0), 10, 1, 4, 2)
    placement = Placement(np.arange(4, dtype=np.int32)[None], 1, 1, 4)
    cost = step.cost(route(trace, build.cut(trace, 10), placement, dedup=step.dedup))
    assert cost.dispatch_us.tolist() == [[0.0]]
    assert cost.step_us[0] == cost.compute_us[0, 0, 0] > 0


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"all_to_all": "deepep_lll"}, "unknown all-to-all library 'deepep_lll'"),
        ({"dedup": "gpus"}, "unknown deduplication 'gpus'"),
        ({"dispatch_dtype": "fp7"}, "unknown message dtype 'fp7'"),
        ({"expert_dtype": "int3"}, "'int3'"),
    ],
)
def test_unknown_names(options: dict[str, Any], cause: str) -> None:
    cluster, model = load_cluster("h100-sxm-ib", 8), load_model("OLMoE-1B-7B")
    with pytest.raises(UnknownNameError, match=cause) as caught:
        build_step_model(cluster, model, **options)
    assert caught.value.remedy


def test_other_cluster_is_a_mismatch(build: ModuleType) -> None:
    with pytest.raises(MismatchError, match="the plan has 2 GPUs, the cluster 4"):
        toy_step(build, build.small_cluster()).cost(only(2, {}))
