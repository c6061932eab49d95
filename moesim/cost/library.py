"""All-to-all libraries by name: what each sends, which is the default, which cannot be."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from moesim.choices import AllToAll
from moesim.cost.routing import Dedup
from moesim.errors import InputError, UnknownNameError
from moesim.trace.batches import Phase

if TYPE_CHECKING:
    from moesim.cost.calibration import Calibration

DEDUP_OF: dict[str, Dedup] = {
    "nccl": "gpu",
    "deepep": "node",
    "deepep_ll": "none",
    "deepep_v2": "node",
    "nvlink": "gpu",
    "nvlink_one_sided": "gpu",
}
KINDS_OF: dict[str, tuple[str, str]] = {
    "nccl": ("all_to_all_v", "all_to_all_v"),
    "deepep": ("deepep_normal_dispatch", "deepep_normal_combine"),
    "deepep_ll": ("deepep_ll_dispatch", "deepep_ll_combine"),
    "deepep_v2": ("deepep_v2_dispatch", "deepep_v2_combine"),
    "nvlink": ("nvlink_dispatch", "nvlink_combine"),
    "nvlink_one_sided": ("nvlink_one_sided_dispatch", "nvlink_one_sided_combine"),
}
NOT_PUBLISHED = {
    "nixl": "no times of NIXL's dispatch and combine are published",
    "nvshmem": "DeepEP's first version is the one through NVSHMEM, deepep and deepep_ll here",
    "pplx": "no table of pplx-kernels' times is at hand",
    "uccl": "no table of UCCL's times on InfiniBand is at hand",
    "mori": "no table of MORI's times is at hand",
}
"""Why exchanges that engines have are not modelled, by a part of their names."""


def check_library(name: str, known: Collection[str] = KINDS_OF) -> None:
    """Raise InputError for an exchange of which no times are published, by name, and
    UnknownNameError for one that is not known."""
    if name in known:
        return
    of_name = next((part for part in NOT_PUBLISHED if part in name.lower()), None)
    if of_name is not None:
        raise InputError(
            f"the exchange {name!r:.40}: {NOT_PUBLISHED[of_name]}",
            "take deepep_ll or deepep for an estimate of like kernels, or give a calibration with"
            " your own measurements",
        )
    raise UnknownNameError("all-to-all library", name, known)


def default_library(calibration: Calibration, num_nodes: int, phase: Phase) -> AllToAll:
    """All-to-all over so many nodes where none is named (see `build_step_model`)."""
    across: AllToAll = "deepep" if phase == "prefill" else "deepep_ll"
    wanted: AllToAll = across if num_nodes > 1 else "nvlink"
    return wanted if KINDS_OF[wanted][0] in calibration.collectives.kinds else "nccl"


def dispatch_dtype_of(library: str, expert_dtype: str) -> str:
    """Type of the rows that a library dispatches: DeepEP's kernels send fp8 rows, with a scale per
    128 elements, where experts are fp8, and all others bf16. Combine is bf16 everywhere.

    As vLLM and SGLang call DeepEP (vllm/model_executor/layers/fused_moe, the DeepEP
    prepare-and-finalize classes: fp8 for block-scaled fp8 experts). Exchanges in nvfp4 are ignored.
    """
    return "fp8" if library.startswith("deepep") and expert_dtype == "fp8" else "bf16"


def check_one_domain(library: str, num_nodes: int) -> None:
    """Raise InputError for kernels that reach the GPUs of one NVLink domain only, over more."""
    if library.startswith("nvlink") and num_nodes > 1:
        raise InputError(
            f"{library} over {num_nodes} NVLink domains: its kernels write to GPUs of one only",
            "choose nccl or deepep, or a group inside one domain",
        )
