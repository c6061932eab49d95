"""How good are plans from counts of a few steps?

Steps are batches of real traces, drawn from the tuning requests and reduced to counts. Each plan is
made from them alone and judged by the excess imbalance (mean over steps and layers of max/mean GPU
load, minus 1) of 48 steps of requests that it never saw. Prints the table of docs/evaluation.md,
means over three draws of the steps. Usage, some minutes on two cores:

    python benchmarks/load_plans.py --data ../shared/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from moesim.jobs.plan_loads import measure_loads

from moesim.planning.tuning import batch_counts
from moesim.solvers.base import Problem
from moesim.solvers.registry import find_solver
from moesim.trace.batches import Phase, draw_batches, index_requests, split_requests
from moesim.trace.format import Trace, load_token_trace

CASES: tuple[tuple[str, Phase, int], ...] = (
    ("debian-moe", "prefill", 4096),
    ("deepseek-v2-lite", "prefill", 2048),
    ("gpt-oss-20b", "decode", 256),
)
SOLVERS = ("linear", "eplb", "local_search")
STEPS = (1, 6, 20, 100)
NUM_LAYERS, NUM_GPUS, NUM_DRAWS, NUM_JUDGING = 4, 8, 3, 48
REDUNDANT = (0, 8)


def excess(trace: Trace, phase: Phase, tokens: int, steps: int, redundant: int) -> list[float]:
    """Excess imbalance by solver, mean over draws."""
    tune, held_out = split_requests(index_requests(trace, phase)[0])
    layers = np.unique(np.linspace(0, trace.num_layers - 1, NUM_LAYERS).round().astype(int))
    judged = batch_counts(trace, draw_batches(held_out, phase, tokens, NUM_JUDGING, 1))[:, layers]
    found = np.zeros((NUM_DRAWS, len(SOLVERS)))
    for draw in range(NUM_DRAWS):
        batches = draw_batches(tune, phase, tokens, steps, 100 + draw)
        problem = Problem(
            counts=np.ascontiguousarray(batch_counts(trace, batches)[:, layers]),
            capacity=np.full(NUM_GPUS, (trace.num_experts + redundant) // NUM_GPUS),
            num_nodes=1,
            seed=draw,
        )
        for i, solver in enumerate(SOLVERS):
            placement = find_solver(solver).solve(problem).placement
            order, speed = np.arange(NUM_JUDGING), np.ones(NUM_GPUS)
            values = measure_loads(judged.astype(np.int64), placement, order, NUM_JUDGING, speed)
            found[draw, i] = values.values["imbalance"].mean() - 1
    return [float(x) for x in found.mean(axis=0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    args = parser.parse_args()
    head = ["trace", "tokens a step", "redundant", "steps", *SOLVERS]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, phase, tokens in CASES:
        trace = load_token_trace(args.data / f"{name}.npz", "this")
        for redundant in REDUNDANT:
            for steps in STEPS:
                values = excess(trace, phase, tokens, steps, redundant)
                cells = [f"{name}, {phase}", f"{tokens:,}", str(redundant), str(steps)]
                cells += [f"{value:.3f}" for value in values]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
