"""Shipped GPU specs."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path

from moesim.cluster.types import GpuSpec
from moesim.errors import UnknownNameError


@lru_cache(maxsize=1)
def topology_dir() -> Path:
    """Directory of the shipped cluster, GPU and host files."""
    return Path(str(resources.files("moesim.topologies")))


@lru_cache(maxsize=1)
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
