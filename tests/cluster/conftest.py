"""A small cluster file to start from: 2 nodes of 4 GPUs, every figure a round number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesim.cluster import Cluster, load_cluster

_ORIGIN = {"kind": "assumed", "source": "test"}

SMALL: dict[str, Any] = {
    "format": "moesim-cluster",
    "version": 1,
    "name": "small",
    "nodes": [
        {
            "count": 2,
            "gpus_per_node": 4,
            "gpu": "h100-sxm",
            "fabric": "nvswitch",
            "pcie": {
                "root_complexes": 2,
                "host_bridge_gb_per_s": 40,
                "socket_gb_per_s": 30,
                **_ORIGIN,
            },
            "host": {"hosts_per_node": 2, "dram_gb": 100, "dram_gb_per_s": 200, **_ORIGIN},
            "nvme": {"nvme_gb": 1000, "nvme_gb_per_s": 10, **_ORIGIN},
            "nics": {"type": "infiniband", "gb_per_s": 50, "slot_gb_per_s": 60, **_ORIGIN},
        }
    ],
    "network": {
        "type": "rail-optimised",
        "leaf_down_ports": 4,
        "port_gb_per_s": 50,
        "num_spines": 2,
        **_ORIGIN,
    },
    "latency": {
        "nvlink_us": 1,
        "pcie_us": 2,
        "nic_us": 3,
        "leaf_spine_us": 5,
        "host_us": 7,
        "nvme_us": 100,
        "message_intra_node_us": 10,
        "message_inter_node_us": 20,
        "message_host_us": 30,
        **_ORIGIN,
    },
}

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write SMALL after an edit; return the path."""

    def writer(edit: Edit | None = None, name: str = "small.yaml") -> Path:
        content = copy.deepcopy(SMALL)
        if edit is not None:
            edit(content)
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    return writer


@pytest.fixture
def small(write: Callable[..., Path]) -> Callable[..., Cluster]:
    """Load SMALL after an edit."""

    def loader(edit: Edit | None = None, num_gpus: int | None = None) -> Cluster:
        return load_cluster(write(edit), num_gpus)

    return loader
