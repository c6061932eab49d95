"""Fit `ExpertGemmModel` to the grouped-GEMM and fused-MoE tables: `python
verification/calibration/fit_experts.py --data ../shared/data/measured
--out topologies/calibration/h100.yaml`.

Fitted on balanced loads at every other token count; the stated errors are of the counts between,
and of skewed loads that the fit never saw. With `--gpu h200` nothing is fitted: the H100's
arithmetic is kept and its share of memory bandwidth is applied to the H200's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import AICONFIGURATOR, HBM_RATIO, HEADERS, arguments, report, update
from tables import OWN_SOURCE, ExpertPoints, own_grouped_points, vllm_moe_points, wideep_points

from moesim.cost.expert_gemm import NUM_MATRICES, ExpertGemmModel
from moesim.cost.fitting import round_significant
from moesim.model.names import WEIGHT_BYTES


@dataclass(frozen=True)
class VllmKernel:
    dtype: str
    kernel: str
    table_dtype: str
    contains: str
    start_tflops: float


# The first kernel of a dtype is its default: what vLLM picks for expert parallelism on an H100.
VLLM_KERNELS = (
    VllmKernel("bf16", "vllm_triton", "bfloat16", "unquantizedfusedmoe_triton", 500.0),
    VllmKernel("fp8", "vllm_flashinfer_block", "fp8_block", "vllm_fp8moe_flashinfer", 700.0),
    VllmKernel("fp8", "vllm_triton_block", "fp8_block", "fp8moe_triton", 700.0),
    VllmKernel("fp8", "vllm_flashinfer_per_tensor", "fp8", "modeloptfp8moe", 900.0),
    VllmKernel("int4", "vllm_marlin", "int4_wo", "wna16marlin", 400.0),
    VllmKernel("mxfp4", "vllm_triton", "w4a16_mxfp4", "gptossmxfp4", 400.0),
)
EAGER_NOTE = "launched eagerly: launch_us is the host's, not a CUDA graph's"
REGIMES = (("decode", 0, 256), ("middle", 256, 2048), ("prefill", 2048, 2**40))


def regime_reports(points: ExpertPoints, model: ExpertGemmModel) -> list[dict[str, Any]]:
    predicted = points.fit.predict_us(model)
    measured = points.fit.times_us
    tokens = points.frame["num_tokens"].to_numpy()
    skewed = (points.frame["distribution"].str.startswith("power_law")).to_numpy()
    reports = []
    for loads in (False, True):
        for name, above, up_to in REGIMES:
            held = (tokens > above) & (tokens <= up_to) & (skewed == loads) & ~points.train
            if not held.any():
                continue
            reports.append(
                report(
                    predicted[held],
                    measured[held],
                    regime=f"{name}, {above + 1} to {up_to} tokens" if up_to < 2**40 else name,
                    held_out="power-law loads" if loads else "every other token count",
                )
            )
    return reports


def entry(points: ExpertPoints, model: ExpertGemmModel, source: str) -> dict[str, Any]:
    per_expert = np.concatenate([np.concatenate(c) for c in points.frame["counts"]])
    params = NUM_MATRICES * points.fit.hidden * points.fit.intermediate
    fields: dict[str, Any] = {
        "dtype": model.dtype,
        "kernel": model.kernel,
        "basis": "measured",
        "source": source,
        "weight_bytes_per_param": round_significant(model.weight_bytes_per_param, 6),
        "launch_us": model.launch_us,
        "weight_gb_per_s": model.weight_gb_per_s,
        "tflops": model.tflops,
        "half_tokens": model.half_tokens,
        "tile_tokens": model.tile_tokens,
        "sharpness": model.sharpness,
    }
    for name in ("row_gb_per_s", "token_gb_per_s"):
        if getattr(model, name) is not None:
            fields[name] = getattr(model, name)
    fields["ranges"] = {
        "tokens_per_expert": [1.0, float(per_expert.max())],
        "params_per_expert": [float(params.min()), float(params.max())],
    }
    fields["fit"] = regime_reports(points, model)
    return fields


def fit_h100(data: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    entries = []
    for spec in VLLM_KERNELS:
        points = vllm_moe_points(
            data,
            spec.table_dtype,
            spec.contains,
            WEIGHT_BYTES[spec.dtype],
        )
        model = points.fit.subset(points.train).fit(
            dtype=spec.dtype,
            kernel=spec.kernel,
            start_tflops=spec.start_tflops,
            start_gb_per_s=2500.0,
        )
        entries.append(entry(points, model, "vllm_moe_h100"))
    for phase, kernel in (("decode", "deepgemm_masked"), ("prefill", "deepgemm_contiguous")):
        points = wideep_points(data, phase)
        model = points.fit.subset(points.train).fit(
            dtype="fp8", kernel=kernel, start_tflops=1200.0, start_gb_per_s=2500.0
        )
        entries.append(entry(points, model, "wideep_moe_h100"))
    entries[-1]["eager_launch_us"] = entries[-1]["launch_us"]
    entries[-1]["note"] = EAGER_NOTE
    points = own_grouped_points(data)
    model = points.fit.subset(points.train).fit(
        dtype="bf16", kernel="torch_grouped_mm", start_tflops=500.0, start_gb_per_s=2500.0
    )
    own = entry(points, model, "own_h100x2")
    own["eager_launch_us"] = own["launch_us"]
    own["note"] = EAGER_NOTE
    entries.append(own)
    sources = {
        "vllm_moe_h100": f"{AICONFIGURATOR}, h100 vllm 0.24.0 moe table, CUDA graph",
        "wideep_moe_h100": f"{AICONFIGURATOR}, h100 SGLang 0.5.10 wide-EP tables, DeepGEMM",
        "own_h100x2": OWN_SOURCE,
    }
    return entries, sources


def scale_to_h200(h100_file: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    entries = []
    loaded = yaml.safe_load(h100_file.read_text())
    for old in loaded["expert_ffn"]:
        scaled = {k: v for k, v in old.items() if k not in ("fit", "note")}
        for name in ("weight_gb_per_s", "row_gb_per_s", "token_gb_per_s"):
            if name in scaled:
                scaled[name] = round_significant(scaled[name] * HBM_RATIO["h200"])
        scaled |= {
            "basis": "assumed",
            "note": "H100's fit with memory rates x 4800 / 3350 (datasheet HBM bandwidths)",
        }
        entries.append(scaled)
    used = {e["source"] for e in entries}
    return entries, {k: v for k, v in loaded["sources"].items() if k in used}


def main() -> None:
    args = arguments(__doc__ or "")
    if args.gpu == "h200":
        entries, sources = scale_to_h200(args.out.parent / "h100.yaml")
    else:
        entries, sources = fit_h100(args.data)
    for e in entries:
        print(e["dtype"], e["kernel"], e["launch_us"], e["weight_gb_per_s"], e["tflops"])
        for fit in e.get("fit", []):
            print("   ", fit)
    update(args.out, HEADERS[args.gpu], "expert_ffn", entries, sources)


if __name__ == "__main__":
    main()
