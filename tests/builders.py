"""Small traces, placements, clusters and calibrations that the core's tests are built from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from moesim.cluster import Cluster, load_cluster
from moesim.cost.calibration import Calibration
from moesim.cost.collective import KINDS, CollectiveCurve, CollectiveModel
from moesim.cost.curves import AffineMin
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.model.names import AttentionSpec, ModelSpec
from moesim.placement import Placement
from moesim.trace.batches import Batches
from moesim.trace.format import Trace, TraceMeta

IntArray = npt.NDArray[np.int64]
_ORIGIN = {"kind": "assumed", "source": "test"}


def make_trace(
    ids: Any,
    num_experts: int,
    *,
    request_ids: Any = None,
    rank_ids: Any = None,
    phases: Any = None,
    domain_ids: Any = None,
    domains: tuple[str, ...] = (),
    model: str = "toy",
) -> Trace:
    """A trace of `ids` [T, L, K], by default one request of prefill tokens."""
    chosen = np.ascontiguousarray(ids, np.int16)
    tokens, layers, top_k = chosen.shape
    requests = np.asarray(np.zeros(tokens) if request_ids is None else request_ids, np.int32)
    starts = np.concatenate(([True], requests[1:] != requests[:-1])) if tokens else np.ones(0, bool)
    first = np.maximum.accumulate(np.where(starts, np.arange(tokens), 0))
    return Trace(
        expert_ids=chosen,
        request_ids=requests,
        positions=(np.arange(tokens) - first).astype(np.int32),
        phases=np.asarray(np.zeros(tokens) if phases is None else phases, np.uint8),
        meta=TraceMeta(model, num_experts, top_k, tuple(range(layers)), domains),
        rank_ids=None if rank_ids is None else np.asarray(rank_ids, np.int32),
        domain_ids=None if domain_ids is None else np.asarray(domain_ids, np.int16),
    )


def random_trace(
    rng: np.random.Generator,
    tokens: int,
    layers: int,
    experts: int,
    top_k: int,
    *,
    missing: float = 0.0,
    request_tokens: int = 8,
    skew: float = 1.0,
    **changes: Any,
) -> Trace:
    """Distinct experts a token, Zipf-like popularity, a share `missing` of choices left out."""
    popularity = np.stack([rng.permutation(np.arange(1, experts + 1)) for _ in range(layers)])
    noise = rng.gumbel(size=(tokens, layers, experts))
    ids = np.argsort(-(noise - skew * np.log(popularity)), axis=2)[:, :, :top_k].astype(np.int16)
    ids[rng.random(ids.shape) < missing] = -1
    return make_trace(ids, experts, request_ids=np.arange(tokens) // request_tokens, **changes)


def random_placement(
    rng: np.random.Generator, layers: int, experts: int, gpus: int, nodes: int, per_gpu: int
) -> Placement:
    """A random placement with `gpus * per_gpu - experts` replicas, none twice on a GPU."""
    table = np.empty((layers, gpus, per_gpu), np.int32)
    for layer in range(layers):
        order = np.resize(rng.permutation(experts), gpus * per_gpu)
        table[layer] = rng.permutation(order.reshape(gpus, per_gpu))
        for row in table[layer]:
            rng.shuffle(row)
    return Placement(table.reshape(layers, -1), gpus, nodes, experts)


def cut(trace: Trace, *sizes: int) -> Batches:
    """Consecutive batches of `sizes` tokens."""
    indptr = np.concatenate(([0], np.cumsum(sizes)))
    return Batches(np.arange(indptr[-1]), indptr, "prefill", max(sizes))


def small_cluster(
    nodes: int = 2,
    per_node: int = 2,
    *,
    nvlink: float = 100.0,
    nic: float = 50.0,
    slot: float = 64.0,
    network: dict[str, Any] | None = None,
    fabric: str = "nvswitch",
    **group: Any,
) -> Cluster:
    """`nodes` nodes of `per_node` equal GPUs on one switch, every rate as given."""
    gpu = {
        "name": "toy-gpu",
        "title": "toy",
        "memory": {"hbm_gb": 80, "hbm_gb_per_s": 1000, **_ORIGIN},
        "compute": {"bf16_tflops": 10, **_ORIGIN},
        "links": {"nvlink_gb_per_s": nvlink, "pcie_gb_per_s": slot, **_ORIGIN},
        "launch": {"kernel_launch_us": 1, **_ORIGIN},
        "price": {"price_usd_per_hour": 1, **_ORIGIN},
    }
    content = {
        "format": "moesim-cluster",
        "version": 1,
        "name": "toy",
        "gpu_specs": [gpu],
        "nodes": [
            {
                "count": nodes,
                "gpus_per_node": per_node,
                "gpu": "toy-gpu",
                "fabric": fabric,
                "pcie": {"root_complexes": per_node, "host_bridge_gb_per_s": slot, **_ORIGIN},
                "host": {"hosts_per_node": 1, "dram_gb": 100, "dram_gb_per_s": 200, **_ORIGIN},
                "nics": {"type": "infiniband", "gb_per_s": nic, "slot_gb_per_s": slot, **_ORIGIN},
                **group,
            }
        ],
        "network": {
            "type": "single-switch",
            "leaf_down_ports": nodes * per_node,
            "port_gb_per_s": 400,
            **(network or {}),
            **_ORIGIN,
        },
        "latency": {
            **dict.fromkeys(("nvlink_us", "pcie_us", "nic_us", "leaf_spine_us"), 1),
            **dict.fromkeys(("host_us", "nvme_us", "message_intra_node_us"), 1),
            **dict.fromkeys(("message_inter_node_us", "message_host_us"), 1),
            **_ORIGIN,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_cluster(path)


def toy_calibration(
    *,
    nvlink: Sequence[tuple[float, float]] = ((10.0, 1.0),),
    nic: Sequence[tuple[float, float]] = ((20.0, 0.5),),
    group_size: int = 4,
    num_nodes: int = 2,
) -> Calibration:
    """Every collective is max(10 us + bytes / 1 GB/s, 20 us + NIC bytes / 0.5 GB/s) by default.

    An expert of n tokens takes weights / 1000 GB/s + n x flops / 10 TFLOPS, a layer's launch 5 us.
    """
    across = AffineMin(tuple(nic)) if num_nodes > 1 else None
    curves = [
        CollectiveCurve(kind, group_size, num_nodes, AffineMin(tuple(nvlink)), across)
        for kind in KINDS
    ]
    expert = ExpertGemmModel("bf16", "toy", 2.0, 5.0, 1000.0, 10.0, sharpness=1.0)
    return Calibration("toy", "toy-gpu", CollectiveModel(curves), {("bf16", "toy"): expert}, {})


def toy_model(layers: int, experts: int, top_k: int, **changes: Any) -> ModelSpec:
    """Hidden size 1,000 and experts of 100: 2,000 bytes a message, 600,000 bytes an expert."""
    sizes: dict[str, Any] = {"hidden_size": 1000, "moe_intermediate_size": 100, **changes}
    return ModelSpec(
        name="toy",
        source="test",
        num_hidden_layers=layers,
        moe_layer_ids=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        vocab_size=100,
        attention=AttentionSpec("gqa", 4, 4, 16),
        **sizes,
    )
