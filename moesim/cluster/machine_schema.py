"""The YAML schema of host and machine files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moesim.choices import Vectors
from moesim.cluster.machine import Host
from moesim.cluster.schema import Count, Figures, GpuFile, Name, NotNegative, Nvme, Positive, Text
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
