"""Vertices and directed links of a cluster, and the indices that routing needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.cluster.types import LINK_CLASSES
from moesim.types import FloatArray, IntArray

if TYPE_CHECKING:
    import networkx as nx


NVSWITCH, PCIE_TREE, NO_PEER = range(3)
"""Codes of `Fabric.peer_of_node`: how the GPUs of one node reach each other."""

# fmt: off
_PER_GPU = (
    "gpu_uid", "gpu_vertex", "node_of_gpu", "nv_up", "nv_down", "pcie_up", "pcie_down",
    "rc_of_gpu", "nic_of_gpu", "to_nic", "from_nic", "port_of_gpu",
)
# fmt: on


@dataclass(frozen=True, eq=False)
class Fabric:
    """Links in parallel arrays, and what each GPU, root complex, NIC and leaf attaches to.

    A link id of -1 means that there is none. `to_nic` and `from_nic` [G, w] hold the whole path
    between a GPU and its NIC, padded with -1. `spine_up` and `spine_down` are [leaves, spines].
    `socket_key` (sorted, host_a * num_hosts + host_b) and `socket_link` are the links between the
    hosts of a node. The GPUs of a node that sit on a leaf are
    `relay_gpu[relay_indptr[i]:relay_indptr[i + 1]]`, where `relay_key[i]` is node * num_leaves +
    leaf (sorted); `port_of_gpu` numbers the GPUs of a leaf. `gpu_uid` follows a GPU through
    `relabel` and seeds its ECMP hash.
    """

    vertices: tuple[str, ...]
    vertex_node: IntArray
    link_src: IntArray
    link_dst: IntArray
    link_gb_per_s: FloatArray
    link_latency_us: FloatArray
    link_class: NDArray[np.int8]
    gpu_uid: IntArray
    gpu_vertex: IntArray
    node_of_gpu: IntArray
    peer_of_node: IntArray
    nv_up: IntArray
    nv_down: IntArray
    pcie_up: IntArray
    pcie_down: IntArray
    rc_of_gpu: IntArray
    bridge_up: IntArray
    bridge_down: IntArray
    host_of_rc: IntArray
    socket_key: IntArray
    socket_link: IntArray
    dram_write: IntArray
    dram_read: IntArray
    nvme_write: IntArray
    nvme_read: IntArray
    nic_of_gpu: IntArray
    to_nic: IntArray
    from_nic: IntArray
    leaf_of_nic: IntArray
    leaf_up: IntArray
    leaf_down: IntArray
    spine_up: IntArray
    spine_down: IntArray
    port_of_gpu: IntArray
    relay_key: IntArray
    relay_indptr: IntArray
    relay_gpu: IntArray
    relays: bool
    ecmp_seed: int
    message_intra_node_us: float
    message_inter_node_us: float
    message_host_us: float

    @property
    def num_gpus(self) -> int:
        return len(self.gpu_uid)

    @property
    def num_hosts(self) -> int:
        return len(self.dram_read)

    @cached_property
    def link_name(self) -> tuple[str, ...]:
        """`source->target` of every link."""
        names = self.vertices
        pairs = zip(self.link_src.tolist(), self.link_dst.tolist(), strict=True)
        return tuple(f"{names[a]}->{names[b]}" for a, b in pairs)

    @cached_property
    def graph(self) -> nx.DiGraph:
        """The links as a networkx graph; see `Cluster.graph`."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        for name, node in zip(self.vertices, self.vertex_node.tolist(), strict=True):
            graph.add_node(name, kind=name.partition(":")[0], node=node if node >= 0 else None)
        names = self.vertices
        for link, (a, b) in enumerate(zip(self.link_src, self.link_dst, strict=True)):
            graph.add_edge(
                names[a],
                names[b],
                link_idx=link,
                gb_per_s=float(self.link_gb_per_s[link]),
                latency_us=float(self.link_latency_us[link]),
                link_class=LINK_CLASSES[self.link_class[link]],
            )
        return nx.freeze(graph)

    def relabelled(self, order: IntArray) -> Fabric:
        """GPU i of the result is GPU `order[i]` of this fabric; every link keeps its index."""
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        vertices = list(self.vertices)
        for new_idx, vertex in enumerate(self.gpu_vertex[order].tolist()):
            vertices[vertex] = f"gpu:{new_idx}"
        return replace(
            self,
            vertices=tuple(vertices),
            relay_gpu=inverse[self.relay_gpu],
            **{name: getattr(self, name)[order] for name in _PER_GPU},
        )
