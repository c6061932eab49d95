"""Finding, reading and sizing cluster files."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesim.cluster.core import Cluster
from moesim.cluster.types import BasisBlock, GpuSpec
from moesim.errors import FormatError, InputError, UnknownNameError

if TYPE_CHECKING:
    from moesim.cluster.build import NodePlan
    from moesim.cluster.schema import ClusterFile

DEFAULT_CLUSTER = "h100-sxm-ib"
"""The cluster of a command that names none."""


@lru_cache(maxsize=1)
def topology_dir() -> Path:
    """Directory of the shipped cluster and GPU files."""
    return Path(str(resources.files("moesim.topologies")))


def cluster_names() -> tuple[str, ...]:
    """Names of the shipped clusters."""
    return tuple(sorted(path.stem for path in topology_dir().glob("*.yaml")))


def gpu_names() -> tuple[str, ...]:
    """Names of the shipped GPU specs."""
    return tuple(sorted(path.stem for path in (topology_dir() / "gpus").glob("*.yaml")))


def load_gpu(name: str) -> GpuSpec:
    """A shipped GPU spec. Raises UnknownNameError."""
    if name not in gpu_names():
        raise UnknownNameError("GPU", name, gpu_names())
    return _gpu_file(topology_dir() / "gpus" / f"{name}.yaml")


@lru_cache(maxsize=64)
def _gpu_file(path: Path) -> GpuSpec:
    from moesim.cluster.schema import GpuFile, parse_file

    return parse_file(GpuFile, path, path.name).spec()


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
    """The cluster of a shipped name or a YAML file, sized to `num_gpus` GPUs.

    None takes the file's own count. The file's nodes are repeated in order as often as needed;
    fewer GPUs than the first node has makes one partial node (its first GPUs). after: GPUs of the
    same cluster that others have; their nodes are left out, unless all fit into one.
    Raises UnknownNameError for an unknown name, InputError for an unreadable file or a size that is
    no whole number of nodes (the cause and the nearest sizes), FormatError for a wrong file (the
    field, the file, the line and a remedy).
    """
    from moesim.cluster.build import build_fabric, choose_nodes
    from moesim.cluster.schema import ClusterFile, parse_file

    path = find_cluster_file(name_or_path)
    file = parse_file(ClusterFile, path, path.name)
    nodes = choose_nodes(file, num_gpus, after)
    gpus = _gpus_of(file, path.name, nodes)
    fabric = build_fabric(file, path.name, nodes, gpus)
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
        calibration=_calibration_beside(path, file.calibration),
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
