"""Measure what offloading rests on: the host link, and experts on the CPU.

Needs torch; a GPU only for the host link. Prints JSON: `h2d_us` [bytes, us] copies from pinned
memory; `cpu_expert_us` [shape, dtype, tokens, us] one SwiGLU expert, a different one each time so
that caches do not help; and, fitted to them, the figures that `moesim cache` takes as --cpu-us,
--dram-gb-per-s and --cpu-tflops. Usage:

    python benchmarks/host_rates.py [--threads N] [--seconds 60]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

SHAPES = {
    "qwen3-30b": (2048, 768),
    "deepseek-v2-lite": (2048, 1408),
    "gpt-oss-20b": (2880, 2880),
    "mixtral": (4096, 14336),
}
TOKENS = (1, 2, 4, 8, 16, 64, 256)
POOL_BYTES = 2 << 30
"""Experts in rotation, well beyond any last-level cache."""


def median_us(call, repeat: int) -> float:  # type: ignore[no-untyped-def]
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def host_link() -> list[list[float]]:
    if not torch.cuda.is_available():
        return []
    rows = []
    for shift in range(20, 30):
        size = 1 << shift
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        card = torch.empty(size, dtype=torch.uint8, device="cuda")

        def copy(host=host, card=card) -> None:  # type: ignore[no-untyped-def]
            card.copy_(host, non_blocking=True)
            torch.cuda.synchronize()

        rows.append([size, median_us(copy, 10)])
    return rows


def cpu_experts(seconds: float) -> list[list[object]]:
    rows: list[list[object]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, (hidden, width) in SHAPES.items():
            size = 3 * hidden * width * dtype.itemsize
            count = max(2, min(256, POOL_BYTES // size))
            gate = torch.full((count, width, hidden), 0.01, dtype=dtype)
            up = torch.full((count, width, hidden), 0.01, dtype=dtype)
            down = torch.full((count, hidden, width), 0.01, dtype=dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, hidden).to(dtype)
                times, turn, began = [], 0, time.perf_counter()
                while len(times) < 40 and time.perf_counter() - began < seconds:
                    e = turn % count
                    start = time.perf_counter()
                    y = torch.nn.functional.silu(x @ gate[e].T) * (x @ up[e].T)
                    y @ down[e].T
                    times.append(time.perf_counter() - start)
                    turn += 1
                rows.append(
                    [
                        name,
                        str(dtype)[6:],
                        tokens,
                        statistics.median(times[min(2, len(times) - 1) :]) * 1e6,
                    ]
                )
    return rows


def figures(rows: list[list[object]]) -> dict[str, dict[str, float]]:
    """What HostSpec takes, by dtype: at one token an expert costs `cpu_us` plus its bytes at
    `dram_gb_per_s` (least squares of relative errors over the shapes); `cpu_tflops` is the median
    over the shapes at the most tokens, the fixed cost taken off."""
    out: dict[str, dict[str, float]] = {}
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        us = {(r[0], r[2]): float(r[3]) for r in rows if r[1] == dtype}  # type: ignore[arg-type]
        params = {name: 3 * h * i for name, (h, i) in SHAPES.items()}
        size = np.array([params[name] * width for name in SHAPES], float)
        time_us = np.array([us[(name, 1)] for name in SHAPES])
        terms = np.stack([np.ones(len(size)), size], axis=1) / time_us[:, None]
        fixed, per_byte = np.linalg.lstsq(terms, np.ones(len(size)), rcond=None)[0]
        most = TOKENS[-1]
        out[dtype] = {
            "cpu_us": fixed,
            "dram_gb_per_s": 1e-3 / per_byte,
            "cpu_tflops": statistics.median(
                2 * params[n] * most / (us[(n, most)] - fixed) / 1e6 for n in SHAPES
            ),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=60.0, help="for all CPU experts together")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    each = options.seconds / (2 * len(SHAPES) * len(TOKENS))
    with torch.inference_mode():
        rows = cpu_experts(each)
        result = {
            "cpu": cpu_name(),
            "threads": options.threads,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
            "h2d_us": host_link(),
            "cpu_expert_us": rows,
            "figures": figures(rows),
        }
    print(json.dumps(result))


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
