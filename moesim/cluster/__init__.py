"""Clusters: GPU specs and links from YAML, as a graph, bandwidth and hop matrices and routes."""

from moesim.cluster.core import Cluster
from moesim.cluster.fabric import Fabric
from moesim.cluster.gpus import gpu_names, load_gpu, topology_dir
from moesim.cluster.load import (
    DEFAULT_CLUSTER,
    check_cluster_file,
    cluster_names,
    find_cluster_file,
    load_cluster,
)
from moesim.cluster.machine import (
    Host,
    Machine,
    host_names,
    is_machine,
    is_shipped,
    load_host,
    load_machine,
)
from moesim.cluster.types import (
    KINDS,
    LINK_CLASSES,
    Basis,
    BasisBlock,
    GpuSpec,
    HostRoutes,
    PathSet,
    RouteTable,
)

__all__ = [
    "DEFAULT_CLUSTER",
    "KINDS",
    "LINK_CLASSES",
    "Basis",
    "BasisBlock",
    "Cluster",
    "Fabric",
    "GpuSpec",
    "Host",
    "HostRoutes",
    "Machine",
    "PathSet",
    "RouteTable",
    "check_cluster_file",
    "cluster_names",
    "find_cluster_file",
    "gpu_names",
    "host_names",
    "is_machine",
    "is_shipped",
    "load_cluster",
    "load_gpu",
    "load_host",
    "load_machine",
    "topology_dir",
]
