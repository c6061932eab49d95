"""Models for a GPU nobody measured here: datasheet figures times assumed efficiencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moesim.cost.calibration import Calibration
from moesim.cost.collective import CollectiveCurve, CollectiveModel
from moesim.cost.copies import CopyModel
from moesim.cost.curves import AffineMin
from moesim.cost.dense import (
    KV_ELEMENT_BYTES,
    AttentionKernel,
    DenseModel,
    GemmModel,
    MlaModule,
    Phase,
)
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.errors import InputError
from moesim.model.names import WEIGHT_BYTES

# What the fitted H100 reaches of its datasheet (topologies/calibration/h100.yaml), rounded, and
# assumed to carry over: all-to-all 285 to 323 of 450 GB/s, weights 2.9 of 3.35 TB/s, bf16 expert
# GEMM 600 of 989 TFLOPS, pinned copies 55 of 64 GB/s, small all-to-all 6 to 7 us.
LINK_EFFICIENCY = 0.65
HBM_EFFICIENCY = 0.85
TFLOPS_EFFICIENCY = 0.6
PCIE_EFFICIENCY = 0.85
COLLECTIVE_LATENCY_US = 10.0
COPY_LATENCY_US = 10.0
# The same file's dense kernels: GEMM 810 of 989 TFLOPS, attention 640 (prefill, 128 wide).
GEMM_EFFICIENCY = 0.8
ATTENTION_EFFICIENCY = 0.6
ATTENTION_EXTRA_TOKENS = 150.0
HEAD_DIM = 128  # bytes and operations of other head sizes are in proportion
GEMM_DEPTH_PER_US = 1800.0
KERNELS_PER_ATTENTION = 3
KERNELS_PER_MLA_LAYER = 20
# A layer of routed experts is several kernels: routing, alignment, two GEMMs, activation, sum.
KERNELS_PER_LAYER = 6
HALF_TOKENS = 20.0
SHARPNESS = 2.5

# The number format whose units compute with weights of a dtype, then those to fall back on, each
# with the share of its rate. Four-bit weights without fp4 units are unpacked to bf16, fp32 runs as
# TF32 at half the bf16 rate.
_COMPUTE: dict[str, tuple[tuple[str, float], ...]] = {
    "fp32": (("bf16", 0.5),),
    "bf16": (("bf16", 1.0),),
    "fp16": (("bf16", 1.0),),
    "fp8": (("fp8", 1.0), ("bf16", 1.0)),
    "mxfp4": (("fp4", 1.0), ("bf16", 1.0)),
    "nvfp4": (("fp4", 1.0), ("bf16", 1.0)),
    "mxfp8": (("fp8", 1.0), ("bf16", 1.0)),
    "int8": (("bf16", 1.0),),
    "int4": (("bf16", 1.0),),
    "nf4": (("bf16", 1.0),),
}
_GROUP_SIZES = tuple(2**k for k in range(1, 11))
_COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter")


@dataclass(frozen=True)
class GpuFigures:
    """Datasheet figures of one GPU, all per GPU and one direction.

    `tflops`: dense peak by number format, of "fp4", "fp8" and "bf16" those it has.
    `nvlink_gb_per_s`: 0 where there is none, PCIe then carries the collectives.
    `kernel_launch_us`: of one kernel.
    """

    name: str
    hbm_gb_per_s: float
    tflops: Mapping[str, float]
    nvlink_gb_per_s: float
    pcie_gb_per_s: float
    kernel_launch_us: float = 4.0


def datasheet_models(figures: GpuFigures) -> Calibration:
    """A `Calibration` of the same shape as a measured one; every entry's basis is "assumed".

    Assumed: 65 % of the link, 85 % of HBM, 60 % of peak arithmetic, 85 % of PCIe, 10 us of
    latency a collective, 6 kernels a layer, 80 % and 60 % of peak for dense GEMMs and attention,
    and the fitted H100's half-rate points and overlaps.

    Raises InputError where a figure is not positive or no bf16 rate is given.
    """
    needed = {
        "hbm_gb_per_s": figures.hbm_gb_per_s,
        "pcie_gb_per_s": figures.pcie_gb_per_s,
        "bf16 tflops": figures.tflops.get("bf16", 0.0),
    }
    for name, value in needed.items():
        if not value > 0:
            raise InputError(
                f"{figures.name}: {name} must be positive, is {value}", "give the datasheet figure"
            )
    link = figures.nvlink_gb_per_s or figures.pcie_gb_per_s
    efficiency = LINK_EFFICIENCY if figures.nvlink_gb_per_s else PCIE_EFFICIENCY
    source = f"{figures.name} datasheet x assumed efficiencies"

    def curve(kind: str, size: int, rate: float) -> CollectiveCurve:
        return CollectiveCurve(
            kind=kind,
            group_size=size,
            num_nodes=1,
            nvlink=AffineMin(((COLLECTIVE_LATENCY_US, rate),)),
            basis="assumed",
            source=source,
        )

    rate = link * efficiency
    curves = [curve(kind, n, rate) for kind in _COLLECTIVES for n in _GROUP_SIZES]
    # A ring sends 2 (n - 1) / n of the tensor.
    curves += [curve("all_reduce", n, rate * n / (2 * (n - 1))) for n in _GROUP_SIZES]
    experts = {
        (dtype, "datasheet"): ExpertGemmModel(
            dtype=dtype,
            kernel="datasheet",
            weight_bytes_per_param=WEIGHT_BYTES[dtype],
            launch_us=KERNELS_PER_LAYER * figures.kernel_launch_us,
            weight_gb_per_s=figures.hbm_gb_per_s * HBM_EFFICIENCY,
            tflops=_peak_tflops(figures, dtype) * TFLOPS_EFFICIENCY,
            half_tokens=HALF_TOKENS,
            sharpness=SHARPNESS,
            basis="assumed",
            source=source,
        )
        for dtype in _COMPUTE
    }
    host = AffineMin(((COPY_LATENCY_US, figures.pcie_gb_per_s * PCIE_EFFICIENCY),))
    local = AffineMin(((figures.kernel_launch_us, figures.hbm_gb_per_s * HBM_EFFICIENCY / 2),))
    copies = {
        direction: CopyModel(direction, c, basis="assumed", source=source)
        for direction, c in (("h2d", host), ("d2h", host), ("permute", local))
    }
    return Calibration(
        name=f"{figures.name}-datasheet",
        gpu=figures.name,
        collectives=CollectiveModel(curves),
        experts=experts,
        copies=copies,
        dense=_dense(figures, source),
        sources={},
    )


def _peak_tflops(figures: GpuFigures, dtype: str) -> float:
    rates = [figures.tflops[f] * share for f, share in _COMPUTE[dtype] if f in figures.tflops]
    return rates[0]


def _dense(figures: GpuFigures, source: str) -> DenseModel:
    memory = figures.hbm_gb_per_s * HBM_EFFICIENCY
    attention_tflops = figures.tflops["bf16"] * ATTENTION_EFFICIENCY
    launch = figures.kernel_launch_us
    gemms = {
        dtype: GemmModel(
            dtype=dtype,
            weight_bytes_per_param=WEIGHT_BYTES[dtype],
            launch_us=launch,
            gb_per_s=memory,
            tflops=_peak_tflops(figures, dtype) * GEMM_EFFICIENCY,
            sharpness=SHARPNESS,
            k_per_us=GEMM_DEPTH_PER_US,
            basis="assumed",
            source=source,
        )
        for dtype in _COMPUTE
    }
    attention: dict[tuple[str, int, str], AttentionKernel] = {}
    mla: dict[tuple[str, str, str], MlaModule] = {}
    phases: tuple[tuple[Phase, float], ...] = (("decode", ATTENTION_EXTRA_TOKENS), ("prefill", 0.0))
    for phase, extra in phases:
        for kv_dtype in KV_ELEMENT_BYTES:
            attention[phase, HEAD_DIM, kv_dtype] = AttentionKernel(
                phase=phase,
                head_dim=HEAD_DIM,
                kv_dtype=kv_dtype,
                launch_us=KERNELS_PER_ATTENTION * launch,
                gb_per_s=memory,
                tflops=attention_tflops,
                sharpness=SHARPNESS,
                extra_tokens=extra,
                basis="assumed",
                source=source,
            )
            for dtype in _COMPUTE:
                mla[phase, dtype, kv_dtype] = MlaModule(
                    phase=phase,
                    dense_dtype=dtype,
                    kv_dtype=kv_dtype,
                    weight_bytes_per_param=WEIGHT_BYTES[dtype],
                    launch_us=KERNELS_PER_MLA_LAYER * launch,
                    weight_gb_per_s=memory,
                    dense_tflops=gemms[dtype].tflops,
                    kv_gb_per_s=memory,
                    attention_tflops=attention_tflops,
                    sharpness=SHARPNESS,
                    extra_tokens=extra,
                    basis="assumed",
                    source=source,
                )
    return DenseModel(gemms, attention, mla)
