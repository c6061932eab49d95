"""`moesim topology list`, `show` and `check`."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moesim.cli.topology import app
from moesim.cluster import cluster_names, gpu_names, load_cluster
from moesim.errors import FormatError, InputError

runner = CliRunner()


def run(*arguments: str) -> str:
    """Standard output of a run that must succeed."""
    result = runner.invoke(app, list(arguments), env={"COLUMNS": "60"})
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: str) -> InputError:
    """The error that a run raises; the command line prints it and exits with its code."""
    result = runner.invoke(app, list(arguments))
    assert isinstance(result.exception, InputError)
    assert result.exception.exit_code == 2
    assert result.stdout == ""
    return result.exception


def test_list_names_every_cluster_and_gpu() -> None:
    out = run("list")
    firsts = [line.split()[0] for line in out.splitlines() if line.strip()]
    for name in (*cluster_names(), *gpu_names()):
        assert name in firsts
    assert "…" not in out
    rows = json.loads(run("list", "--json"))
    assert [row["name"] for row in rows["clusters"]] == list(cluster_names())
    assert rows["gpus"] == list(gpu_names())


def test_show_prints_routes_and_sources() -> None:
    out = run("show", "h100-sxm-ib", "--gpus", "32")
    assert "h100-sxm-ib: 32 GPUs in 4 nodes" in out
    assert "gpu:0 pcie:0:0 nic:0 leaf:0 nic:8 pcie:1:0 gpu:8" in out
    assert "Figures: assumed at the weakest" in out
    assert "SuperPOD" in out


@pytest.mark.parametrize("name", cluster_names())
def test_show_json_is_json_alone(name: str) -> None:
    info = json.loads(run("show", name, "--json"))
    cluster = load_cluster(name)
    assert info["cluster_hash"] == cluster.cluster_hash()
    assert sum(route["num_pairs"] for route in info["routes"]) == cluster.num_gpus * (
        cluster.num_gpus - 1
    )
    assert sum(link["num_links"] for link in info["links"]) == cluster.routes().num_links
    assert sum(gpu["num_gpus"] for gpu in info["gpu_types"]) == cluster.num_gpus
    assert {block["kind"] for block in info["basis"]["blocks"]} <= {
        "assumed", "datasheet", "measured",
    }  # fmt: skip


def test_yaml_is_a_file_to_start_from(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(run("show", "l40s-pcie", "--yaml"))
    assert run("check", str(mine)) == "l40s-pcie: valid, 16 GPUs in 2 nodes, figures assumed\n"
    assert json.loads(run("check", str(mine), "--json"))["cluster_hash"] == (
        load_cluster("l40s-pcie").cluster_hash()
    )
    mine.write_text(mine.read_text().replace("gb_per_s: 25", "gb_per_s: -25", 1))
    assert isinstance(fails("check", str(mine)), FormatError)
    error = fails("check", str(mine))
    assert error.cause.startswith("mine.yaml, line ")
    assert "nodes[0].nics.gb_per_s" in error.cause


def test_show_yaml_reads_a_file_too_and_not_with_json(tmp_path: Path) -> None:
    assert "choose one" in fails("show", "l40s-pcie", "--yaml", "--json").remedy


def test_wrong_names_sizes_and_files() -> None:
    assert "did you mean 'b200-ib'?" in fails("show", "b200").remedy
    assert fails("show", "h100-sxm-ib", "--gpus", "20").remedy == "ask for 16 or 24 GPUs"
    assert "65,536" in fails("show", "h100-sxm-ib", "--gpus", "99999999").remedy
    assert "No such file" in fails("check", "h100-sxm-ib").cause


def test_large_clusters_are_shown_without_routes() -> None:
    info = json.loads(run("show", "h100-sxm-ib", "--gpus", "4104", "--json"))
    assert info["routes"] == []
    assert info["vertices"]["gpu"] == 4104


@pytest.mark.parametrize(("name", "gpus"), [("h100-sxm-ib", "16"), ("gb200-nvl72", "72")])
def test_plot(tmp_path: Path, name: str, gpus: str) -> None:
    """A PNG of a sensible size, the same bytes each time."""
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    for target in (first, second):
        result = runner.invoke(app, ["show", name, "--gpus", gpus, "--plot", str(target)])
        assert result.exit_code == 0
        assert f"wrote {target}" in result.stderr
        assert "wrote" not in result.stdout
    data = first.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 1000 < width < 5000
    assert 500 < height < 1500
    assert data == second.read_bytes()


def test_plot_draws_every_vertex_once(tmp_path: Path) -> None:
    svg = tmp_path / "p.svg"
    run("show", "l40s-pcie", "--plot", str(svg))
    text = svg.read_text()
    assert text.count(">15</text>") == 1  # GPU 15 alone has that number
    assert text.count('aria-label="gpu:') == 16
    assert ">leaf switches</text>" in text
    assert ">NVSwitch</text>" not in text


def test_plot_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    assert (
        "unreadable"
        in fails("show", "h100-sxm-ib", "--gpus", "1024", "--plot", str(tmp_path / "a.png")).cause
    )
    for name in ("a.xyz", "missing/a.png"):
        fails("show", "h100-sxm-ib", "--plot", str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []
