"""docs/topologies.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from moesim.cluster import check_cluster_file, cluster_names, gpu_names, load_cluster, load_gpu

TEXT = (Path(__file__).parents[2] / "docs" / "topologies.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Cells of the body of the first table after `heading`."""
    lines = TEXT.split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    body = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        body.append([cell.strip() for cell in line.strip("|").split("|")])
    return body


def test_the_example_is_a_valid_cluster(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert example is not None
    path = tmp_path / "example.yaml"
    path.write_text(example.group(1), encoding="utf-8")
    cluster = check_cluster_file(path)
    assert cluster.num_gpus == 8
    assert cluster.gpus[3].name == "my-gpu"
    assert cluster.speed_factor[7] == 0.9
    table = cluster.routes()
    uplinks = table.link_gb_per_s[[n.startswith("leaf:0->spine") for n in table.link_name]]
    assert uplinks.sum() == 4 * 50 / 2


def test_every_shipped_cluster_is_listed_with_its_size() -> None:
    listed = {re.findall(r"`(.*?)`", row[0])[0]: row[1] for row in rows("# Topologies")}
    assert set(listed) == set(cluster_names())
    for name, gpus in listed.items():
        numbers = [int(n) for n in re.findall(r"(?:^|, )(\d+) ", gpus)]
        assert sum(numbers) == load_cluster(name).num_gpus


def test_the_gpu_table_is_that_of_the_specs() -> None:
    table = rows("## GPU figures")
    assert [row[0].strip("`") for row in table] == list(gpu_names())
    for row in table:
        gpu = load_gpu(row[0].strip("`"))
        assert [float(cell or 0) for cell in row[1:8]] == [
            gpu.hbm_gb,
            gpu.hbm_gb_per_s,
            gpu.tflops["bf16"],
            gpu.tflops.get("fp8", 0),
            gpu.tflops.get("fp4", 0),
            gpu.nvlink_gb_per_s,
            gpu.pcie_gb_per_s,
        ]


def test_the_hops_it_states() -> None:
    found = {
        name: set(load_cluster(name).hop_matrix().flatten().tolist()) - {0}
        for name in ("h100-sxm-ib", "h100-sxm-roce-leafspine")
    }
    assert "2 in a node, 6 on a\nleaf, 8 across a spine or a relay" in TEXT
    assert all(hops == {2, 6, 8} for hops in found.values())
