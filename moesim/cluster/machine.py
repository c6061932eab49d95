"""Machines that people own: GPUs beside a host, by name (`2xrtx-3090+ddr4-4ch`) or from YAML."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from moesim.choices import Vectors
from moesim.cluster.gpus import gpu_names, load_gpu, topology_dir
from moesim.cluster.types import KINDS, BasisBlock, GpuSpec, Kind
from moesim.errors import InputError, MismatchError, UnknownNameError

USUAL_HOST = "xeon-16vcpu"
"""The host of a GPU that names none."""
MAX_GPUS_OF_A_MACHINE = 64
_COUNT = re.compile(r"([0-9]{1,3})x-?(.+)", re.DOTALL)


@dataclass(frozen=True)
class Host:
    """One computer without its GPUs; figures are of all its sockets together.

    `dram_gb_per_s` is what the channels carry (channels x transfers x 8 bytes), not what kernels
    reach. `ghz`: clock under vector load. `pcie_gb_per_s`: slot of one GPU, per direction.
    `unified`: DRAM is the GPU's memory too. `kernels`: measured matrix products (microseconds per
    call, GB/s, TFLOPS), None where nothing was measured. `nvme_gb` 0: no NVMe.
    """

    name: str
    title: str
    dram_gb: float
    dram_gb_per_s: float
    sockets: int
    cores: int
    ghz: float
    vectors: Vectors
    pcie_gb_per_s: float
    nvme_gb: float = 0.0
    nvme_gb_per_s: float = 0.0
    unified: bool = False
    kernels: tuple[float, float, float] | None = None
    blocks: tuple[BasisBlock, ...] = ()


@dataclass(frozen=True)
class Machine:
    """GPUs (in order) and their host. Each GPU's host link is the slower of its own and the
    host's slot."""

    name: str
    gpus: tuple[GpuSpec, ...]
    host: Host

    @property
    def blocks(self) -> tuple[BasisBlock, ...]:
        """Every figure with its origin."""
        return (*(b for gpu in dict.fromkeys(self.gpus) for b in gpu.blocks), *self.host.blocks)

    @property
    def basis(self) -> Kind:
        """The weakest kind among the figures that speed and memory rest on; launch, price and NVMe
        are left out."""
        counted = [
            b for b in self.blocks if not b.where.endswith((": launch", ": price", ": nvme"))
        ]
        return min((b.kind for b in counted), key=KINDS.index)


def _is_file(text: str) -> bool:
    return Path(text).suffix in (".yaml", ".yml") or os.sep in text


def host_names() -> tuple[str, ...]:
    """Names of the shipped hosts."""
    return tuple(sorted(path.stem for path in (topology_dir() / "hosts").glob("*.yaml")))


def load_host(name: str) -> Host:
    """A shipped host, or that of a YAML file. Raises UnknownNameError, InputError, FormatError."""
    if _is_file(name):
        from moesim.cluster.machine_schema import HostFile
        from moesim.cluster.schema import parse_file

        return parse_file(HostFile, Path(name), Path(name).name).host()
    if name not in host_names():
        raise UnknownNameError("host", name[:80], host_names())
    return _host_file(topology_dir() / "hosts" / f"{name}.yaml")


@lru_cache(maxsize=64)
def _host_file(path: Path) -> Host:
    from moesim.cluster.machine_schema import HostFile
    from moesim.cluster.schema import parse_file

    return parse_file(HostFile, path, path.name).host()


def load_machine(name_or_path: str | os.PathLike[str]) -> Machine:
    """The machine of a name or of a YAML file (`format: moesim-machine`).

    A name is a GPU, `+` and a host, by name or as a YAML file (`format: moesim-host`):
    `rtx-4090+ddr5-2ch`, `rtx-4090+mine.yaml`; `4xrtx-4090+ddr5-8ch` has four GPUs. Without a
    host, that which the GPU's file names, else USUAL_HOST. Raises UnknownNameError, InputError,
    FormatError (file, line, field), MismatchError for a GPU that has only the host's memory beside
    another host.
    """
    text = os.fspath(name_or_path)
    gpu_text, plus, host_text = text.partition("+")
    if _is_file(text) and not (plus and not _is_file(gpu_text)):
        return _machine_file(Path(text))
    found = _COUNT.fullmatch(gpu_text)
    count, gpu_name = (int(found[1]), found[2]) if found else (1, gpu_text)
    if not 1 <= count <= MAX_GPUS_OF_A_MACHINE:
        raise InputError(
            f"a machine of {count} GPUs", f"give 1 to {MAX_GPUS_OF_A_MACHINE}, as 2x{gpu_name:.40}"
        )
    if gpu_name not in gpu_names():
        raise UnknownNameError("GPU", gpu_name[:80], gpu_names())
    gpu = load_gpu(gpu_name)
    host = load_host(host_text if plus else gpu.host or USUAL_HOST)
    return _assembled(text, (gpu,) * count, host)


def is_machine(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this names a machine rather than a cluster: a GPU with or without a host, or a YAML
    file that says `format: moesim-machine`. False for what cannot be read."""
    text = os.fspath(name_or_path)
    path = Path(text)
    gpu_text, plus, _ = text.partition("+")
    if not _is_file(text) or (plus and not _is_file(gpu_text)):
        return "+" in text or text in gpu_names() or _COUNT.fullmatch(text) is not None
    from moesim.cluster.yaml_file import read_yaml

    try:
        content, _ = read_yaml(path, path.name)
    except InputError:
        return False
    return isinstance(content, dict) and content.get("format") == "moesim-machine"


def is_shipped(name: str) -> bool:
    """Whether all parts of a machine's name are shipped: a name out of a file that may be loaded,
    for it leads to no other file."""
    gpu_text, plus, host = name.partition("+")
    found = _COUNT.fullmatch(gpu_text)
    gpu = found[2] if found else gpu_text
    return gpu in gpu_names() and (not plus or host in host_names())


def _machine_file(path: Path) -> Machine:
    from moesim.cluster.machine_schema import MachineFile
    from moesim.cluster.schema import GpuFile, parse_file

    file = parse_file(MachineFile, path, path.name)
    own = {gpu.name: gpu.spec() for gpu in file.gpus if isinstance(gpu, GpuFile)}
    gpus = []
    for gpu in file.gpus:
        name = gpu if isinstance(gpu, str) else gpu.name
        if name not in own and name not in gpu_names():
            raise UnknownNameError(f"GPU in {path.name}:", name[:80], {*own, *gpu_names()})
        gpus.append(own[name] if name in own else load_gpu(name))
    if isinstance(file.host, str):
        beside = path.parent / file.host
        host = load_host(str(beside) if _is_file(file.host) else file.host)
    else:
        host = file.host.host()
    return _assembled(file.name, tuple(gpus), host)


def _assembled(name: str, gpus: tuple[GpuSpec, ...], host: Host) -> Machine:
    if host.unified and len(gpus) != 1:
        raise MismatchError(
            f"{host.name} has one memory for all, and {len(gpus)} GPUs are named",
            "name one GPU, or a host with memory of its own",
        )
    for gpu in gpus:
        if gpu.host in host_names() and gpu.host != host.name:
            own = load_host(gpu.host)
            if own.unified:
                raise MismatchError(
                    f"{gpu.name} shares the memory of its own host, {host.name} is another",
                    f"name {gpu.name} alone",
                )
    linked = tuple(
        replace(gpu, pcie_gb_per_s=min(gpu.pcie_gb_per_s, host.pcie_gb_per_s)) for gpu in gpus
    )
    return Machine(name, linked, host)
