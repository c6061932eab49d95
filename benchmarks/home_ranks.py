"""What predicted home ranks are worth: messages and inter-node bytes on held-out requests.

For each trace, workload and placement: contiguous home ranks, every predictor that the trace has
data for, and the oracle, which knows where the tokens evaluated go. Writes `reports/home-ranks/`:
results.csv (case by case: --resume goes on after a stopped run) and README.md. Usage:

    python benchmarks/home_ranks.py --data ../shared/data --out reports/home-ranks
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rows import arguments, begin, days, write

from moesim.cluster import load_cluster
from moesim.cost.step import build_step_model
from moesim.errors import MismatchError
from moesim.model.names import load_model
from moesim.planning.evaluate import difference, draw_sample, figures, measure
from moesim.planning.home_ranks import choose_predictor, predict_homes
from moesim.planning.traffic import sample_traffic
from moesim.planning.tuning import tuning_counts
from moesim.solvers.base import Problem
from moesim.solvers.registry import find_solver
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import load_token_trace

CASES = (
    ("gpt-oss-20b", 16, "decode", 256),
    ("debian-moe", 16, "decode", 256),
    ("debian-moe", 16, "prefill", 4096),
    ("deepseek-v2-lite", 16, "decode", 256),
)
PREDICTORS = ("domain", "tokens", "prefix", "oracle")
SOLVERS = ("eplb", "coclustering")
FAR = 9.0
"""NVLink over NIC line rate of an H100 node: 450 and 50 GB/s."""
TUNING_BATCHES = 600


def run_case(data: Path, name: str, gpus: int, phase: str, tokens: int) -> list[dict]:
    trace = load_token_trace(data / f"{name}.npz", "benchmark")
    cluster = load_cluster("h100-sxm-ib", num_gpus=gpus)
    step = build_step_model(cluster, load_model(trace.meta.model), phase=phase, all_to_all="nccl")
    index, _ = index_requests(trace, phase)
    tune, held_out = split_requests(index)
    counts = tuning_counts(trace, tune, phase, tokens, 0)[:TUNING_BATCHES]
    sample = draw_sample(trace, held_out, phase, tokens, 0)
    problem = Problem(
        counts=counts,
        capacity=np.full(gpus, trace.num_experts // gpus),
        num_nodes=cluster.num_nodes,
        objective="traffic",
        traffic=sample_traffic(trace, tune, phase, tokens, step, 0),
    )
    rows = []
    for solver in SOLVERS:
        placement = find_solver(solver).solve(problem).placement
        base = measure(trace, sample, placement, policy="split", dedup="gpu", step=step)
        measured = {"contiguous": base}
        for name_of in PREDICTORS:
            try:
                predictor = choose_predictor(name_of, trace, phase)
            except MismatchError:
                continue
            homes = predict_homes(
                trace, tune, placement, predictor, policy="split", dedup="gpu", far=FAR
            )
            measured[predictor] = measure(
                trace,
                sample,
                placement,
                policy="split",
                dedup="gpu",
                step=step,
                homes=homes.homes,
            )
        for home, values in measured.items():
            found = figures(sample, values)
            delta = difference(sample, values, base, "inter_node_bytes")
            of = figures(sample, base)["inter_node_bytes"].value
            row = {"trace": name, "gpus": gpus, "phase": phase, "solver": solver, "homes": home}
            for key in ("fan_out", "node_fan_out", "inter_node_bytes", "step_us"):
                row[key] = f"{found[key].value:.6g}"
            row["change"] = f"{100 * delta.value / of:.4g}"
            row["low"], row["high"] = (f"{100 * x / of:.4g}" for x in (delta.low, delta.high))
            rows.append(row)
    print(name, phase, flush=True)
    return rows


def write_report(rows: list[dict], out: Path) -> None:
    lines = [
        "# Home ranks: which data-parallel rank takes which request",
        "",
        "Bytes that cross nodes, on held-out requests, when home ranks are cut contiguously and",
        "when requests are given to ranks by where their experts are predicted to be. 16 H100s in",
        "two nodes, one message per destination GPU (`--all-to-all nccl`). Every rank has as many",
        "tokens as before, and loads and fan-out do not depend on home ranks. In prefill batches a",
        "request may be cut between ranks, as contiguous cutting does. Brackets: 95 %",
        "bootstrap interval of the change.",
        "",
        "Predictors: `domain` averages the tuning requests of a request's domain, `tokens` those",
        "with a token's id, `prefix` the request's own tokens before the one evaluated (at most",
        "64). `oracle` uses the routing of the very tokens evaluated: a limit, not a method.",
        "Regenerate with:",
        "",
        "    python benchmarks/home_ranks.py --data ../shared/data --out reports/home-ranks",
        "",
        days(rows),
        "",
        "| trace | phase | placement | home ranks | GPUs per token | nodes per token |"
        " inter-node KB per token | change | predicted MoE time per step, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        change = f"{float(r['change']):+.1f}% ({float(r['low']):+.1f} to {float(r['high']):+.1f})"
        lines.append(
            f"| {r['trace']} | {r['phase']} | {r['solver']} | {r['homes']} |"
            f" {float(r['fan_out']):.2f} | {float(r['node_fan_out']):.2f} |"
            f" {float(r['inter_node_bytes']) / 1e3:.1f} |"
            f" {'' if r['homes'] == 'contiguous' else change} | {float(r['step_us']) / 1e3:.3f} |"
        )
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = arguments(__doc__, "reports/home-ranks")
    args = parser.parse_args()
    table = args.out / "results.csv"
    rows = begin(table, args.resume)
    for case in CASES:
        if not any((r["trace"], r["phase"]) == (case[0], case[2]) for r in rows):
            rows += run_case(args.data, *case)
            write(table, rows)
    write_report(rows, args.out)


if __name__ == "__main__":
    main()
