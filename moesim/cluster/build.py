"""From a parsed cluster file and a size to vertices and links."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moesim.cluster.fabric import NO_PEER, NVSWITCH, PCIE_TREE, Fabric
from moesim.cluster.schema import MAX_GPUS, ClusterFile, Latency, NetworkSchema, NodeGroup
from moesim.cluster.types import HOST, LEAF_SPINE, NIC, NVLINK, NVME, PCIE, GpuSpec
from moesim.errors import FormatError, InputError

_PEERS = {"nvswitch": NVSWITCH, "pcie": PCIE_TREE, "none": NO_PEER}

MAX_LINKS = 2_000_000
"""Most directed links that a cluster may have."""

# fmt: off
_COLUMNS = (
    "gpu_vertex", "node_of_gpu", "peer_of_node", "nv_up", "nv_down", "pcie_up", "pcie_down",
    "rc_of_gpu", "bridge_up", "bridge_down", "host_of_rc", "dram_write", "dram_read",
    "nvme_write", "nvme_read", "nic_of_gpu", "leaf_of_nic", "leaf_up", "leaf_down",
)
# fmt: on


@dataclass(frozen=True)
class NodePlan:
    """One node to build: its group, and how many of the group's GPUs it has (the first ones)."""

    group: NodeGroup
    num_gpus: int


def choose_nodes(file: ClusterFile, num_gpus: int | None, after: int = 0) -> list[NodePlan]:
    """Nodes for `num_gpus` GPUs: the file's nodes in order, over and over.

    None takes the file's own count. Fewer GPUs than the first node has make one partial node.
    after: nodes that hold so many GPUs come first and are left out, unless those and `num_gpus` fit
    into one node.
    Raises InputError for a size that is not a whole number of nodes, or is out of range.
    """
    pattern = [group for group in file.nodes for _ in range(group.count)]
    if num_gpus is None:
        return [NodePlan(group, group.gpus_per_node) for group in pattern]
    if not 1 <= num_gpus <= MAX_GPUS:
        raise InputError(
            f"{num_gpus:,} GPUs asked for on {file.name}", f"ask for 1 to {MAX_GPUS:,} GPUs"
        )
    held, skip = 0, 0
    while held < after and after + num_gpus > pattern[0].gpus_per_node:
        held += pattern[skip % len(pattern)].gpus_per_node
        skip += 1
    pattern = pattern[skip % len(pattern) :] + pattern[: skip % len(pattern)]
    if num_gpus < pattern[0].gpus_per_node:
        return [NodePlan(pattern[0], num_gpus)]
    nodes: list[NodePlan] = []
    total = 0
    while total < num_gpus:
        group = pattern[len(nodes) % len(pattern)]
        if total + group.gpus_per_node > num_gpus:
            raise InputError(
                f"{num_gpus} GPUs are not a whole number of {file.name} nodes",
                f"ask for {total} or {total + group.gpus_per_node} GPUs",
            )
        nodes.append(NodePlan(group, group.gpus_per_node))
        total += group.gpus_per_node
    return nodes


@dataclass
class _Links:
    """Vertices and links as they are added."""

    names: list[str] = field(default_factory=list)
    node: list[int] = field(default_factory=list)
    src: list[int] = field(default_factory=list)
    dst: list[int] = field(default_factory=list)
    gb_per_s: list[float] = field(default_factory=list)
    latency_us: list[float] = field(default_factory=list)
    code: list[int] = field(default_factory=list)

    def vertex(self, name: str, node: int = -1) -> int:
        self.names.append(name)
        self.node.append(node)
        return len(self.names) - 1

    def pair(
        self, a: int, b: int, code: int, gb_per_s: float, latency_us: float
    ) -> tuple[int, int]:
        """Add a -> b and b -> a; return their link ids."""
        if len(self.src) >= MAX_LINKS:
            raise FormatError(
                f"more than {MAX_LINKS:,} links",
                "ask for fewer GPUs, or give more leaf_down_ports, fewer spines or fewer hosts",
            )
        for src, dst in ((a, b), (b, a)):
            self.src.append(src)
            self.dst.append(dst)
            self.gb_per_s.append(gb_per_s)
            self.latency_us.append(latency_us)
            self.code.append(code)
        return len(self.src) - 2, len(self.src) - 1


class _Builder:
    def __init__(self, file: ClusterFile, label: str, num_nodes: int) -> None:
        self.file = file
        self.label = label
        self.latency: Latency = file.latency
        self.links = _Links()
        self.num_nodes = num_nodes
        self.cols: dict[str, list[int]] = {name: [] for name in _COLUMNS}
        self.sockets: dict[tuple[int, int], int] = {}
        self.to_nic: list[list[int]] = []
        self.from_nic: list[list[int]] = []
        self.rc_vertex: list[int] = []
        self.nic_vertex: list[int] = []
        self.node_of_nic: list[int] = []
        self.nic_rank: list[int] = []
        self.nic_gb_per_s: list[float] = []

    def add_node(self, node: int, plan: NodePlan, gpus: Sequence[GpuSpec]) -> None:
        group, links, cols, us = plan.group, self.links, self.cols, self.latency
        cols["peer_of_node"].append(_PEERS[group.fabric])
        per_rc = group.gpus_per_node // group.pcie.root_complexes
        rcs = range(-(-plan.num_gpus // per_rc))
        rc_base = len(self.rc_vertex)
        self._add_hosts(node, group, len(rcs), rc_base)
        switch = -1
        if group.fabric == "nvswitch":
            switch = links.vertex(f"nvswitch:{node}", node)
        gpu_base = len(cols["gpu_vertex"])
        for rank, gpu in enumerate(gpus):
            vertex = links.vertex(f"gpu:{gpu_base + rank}", node)
            cols["gpu_vertex"].append(vertex)
            cols["node_of_gpu"].append(node)
            rc = rc_base + rank // per_rc
            cols["rc_of_gpu"].append(rc)
            up, down = links.pair(vertex, self.rc_vertex[rc], PCIE, gpu.pcie_gb_per_s, us.pcie_us)
            cols["pcie_up"].append(up)
            cols["pcie_down"].append(down)
            up = down = -1
            if switch >= 0:
                if gpu.nvlink_gb_per_s <= 0:
                    raise FormatError(
                        f"{self.label}: fabric nvswitch, but GPU {gpu.name} has no NVLink",
                        "write fabric: pcie, or give the GPU spec nvlink_gb_per_s",
                    )
                up, down = links.pair(vertex, switch, NVLINK, gpu.nvlink_gb_per_s, us.nvlink_us)
            cols["nv_up"].append(up)
            cols["nv_down"].append(down)
        self._add_nics(node, group, gpu_base, len(gpus))

    def _add_hosts(self, node: int, group: NodeGroup, num_rcs: int, rc_base: int) -> None:
        links, cols, us = self.links, self.cols, self.latency
        rcs_per_host = group.pcie.root_complexes // group.host.hosts_per_node
        hosts: list[int] = []
        for _ in range(-(-num_rcs // rcs_per_host)):
            idx = len(cols["dram_read"])
            host = links.vertex(f"host:{idx}", node)
            dram = links.vertex(f"dram:{idx}", node)
            write, read = links.pair(host, dram, HOST, group.host.dram_gb_per_s, us.host_us)
            cols["dram_write"].append(write)
            cols["dram_read"].append(read)
            write = read = -1
            if group.nvme is not None:
                disk = links.vertex(f"nvme:{idx}", node)
                write, read = links.pair(host, disk, NVME, group.nvme.nvme_gb_per_s, us.nvme_us)
            cols["nvme_write"].append(write)
            cols["nvme_read"].append(read)
            hosts.append(host)
        first = len(cols["dram_read"]) - len(hosts)
        if group.pcie.socket_gb_per_s is not None:
            for a in range(len(hosts)):
                for b in range(a + 1, len(hosts)):
                    there, back = links.pair(
                        hosts[a], hosts[b], HOST, group.pcie.socket_gb_per_s, us.host_us
                    )
                    self.sockets[first + a, first + b] = there
                    self.sockets[first + b, first + a] = back
        elif len(hosts) > 1 and group.fabric == "pcie":
            raise FormatError(
                f"{self.label}: GPUs of one node on {len(hosts)} hosts with no link between them",
                "give pcie.socket_gb_per_s, or a fabric other than pcie",
            )
        for rc in range(num_rcs):
            vertex = links.vertex(f"pcie:{node}:{rc}", node)
            self.rc_vertex.append(vertex)
            host_idx = rc // rcs_per_host
            up, down = links.pair(
                vertex, hosts[host_idx], HOST, group.pcie.host_bridge_gb_per_s, us.host_us
            )
            cols["bridge_up"].append(up)
            cols["bridge_down"].append(down)
            cols["host_of_rc"].append(first + host_idx)

    def _add_nics(self, node: int, group: NodeGroup, gpu_base: int, num_gpus: int) -> None:
        links, cols, nics = self.links, self.cols, group.nics
        if nics is None:
            cols["nic_of_gpu"].extend([-1] * num_gpus)
            self.to_nic.extend([[]] * num_gpus)
            self.from_nic.extend([[]] * num_gpus)
            return
        for rank in range(num_gpus):
            gpu = gpu_base + rank
            rc = cols["rc_of_gpu"][gpu]
            if rank % nics.gpus_per_nic == 0:
                nic = links.vertex(f"nic:{len(self.nic_vertex)}", node)
                self.nic_vertex.append(nic)
                self.node_of_nic.append(node)
                self.nic_gb_per_s.append(nics.gb_per_s)
                self.nic_rank.append(rank // nics.gpus_per_nic)
                nic_rc = rc
                slot_in, slot_out = links.pair(
                    self.rc_vertex[rc], nic, PCIE, nics.slot_gb_per_s, self.latency.pcie_us
                )
            cols["nic_of_gpu"].append(len(self.nic_vertex) - 1)
            self.to_nic.append([cols["pcie_up"][gpu], *self._across(rc, nic_rc), slot_in])
            self.from_nic.append([slot_out, *self._across(nic_rc, rc), cols["pcie_down"][gpu]])

    def _across(self, rc_a: int, rc_b: int) -> list[int]:
        """Links from root complex a to root complex b of the same node."""
        if rc_a == rc_b:
            return []
        host_a, host_b = self.cols["host_of_rc"][rc_a], self.cols["host_of_rc"][rc_b]
        between: list[int] = []
        if host_a != host_b:
            if (host_a, host_b) not in self.sockets:
                raise FormatError(
                    f"{self.label}: a GPU and its NIC are on hosts with no link between them",
                    "give pcie.socket_gb_per_s, or fewer gpus_per_nic",
                )
            between = [self.sockets[host_a, host_b]]
        return [self.cols["bridge_up"][rc_a], *between, self.cols["bridge_down"][rc_b]]

    def add_network(self) -> tuple[list[list[int]], list[list[int]]]:
        """Add leaves and spines where some traffic needs them; return spine links by leaf."""
        cols, links, network = self.cols, self.links, self.file.network
        lonely = any(
            cols["peer_of_node"][node] == NO_PEER
            for node, count in enumerate(np.bincount(cols["node_of_gpu"]).tolist())
            if count > 1
        )
        if self.num_nodes == 1 and not lonely:
            for name in ("leaf_of_nic", "leaf_up", "leaf_down"):
                cols[name] = [-1] * len(self.nic_vertex)
            return [], []
        reason = f"{self.num_nodes} nodes" if self.num_nodes > 1 else "GPUs with fabric none"
        if network is None or -1 in cols["nic_of_gpu"]:
            what = "no network" if network is None else "a node without nics"
            raise FormatError(
                f"{self.label}: disconnected: {reason}, but {what}",
                "add network: and nics:, or ask for at most one node of GPUs",
            )
        leaf_of_nic = self._leaves(network)
        num_leaves = max(leaf_of_nic) + 1
        leaves = [links.vertex(f"leaf:{i}") for i in range(num_leaves)]
        for nic, leaf in enumerate(leaf_of_nic):
            rate = min(self.nic_gb_per_s[nic], network.port_gb_per_s)
            up, down = links.pair(
                self.nic_vertex[nic], leaves[leaf], NIC, rate, self.latency.nic_us
            )
            cols["leaf_of_nic"].append(leaf)
            cols["leaf_up"].append(up)
            cols["leaf_down"].append(down)
        if num_leaves == 1:
            return [], []
        if network.num_spines == 0 and not self._rails_suffice(leaf_of_nic):
            raise FormatError(
                f"{self.label}: disconnected: {num_leaves} leaf switches and no spine",
                "give network.num_spines, or more leaf_down_ports",
            )
        spines = [links.vertex(f"spine:{i}") for i in range(network.num_spines)]
        uplinks = network.leaf_down_ports * network.port_gb_per_s / network.oversubscription
        spine_up: list[list[int]] = []
        spine_down: list[list[int]] = []
        for leaf in leaves:
            both = [
                links.pair(
                    leaf, spine, LEAF_SPINE, uplinks / len(spines), self.latency.leaf_spine_us
                )
                for spine in spines
            ]
            spine_up.append([up for up, _ in both])
            spine_down.append([down for _, down in both])
        return spine_up, spine_down

    def _leaves(self, network: NetworkSchema) -> list[int]:
        """Leaf switch of every NIC."""
        ports, num_nics = network.leaf_down_ports, len(self.nic_vertex)
        if network.type == "rail-optimised":
            rails = network.num_rails or max(self.nic_rank) + 1
            filled: dict[int, int] = {}
            leaves = []
            for rank in self.nic_rank:
                rail = rank % rails
                leaves.append(filled.get(rail, 0) // ports * rails + rail)
                filled[rail] = filled.get(rail, 0) + 1
            return leaves
        if network.type == "single-switch" and num_nics > ports:
            raise InputError(
                f"{self.label}: {num_nics} NICs on a single switch of {ports} ports",
                "ask for fewer GPUs, or write network type leaf-spine",
            )
        return [nic // ports for nic in range(num_nics)]

    def _rails_suffice(self, leaf_of_nic: list[int]) -> bool:
        """Whether relaying over NVLink reaches every GPU without a spine."""
        if not relays(self.file) or any(p != NVSWITCH for p in self.cols["peer_of_node"]):
            return False
        reach: dict[int, set[int]] = {}
        for node, leaf in zip(self.node_of_nic, leaf_of_nic, strict=True):
            reach.setdefault(node, set()).add(leaf)
        return all(leaves == reach[0] for leaves in reach.values())

    def relay_arrays(self) -> dict[str, np.ndarray]:
        """GPUs by node and leaf (CSR under sorted keys), and each GPU's port number on its leaf."""
        cols = self.cols
        num_leaves = max(cols["leaf_of_nic"], default=-1) + 1
        by_leaf: dict[int, list[int]] = {}
        used: dict[int, int] = {}
        port_of_gpu: list[int] = []
        for gpu, nic in enumerate(cols["nic_of_gpu"]):
            leaf = cols["leaf_of_nic"][nic] if num_leaves else -1
            if leaf >= 0:
                by_leaf.setdefault(cols["node_of_gpu"][gpu] * num_leaves + leaf, []).append(gpu)
            port_of_gpu.append(used.get(leaf, 0))
            used[leaf] = port_of_gpu[-1] + 1
        keys = sorted(by_leaf)
        return {
            "port_of_gpu": _ints(port_of_gpu),
            "relay_key": _ints(keys),
            "relay_indptr": _ints(np.cumsum([0, *(len(by_leaf[key]) for key in keys)])),
            "relay_gpu": _ints(gpu for key in keys for gpu in by_leaf[key]),
        }


def relays(file: ClusterFile) -> bool:
    """Whether traffic is moved over NVLink to the destination's rail first (PXN)."""
    network = file.network
    return (
        network is not None
        and network.type == "rail-optimised"
        and network.rail_forwarding != "spine"
    )


def build_fabric(
    file: ClusterFile, label: str, nodes: Sequence[NodePlan], gpus: Sequence[GpuSpec]
) -> Fabric:
    """Vertices and links of `nodes`, whose GPUs are `gpus` in order.

    Raises FormatError for a topology that leaves GPUs disconnected.
    """
    builder = _Builder(file, label, len(nodes))
    start = 0
    for node, plan in enumerate(nodes):
        builder.add_node(node, plan, gpus[start : start + plan.num_gpus])
        start += plan.num_gpus
    spine_up, spine_down = builder.add_network()
    sockets = sorted(builder.sockets.items())
    num_hosts = len(builder.cols["dram_read"])
    links = builder.links
    return Fabric(
        vertices=tuple(links.names),
        vertex_node=_ints(links.node),
        link_src=_ints(links.src),
        link_dst=_ints(links.dst),
        link_gb_per_s=np.array(links.gb_per_s, dtype=np.float64),
        link_latency_us=np.array(links.latency_us, dtype=np.float64),
        link_class=np.array(links.code, dtype=np.int8),
        gpu_uid=np.arange(len(gpus), dtype=np.int64),
        socket_key=_ints(a * num_hosts + b for (a, b), _ in sockets),
        socket_link=_ints(link for _, link in sockets),
        to_nic=_padded(builder.to_nic),
        from_nic=_padded(builder.from_nic),
        spine_up=_padded(spine_up),
        spine_down=_padded(spine_down),
        relays=relays(file),
        ecmp_seed=file.network.ecmp_seed if file.network is not None else 0,
        message_intra_node_us=file.latency.message_intra_node_us,
        message_inter_node_us=file.latency.message_inter_node_us,
        message_host_us=file.latency.message_host_us,
        **builder.relay_arrays(),
        **{name: _ints(values) for name, values in builder.cols.items()},
    )


def _ints(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)


def _padded(rows: list[list[int]]) -> np.ndarray:
    width = max((len(row) for row in rows), default=0)
    return np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int64).reshape(
        len(rows), width
    )
