"""Routes between GPUs, and between GPUs and host memory.

Rules, in order: GPUs of one node use the node's own fabric (NVSwitch, or the PCIe tree); others go
through the source's NIC, the leaf switches and, between two leaves, one spine. On a rail-optimised
network with forwarding over NVLink, traffic to another rail goes first to the GPU of the source's
node that sits on the destination's rail, if that saves the spine (NCCL 2.12's PXN: NVIDIA developer
blog, "Doubling all2all Performance with NVIDIA Collective Communication Library 2.12", 2022). The
spine is chosen by a seeded hash of source and destination (ECMP, one path a GPU pair). Each such
route has the fewest links possible, and the widest spine link since those of a leaf are equal.
Ignored: adaptive routing, multi-path spraying, several rails used by one pair of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moesim.cluster.fabric import NO_PEER, NVSWITCH, PCIE_TREE, Fabric
from moesim.cluster.types import HostRoutes, PathSet, RouteTable
from moesim.errors import InputError
from moesim.types import IntArray

MAX_ROUTED_GPUS = 4096
"""Route tables are dense in GPU pairs; beyond this they would not fit in memory."""

_PAIRS_AT_ONCE = 1 << 20

Mask = NDArray[np.bool_]


def route_table(fabric: Fabric) -> RouteTable:
    """Routes between all pairs of GPUs. Raises InputError for more than MAX_ROUTED_GPUS GPUs."""
    num_gpus = fabric.num_gpus
    if num_gpus > MAX_ROUTED_GPUS:
        raise InputError(
            f"routes between all pairs of {num_gpus:,} GPUs would not fit in memory",
            f"model one EP group: at most {MAX_ROUTED_GPUS:,} GPUs",
        )
    hops, latency, width, flat = [], [], [], []
    rows = max(1, _PAIRS_AT_ONCE // num_gpus)
    for start in range(0, num_gpus, rows):
        src = np.arange(start, min(start + rows, num_gpus)).repeat(num_gpus)
        dst = np.tile(np.arange(num_gpus), len(src) // num_gpus)
        path = paths_between(fabric, src, dst)
        used = path >= 0
        flat.append(path[used].astype(np.int32))
        hops.append(used.sum(axis=1))
        latency.append(
            np.where(used, fabric.link_latency_us[path], 0.0).sum(axis=1)
            + _message_us(fabric, src, dst)
        )
        width.append(np.where(used, fabric.link_gb_per_s[path], np.inf).min(axis=1, initial=np.inf))
    num_hops = np.concatenate(hops)
    shape = (num_gpus, num_gpus)
    return RouteTable(
        indptr=_frozen(np.concatenate([[0], np.cumsum(num_hops)])),
        link_idx=_frozen(np.concatenate(flat)),
        link_gb_per_s=_frozen(fabric.link_gb_per_s),
        link_latency_us=_frozen(fabric.link_latency_us),
        link_class=_frozen(fabric.link_class),
        link_name=fabric.link_name,
        hops=_frozen(num_hops.reshape(shape)),
        latency_us=_frozen(np.concatenate(latency).reshape(shape)),
        gb_per_s=_frozen(np.concatenate(width).reshape(shape)),
    )


def paths_between(fabric: Fabric, src: IntArray, dst: IntArray) -> IntArray:
    """Links from GPU `src[i]` to GPU `dst[i]` in order, [n, w], -1 where there is no link."""
    node = fabric.node_of_gpu
    same = node[src] == node[dst]
    peer = fabric.peer_of_node[node[src]]
    differ = src != dst
    local = same & differ
    remote = differ & (~same | (peer == NO_PEER))
    switched = local & (peer == NVSWITCH)
    treed = local & (peer == PCIE_TREE)
    columns: list[IntArray] = []

    def emit(links: IntArray, where: Mask) -> None:
        if where.any():
            columns.append(np.where(where, links, -1))

    emit(fabric.nv_up[src], switched)
    emit(fabric.nv_down[dst], switched)
    if treed.any():
        crosses = treed & (fabric.rc_of_gpu[src] != fabric.rc_of_gpu[dst])
        emit(fabric.pcie_up[src], treed)
        emit(fabric.bridge_up[fabric.rc_of_gpu[src]], crosses)
        emit(_socket(fabric, src, dst), crosses)
        emit(fabric.bridge_down[fabric.rc_of_gpu[dst]], crosses)
        emit(fabric.pcie_down[dst], treed)
    if remote.any():
        _remote(fabric, src, dst, remote, emit)
    if not columns:
        return np.full((len(src), 0), -1, dtype=np.int64)
    return np.stack(columns, axis=1)


def _remote(
    fabric: Fabric,
    src: IntArray,
    dst: IntArray,
    remote: Mask,
    emit: Callable[[IntArray, Mask], None],
) -> None:
    via = np.where(remote, _relay(fabric, src, dst), src)
    relayed = remote & (via != src)
    emit(fabric.nv_up[src], relayed)
    emit(fabric.nv_down[via], relayed)
    nic_a, nic_b = fabric.nic_of_gpu[via], fabric.nic_of_gpu[dst]
    leaf_a, leaf_b = fabric.leaf_of_nic[nic_a], fabric.leaf_of_nic[nic_b]
    for column in range(fabric.to_nic.shape[1]):
        emit(fabric.to_nic[via, column], remote)
    leaves = remote & (nic_a != nic_b)
    emit(fabric.leaf_up[nic_a], leaves)
    spines = leaves & (leaf_a != leaf_b)
    if spines.any():
        spine = ecmp_spine(fabric, src, dst)
        emit(fabric.spine_up[leaf_a, spine], spines)
        emit(fabric.spine_down[leaf_b, spine], spines)
    emit(fabric.leaf_down[nic_b], leaves)
    for column in range(fabric.from_nic.shape[1]):
        emit(fabric.from_nic[dst, column], remote)


def _relay(fabric: Fabric, src: IntArray, dst: IntArray) -> IntArray:
    """The GPU that hands the traffic to its NIC: `src`, or one of its node on `dst`'s leaf."""
    if not fabric.relays:
        return src
    leaf = fabric.leaf_of_nic[fabric.nic_of_gpu]
    node = fabric.node_of_gpu[src]
    key = node * (int(fabric.leaf_of_nic.max()) + 1) + leaf[dst]
    at = np.minimum(np.searchsorted(fabric.relay_key, key), len(fabric.relay_key) - 1)
    saves = (
        (fabric.relay_key[at] == key)
        & (leaf[src] != leaf[dst])
        & (fabric.peer_of_node[node] == NVSWITCH)
    )
    turn = fabric.port_of_gpu[dst] % np.diff(fabric.relay_indptr)[at]
    return np.where(saves, fabric.relay_gpu[fabric.relay_indptr[at] + turn], src)


def _socket(fabric: Fabric, src: IntArray, dst: IntArray) -> IntArray:
    """The link between the hosts of `src` and `dst`, -1 where it is the same host."""
    host = fabric.host_of_rc[fabric.rc_of_gpu]
    if not len(fabric.socket_key):
        return np.full(len(src), -1, dtype=np.int64)
    key = host[src] * fabric.num_hosts + host[dst]
    at = np.minimum(np.searchsorted(fabric.socket_key, key), len(fabric.socket_key) - 1)
    return np.where(fabric.socket_key[at] == key, fabric.socket_link[at], -1)


def ecmp_spine(fabric: Fabric, src: IntArray, dst: IntArray) -> IntArray:
    """Spine of each pair: splitmix64 (Steele, Lea and Flood, OOPSLA 2014) of seed, src and dst."""
    with np.errstate(over="ignore"):
        value = np.full(len(src), fabric.ecmp_seed, dtype=np.uint64)
        for part in (src, dst):
            value = _splitmix64(value + fabric.gpu_uid[part].astype(np.uint64))
    return (value % np.uint64(fabric.spine_up.shape[1])).astype(np.int64)


def _splitmix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _message_us(fabric: Fabric, src: IntArray, dst: IntArray) -> NDArray[np.float64]:
    node = fabric.node_of_gpu
    inside = (node[src] == node[dst]) & (fabric.peer_of_node[node[src]] != NO_PEER)
    overhead = np.where(inside, fabric.message_intra_node_us, fabric.message_inter_node_us)
    return np.where(src == dst, 0.0, overhead)


def host_routes(fabric: Fabric) -> HostRoutes:
    """Paths between every GPU and its host's DRAM and NVMe."""
    rc = fabric.rc_of_gpu
    host = fabric.host_of_rc[rc]
    up = [fabric.pcie_up, fabric.bridge_up[rc]]
    down = [fabric.bridge_down[rc], fabric.pcie_down]
    read, write = fabric.dram_read[host], fabric.dram_write[host]
    disk_read, disk_write = fabric.nvme_read[host], fabric.nvme_write[host]
    has_nvme = bool((disk_read >= 0).all())
    return HostRoutes(
        dram_to_gpu=_path_set(fabric, [read, *down]),
        gpu_to_dram=_path_set(fabric, [*up, write]),
        nvme_to_gpu=_path_set(fabric, [disk_read, *down]) if has_nvme else None,
        gpu_to_nvme=_path_set(fabric, [*up, disk_write]) if has_nvme else None,
        nvme_to_dram=_path_set(fabric, [disk_read, write]) if has_nvme else None,
        dram_to_nvme=_path_set(fabric, [read, disk_write]) if has_nvme else None,
    )


def _path_set(fabric: Fabric, columns: list[IntArray]) -> PathSet:
    path = np.stack(columns, axis=1)
    return PathSet(
        indptr=_frozen(np.arange(len(path) + 1, dtype=np.int64) * path.shape[1]),
        link_idx=_frozen(path.astype(np.int32).reshape(-1)),
        gb_per_s=_frozen(fabric.link_gb_per_s[path].min(axis=1)),
        latency_us=_frozen(fabric.link_latency_us[path].sum(axis=1) + fabric.message_host_us),
    )


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
