"""What others measured of balancing, beside what moesim predicts: `facts.json`.

    python reports/balance/facts.py > reports/balance/facts.json

Stalls: EPLB's first plan from linear placement, for loads with the spread of lognormal:0.5, which
moves about as many weights as any later plan for other traffic. Throughput: `moesim balance` on a
synthetic trace of DeepSeek-V3's shape, since traces of the measured runs are not public.
"""

from __future__ import annotations

import json
import sys

import numpy as np

import moesim
from moesim.cluster import load_cluster
from moesim.cost.step import build_step_model
from moesim.model.names import load_model
from moesim.planning.migration import Movers
from moesim.sim.links import link_table
from moesim.sim.migrate import build_mover
from moesim.planning.balancing.bench import Costs
from moesim.solvers.base import Problem, run_solver
from moesim.solvers.registry import find_solver
from moesim.types import stream

STALLS = {
    "vllm#43219, DeepSeek-R1 NVFP4, 32 GB200, 32 redundant": {
        "measured_s": 0.91,
        "from_s": 0.65,
        "to_s": 1.70,
        "case": ("gb200-nvl72", 32, "DeepSeek-V3", "mxfp4", 32),
    },
    "vllm#28369, DeepSeek-V2-Lite, 8 H100, 0 redundant": {
        "measured_s": 0.26,
        "case": ("h100-sxm-ib", 8, "DeepSeek-V2-Lite", None, 0),
    },
    "sglang#6739, DeepSeek-V3, GPUs not said (16 H100 here), 32 redundant": {
        "measured_s": 1.8,
        "case": ("h100-sxm-ib", 16, "DeepSeek-V3", None, 32),
    },
}


def stall_s(cluster: str, gpus: int, model: str, dtype: str | None, redundant: int) -> dict:
    """Seconds of plan, host work and weights of one synchronous placement."""
    spec, sized = load_model(model), load_cluster(cluster, num_gpus=gpus)
    load = stream(0).lognormal(0.0, 0.5, (1, spec.num_moe_layers, spec.num_experts))
    slots = (spec.num_experts + redundant) // gpus
    problem = Problem(load.astype(np.float32), np.full(gpus, slots), sized.num_nodes)
    old, new = (run_solver(find_solver(n), problem).placement for n in ("linear", "eplb"))
    step = build_step_model(sized, spec, phase="decode")
    links = link_table(sized, step)
    mover = build_mover(sized, links, float(spec.expert_bytes(dtype)))
    moved = Movers(old, mover, links.num_links).plan(new)
    costs = Costs()
    return {
        "plan_s": costs.plan_us / 1e6,
        "host_s": costs.layer_us * spec.num_moe_layers / 1e6,
        "weights_s": moved.us / 1e6,
        "gigabytes": moved.bytes_from_gpus / 1e9,
        "predicted_s": (costs.plan_us + costs.layer_us * spec.num_moe_layers + moved.us) / 1e6,
        "layers": spec.num_moe_layers,
    }


def rocm_atom(trace: str) -> dict:
    """Change of requests/s of a prefill service that a step's MoE part bounds, none to EPLB with 0
    and 64 redundant experts, 8 GPUs, 2,048 tokens per GPU (theirs: 8,192)."""
    result = moesim.balance(
        trace, gpus=8, cluster="h200-sxm-ib", phase="prefill", batch_tokens=16384,
        redundant_experts=64, schemes=("eplb-vllm", "eplb-vllm+r"), ignore_memory=True,
    )  # fmt: skip
    return {
        row.name: {
            "moe_time_change": row.against_none.value,
            "imbalance": row.imbalance.value,
        }
        for row in result.rows
    }


def main() -> None:
    found = {}
    for name, fact in STALLS.items():
        predicted = stall_s(*fact.pop("case"))
        per_layer = (fact["measured_s"] - predicted["plan_s"] - predicted["weights_s"]) * 1e3
        found[name] = {**fact, **predicted, "host_ms_per_layer": per_layer / predicted["layers"]}
    out = {"stalls": found}
    if len(sys.argv) > 1:
        out["ROCm/ATOM#1210"] = rocm_atom(sys.argv[1])
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
