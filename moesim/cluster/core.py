"""The cluster that solvers, costs and simulations see."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from moesim.cluster.fabric import Fabric
from moesim.cluster.machine import Host, Machine
from moesim.cluster.routes import host_routes, route_table
from moesim.cluster.types import KINDS, LINK_CLASSES, Basis, BasisBlock, GpuSpec
from moesim.errors import InputError

if TYPE_CHECKING:
    import networkx as nx

    from moesim.cluster.types import HostRoutes, RouteTable

DEFAULT_ROLES = ("gpu", "fabric", "network", "latency")
"""Roles of the figures that the time of an all-resident MoE step rests on."""


_ROUTES: WeakKeyDictionary[Fabric, RouteTable] = WeakKeyDictionary()
_HOST_ROUTES: WeakKeyDictionary[Fabric, HostRoutes] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Cluster:
    """A cluster of `num_gpus` GPUs (G) in `num_nodes` nodes (N).

    `gpus` has one GpuSpec a GPU; `speed_factor` float64[G] multiplies a GPU's compute and HBM rates
    (1 nominal, 0.5 half as fast; links are not affected); `node_of_gpu` int64[G]; `local_rank`
    int64[G] counts within the node; `host_of_gpu` int64[G] names the host (NUMA domain) whose DRAM
    and NVMe the GPU uses, and `host_dram_gb`, `host_nvme_gb` float64[hosts] their capacities (0
    where there is no NVMe). `calibration` names a calibration table or its file, or is None.
    `nic_gb_per_s` is a GPU's share of its NIC, of the node where it is least, also where the
    cluster is one node without a network; None without NICs. `machine`: what it was made from,
    where that was a machine.
    Equality is identity; compare `cluster_hash()`.
    """

    name: str
    description: str
    num_gpus: int
    num_nodes: int
    gpus: tuple[GpuSpec, ...]
    speed_factor: NDArray[np.float64]
    node_of_gpu: NDArray[np.int64]
    local_rank: NDArray[np.int64]
    host_of_gpu: NDArray[np.int64]
    host_dram_gb: NDArray[np.float64]
    host_nvme_gb: NDArray[np.float64]
    calibration: str | None
    network_type: str
    nic_type: str
    fabric: Fabric
    blocks: tuple[BasisBlock, ...]
    nic_gb_per_s: float | None = None
    machine: Machine | None = None

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(gpu.name for gpu in self.gpus))
        return f"<Cluster: {self.name}, {self.num_gpus} x {kinds}, {self.num_nodes} node(s)>"

    def __post_init__(self) -> None:
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    @property
    def graph(self) -> nx.DiGraph:
        """networkx DiGraph, read-only, built on first use.

        Vertices `gpu:3`, `nvswitch:0` (node), `pcie:0:1` (node, root complex), `nic:3`, `leaf:2`,
        `spine:1`, `host:0`, `dram:0`, `nvme:0`, with `kind` and `node`. Edges have `link_idx` (the
        index in RouteTable), `gb_per_s`, `latency_us` and `link_class`.
        """
        return self.fabric.graph

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a node. Raises InputError where nodes differ in size."""
        sizes = set(np.bincount(self.node_of_gpu).tolist())
        if len(sizes) != 1:
            raise InputError(
                f"the nodes of {self.name} have different numbers of GPUs",
                "use a cluster of equal nodes here",
            )
        return sizes.pop()

    def routes(self) -> RouteTable:
        """Links that a byte crosses between every two GPUs (computed once).

        Raises InputError for more than 4,096 GPUs, whose table would not fit in memory.
        """
        if self.fabric not in _ROUTES:
            _ROUTES[self.fabric] = route_table(self.fabric)
        return _ROUTES[self.fabric]

    def host_routes(self) -> HostRoutes:
        """Paths between every GPU and its host's DRAM and NVMe (computed once)."""
        if self.fabric not in _HOST_ROUTES:
            _HOST_ROUTES[self.fabric] = host_routes(self.fabric)
        return _HOST_ROUTES[self.fabric]

    def bandwidth_matrix(self) -> NDArray[np.float64]:
        """float64[G, G]: narrowest link from row to column in GB/s; inf on the diagonal.

        One flow alone: sharing is for the cost and the simulation to say.
        """
        return self.routes().gb_per_s

    def hop_matrix(self) -> NDArray[np.int64]:
        """int64[G, G]: links crossed from row to column; 0 on the diagonal."""
        return self.routes().hops

    def with_speed(self, gpu_idx: int, factor: float) -> Cluster:
        """A copy in which GPU `gpu_idx` computes and reads HBM at `factor` of its nominal rates.

        Raises InputError for an index out of range, or a factor that is not finite and positive.
        """
        if not 0 <= gpu_idx < self.num_gpus:
            raise InputError(
                f"no GPU {gpu_idx} in {self.name}", f"GPUs are 0 to {self.num_gpus - 1}"
            )
        if not (math.isfinite(factor) and factor > 0):
            raise InputError(
                f"speed factor {factor} of GPU {gpu_idx}",
                "give a finite factor above 0; 1 is nominal",
            )
        speed = self.speed_factor.copy()
        speed[gpu_idx] = factor
        return replace(self, speed_factor=speed)

    def relabel(self, permutation: Sequence[int] | NDArray[np.int64]) -> Cluster:
        """The same hardware under other labels: GPU i of the result is GPU `permutation[i]`.

        A GPU keeps its NIC, rail, host, speed and routes; link indices stay, and nodes are numbered
        in order of first appearance. So routes(new)[i, j] == routes(old)[p[i], p[j]] (INV-5).
        Raises InputError unless `permutation` is one of 0..G-1.
        """
        order = np.asarray(permutation, dtype=np.int64)
        if order.shape != (self.num_gpus,) or not np.array_equal(
            np.sort(order), np.arange(self.num_gpus)
        ):
            raise InputError(
                f"not a permutation of the {self.num_gpus} GPUs of {self.name}",
                f"give every number of 0 to {self.num_gpus - 1} once",
            )
        old_nodes = self.node_of_gpu[order]
        appearance = {old: new for new, old in enumerate(dict.fromkeys(old_nodes.tolist()))}
        return replace(
            self,
            gpus=tuple(self.gpus[i] for i in order.tolist()),
            speed_factor=self.speed_factor[order],
            node_of_gpu=np.array([appearance[n] for n in old_nodes.tolist()], dtype=np.int64),
            local_rank=self.local_rank[order],
            host_of_gpu=self.host_of_gpu[order],
            fabric=self.fabric.relabelled(order),
        )

    def basis(self, roles: Sequence[str] = DEFAULT_ROLES) -> Basis:
        """The weakest kind among the figures that a prediction rests on, and their blocks.

        `roles` picks the blocks: add `host` for offloading and `price` for money. The network
        counts only where some route uses it. Calibration tables have their own basis.
        """
        used = set(roles)
        if not (self.fabric.leaf_of_nic >= 0).any():
            used.discard("network")
        blocks = tuple(block for block in self.blocks if block.role in used)
        weakest = min((KINDS.index(block.kind) for block in blocks), default=len(KINDS) - 1)
        return Basis(KINDS[weakest], blocks)

    def cluster_hash(self) -> str:
        """sha256 (hex) of everything that can change a result: links, GPUs, speeds, routing rules.

        Names of files, descriptions, sources and kinds do not count; the calibration's name does.
        """
        fabric = self.fabric
        content: dict[str, Any] = {
            "version": 1,
            "links": [
                [name, rate, latency, LINK_CLASSES[code]]
                for name, rate, latency, code in zip(
                    fabric.link_name,
                    fabric.link_gb_per_s.tolist(),
                    fabric.link_latency_us.tolist(),
                    fabric.link_class.tolist(),
                    strict=True,
                )
            ],
            "gpu_types": {gpu.name: _figures(gpu) for gpu in dict.fromkeys(self.gpus)},
            "gpus": [gpu.name for gpu in self.gpus],
            "speed_factor": self.speed_factor.tolist(),
            "node_of_gpu": self.node_of_gpu.tolist(),
            "local_rank": self.local_rank.tolist(),
            "gpu_uid": fabric.gpu_uid.tolist(),
            "host_of_gpu": self.host_of_gpu.tolist(),
            "host_dram_gb": self.host_dram_gb.tolist(),
            "host_nvme_gb": self.host_nvme_gb.tolist(),
            "peer_of_node": fabric.peer_of_node.tolist(),
            "relays": fabric.relays,
            "ecmp_seed": fabric.ecmp_seed,
            "message_us": [
                fabric.message_intra_node_us,
                fabric.message_inter_node_us,
                fabric.message_host_us,
            ],
            "nic_type": self.nic_type,
            "calibration": self.calibration and Path(self.calibration).name,
        }
        if self.machine is not None:
            content["host"] = _host_figures(self.machine.host)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _host_figures(host: Host) -> list[Any]:
    return [
        host.dram_gb_per_s,
        host.sockets,
        host.cores,
        host.ghz,
        host.vectors,
        host.unified,
        host.kernels,
        host.nvme_gb_per_s,
    ]


def _figures(gpu: GpuSpec) -> list[Any]:
    return [
        gpu.hbm_gb,
        gpu.hbm_gb_per_s,
        sorted(gpu.tflops.items()),
        gpu.nvlink_gb_per_s,
        gpu.pcie_gb_per_s,
        gpu.kernel_launch_us,
        gpu.price_usd_per_hour,
    ]
