"""Machines: a GPU and a host by name, or a YAML file of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moesim.cluster import host_names, is_machine, load_host, load_machine
from moesim.errors import FormatError, InputError, MismatchError, UnknownNameError

DOCS = (Path(__file__).parents[2] / "docs" / "topologies.md").read_text(encoding="utf-8")


def own_machine() -> str:
    """The YAML of docs/topologies.md."""
    return re.findall(r"```yaml\n(format: moesim-machine.*?)```", DOCS, re.DOTALL)[0]


def test_a_name_is_a_gpu_and_a_host() -> None:
    """DDR5-5600 in two channels: 2 x 5600 MT/s x 8 bytes = 89.6 GB/s; a Gen4 card in a Gen5 slot
    has the card's 32 GB/s, a Gen4 card in a Gen3 slot the slot's 16."""
    machine = load_machine("rtx-4090+ddr5-2ch")
    assert (machine.gpus[0].hbm_gb, machine.host.dram_gb_per_s) == (24, 89.6)
    assert machine.gpus[0].pcie_gb_per_s == 32
    assert load_machine("rtx-4090+ddr4-2ch-pcie3").gpus[0].pcie_gb_per_s == 16
    assert len(load_machine("4xrtx-4090+2s-ddr5-8ch").gpus) == 4
    assert load_machine("4x-rtx-4090+ddr5-8ch").gpus == load_machine("4xrtx-4090+ddr5-8ch").gpus


def test_a_gpu_alone_has_the_host_that_its_file_names() -> None:
    assert load_machine("rtx-3090").host.name == "ddr4-2ch"
    assert load_machine("l40s").host.name == "xeon-16vcpu"
    spark = load_machine("dgx-spark")
    assert spark.host.unified
    assert spark.host.dram_gb_per_s == spark.gpus[0].hbm_gb_per_s == 273


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("rtx4090", UnknownNameError),
        ("rtx-4090+ddr6", UnknownNameError),
        ("0xrtx-4090", InputError),
        ("2xdgx-spark", MismatchError),
        ("m3-ultra+ddr5-2ch", MismatchError),
        ("none/such.yaml", InputError),
    ],
)
def test_what_is_no_machine_is_refused(name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        load_machine(name)


@pytest.mark.parametrize("name", host_names())
def test_hosts_name_their_sources_and_are_named_after_their_files(name: str) -> None:
    host = load_host(name)
    assert host.name == name
    assert all(len(block.source) > 10 for block in host.blocks)


def test_a_machine_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mybox.yaml"
    path.write_text(own_machine(), encoding="utf-8")
    assert is_machine(path)
    machine = load_machine(path)
    assert [gpu.name for gpu in machine.gpus] == ["rtx-3090", "rtx-3090"]
    assert [gpu.pcie_gb_per_s for gpu in machine.gpus] == [16, 16]
    assert (machine.name, machine.host.cores, machine.basis) == ("mybox", 16, "datasheet")


def test_a_wrong_key_names_line_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "mybox.yaml"
    path.write_text(own_machine().replace("dram_gb_per_s", "dram_gbps"), encoding="utf-8")
    with pytest.raises(FormatError, match=r"mybox.yaml, line 8: unknown key .*dram_gbps"):
        load_machine(path)


def test_clusters_are_no_machines(tmp_path: Path) -> None:
    assert not is_machine("h100-sxm-ib")
    assert is_machine("rtx-4090")
    assert not is_machine(tmp_path / "absent.yaml")
