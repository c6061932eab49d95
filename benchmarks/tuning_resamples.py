"""Does it help to draw tuning batches from bootstrap resamples of the requests?

The local search (objective balance) is run on the same number of tuning batches drawn in several
ways, and judged by the excess imbalance (mean over batches and layers of max/mean GPU load, minus
1) on requests that it never saw. `tuning` judges inside the tuning half alone, split again with
three seeds: what a choice may rest on. `held-out` judges on the held-out half. Prints the table of
docs/evaluation.md; ratios are geometric means over layers and splits, with 95 % intervals in the
summary that take these as independent. Usage, about 20 minutes on two cores:

    python benchmarks/tuning_resamples.py --data ../shared/data
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moesim.metrics import imbalance
from moesim.planning import tuning
from moesim.solvers.base import Problem
from moesim.solvers.registry import find_solver
from moesim.trace.batches import Phase, RequestIndex, draw_batches, index_requests, split_requests
from moesim.trace.format import Trace, load_token_trace

TRACES = ("debian-moe", "deepseek-v2-lite", "gpt-oss-20b")
WORKLOADS: tuple[tuple[Phase, int], ...] = (("prefill", 4096), ("decode", 256))
GPUS = (8, 16)
FRACTIONS = {"plain": None, "resamples of all": 1.0, "resamples of half": 0.5}
"""Requests in a resample as a share of the tuning requests; plain draws without resampling."""
CHUNK_BATCHES = 100
NUM_JUDGING_BATCHES = 300
Values = dict[str, npt.NDArray[np.float64]]


def some_layers(trace: Trace, num_layers: int) -> Trace:
    """The trace restricted to layers at even distances."""
    keep = np.unique(np.linspace(0, trace.num_layers - 1, num_layers).round().astype(int))
    meta = replace(trace.meta, layer_ids=tuple(trace.meta.layer_ids[i] for i in keep))
    return replace(trace, expert_ids=np.ascontiguousarray(trace.expert_ids[:, keep]), meta=meta)


def drawn_counts(
    trace: Trace, requests: RequestIndex, phase: Phase, tokens: int, num_batches: int, seed: int
) -> npt.NDArray[np.float32]:
    """[B, L, E]: counts of batches drawn from the requests as they are."""
    parts = [
        tuning.batch_counts(
            trace, draw_batches(requests, phase, tokens, CHUNK_BATCHES, seed * 1009 + i)
        )
        for i in range(num_batches // CHUNK_BATCHES)
    ]
    return np.concatenate(parts)


def excess(
    counts: npt.NDArray[np.float32], table: npt.NDArray[np.int32], num_gpus: int
) -> npt.NDArray[np.float64]:
    """[L]: excess imbalance of a placement without replicas, table [L, E], on counts [B, L, E]."""
    placed = np.take_along_axis(counts, table[None].astype(np.int64), axis=2)
    load = placed.reshape(*counts.shape[:2], num_gpus, -1).sum(axis=3)
    return imbalance(load).mean(axis=0) - 1


def splits(requests: RequestIndex, judge: str) -> Iterator[tuple[RequestIndex, RequestIndex]]:
    tune, held_out = split_requests(requests)
    if judge == "held-out":
        yield tune, held_out
        return
    for seed in (1, 2, 3):
        yield split_requests(tune, seed)


def run_case(trace: Trace, judge: str, gpus: int, phase: Phase, tokens: int) -> Values:
    """Excess imbalance of EPLB and of the search by way of drawing, for every split and layer."""
    index, _ = index_requests(trace, phase)
    values: dict[str, list[npt.NDArray[np.float64]]] = {n: [] for n in ("EPLB", *FRACTIONS)}
    for seed, (tune, other) in enumerate(splits(index, judge)):
        judged = drawn_counts(trace, other, phase, tokens, NUM_JUDGING_BATCHES, 7 + seed)
        for name, fraction in FRACTIONS.items():
            if fraction is not None:
                tuning.RESAMPLE_FRACTION = fraction
                counts = tuning.tuning_counts(trace, tune, phase, tokens, seed)
                num_batches = len(counts)
            else:
                num_batches = tuning.NUM_RESAMPLES * tuning.BATCHES_PER_RESAMPLE
                counts = drawn_counts(trace, tune, phase, tokens, num_batches, seed)
            capacity = np.full(gpus, trace.num_experts // gpus)
            problem = Problem(counts, capacity, 1, "balance", seed=seed, time_limit_s=1e6)
            solved = {name: "local_search"} | ({"EPLB": "eplb"} if fraction == 1.0 else {})
            for row, solver in solved.items():
                placement = find_solver(solver).solve(problem).placement
                values[row].append(excess(judged, placement.physical_to_logical, gpus))
    return {name: np.concatenate(v) for name, v in values.items()}


def ratios(values: Values) -> dict[str, tuple[float, float]]:
    """By way of drawing, against plain: geometric mean of the ratios, and half of its interval."""
    out = {}
    for name in list(FRACTIONS)[1:]:
        logs = np.log(values[name] / values["plain"])
        middle = float(np.exp(logs.mean()))
        out[name] = middle, middle * float(1.96 * logs.std(ddof=1) / np.sqrt(len(logs)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--layers", type=int, default=8, help="layers of each trace, evenly spread")
    args = parser.parse_args()
    ways = list(FRACTIONS)
    head = [
        "judged on",
        "trace",
        "GPUs",
        "phase",
        "EPLB",
        *ways,
        *(f"{w} / plain" for w in ways[1:]),
    ]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for judge in ("tuning", "held-out"):
        cases: list[Values] = []
        for name in TRACES:
            trace = some_layers(load_token_trace(args.data / f"{name}.npz", "this"), args.layers)
            for gpus in GPUS:
                for phase, tokens in WORKLOADS:
                    cases.append(run_case(trace, judge, gpus, phase, tokens))
                    print_row([judge, name, str(gpus), phase], cases[-1])
        together = {n: np.concatenate([c[n] for c in cases]) for n in cases[0]}
        print_row([judge, "all", "", ""], together, interval=True)


def print_row(head: list[str], values: Values, *, interval: bool = False) -> None:
    cells = [f"{v.mean():.4f}" for v in values.values()]
    cells += [
        f"{middle:.3f} ±{half:.3f}" if interval else f"{middle:.2f}"
        for middle, half in ratios(values).values()
    ]
    print("| " + " | ".join([*head, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
