"""Fit GEMM, attention and latent-attention layers: `python verification/calibration/fit_dense.py
--data ../shared/data/measured --out topologies/calibration/h100.yaml`.

Every other row count, context or prompt length is fitted, those between are held out. With
`--gpu h200` the H100's fits are kept, memory rates in proportion to memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import AICONFIGURATOR, HBM_RATIO, HEADERS, arguments, report, update
from tables import DensePoints, attention_points, gemm_points, mla_points

from moesim.cost.dense import AttentionKernel, GemmModel, MlaModule
from moesim.cost.fitting import robust_fit, round_significant
from moesim.model.names import WEIGHT_BYTES, load_model

MAX_TRAIN_POINTS = 5000
MEMORY_RATES = ("gb_per_s", "weight_gb_per_s", "kv_gb_per_s", "row_gb_per_s")
SOURCES = {
    "vllm_gemm_h100": f"{AICONFIGURATOR}, h100 vllm 0.24.0 gemm table, CUDA graph",
    "vllm_attention_h100": f"{AICONFIGURATOR}, h100 vllm 0.24.0 attention tables, CUDA graph",
    "vllm_mla_h100": f"{AICONFIGURATOR}, h100 vllm 0.24.0 DeepSeek-V3 attention modules",
}
Predict = Callable[[Mapping[str, float], np.ndarray], np.ndarray]


def fit(points: DensePoints, starts: dict[str, float], predict: Predict) -> dict[str, float]:
    """Parameters by name; those called *sharpness are fitted as 1 + exp(x), the others as exp."""
    names = list(starts)
    at = np.flatnonzero(points.train)
    at = at[:: max(1, len(at) // MAX_TRAIN_POINTS)]

    def unpack(log_params: np.ndarray) -> dict[str, float]:
        values = dict(zip(names, np.exp(log_params), strict=True))
        return {k: min(1.0 + v, 64.0) if k.endswith("sharpness") else v for k, v in values.items()}

    first = [np.log(v - 1.0 if k.endswith("sharpness") else v) for k, v in starts.items()]
    params, _ = robust_fit(
        lambda p: np.log(predict(unpack(p), at) / points.times_us[at]), [first], loss_scale=0.1
    )
    found = {k: round_significant(v) for k, v in unpack(params).items()}
    return {k: (0.0 if k == "extra_tokens" and v < 0.1 else v) for k, v in found.items()}


def reports(
    points: DensePoints, predicted: np.ndarray, regimes: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    return [
        report(
            predicted[held],
            points.times_us[held],
            regime=name,
            held_out="every other size",
        )
        for name, of in regimes.items()
        if (held := of & ~points.train).any()
    ]


def fit_gemms(data: Path) -> list[dict[str, Any]]:
    entries = []
    for dtype, table_dtype, tflops in (("bf16", "bfloat16", 800.0), ("fp8", "fp8", 1300.0)):
        points = gemm_points(data, table_dtype)
        m, n, k = (points.frame[c].to_numpy(dtype=np.float64) for c in "mnk")
        fixed = {"dtype": dtype, "weight_bytes_per_param": WEIGHT_BYTES[dtype]}
        starts = {
            "launch_us": 3.0,
            "gb_per_s": 2900.0,
            "tflops": tflops,
            "sharpness": 2.5,
            "k_per_us": 1800.0,
            "k_sharpness": 1.5,
        }
        if dtype != "bf16":
            starts["row_gb_per_s"] = 1000.0  # activations are quantised in the same call

        def predict(p: Mapping[str, float], at: np.ndarray, m=m, n=n, k=k, fixed=fixed) -> Any:
            return GemmModel(**fixed, **p).time_us(m[at], n[at], k[at])

        params = fit(points, starts, predict)
        every = np.arange(len(m))
        regimes = {
            "m up to 64": m <= 64,
            "m 65 to 1024": (m > 64) & (m <= 1024),
            "m above 1024": m > 1024,
        }
        entries.append(
            {
                "dtype": dtype,
                "basis": "measured",
                "source": "vllm_gemm_h100",
                **params,
                "fit": reports(points, predict(params, every), regimes),
            }
        )
    return entries


def fit_attention(data: Path) -> list[dict[str, Any]]:
    entries = []
    for phase in ("decode", "prefill"):
        for (head_dim, kv_dtype), points in attention_points(data, phase).items():
            f = points.frame
            batch = f["batch_size"].to_numpy(dtype=np.float64)
            tokens = (f["step"] + 1 if phase == "decode" else f["isl"]).to_numpy(dtype=np.float64)
            fixed = {"phase": phase, "head_dim": head_dim, "kv_dtype": kv_dtype}
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
            params = fit(points, starts, predict)
            windowed = f["window_size"].to_numpy() > 0
            entries.append(
                {
                    **fixed,
                    "basis": "measured",
                    "source": "vllm_attention_h100",
                    **params,
                    "fit": reports(
                        points,
                        predict(params, np.arange(len(f))),
                        {"full": ~windowed, "windowed": windowed},
                    ),
                }
            )
    return entries


def fit_mla(data: Path) -> list[dict[str, Any]]:
    model = load_model("deepseek-v3")
    entries = []
    for phase in ("decode", "prefill"):
        for (dense_dtype, kv_dtype), points in mla_points(data, phase).items():
            f = points.frame
            batch = f["batch_size"].to_numpy(dtype=np.float64)
            tokens = (f["step"] + 1 if phase == "decode" else f["isl"]).to_numpy(dtype=np.float64)
            fixed = {"phase": phase, "dense_dtype": dense_dtype, "kv_dtype": kv_dtype}
            width = {"weight_bytes_per_param": WEIGHT_BYTES[dense_dtype]}
            groups = {
                replace(model.attention, num_heads=int(heads), num_kv_heads=int(heads)): rows
                for heads, rows in f.groupby("num_heads").indices.items()
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
                "launch_us": 70.0,
                "weight_gb_per_s": 2500.0,
                "dense_tflops": 600.0,
                "kv_gb_per_s": 2500.0,
                "attention_tflops": 800.0,
                "sharpness": 3.0,
            }
            if phase == "decode":
                starts["extra_tokens"] = 128.0
            params = fit(points, starts, predict)
            whole = (f["num_heads"] == 128).to_numpy()
            entries.append(
                {
                    **fixed,
                    "basis": "measured",
                    "source": "vllm_mla_h100",
                    **params,
                    "fit": reports(
                        points,
                        predict(params, np.arange(len(f))),
                        {"all 128 heads": whole, "1 to 64 heads": ~whole},
                    ),
                }
            )
    return entries


def scale_to_h200(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scaled = []
    for old in entries:
        new = {k: v for k, v in old.items() if k != "fit"}
        for name in MEMORY_RATES:
            if name in new:
                new[name] = round_significant(new[name] * HBM_RATIO["h200"])
        scaled.append(new | {"basis": "assumed", "note": "H100's fit, memory rates x 4800 / 3350"})
    return scaled


def main() -> None:
    args = arguments(__doc__ or "")
    if args.gpu == "h200":
        h100 = yaml.safe_load((args.out.parent / "h100.yaml").read_text())
        sections = {name: scale_to_h200(h100[name]) for name in ("gemm", "attention", "mla")}
    else:
        sections = {
            "gemm": fit_gemms(args.data),
            "attention": fit_attention(args.data),
            "mla": fit_mla(args.data),
        }
    for name, entries in sections.items():
        print(*entries, sep="\n")
        update(args.out, HEADERS[args.gpu], name, entries, SOURCES)


if __name__ == "__main__":
    main()
