"""Calibrations of serving engines' own kernels: `python verification/serving/fit_engines.py
--tables PATH/systems/data --gpu h200 --engine vllm --out topologies/calibration/h200-vllm.yaml`.
On Blackwell, where no other table of kernels is, all but the all-reduce go into the GPU's own file
(`--out topologies/calibration/gb200.yaml --section gemm ...`).

`--tables` is the folder `aic-core/src/aiconfigurator_core/systems/data` of a checkout of
github.com/ai-dynamo/aiconfigurator @095f58a. Only fitted parameters are written. Every other size
is fitted, those between are held out and give the stated errors. No serving measurement is used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibration"))

from common import AICONFIGURATOR, HEADERS, report, update
from engine_tables import (
    SOURCES,
    all_reduce_table,
    attention_points,
    expert_points,
    gemm_points,
    mla_points,
)
from fit_dense import fit, reports
from fit_experts import entry as expert_entry
from tables import alternate

from moesim.cost.dense import AttentionKernel, GemmModel, MlaModule
from moesim.cost.fitting import fit_affine_min
from moesim.model.names import WEIGHT_BYTES, load_model

SHAPES = {
    "fp8": ((3072, 1536), (4096, 1536), (7168, 2048), (6144, 2048), (4096, 1024)),
    "nvfp4": ((4096, 1536), (7168, 2048), (6144, 2048)),
    "bf16": (),
    "int4": ((7168, 2048),),
    "mxfp4": ((2880, 2880),),
}
START_TFLOPS = {"fp8": 800.0, "bf16": 500.0, "int4": 400.0, "mxfp4": 500.0, "nvfp4": 2000.0}
START_GB_PER_S = {"h100": 2600.0, "h200": 3500.0, "rtx-pro-6000": 1400.0}
GPU_NAMES = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "b300": "NVIDIA B300",
    "gb200": "NVIDIA GB200",
    "gb300": "NVIDIA GB300",
    "rtx-pro-6000": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
}


def fit_all_reduce(root: Path, gpu: str, engine: str, source: str) -> list[dict[str, Any]]:
    entries = []
    for ranks, rows in all_reduce_table(root, gpu, engine).groupby("num_gpus"):
        rows = rows.groupby("bytes", as_index=False)["us"].min()
        size, us = rows["bytes"].to_numpy(), rows["us"].to_numpy()
        train = alternate(size)
        curve, _ = fit_affine_min(size[train], us[train])
        entries.append(
            {
                "kind": "all_reduce",
                "group_size": int(ranks),
                "basis": "measured",
                "source": source,
                "nvlink": [list(pair) for pair in curve.segments],
                "bytes_range": [float(size.min()), float(size.max())],
                "fit": [
                    report(curve.time_us(size[~train]), us[~train], held_out="every other size")
                ],
            }
        )
    return entries


def fit_gemms(root: Path, gpu: str, engine: str, source: str) -> list[dict[str, Any]]:
    entries = []
    tflops_of = {"bf16": 800.0, "fp8": 1300.0, "nvfp4": 3000.0}
    for dtype in SOURCES[gpu, engine].gemm_dtypes:
        tflops = tflops_of[dtype]
        points = gemm_points(root, gpu, engine, dtype)
        m, n, k = (points.frame[c].to_numpy(dtype=np.float64) for c in "mnk")
        fixed = {"dtype": dtype, "weight_bytes_per_param": WEIGHT_BYTES[dtype]}
        starts = {
            "launch_us": 3.0,
            "gb_per_s": 3500.0,
            "tflops": tflops,
            "sharpness": 2.5,
            "k_per_us": 1800.0,
            "k_sharpness": 1.5,
        }
        if dtype != "bf16":
            starts["row_gb_per_s"] = 1000.0

        def predict(p: Mapping[str, float], at: np.ndarray, m=m, n=n, k=k, fixed=fixed) -> Any:
            return GemmModel(**fixed, **p).time_us(m[at], n[at], k[at])

        params = fit(points, starts, predict)
        regimes = {
            "m up to 64": m <= 64,
            "m 65 to 1024": (m > 64) & (m <= 1024),
            "m above 1024": m > 1024,
        }
        found = reports(points, predict(params, np.arange(len(m))), regimes)
        entries.append(
            {"dtype": dtype, "basis": "measured", "source": source, **params, "fit": found}
        )
    return entries


def fit_attention(root: Path, gpu: str, engine: str, source: str) -> list[dict[str, Any]]:
    entries = []
    for phase in ("decode", "prefill"):
        for (head_dim, kv_dtype), points in attention_points(root, gpu, engine, phase).items():
            f = points.frame
            batch = f["batch_size"].to_numpy(dtype=np.float64)
            tokens = (f["step"] + 1 if phase == "decode" else f["isl"]).to_numpy(dtype=np.float64)
            fixed = {"phase": phase, "head_dim": head_dim, "kv_dtype": kv_dtype}
            heads = f["num_key_value_heads"].where(f["num_key_value_heads"] > 0, f["num_heads"])
            f = f.assign(num_key_value_heads=heads)
            groups = f.groupby(["num_heads", "num_key_value_heads", "window_size"]).indices

            def predict(
                p: Mapping[str, float],
                at: np.ndarray,
                fixed=fixed,
                groups=groups,
                batch=batch,
                tokens=tokens,
            ) -> Any:
                kernel = AttentionKernel(**fixed, **p)
                time = np.empty(len(batch))
                for (heads, kv_heads, window), rows in groups.items():
                    time[rows] = kernel.time_us(
                        batch[rows], tokens[rows], int(heads), int(kv_heads), window=int(window)
                    )
                return time[at]

            starts = {"launch_us": 10.0, "gb_per_s": 2500.0, "tflops": 500.0, "sharpness": 2.0}
            if phase == "decode":
                starts["extra_tokens"] = 64.0
            windowed = f["window_size"].to_numpy() > 0
            # Windows shorten what is read; how a kernel skips the rest is not what is fitted.
            params = fit(replace(points, train=points.train & ~windowed), starts, predict)
            found = reports(
                points,
                predict(params, np.arange(len(f))),
                {"full": ~windowed, "windowed": windowed},
            )
            entries.append({**fixed, "basis": "measured", "source": source, **params, "fit": found})
    return entries


def fit_mla(root: Path, gpu: str, engine: str, source: str) -> list[dict[str, Any]]:
    model = load_model("deepseek-v3")
    borrowed = SOURCES[gpu, engine].mla
    own = borrowed is not None and borrowed[0] == engine
    entries = []
    for phase in ("decode", "prefill"):
        for (dense, kv), points in (mla_points(root, gpu, engine, phase) or {}).items():
            f = points.frame
            batch = f["batch_size"].to_numpy(dtype=np.float64)
            tokens = (f["step"] + 1 if phase == "decode" else f["isl"]).to_numpy(dtype=np.float64)
            fixed = {"phase": phase, "dense_dtype": dense, "kv_dtype": kv}
            width = {"weight_bytes_per_param": WEIGHT_BYTES[dense]}
            groups = {
                replace(model.attention, num_heads=int(h), num_kv_heads=int(h)): rows
                for h, rows in f.groupby("num_heads").indices.items()
            }

            def predict(
                p: Mapping[str, float],
                at: np.ndarray,
                fixed=fixed | width,
                groups=groups,
                batch=batch,
                tokens=tokens,
            ) -> Any:
                module = MlaModule(**fixed, **p)
                time = np.empty(len(batch))
                for spec, rows in groups.items():
                    time[rows] = module.time_us(batch[rows], tokens[rows], spec, model.hidden_size)
                return time[at]

            starts = {
                "launch_us": 45.0,
                "weight_gb_per_s": 3500.0,
                "dense_tflops": 600.0,
                "kv_gb_per_s": 3500.0,
                "attention_tflops": 800.0,
                "sharpness": 3.0,
            }
            if phase == "decode":
                starts["extra_tokens"] = 128.0
            params = fit(points, starts, predict)
            found = reports(
                points, predict(params, np.arange(len(f))), {"all": np.ones(len(f), bool)}
            )
            entry = {**fixed, "basis": "measured", "source": source, **params, "fit": found}
            if not own:
                entry |= {"basis": "assumed", "note": "the module of another engine"}
            entries.append(entry)
    return entries


def fit_experts(root: Path, gpu: str, engine: str, source: str) -> list[dict[str, Any]]:
    entries = []
    used = SOURCES[gpu, engine]
    for dtype, parallel in product(used.experts, used.parallel):
        for shape in (None, *SHAPES[dtype]):
            points = expert_points(
                root, gpu, engine, dtype, WEIGHT_BYTES[dtype], shape, parallel=parallel
            )
            if points is None:
                continue
            name = f"{engine}_{parallel}" + ("" if shape is None else f" {shape[0]}x{shape[1]}")
            model = points.fit.subset(points.train).fit(
                dtype=dtype,
                kernel=name,
                start_tflops=START_TFLOPS[dtype],
                start_gb_per_s=START_GB_PER_S.get(gpu, 6000.0),
            )
            fields = expert_entry(points, model, source)
            if shape is not None:
                fields["shape"] = list(shape)
            print(dtype, name, fields["launch_us"], fields["weight_gb_per_s"], fields["tflops"])
            print("   ", [(r["regime"], r["median_error"], r["p90_error"]) for r in fields["fit"]])
            entries.append(fields)
    return entries


FITS: dict[str, Callable[[Path, str, str, str], list[dict[str, Any]]]] = {
    "collectives": fit_all_reduce,
    "gemm": fit_gemms,
    "attention": fit_attention,
    "mla": fit_mla,
    "expert_ffn": fit_experts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--gpu", choices=list(GPU_NAMES), required=True)
    parser.add_argument("--engine", choices=["vllm", "sglang", "trtllm"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--section", choices=list(FITS), action="append", help="only these")
    args = parser.parse_args()
    used = SOURCES[args.gpu, args.engine]
    source = f"{args.engine}_{args.gpu}"
    versions = {"gemm": used.gemm, "attention": used.attention, "all-reduce": used.all_reduce}
    versions |= {f"{d} experts": v for d, v in used.experts.items()}
    if used.mla:
        versions["latent attention"] = " ".join(used.mla)
    listed = ", ".join(f"{part} {version}" for part, version in versions.items())
    sources = {source: f"{AICONFIGURATOR}, {args.gpu} {args.engine} tables: {listed}"}
    header = {
        "format": "moesim-calibration",
        "version": 1,
        "name": args.out.stem,
        "gpu": GPU_NAMES[args.gpu],
        "description": f"Kernels of {args.engine} as it serves, fitted to public tables",
    }
    header = HEADERS.get(args.out.stem, header)
    call = (args.tables, args.gpu, args.engine, source)
    for section in args.section or FITS:
        entries = FITS[section](*call)
        for e in entries:
            if section != "expert_ffn":
                print({k: v for k, v in e.items() if k not in ("fit", "source", "basis")})
                print(
                    "   ", [(r.get("regime"), r["median_error"], r["p90_error"]) for r in e["fit"]]
                )
        update(args.out, header, section, entries, sources)


if __name__ == "__main__":
    main()
