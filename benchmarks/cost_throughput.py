"""Throughput of the analytic cost, in token-layer-choices per second on one core.

Times `route` (slot loads, messages, fan-out) and `route` plus `StepModel.cost`, beside what plain
numpy needs for the slot loads alone and for loads and messages, on the bundled trace and on a
random one of DeepSeek-V3's shape. Prints the median of several runs and the ratios. Usage:

    taskset -c 0 python benchmarks/cost_throughput.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from moesim.cluster import load_cluster
from moesim.cost.routing import Routed, home_ranks, route
from moesim.cost.step import build_step_model
from moesim.model.names import load_model
from moesim.placement import Placement
from moesim.trace.batches import Batches, draw_batches, index_requests
from moesim.trace.format import Trace, TraceMeta, load_token_trace


def random_trace(num_tokens: int, num_layers: int, num_experts: int, top_k: int) -> Trace:
    """Distinct random experts for every token and layer, with a skewed popularity."""
    rng = np.random.default_rng(0)
    skew = rng.gamma(2.0, size=(num_layers, num_experts))
    ids = np.empty((num_tokens, num_layers, top_k), np.uint8)
    for layer in range(num_layers):
        score = np.log(skew[layer]) + rng.gumbel(size=(num_tokens, num_experts))
        ids[:, layer] = np.argpartition(-score, top_k, axis=1)[:, :top_k]
    meta = TraceMeta("random", num_experts, top_k, tuple(range(num_layers)))
    requests = np.repeat(np.arange(num_tokens // 512), 512).astype(np.int32)
    positions = np.tile(np.arange(512), num_tokens // 512).astype(np.int32)
    return Trace(ids, requests, positions, np.zeros(num_tokens, np.uint8), meta)


def numpy_loads(trace: Trace, batches: Batches, placement: Placement) -> np.ndarray:
    """Slot loads by numpy: one bincount a batch."""
    slot_of = placement.logical_to_physical()[:, :, 0]
    layers = np.arange(trace.num_layers)
    out = []
    for b in range(len(batches)):
        ids = trace.expert_ids[batches[b]].astype(np.int64)
        slots = slot_of[layers[None, :, None], ids] + (layers * placement.num_slots)[None, :, None]
        out.append(np.bincount(slots.ravel(), minlength=trace.num_layers * placement.num_slots))
    return np.stack(out).reshape(len(batches), trace.num_layers, -1)


def numpy_messages(trace: Trace, batches: Batches, placement: Placement) -> np.ndarray:
    """Deduplicated messages [B, L, G, G] by numpy: sort each token's GPUs, drop repeats."""
    gpu_of = placement.logical_to_physical()[:, :, 0] // placement.slots_per_gpu
    layers, gpus = np.arange(trace.num_layers), placement.num_gpus
    home = home_ranks(trace, batches, gpus)
    out = []
    for b in range(len(batches)):
        ids = trace.expert_ids[batches[b]].astype(np.int64)
        hit = np.sort(gpu_of[layers[None, :, None], ids], axis=2)
        own = home[batches.indptr[b] : batches.indptr[b + 1]].astype(np.int64)[:, None, None]
        first = np.concatenate([np.ones_like(hit[..., :1], bool), np.diff(hit, axis=2) > 0], axis=2)
        cell = (layers[None, :, None] * gpus + own) * gpus + hit
        keep = first & (hit != own)
        out.append(np.bincount(cell[keep], minlength=trace.num_layers * gpus * gpus))
    return np.stack(out).reshape(len(batches), trace.num_layers, gpus, gpus)


def median_seconds(work: Callable[[], object], runs: int) -> float:
    """Median processor time of `work` after one warm-up, which also compiles. Processor rather
    than wall time, so that a busy machine does not count."""
    work()
    times = []
    for _ in range(runs):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times)


def report(label: str, trace: Trace, model: str, gpus: int, runs: int) -> None:
    """Check ours against numpy, time both, print the rows of one case."""
    cluster = load_cluster("h100-sxm-ib", num_gpus=gpus)
    step = build_step_model(cluster, load_model(model), all_to_all="nccl")
    table = np.tile(np.arange(trace.num_experts, dtype=np.int32), (trace.num_layers, 1))
    placement = Placement(table, gpus, cluster.num_nodes, trace.num_experts)
    batches = draw_batches(index_requests(trace)[0], "prefill", 4096, 8, 0)
    choices = len(batches.token_idx) * trace.num_layers * trace.top_k

    def ours() -> Routed:
        return route(trace, batches, placement, dedup="gpu")

    loads, messages = ours().slot_tokens, ours().messages
    if (loads != numpy_loads(trace, batches, placement)).any():
        raise SystemExit(f"{label}: loads differ")
    if (messages != numpy_messages(trace, batches, placement)).any():
        raise SystemExit(f"{label}: messages differ")
    peer = median_seconds(lambda: numpy_loads(trace, batches, placement), runs)
    peer += median_seconds(lambda: numpy_messages(trace, batches, placement), runs)
    rows = {
        "numpy, loads and messages": peer,
        "route": median_seconds(ours, runs),
        "route and step cost": median_seconds(lambda: step.cost(ours()), runs),
    }
    for what, seconds in rows.items():
        print(f"{label:<20}{what:<28}{choices / seconds / 1e6:>12.1f}{peer / seconds:>14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    print(f"{'case':<20}{'what':<28}{'M choices/s':>12}{'numpy / ours':>14}")
    sample = load_token_trace("sample:debian-moe", "this benchmark")
    report("sample:debian-moe", sample, "debian-moe", 8, runs)
    report("DeepSeek-V3 shape", random_trace(16_384, 58, 256, 8), "deepseek-v3", 32, runs)


if __name__ == "__main__":
    main()
