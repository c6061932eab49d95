"""Batches by shared experts, beside first come first served: the table in reports/offloading.

Usage: python benchmarks/offloading_batching.py --data ../shared/data --out reports/offloading
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from moesim.caching.batching import ORDERS, Batching, pooled_stream, waits
from moesim.caching.info import limit_tokens
from moesim.caching.rates import HostSpec, build_rates, step_times
from moesim.caching.simulate import expert_frequency
from moesim.caching.timeline import Setup, all_events, run_timeline
from moesim.cluster.gpus import load_gpu
from moesim.model.names import load_model
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import load_token_trace

TRACES = ("debian-moe", "deepseek-v2-lite", "gpt-oss-20b", "sample:debian-olmoe")
GPU = "h100-sxm"
SIZES = ((4, 16), (8, 32))
"""(batch, pool)."""
PATIENCE = (4, 16)
POLICY = "lfru"
MAX_TOKENS = 16_384


def study(name: str, data: Path) -> dict[str, Any]:
    """Every order at every size on the held-out requests, half of each layer's experts in memory,
    misses fetched."""
    path = name if name.startswith("sample:") else str(data / f"{name}.npz")
    trace = load_token_trace(path, "the batching study")
    model = load_model(trace.meta.model)
    tune, held = split_requests(index_requests(trace, "decode")[0])
    held = limit_tokens(held, MAX_TOKENS, 0)
    frequency = expert_frequency(trace, tune)
    shape = frequency.shape
    setup = Setup(
        np.full(shape[0], shape[1] // 2),
        np.zeros(shape, bool),
        np.zeros(shape[0], bool),
        frequency,
        POLICY,
    )
    rates = build_rates(model, load_gpu(GPU), HostSpec())
    rows = []
    for batch, pool in SIZES:
        if pool > len(held.ids):
            continue
        times = step_times(rates, batch, 2048, np.full(shape, float(model.expert_bytes())))
        for order in ORDERS:
            for patience in PATIENCE if order != "fifo" else PATIENCE[-1:]:
                batching = Batching(order, pool, patience)  # type: ignore[arg-type]
                stream = pooled_stream(trace, held, batch, batching, fit=tune)
                run = run_timeline(trace, stream, setup, times)
                wait = waits(stream, run.step_s) * 1e3
                events = all_events(trace, stream)
                rows.append(
                    {
                        "batch": batch,
                        "pool": pool,
                        "order": order,
                        "patience": patience,
                        "experts": events.num_accesses / events.num_events,
                        "hit_rate": run.hit_rate,
                        "tokens_per_s": run.tokens_per_s,
                        "wait_ms_mean": float(wait.mean()),
                        "wait_ms_p99": float(np.percentile(wait, 99)),
                        "wait_ms_max": float(wait.max()),
                    }
                )
    return {"requests": len(held.ids), "tokens": len(held.token_idx), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("reports/offloading"))
    options = parser.parse_args()
    found = {name: study(name, options.data) for name in TRACES}
    (options.out / "batching.json").write_text(json.dumps(found, indent=1) + "\n")
    from offloading_study import GPU as STUDY_GPU
    from offloading_study import RATIOS
    from offloading_text import render

    results = json.loads((options.out / "results.json").read_text())
    (options.out / "README.md").write_text(render(results, RATIOS, STUDY_GPU, found))


if __name__ == "__main__":
    main()
