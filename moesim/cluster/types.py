"""Value types of a cluster: GPU specs, links, route tables, and where their figures come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim import choices
from moesim.errors import UnknownNameError

Kind = choices.Basis

KINDS: tuple[Kind, ...] = ("assumed", "datasheet", "measured")
"""How a figure was come by, weakest first."""

LINK_CLASSES = ("nvlink", "pcie", "nic", "leaf_spine", "host", "nvme")
"""Names of the codes in `RouteTable.link_class`: `LINK_CLASSES[code]`."""

NVLINK, PCIE, NIC, LEAF_SPINE, HOST, NVME = range(6)

DTYPES = ("fp4", "fp8", "bf16")
"""Number formats a GPU spec may state a rate for, narrowest first."""


@dataclass(frozen=True)
class BasisBlock:
    """One block of figures with its origin.

    `where` names the block (`gpu h100-sxm: memory`), `role` what it is used for: `gpu`, `fabric`
    (within a node), `network` (between nodes), `latency`, `host` (DRAM and NVMe) or `price`.
    `figures` are (key, value) pairs, the unit in the key.
    """

    where: str
    role: str
    kind: Kind
    source: str
    figures: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Basis:
    """What a prediction rests on: the weakest kind among `blocks`, and the blocks."""

    kind: Kind
    blocks: tuple[BasisBlock, ...]


@dataclass(frozen=True)
class GpuSpec:
    """Nominal figures of one GPU type. Rates are dense (no sparsity), links are per direction.

    `tflops` maps a number format of DTYPES to 1e12 operations per second; `nvlink_gb_per_s` is 0
    for a GPU without NVLink; `pcie_gb_per_s` is the link to the host, whatever its technology.
    `host` names the host that such a GPU usually has, empty where none is usual.
    """

    name: str
    title: str
    hbm_gb: float
    hbm_gb_per_s: float
    tflops: Mapping[str, float] = field(hash=False)
    nvlink_gb_per_s: float
    pcie_gb_per_s: float
    kernel_launch_us: float
    price_usd_per_hour: float
    blocks: tuple[BasisBlock, ...]
    host: str = ""

    def peak_tflops(self, dtype: str) -> float:
        """Dense rate for `dtype`: `fp4`, `fp8` or `bf16` (`fp16` counts as `bf16`).

        A format the GPU has no units for runs at the rate of the next wider one it has, as
        weight-only quantised kernels do. Raises UnknownNameError for any other name.
        """
        wanted = "bf16" if dtype == "fp16" else dtype
        if wanted not in DTYPES:
            raise UnknownNameError("number format", dtype, (*DTYPES, "fp16"))
        for candidate in DTYPES[DTYPES.index(wanted) :]:
            if candidate in self.tflops:
                return self.tflops[candidate]
        return self.tflops["bf16"]


@dataclass(frozen=True, eq=False)
class PathSet:
    """One path a GPU in CSR form: GPU g crosses links `link_idx[indptr[g]:indptr[g + 1]]`.

    `indptr` int64[G+1], `link_idx` int32 into the tables of `RouteTable`, `gb_per_s` float64[G] the
    narrowest link, `latency_us` float64[G] the sum over the links plus the software overhead of
    one host copy.
    """

    indptr: NDArray[np.int64]
    link_idx: NDArray[np.int32]
    gb_per_s: NDArray[np.float64]
    latency_us: NDArray[np.float64]

    def links(self, gpu_idx: int) -> NDArray[np.int32]:
        """The links that GPU `gpu_idx` crosses, in order."""
        return self.link_idx[self.indptr[gpu_idx] : self.indptr[gpu_idx + 1]]


@dataclass(frozen=True, eq=False)
class HostRoutes:
    """Paths between each GPU and the DRAM and NVMe of its own host.

    An NVMe path does not cross the DRAM link (direct storage access); staging through DRAM is
    `nvme_to_dram` followed by `dram_to_gpu`. The NVMe fields are None where some GPU's host has no
    NVMe.
    """

    dram_to_gpu: PathSet
    gpu_to_dram: PathSet
    nvme_to_gpu: PathSet | None
    gpu_to_nvme: PathSet | None
    nvme_to_dram: PathSet | None
    dram_to_nvme: PathSet | None


@dataclass(frozen=True, eq=False)
class RouteTable:
    """The directed links that a byte crosses between every two GPUs.

    Row `s * G + d` of the CSR pair `indptr` int64[G*G+1], `link_idx` int32[...] lists the links
    from GPU s to GPU d in order; it is empty for s == d. Per link: `link_gb_per_s` float64,
    `link_latency_us` float64, `link_class` int8 (codes into LINK_CLASSES), `link_name`
    ("gpu:3->nvswitch:0"). `hops` int64[G, G] counts links, `latency_us` float64[G, G] is their
    latencies' sum plus the software overhead of one message (0 on the diagonal), `gb_per_s`
    float64[G, G] the narrowest link (inf on the diagonal).
    """

    indptr: NDArray[np.int64]
    link_idx: NDArray[np.int32]
    link_gb_per_s: NDArray[np.float64]
    link_latency_us: NDArray[np.float64]
    link_class: NDArray[np.int8]
    link_name: tuple[str, ...]
    hops: NDArray[np.int64]
    latency_us: NDArray[np.float64]
    gb_per_s: NDArray[np.float64]

    @property
    def num_links(self) -> int:
        """Number of directed links of the cluster, those of host memory included."""
        return len(self.link_name)

    @property
    def link_class_names(self) -> tuple[str, ...]:
        """`LINK_CLASSES`, for reading `link_class`."""
        return LINK_CLASSES

    def links(self, src_idx: int, dst_idx: int) -> NDArray[np.int32]:
        """The links from GPU `src_idx` to GPU `dst_idx`, in order."""
        row = src_idx * len(self.hops) + dst_idx
        return self.link_idx[self.indptr[row] : self.indptr[row + 1]]
