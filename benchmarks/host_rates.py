"""Measure what offloading rests on: host link, DRAM reads, and experts on the CPU.

Needs torch; a GPU only for the host link. Prints JSON: `h2d_us` [bytes, us] copies from pinned
memory; `dram_read_gb_per_s` of a plain reduction; `cpu_expert_us` [shape, dtype, tokens, us] one
SwiGLU expert, a different one each time so that caches do not help; and the two figures that
`moesim cache` takes, --dram-gb-per-s from one token and --cpu-tflops from many. Usage:

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


def dram_read() -> float:
    block = torch.ones(1 << 29, dtype=torch.int32)
    return block.nbytes / median_us(block.sum, 5) / 1e3


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
    """Effective rates by dtype: bytes over time at one token, flops over time at the most."""
    out: dict[str, dict[str, float]] = {}
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        picked = {(r[0], r[2]): float(r[3]) for r in rows if r[1] == dtype}  # type: ignore[arg-type]
        params = {name: 3 * h * i for name, (h, i) in SHAPES.items()}
        out[dtype] = {
            "dram_gb_per_s": statistics.median(
                params[n] * width / picked[(n, 1)] / 1e3 for n in SHAPES
            ),
            "cpu_tflops": statistics.median(
                2 * params[n] * TOKENS[-1] / picked[(n, TOKENS[-1])] / 1e6 for n in SHAPES
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
            "dram_read_gb_per_s": dram_read(),
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
