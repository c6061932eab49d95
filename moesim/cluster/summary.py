"""A cluster in a few numbers: what it is made of, its links by class, its routes by kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesim.cluster.core import Cluster
from moesim.cluster.routes import MAX_ROUTED_GPUS
from moesim.cluster.types import LINK_CLASSES


@dataclass(frozen=True)
class LinkGroup:
    """Directed links of one class, bandwidth and latency."""

    link_class: str
    num_links: int
    gb_per_s: float
    latency_us: float
    example: str


@dataclass(frozen=True)
class RouteGroup:
    """Ordered GPU pairs whose routes have the same length, narrowest link and latency."""

    num_pairs: int
    hops: int
    gb_per_s: float
    latency_us: float
    example: tuple[str, ...]


def link_groups(cluster: Cluster) -> list[LinkGroup]:
    """Links grouped by class, bandwidth and latency, classes in the order of LINK_CLASSES."""
    fabric = cluster.fabric
    rows: dict[tuple[int, float, float], list[int]] = {}
    for link, key in enumerate(
        zip(
            fabric.link_class.tolist(),
            fabric.link_gb_per_s.tolist(),
            fabric.link_latency_us.tolist(),
            strict=True,
        )
    ):
        rows.setdefault(key, []).append(link)
    return [
        LinkGroup(LINK_CLASSES[code], len(links), rate, latency, fabric.link_name[links[0]])
        for (code, rate, latency), links in sorted(rows.items(), key=lambda row: row[0])
    ]


def route_groups(cluster: Cluster) -> list[RouteGroup]:
    """Routes grouped by hops, bandwidth and latency, shortest first.

    Empty for more GPUs than a route table holds.
    """
    if cluster.num_gpus > MAX_ROUTED_GPUS:
        return []
    table = cluster.routes()
    keys = np.stack([table.hops, table.latency_us, table.gb_per_s], axis=-1).reshape(-1, 3)
    unique, first, counts = np.unique(keys, axis=0, return_index=True, return_counts=True)
    groups = []
    for (hops, latency, rate), row, count in zip(unique, first.tolist(), counts, strict=True):
        if hops == 0:
            continue
        links = table.links(*divmod(row, cluster.num_gpus))
        names = [table.link_name[link].split("->") for link in links.tolist()]
        path = (names[0][0], *(target for _, target in names))
        groups.append(RouteGroup(int(count), int(hops), float(rate), float(latency), path))
    return groups


def vertex_counts(cluster: Cluster) -> dict[str, int]:
    """Number of vertices of each kind (`gpu`, `nvswitch`, `pcie`, `nic`, `leaf`, ...)."""
    return dict(Counter(name.partition(":")[0] for name in cluster.fabric.vertices))


def describe(cluster: Cluster) -> dict[str, Any]:
    """Everything `moesim topology show --json` prints, as plain values."""
    basis = cluster.basis()
    spec_of = {gpu.name: gpu for gpu in cluster.gpus}
    hosts = cluster.host_routes()
    slow = np.flatnonzero(cluster.speed_factor != 1.0).tolist()
    return {
        "name": cluster.name,
        "description": cluster.description,
        "num_gpus": cluster.num_gpus,
        "num_nodes": cluster.num_nodes,
        "gpus_of_node": np.bincount(cluster.node_of_gpu).tolist(),
        "network_type": cluster.network_type,
        "nic_type": cluster.nic_type,
        "calibration": cluster.calibration,
        "cluster_hash": cluster.cluster_hash(),
        "vertices": vertex_counts(cluster),
        "gpu_types": [
            {
                "name": name,
                "title": spec_of[name].title,
                "num_gpus": count,
                "hbm_gb": spec_of[name].hbm_gb,
                "hbm_gb_per_s": spec_of[name].hbm_gb_per_s,
                "tflops": dict(spec_of[name].tflops),
                "nvlink_gb_per_s": spec_of[name].nvlink_gb_per_s,
                "pcie_gb_per_s": spec_of[name].pcie_gb_per_s,
                "kernel_launch_us": spec_of[name].kernel_launch_us,
                "price_usd_per_hour": spec_of[name].price_usd_per_hour,
            }
            for name, count in Counter(gpu.name for gpu in cluster.gpus).items()
        ],
        "speed_factors": {str(gpu): float(cluster.speed_factor[gpu]) for gpu in slow},
        "hosts": {
            "num_hosts": len(cluster.host_dram_gb),
            "dram_gb": sorted(set(cluster.host_dram_gb.tolist())),
            "nvme_gb": sorted(set(cluster.host_nvme_gb.tolist())),
            "dram_to_gpu_gb_per_s": sorted(set(hosts.dram_to_gpu.gb_per_s.tolist())),
            "nvme_to_gpu_gb_per_s": sorted(set(hosts.nvme_to_gpu.gb_per_s.tolist()))
            if hosts.nvme_to_gpu is not None
            else [],
        },
        "links": [asdict(group) for group in link_groups(cluster)],
        "routes": [asdict(group) for group in route_groups(cluster)],
        "basis": {
            "kind": basis.kind,
            "blocks": [
                {
                    "where": block.where,
                    "role": block.role,
                    "kind": block.kind,
                    "source": block.source,
                    "figures": dict(block.figures),
                }
                for block in cluster.blocks
            ],
        },
    }
