"""EPLB of this project beside the original: quality layer by layer, and time, in one run.

The original is DeepSeek's `eplb.py` (github.com/deepseek-ai/EPLB, MIT), which is not part of this
project: download it and name it with --eplb. It needs torch. Both get the same loads, DeepSeek-V3's
58 layers of 256 experts by default. Prints, for each kind of load, the layers whose placement is
identical, those whose largest GPU load is equal within rounding, the mean max/mean GPU load of
both, and the median processor time of both on one thread. Exits with 1 where ours is worse in any
layer. Usage:

    python benchmarks/eplb_peer.py --eplb eplb.py
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.solvers.methods.eplb import rebalance_experts

ROUNDING = 1e-5
FloatArray = npt.NDArray[np.float64]


def load_peer(path: Path) -> Any:
    """The original as a module."""
    spec = importlib.util.spec_from_file_location("peer_eplb", path)
    if spec is None or spec.loader is None or not path.is_file():
        sys.exit(f"no Python file at {path}: give the original's eplb.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loads(layers: int, experts: int) -> dict[str, FloatArray]:
    """[layers, experts] loads of several kinds, all seeded."""
    rng = np.random.default_rng(0)
    rank = np.stack([rng.permutation(experts) for _ in range(layers)]) + 1
    return {
        "Poisson counts of mean 500": rng.poisson(500, (layers, experts)).astype(float),
        "uniform random": rng.random((layers, experts)),
        "log-normal, sigma 1": rng.lognormal(5, 1, (layers, experts)),
        "Zipf, exponent 0.8": np.round(1e5 / rank**0.8),
        "small counts, many ties": rng.integers(0, 9, (layers, experts)).astype(float),
    }


def gpu_loads(weight: FloatArray, table: npt.NDArray[Any], num_gpus: int) -> FloatArray:
    """[layers, GPUs]: an expert's load is shared equally by its replicas."""
    out = np.empty((len(weight), num_gpus))
    for layer, row in enumerate(table):
        share = weight[layer] / np.bincount(row, minlength=weight.shape[1])
        out[layer] = share[row].reshape(num_gpus, -1).sum(axis=1)
    return out


def median_seconds(work: Callable[[], object], runs: int) -> float:
    """Median processor time after one warm-up, which also compiles."""
    work()
    times = []
    for _ in range(runs):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--eplb", type=Path, required=True, help="the original's eplb.py")
    for name, default in (
        ("layers", 58),
        ("experts", 256),
        ("slots", 288),
        ("gpus", 32),
        ("nodes", 4),
        ("groups", 8),
        ("runs", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    peer = load_peer(args.eplb)
    sizes = (args.slots, args.groups, args.nodes, args.gpus)
    print(
        f"{args.layers} layers, {args.experts} experts -> {args.slots} slots, {args.gpus} GPUs,"
        f" {args.nodes} nodes, {args.groups} groups; torch {torch.__version__}, one thread"
    )
    head = ("identical", "equal max", "ours", "peer", "ours ms", "peer ms", "ratio")
    print(f"{'loads':<28}" + "".join(f"{name:>11}" for name in head))
    worse = 0
    for name, weight in loads(args.layers, args.experts).items():
        given = torch.from_numpy(weight)
        own = rebalance_experts(weight, *sizes)
        theirs = peer.rebalance_experts(given, *sizes)[0].numpy()
        gpu_own, gpu_theirs = (gpu_loads(weight, table, args.gpus) for table in (own, theirs))
        most_own, most_theirs = gpu_own.max(axis=1), gpu_theirs.max(axis=1)
        worse += int((most_own > most_theirs * (1 + ROUNDING)).sum())
        seconds = (
            median_seconds(lambda w=weight: rebalance_experts(w, *sizes), args.runs),
            median_seconds(lambda w=given: peer.rebalance_experts(w, *sizes), args.runs),
        )
        row = (
            f"{(own == theirs).all(axis=1).sum()}/{args.layers}",
            f"{np.isclose(most_own, most_theirs, rtol=ROUNDING).sum()}/{args.layers}",
            f"{(most_own / gpu_own.mean(axis=1)).mean():.5f}",
            f"{(most_theirs / gpu_theirs.mean(axis=1)).mean():.5f}",
            f"{seconds[0] * 1e3:.2f}",
            f"{seconds[1] * 1e3:.1f}",
            f"{seconds[1] / seconds[0]:.0f}",
        )
        print(f"{name:<28}" + "".join(f"{cell:>11}" for cell in row))
    print(f"layers where ours has the larger maximum: {worse}")
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
