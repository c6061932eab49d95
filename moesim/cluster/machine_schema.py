"""The YAML schema of host and machine files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moesim.choices import Vectors
from moesim.cluster.machine import Host, Machine
from moesim.cluster.schema import (
    ClusterFile,
    Count,
    Figures,
    GpuFile,
    Latency,
    Name,
    NodeGroup,
    NotNegative,
    Nvme,
    Pcie,
    Positive,
    Text,
)
from moesim.cluster.schema import Host as HostOfNode
from moesim.cluster.schema import _Model as Block


class Memory(Figures):
    """DRAM of the whole host, all sockets together."""

    dram_gb: Positive
    dram_gb_per_s: Positive


class Cpu(Figures):
    """Cores of all sockets together; `ghz` is their clock under vector load."""

    sockets: Count = 1
    cores: Count
    ghz: Positive
    vectors: Vectors


class Link(Figures):
    """What one GPU's slot carries in one direction."""

    pcie_gb_per_s: Positive


class CpuKernels(Figures):
    """Matrix products measured on this host: a fixed cost per call, then the weights' bytes at
    `read_gb_per_s` for one token, or arithmetic at `tflops` for many."""

    call_us: NotNegative
    read_gb_per_s: Positive
    tflops: Positive


class HostFile(Block):
    """A host: a file of its own, or the `host` of a machine."""

    format: Literal["moesim-host"] = "moesim-host"
    version: Literal[1] = 1
    name: Name
    title: Text
    unified: bool = False
    memory: Memory
    cpu: Cpu
    link: Link
    nvme: Nvme | None = None
    kernels: CpuKernels | None = None

    def host(self) -> Host:
        """The Host that this file describes."""
        parts = ("memory", "cpu", "link", "nvme", "kernels")
        found = {name: getattr(self, name) for name in parts}
        blocks = [
            part.block(f"host {self.name}: {name}", "host") for name, part in found.items() if part
        ]
        kernels = self.kernels
        return Host(
            name=self.name,
            title=self.title,
            dram_gb=self.memory.dram_gb,
            dram_gb_per_s=self.memory.dram_gb_per_s,
            sockets=self.cpu.sockets,
            cores=self.cpu.cores,
            ghz=self.cpu.ghz,
            vectors=self.cpu.vectors,
            pcie_gb_per_s=self.link.pcie_gb_per_s,
            nvme_gb=self.nvme.nvme_gb if self.nvme else 0.0,
            nvme_gb_per_s=self.nvme.nvme_gb_per_s if self.nvme else 0.0,
            unified=self.unified,
            kernels=(kernels.call_us, kernels.read_gb_per_s, kernels.tflops) if kernels else None,
            blocks=tuple(blocks),
        )


class MachineFile(Block):
    """A machine of one's own: GPUs and a host, by name or described in place."""

    format: Literal["moesim-machine"]
    version: Literal[1]
    name: Name
    gpus: Annotated[list[Text | GpuFile], Field(min_length=1, max_length=64)]
    host: Text | HostFile

    @model_validator(mode="after")
    def _own_names(self) -> MachineFile:
        described = [gpu.name for gpu in self.gpus if isinstance(gpu, GpuFile)]
        if len(set(described)) != len(described):
            raise ValueError("gpus: describes one GPU twice; write it once and name it after that")
        return self


BRIDGE_GB_PER_S = 100.0
"""NVLink up to this is a bridge between two cards, which people seldom have: not taken."""
LATENCY = Latency(
    nvlink_us=0.4,
    pcie_us=0.25,
    nic_us=0.9,
    leaf_spine_us=0.8,
    host_us=0.1,
    nvme_us=80,
    message_intra_node_us=2,
    message_inter_node_us=6,
    message_host_us=8,
    kind="assumed",
    source="orders of magnitude, as of the shipped clusters",
)


def cluster_file(machine: Machine, num_gpus: int) -> ClusterFile:
    """The machine with its first `num_gpus` GPUs as a cluster's file: one node, a PCIe root complex
    for each GPU, one NUMA domain."""
    host = machine.host
    kinds = {block.where.rpartition(": ")[2]: block for block in host.blocks}

    def origin(part: str) -> dict[str, str]:
        block = kinds.get(part)
        return {
            "kind": block.kind if block else "assumed",
            "source": block.source if block else "not said",
        }

    gpus = machine.gpus[:num_gpus]
    group = {
        "count": 1,
        "gpus_per_node": num_gpus,
        "gpu": [gpu.name for gpu in gpus],
        "fabric": "nvswitch" if all(g.nvlink_gb_per_s > BRIDGE_GB_PER_S for g in gpus) else "pcie",
        "pcie": Pcie.model_validate(
            {
                "root_complexes": num_gpus,
                "host_bridge_gb_per_s": host.pcie_gb_per_s,
                **origin("link"),
            }
        ),
        "host": HostOfNode.model_validate(
            {
                "hosts_per_node": 1,
                "dram_gb": host.dram_gb,
                "dram_gb_per_s": host.dram_gb_per_s,
                **origin("memory"),
            }
        ),
    }
    if host.nvme_gb:
        group["nvme"] = Nvme.model_validate(
            {
                "nvme_gb": host.nvme_gb,
                "nvme_gb_per_s": host.nvme_gb_per_s,
                **origin("nvme"),
            }
        )
    return ClusterFile(
        format="moesim-cluster",
        version=1,
        name="machine",
        description=f"{num_gpus} x {machine.gpus[0].title}, {host.title}",
        nodes=[NodeGroup.model_validate(group)],
        latency=LATENCY,
    )
