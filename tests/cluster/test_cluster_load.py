"""Sizes, attributes, provenance and the shipped files."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cluster import (
    Cluster,
    cluster_names,
    gpu_names,
    load_cluster,
    load_gpu,
    topology_dir,
)
from moesim.errors import InputError, UnknownNameError


def test_default_is_two_h100_nodes() -> None:
    cluster = load_cluster()
    assert cluster.name == "h100-sxm-ib"
    assert (cluster.num_gpus, cluster.num_nodes, cluster.gpus_per_node) == (16, 2, 8)
    assert cluster.node_of_gpu.tolist() == [0] * 8 + [1] * 8
    assert cluster.local_rank.tolist() == [*range(8), *range(8)]
    assert cluster.host_of_gpu.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert cluster.speed_factor.tolist() == [1.0] * 16
    assert {gpu.name for gpu in cluster.gpus} == {"h100-sxm"}
    assert cluster.calibration == "h100"


@pytest.mark.parametrize(
    ("num_gpus", "nodes"), [(1, [1]), (3, [3]), (8, [8]), (16, [8, 8]), (40, [8] * 5)]
)
def test_resizing(num_gpus: int, nodes: list[int]) -> None:
    cluster = load_cluster("h100-sxm-ib", num_gpus)
    assert cluster.num_gpus == num_gpus
    assert np.bincount(cluster.node_of_gpu).tolist() == nodes


def test_a_partial_node_keeps_only_the_hosts_it_uses() -> None:
    cluster = load_cluster("h100-sxm-ib", 3)
    assert cluster.host_dram_gb.tolist() == [1024.0]
    assert "pcie:0:2" in cluster.graph
    assert "pcie:0:3" not in cluster.graph
    assert "leaf:0" not in cluster.graph


def test_a_size_that_is_no_whole_number_of_nodes_names_the_nearest() -> None:
    with pytest.raises(InputError) as error:
        load_cluster("h100-sxm-ib", 20)
    assert error.value.cause == "20 GPUs are not a whole number of h100-sxm-ib nodes"
    assert error.value.remedy == "ask for 16 or 24 GPUs"


@pytest.mark.parametrize("num_gpus", [0, -8, 65_537, 10**9])
def test_sizes_out_of_range(num_gpus: int) -> None:
    with pytest.raises(InputError, match="ask for 1 to 65,536"):
        load_cluster("h100-sxm-ib", num_gpus)


def test_mixed_nodes_alternate_when_resized() -> None:
    cluster = load_cluster("mixed-h100-a100", 32)
    names = [gpu.name for gpu in cluster.gpus[::8]]
    assert names == ["h100-sxm", "a100-sxm", "h100-sxm", "a100-sxm"]
    # the A100's 25 GB/s NIC is the narrowest link between the two
    assert cluster.bandwidth_matrix()[0, 8] == 25
    assert cluster.bandwidth_matrix()[0, 16] == 50


def test_mixed_gpus_and_a_slow_one_in_a_node(small: Callable[..., Cluster]) -> None:
    def mixed(content: dict[str, Any]) -> None:
        content["nodes"][0] |= {
            "gpu": ["h100-sxm", "h100-sxm", "h20-sxm", "h20-sxm"],
            "speed_factors": [1, 1, 1, 0.5],
        }

    cluster = small(mixed)
    assert [gpu.name for gpu in cluster.gpus[4:]] == ["h100-sxm"] * 2 + ["h20-sxm"] * 2
    assert cluster.speed_factor.tolist() == [1, 1, 1, 0.5] * 2


def test_nodes_of_different_sizes(small: Callable[..., Cluster]) -> None:
    def uneven(content: dict[str, Any]) -> None:
        second = {**content["nodes"][0], "gpus_per_node": 2, "count": 1}
        content["nodes"][0]["count"] = 1
        content["nodes"].append(second)

    cluster = small(uneven)
    assert np.bincount(cluster.node_of_gpu).tolist() == [4, 2]
    with pytest.raises(InputError, match="different numbers of GPUs"):
        _ = cluster.gpus_per_node
    assert small(uneven, num_gpus=10).num_nodes == 3
    with pytest.raises(InputError, match="ask for 6 or 10 GPUs"):
        small(uneven, num_gpus=8)


def test_with_speed(small: Callable[..., Cluster]) -> None:
    cluster = small()
    slow = cluster.with_speed(3, 0.5)
    assert slow.speed_factor.tolist() == [1, 1, 1, 0.5, 1, 1, 1, 1]
    assert cluster.speed_factor.tolist() == [1.0] * 8
    assert slow.routes() is cluster.routes()
    assert slow.cluster_hash() != cluster.cluster_hash()
    for factor in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="speed factor"):
            cluster.with_speed(0, factor)
    with pytest.raises(InputError, match="GPUs are 0 to 7"):
        cluster.with_speed(8, 1)


def test_peak_rate_falls_back_to_the_next_wider_format() -> None:
    assert load_gpu("a100-sxm").peak_tflops("fp8") == 312
    assert load_gpu("h100-sxm").peak_tflops("fp4") == load_gpu("h100-sxm").tflops["fp8"]
    assert load_gpu("b200-sxm").peak_tflops("fp4") == 9000
    assert load_gpu("h100-sxm").peak_tflops("fp16") == 989.4
    with pytest.raises(UnknownNameError, match="number format"):
        load_gpu("h100-sxm").peak_tflops("int3")


def test_unknown_names_propose_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as error:
        load_cluster("h100-sxm-id")
    assert "did you mean 'h100-sxm-ib'?" in error.value.remedy
    with pytest.raises(UnknownNameError, match="did you mean 'h200-sxm'"):
        load_gpu("h200sxm")


@pytest.mark.parametrize("name", ["", "../h100", "h100-sxm-ib.yaml", "a\0b.yaml", "x" * 5000, "~"])
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        load_cluster(name)


def test_hash_is_the_same_in_another_process() -> None:
    code = "from moesim.cluster import load_cluster; print(load_cluster().cluster_hash())"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=env,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == load_cluster().cluster_hash()
    assert len(done.stdout.strip()) == 64


def test_hash_follows_meaning_not_words(small: Callable[..., Cluster]) -> None:
    base = small().cluster_hash()

    def words(content: dict[str, Any]) -> None:
        content["name"] = "other"
        content["description"] = "other words"
        content["latency"]["source"] = "elsewhere"
        content["latency"]["kind"] = "measured"

    assert small(words).cluster_hash() == base

    def faster(content: dict[str, Any]) -> None:
        content["nodes"][0]["nics"]["gb_per_s"] = 51
        content["network"]["port_gb_per_s"] = 51

    def forwarding(content: dict[str, Any]) -> None:
        content["network"]["rail_forwarding"] = "spine"

    def calibrated(content: dict[str, Any]) -> None:
        content["calibration"] = "mine"

    def slower_host(content: dict[str, Any]) -> None:
        content["latency"]["message_host_us"] = 31

    changed = {small(e).cluster_hash() for e in (faster, forwarding, calibrated, slower_host)}
    assert len(changed | {base}) == 5


def test_basis_is_the_weakest_kind_of_what_counts(small: Callable[..., Cluster]) -> None:
    def measured(content: dict[str, Any]) -> None:
        content["latency"]["kind"] = "measured"
        content["nodes"][0]["pcie"]["kind"] = "measured"
        content["gpu_specs"] = [
            {
                "name": "my-gpu",
                "title": "measured GPU",
                "memory": {"hbm_gb": 80, "hbm_gb_per_s": 3000, "kind": "measured", "source": "t"},
                "compute": {"bf16_tflops": 700, "kind": "datasheet", "source": "t"},
                "links": {
                    "nvlink_gb_per_s": 400,
                    "pcie_gb_per_s": 50,
                    "kind": "measured",
                    "source": "t",
                },
                "launch": {"kernel_launch_us": 3, "kind": "measured", "source": "t"},
                "price": {"price_usd_per_hour": 3, "kind": "assumed", "source": "t"},
            }
        ]
        content["nodes"][0]["gpu"] = "my-gpu"

    assert small(measured).basis().kind == "assumed"  # the NICs and the network
    one_node = small(measured, num_gpus=4)
    assert one_node.basis().kind == "datasheet"  # nothing crosses the network: the TFLOPS remain
    assert one_node.basis(("gpu", "price")).kind == "assumed"
    assert {block.role for block in one_node.basis().blocks} == {"gpu", "fabric", "latency"}


def test_clusters_can_be_sent_to_another_process(small: Callable[..., Cluster]) -> None:
    cluster = small()
    cluster.routes()
    _ = cluster.graph
    again = pickle.loads(pickle.dumps(cluster))
    assert again.cluster_hash() == cluster.cluster_hash()
    assert np.array_equal(again.hop_matrix(), cluster.hop_matrix())


@pytest.mark.parametrize(("num_gpus", "limit_s"), [(32, 0.3), (256, 3.0)])
def test_building_is_fast(num_gpus: int, limit_s: float) -> None:
    """Usually 7 and 50 ms: the limit leaves room for a busy machine."""
    load_cluster("h100-sxm-ib", 8).routes()
    start = time.perf_counter()
    load_cluster("h100-sxm-ib", num_gpus).routes()
    assert time.perf_counter() - start < limit_s


def test_huge_clusters_build_but_do_not_route() -> None:
    cluster = load_cluster("h100-sxm-ib", 8192)
    assert cluster.num_nodes == 1024
    with pytest.raises(InputError, match="at most 4,096 GPUs"):
        cluster.routes()


# Dense TFLOPS, GB, GB/s and GB/s per direction as the vendors print them (docs/topologies.md)
PUBLISHED = {
    "h100-sxm": (80, 3350, {"bf16": 1978.8 / 2, "fp8": 3957.8 / 2}, 900 / 2, 128 / 2),
    "h200-sxm": (141, 4800, {"bf16": 1978.8 / 2, "fp8": 3957.8 / 2}, 900 / 2, 128 / 2),
    "a100-sxm": (80, 2039, {"bf16": 624 / 2}, 600 / 2, 64 / 2),
    "l40s": (48, 864, {"bf16": 724.1 / 2, "fp8": 1466 / 2}, 0, 64 / 2),
    "h20-sxm": (96, 4000, {"bf16": 148, "fp8": 296}, 900 / 2, 128 / 2),
    "b200-sxm": (1440 / 8, 64000 / 8, {"bf16": 2250, "fp8": 4500, "fp4": 9000}, 14400 / 16, 64),
    "b300-sxm": (268.6, 62000 / 8, {"bf16": 2250, "fp8": 4500, "fp4": 14000}, 1800 / 2, 256 / 2),
    "gb300": (277.5, 576000 / 72, {"bf16": 2500, "fp8": 5000, "fp4": 15000}, 1800 / 2, 900 / 4),
    "gb200": (372 / 2, 16000 / 2, {"bf16": 2500, "fp8": 5000, "fp4": 10000}, 1800 / 2, 900 / 4),
    "rtx-3090": (24, 936, {"bf16": 142 / 2}, 112.5 / 2, 64 / 2),
    "rtx-4090": (24, 1008, {"bf16": 330.4 / 2, "fp8": 660.6 / 2}, 0, 64 / 2),
    "rtx-5090": (32, 1792, {"bf16": 419 / 2, "fp8": 838 / 2, "fp4": 3352 / 2}, 0, 128 / 2),
    "rtx-5060-ti": (16, 448, {"bf16": 47.4, "fp8": 94.9, "fp4": 759 / 2}, 0, 64 / 2),
    "rtx-pro-6000": (96, 1792, {"bf16": 500, "fp8": 1000, "fp4": 4000 / 2}, 0, 128 / 2),
    "rx-7900-xtx": (24, 960, {"bf16": 122.8}, 0, 64 / 2),
    "r9700": (32, 640, {"bf16": 191, "fp8": 383}, 0, 128 / 2),
    "mi300x": (192, 5300, {"bf16": 1307.4, "fp8": 2614.9}, 7 * 128 / 2, 128 / 2),
    "m3-ultra": (512, 819, {"bf16": 28.2}, 0, 819),
    "m4-max": (128, 546, {"bf16": 16.1}, 0, 546),
    "dgx-spark": (128, 273, {"bf16": 125, "fp8": 250, "fp4": 1000 / 2}, 0, 273),
    "strix-halo": (128, 32 * 8, {"bf16": 59.4}, 0, 256),
}


def test_gpu_specs_are_the_published_ones() -> None:
    assert set(gpu_names()) == set(PUBLISHED)
    for name, (hbm_gb, hbm_gb_per_s, tflops, nvlink, host) in PUBLISHED.items():
        gpu = load_gpu(name)
        assert (gpu.hbm_gb, gpu.hbm_gb_per_s) == (hbm_gb, hbm_gb_per_s)
        assert gpu.tflops == pytest.approx(tflops)
        assert (gpu.nvlink_gb_per_s, gpu.pcie_gb_per_s) == (nvlink, host)


@pytest.mark.parametrize("name", cluster_names())
def test_shipped_clusters_load_at_any_size_and_name_their_sources(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert all(len(block.source) > 20 for block in cluster.blocks)
    assert cluster.basis().kind == "assumed"  # latencies are
    size = cluster.gpus_per_node
    for num_gpus in (1, size - 1, size, 3 * size):
        table = load_cluster(name, num_gpus).routes()
        assert table.hops.shape == (num_gpus, num_gpus)
        assert np.all((table.hops > 0) | np.eye(num_gpus, dtype=bool))


def test_the_required_clusters_are_shipped() -> None:
    assert set(cluster_names()) >= {
        "h100-sxm-ib", "h200-sxm-ib", "h100-sxm-roce-leafspine", "h200-sxm-roce-leafspine",
        "a100-sxm-ib", "l40s-pcie", "b200-ib", "gb200-nvl72", "mixed-h100-a100",
    }  # fmt: skip


def test_files_are_named_after_what_they_define() -> None:
    for name in gpu_names():
        assert load_gpu(name).name == name
    named = {load_cluster(name).calibration for name in cluster_names()} - {None}
    tables = {path.stem for path in (topology_dir() / "calibration").glob("*.yaml")}
    assert named <= tables


def test_a_calibration_file_lies_beside_the_cluster(tmp_path: Path) -> None:
    """`calibration: host.yaml` is looked for beside the cluster's file, wherever one works; the
    hash holds its name alone, so that it is the same on every machine."""
    text = (topology_dir() / "h100-sxm-ib.yaml").read_text(encoding="utf-8")
    hashes = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        path = folder / "mine.yaml"
        path.write_text(text.replace("calibration: h100", "calibration: host.yaml"))
        cluster = load_cluster(path)
        assert cluster.calibration == str(folder / "host.yaml")
        hashes.add(cluster.cluster_hash())
    assert len(hashes) == 1
