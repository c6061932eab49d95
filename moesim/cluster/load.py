"""Finding, reading and sizing cluster files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesim.cluster.core import Cluster
from moesim.cluster.gpus import gpu_names, load_gpu, topology_dir
from moesim.cluster.machine import Machine, is_machine, load_machine
from moesim.cluster.types import BasisBlock, GpuSpec
from moesim.errors import FormatError, InputError, UnknownNameError

if TYPE_CHECKING:
    from moesim.cluster.build import NodePlan
    from moesim.cluster.schema import ClusterFile

DEFAULT_CLUSTER = "h100-sxm-ib"
"""The cluster of a command that names none."""


def cluster_names() -> tuple[str, ...]:
    """Names of the shipped clusters."""
    return tuple(sorted(path.stem for path in topology_dir().glob("*.yaml")))


def find_cluster_file(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a shipped cluster's name, or the path itself if it names a YAML file.

    Raises UnknownNameError for neither.
    """
    text = os.fspath(name_or_path)
    if text in cluster_names():
        return topology_dir() / f"{text}.yaml"
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or os.sep in text:
        return path
    raise UnknownNameError("cluster", text[:80], cluster_names())


def load_cluster(
    name_or_path: str | os.PathLike[str] = DEFAULT_CLUSTER,
    num_gpus: int | None = None,
    *,
    after: int = 0,
) -> Cluster:
    """The cluster of a shipped name or a YAML file, sized to `num_gpus` GPUs; also a machine
    (`load_machine`), as a cluster of one node.

    None takes the file's own count. The file's nodes are repeated in order as often as needed;
    fewer GPUs than the first node has makes one partial node (its first GPUs). after: GPUs of the
    same cluster that others have; their nodes are left out, unless all fit into one.
    Raises UnknownNameError for an unknown name, InputError for an unreadable file or a size that is
    no whole number of nodes (the cause and the nearest sizes), FormatError for a wrong file (the
    field, the file, the line and a remedy).
    """
    from moesim.cluster.build import choose_nodes
    from moesim.cluster.schema import ClusterFile, parse_file

    if means_machine(name_or_path):
        return cluster_of_machine(load_machine(name_or_path), num_gpus)
    path = find_cluster_file(name_or_path)
    file = parse_file(ClusterFile, path, path.name)
    nodes = choose_nodes(file, num_gpus, after)
    gpus = _gpus_of(file, path.name, nodes)
    return _built(file, path.name, nodes, gpus, _calibration_beside(path, file.calibration))


def means_machine(name_or_path: str | os.PathLike[str]) -> bool:
    return os.fspath(name_or_path) not in cluster_names() and is_machine(name_or_path)


def cluster_of_machine(machine: Machine, num_gpus: int | None = None) -> Cluster:
    """A machine as a cluster of one node, with all its GPUs or the first `num_gpus`.

    GPUs with NVLink beyond a bridge's meet on it all to all, others in the PCIe tree; the host is
    one NUMA domain with all its memory. Latencies are assumed. Raises InputError for more GPUs than
    it has.
    """
    from moesim.cluster.build import NodePlan
    from moesim.cluster.machine_schema import cluster_file

    have = len(machine.gpus)
    count = have if num_gpus is None else num_gpus
    if not 1 <= count <= have:
        raise InputError(
            f"{machine.name} has {have} GPU{'s' * (have > 1)}, {count} are asked for",
            f"name a machine of {count}, as {max(1, count)}x{machine.gpus[0].name}",
        )
    file = cluster_file(machine, count)
    used = replace(machine, gpus=machine.gpus[:count])
    built = _built(file, machine.name, [NodePlan(file.nodes[0], count)], list(used.gpus), None)
    rest = [b for b in used.host.blocks if not b.where.endswith((": memory", ": nvme", ": link"))]
    return replace(built, name=machine.name, machine=used, blocks=(*built.blocks, *rest))


def _built(
    file: ClusterFile,
    label: str,
    nodes: list[NodePlan],
    gpus: list[GpuSpec],
    calibration: str | None,
) -> Cluster:
    from moesim.cluster.build import build_fabric

    fabric = build_fabric(file, label, nodes, gpus)
    factors = [
        factor
        for plan in nodes
        for factor in (plan.group.speed_factors or [1.0] * plan.num_gpus)[: plan.num_gpus]
    ]
    host_of_gpu = fabric.host_of_rc[fabric.rc_of_gpu]
    group_of_node = [plan.group for plan in nodes]
    _, first_gpu = np.unique(host_of_gpu, return_index=True)
    host_groups = [group_of_node[int(fabric.node_of_gpu[gpu])] for gpu in first_gpu]
    nic_types = sorted({group.nics.type for group in group_of_node if group.nics is not None})
    return Cluster(
        name=file.name,
        description=file.description,
        num_gpus=len(gpus),
        num_nodes=len(nodes),
        gpus=tuple(gpus),
        speed_factor=np.array(factors, dtype=np.float64),
        node_of_gpu=fabric.node_of_gpu.copy(),
        local_rank=np.concatenate([np.arange(plan.num_gpus, dtype=np.int64) for plan in nodes]),
        host_of_gpu=host_of_gpu,
        host_dram_gb=np.array([group.host.dram_gb for group in host_groups]),
        host_nvme_gb=np.array([g.nvme.nvme_gb if g.nvme else 0.0 for g in host_groups]),
        calibration=calibration,
        network_type=file.network.type if file.network is not None else "none",
        nic_type="+".join(nic_types) or "none",
        fabric=fabric,
        blocks=_blocks(file, nodes, gpus),
        nic_gb_per_s=min(
            (g.nics.gb_per_s / g.nics.gpus_per_nic for g in group_of_node if g.nics is not None),
            default=None,
        ),
    )


def _calibration_beside(path: Path, name: str | None) -> str | None:
    """The calibration's name; of a file (`host.yaml`), its path beside the cluster's file."""
    if name is None or Path(name).suffix not in (".yaml", ".yml"):
        return name
    return str(path.parent / name)


def _gpus_of(file: ClusterFile, label: str, nodes: list[NodePlan]) -> list[GpuSpec]:
    inline: dict[str, GpuSpec] = {}
    for entry in file.gpu_specs:
        if entry.name in inline:
            raise FormatError(
                f"{label}: gpu_specs defines {entry.name} twice", "give each GPU spec its own name"
            )
        inline[entry.name] = entry.spec()
    gpus: list[GpuSpec] = []
    for plan in nodes:
        listed = plan.group.gpu
        names = listed if isinstance(listed, list) else [listed] * plan.group.gpus_per_node
        for name in names[: plan.num_gpus]:
            if name not in inline and name not in gpu_names():
                raise UnknownNameError(f"GPU in {label}:", name[:80], {*inline, *gpu_names()})
            gpus.append(inline[name] if name in inline else load_gpu(name))
    return gpus


def _blocks(
    file: ClusterFile, nodes: list[NodePlan], gpus: list[GpuSpec]
) -> tuple[BasisBlock, ...]:
    blocks = [block for gpu in dict.fromkeys(gpus) for block in gpu.blocks]
    groups = list({id(plan.group): plan.group for plan in nodes}.values())
    for i, group in enumerate(groups):
        where = f"nodes[{i}]"
        blocks.append(group.pcie.block(f"{where}: pcie", "fabric"))
        blocks.append(group.host.block(f"{where}: host", "host"))
        if group.nvme is not None:
            blocks.append(group.nvme.block(f"{where}: nvme", "host"))
        if group.nics is not None:
            blocks.append(group.nics.block(f"{where}: nics", "network"))
    if file.network is not None:
        blocks.append(file.network.block("network", "network"))
    blocks.append(file.latency.block("latency", "latency"))
    return tuple(blocks)


def check_cluster_file(path: str | os.PathLike[str]) -> Cluster:
    """Load a file by its path (never a shipped name) at its own size and route it.

    Raises what load_cluster raises.
    """
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{file.name} is a directory", "name a YAML file")
    cluster = load_cluster(file.resolve())
    if cluster.num_gpus <= 4096:
        cluster.routes()
    return cluster
