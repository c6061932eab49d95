"""Is a synthetic trace as good as the real one that it was fitted to, for what traces are used for?

For each real trace, plans and cache hit rates of the trace and of a synthetic one of its size:
held-out imbalance of EPLB with 8 redundant experts on 8 GPUs, GPUs a token of a search for least
traffic, the best cache of fixed segments (SRP) and of segments kept by use. Prints a table.
Takes some minutes. Usage:

    python verification/synthetic_traces.py [TRACE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from moesim.caching.info import offload_info
from moesim.cluster import load_cluster
from moesim.jobs.plan import make_plan
from moesim.model.names import load_model
from moesim.planning.request import PlanRequest
from moesim.trace.format import Trace, load_token_trace
from moesim.trace.synth import generate
from moesim.trace.synth_fit import fit

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TRACES = [
    "sample:debian-moe",
    *(str(p) for n in ("deepseek-v2-lite", "gpt-oss-20b") if (p := SHARED / f"{n}.npz").exists()),
]
GPUS = 8


def planned(trace: Trace, solver: str, objective: str, redundant: int) -> dict[str, float]:
    """Held-out imbalance and fan-out of linear placement and of one solver."""
    result = make_plan(
        PlanRequest.of(
            trace=trace,
            cluster=load_cluster("h100-sxm-ib", num_gpus=GPUS),
            model=load_model(trace.meta.model),
            solver=solver,
            objective=objective,  # type: ignore[arg-type]
            redundant_experts=redundant,
            time_limit_s=20.0,
            check_memory=False,
        )
    )
    return {
        f"{c.name} {name}": c.figures[name].value
        for c in result.candidates
        for name in ("imbalance", "imbalance_p99", "fan_out")
    }


def figures(trace: Trace) -> dict[str, float]:
    balance = planned(trace, "eplb", "balance", GPUS)
    traffic = planned(trace, "local_search", "traffic", 0)
    info = offload_info(trace)
    return {
        "linear, imbalance": balance["linear imbalance"],
        "EPLB, imbalance": balance["eplb imbalance"],
        "EPLB, imbalance p99": balance["eplb imbalance_p99"],
        "linear, GPUs a token": traffic["linear fan_out"],
        "least traffic, GPUs a token": traffic["local_search fan_out"],
        "SRP, segments of 16": float(np.mean(info.srp[16].layers)),
        "hit rate, segments of 16, cache of 2 K": float(
            info.sch_layers[16][:, 2 * trace.top_k].mean()
        ),
    }


def main() -> None:
    for name in sys.argv[1:] or TRACES:
        real = load_token_trace(name, "the comparison")
        made = generate(fit(real), real.num_tokens, 1)
        print(f"\n{real.meta.model}: {real.num_tokens:,} tokens")
        rows = figures(real), figures(made)
        for label in rows[0]:
            print(f"{label:<40} {rows[0][label]:8.3f} {rows[1][label]:8.3f}")


if __name__ == "__main__":
    main()
