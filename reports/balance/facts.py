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
from moesim.metrics import gpu_loads
from moesim.model.names import load_model
from moesim.placement import Placement
from moesim.planning.migration import Movers
from moesim.sim.links import link_table
from moesim.sim.migrate import build_mover
from moesim.sim.rearrange import LAYER_US, PLAN_US
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
    return {
        "plan_s": PLAN_US / 1e6,
        "host_s": LAYER_US * spec.num_moe_layers / 1e6,
        "weights_s": moved.us / 1e6,
        "gigabytes": moved.bytes_from_gpus / 1e9,
        "predicted_s": (PLAN_US + LAYER_US * spec.num_moe_layers + moved.us) / 1e6,
        "layers": spec.num_moe_layers,
    }


def swap_us(cluster: str) -> float:
    """Microseconds in which two GPUs of a host swap an expert of DeepSeek-V3 each."""
    spec, sized = load_model("DeepSeek-V3"), load_cluster(cluster, num_gpus=8)
    step = build_step_model(sized, spec, phase="decode")
    mover = build_mover(sized, link_table(sized, step), float(spec.expert_bytes()))
    rate = mover.us_per_byte[mover.us_per_byte > 0].min()
    return float(rate * spec.expert_bytes() + sized.routes().latency_us.max())


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


def tensorrt() -> dict:
    """Imbalance ratio, (max - mean) / mean of the ranks' tokens, mean over layers and iterations:
    58 layers, 32 GPUs in order, then 36 GPUs with EPLB from other iterations, 1,024 choices per
    rank and iteration. Popularity is lognormal, of a spread that makes the first of their two
    figures; routing of theirs is not public."""
    layers, iterations, per_rank = 58, 101, 1024
    rng = stream(0, 0x7277)
    drawn = rng.normal(size=(layers, 256))

    def counts(spread: float, ranks: int) -> np.ndarray:
        share = np.exp(spread * drawn)
        share /= share.sum(axis=1, keepdims=True)
        own = stream(ranks, 0x7278)
        return np.stack(
            [own.multinomial(ranks * per_rank, p, size=iterations) for p in share], axis=1
        )

    def ratio(seen: np.ndarray, ranks: int, placement: Placement) -> float:
        load = gpu_loads(seen, placement)
        return float((load.max(axis=2) / load.mean(axis=2)).mean() - 1)

    def placed(name: str, seen: np.ndarray, ranks: int, slots: int) -> Placement:
        problem = Problem(seen.astype(np.float32), np.full(ranks, slots), 1)
        return run_solver(find_solver(name), problem).placement

    low, high = 0.1, 2.0
    for _ in range(12):
        spread = (low + high) / 2
        seen = counts(spread, 32)
        found = ratio(seen, 32, placed("linear", seen[:1], 32, 8))
        low, high = (spread, high) if found < 1.564 else (low, spread)
    later = counts(spread, 36)
    new = placed("eplb", seen, 36, 8)
    even = (later.sum(axis=2, keepdims=True) / 36).repeat(36, axis=2)
    floor = stream(1, 0x7279).poisson(even).max(axis=2) / per_rank - 1
    return {
        "spread_fitted": spread,
        "in_order": {"measured": 1.564, "fitted": found},
        "eplb_288_slots_on_36": {"measured": 0.115, "predicted": ratio(later, 36, new)},
        "of_chance_alone_in_a_perfect_placement": float(floor.mean()),
    }


def main() -> None:
    found = {}
    for name, fact in STALLS.items():
        predicted = stall_s(*fact.pop("case"))
        per_layer = (fact["measured_s"] - predicted["plan_s"] - predicted["weights_s"]) * 1e3
        found[name] = {**fact, **predicted, "host_ms_per_layer": per_layer / predicted["layers"]}
    swaps = {"measured_us": {"H20": 92, "H800": 210}}
    swaps["predicted_us"] = {name: swap_us(name) for name in ("h100-sxm-ib", "h200-sxm-ib")}
    out = {"stalls": found, "EPIC, an expert of DeepSeek-R1 over NVLink": swaps}
    out |= {"TensorRT-LLM, examples/ep_load_balancer": tensorrt()}
    if len(sys.argv) > 1:
        out["ROCm/ATOM#1210"] = rocm_atom(sys.argv[1])
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
