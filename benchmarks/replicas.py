"""Balance against redundant slots, for EPLB and the local search, under every replica policy.

Runs each trace with 0 to 64 redundant slots per layer, on some of its layers, and writes
`reports/replicas/`: results.csv (case by case: --resume goes on after a stopped run),
balancedness.png and README.md. All figures are from held-out requests. Usage:

    python benchmarks/replicas.py --data ../shared/data --out reports/replicas
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rows import arguments, begin, days, write

from moesim.cluster import load_cluster
from moesim.planning.evaluate import draw_sample, figures, measure
from moesim.planning.tuning import tuning_counts
from moesim.solvers.base import Problem
from moesim.solvers.registry import find_solver
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import Trace, TraceMeta, load_token_trace

CASES = (
    ("deepseek-v2-lite", 16, "prefill", 4096),
    ("gpt-oss-20b", 16, "decode", 1024),
    ("debian-moe", 16, "prefill", 4096),
    ("synthetic DeepSeek-V3", 32, "prefill", 8192),
)
MAX_REDUNDANT = 64
NUM_LAYERS = 4
TUNING_BATCHES = 300
POLICIES = ("split", "hash", "nearest", "lp")
SOLVERS = ("eplb", "local_search")
FIELDS = ("balancedness", "imbalance_p99", "fan_out")


def some_layers(trace: Trace, count: int) -> Trace:
    """`count` of the trace's layers, evenly spread."""
    keep = np.linspace(0, trace.num_layers - 1, min(count, trace.num_layers)).round().astype(int)
    ids = np.ascontiguousarray(np.asarray(trace.expert_ids)[:, keep])
    meta = replace(trace.meta, layer_ids=tuple(trace.meta.layer_ids[i] for i in keep))
    return replace(trace, expert_ids=ids, gate_weights=None, meta=meta)


def synthetic(seed: int = 0) -> Trace:
    """DeepSeek-V3's shape (256 experts, top 8) with popularity, requests' tastes and token noise
    set so that linear placement on 32 GPUs is about as uneven as on the real traces."""
    rng = np.random.default_rng(seed)
    requests, length, experts, top_k = 160, 384, 256, 8
    base = 0.5 * rng.standard_normal((NUM_LAYERS, experts))
    topics = 0.6 * rng.standard_normal((12, NUM_LAYERS, experts))
    ids = np.empty((requests * length, NUM_LAYERS, top_k), np.int16)
    for r in range(requests):
        logit = base + topics[rng.integers(12)]
        logit = logit + 0.4 * rng.standard_normal((NUM_LAYERS, experts))
        score = logit[None] + rng.gumbel(size=(length, NUM_LAYERS, experts))
        chosen = np.argpartition(-score, top_k, axis=2)[:, :, :top_k]
        ids[r * length : (r + 1) * length] = chosen
    tokens = len(ids)
    meta = TraceMeta("deepseek-v3", experts, top_k, tuple(range(3, 3 + NUM_LAYERS)))
    return Trace(
        ids,
        np.repeat(np.arange(requests), length).astype(np.int32),
        np.tile(np.arange(length), requests).astype(np.int32),
        np.zeros(tokens, np.uint8),
        meta,
    )


def load(data: Path, name: str) -> Trace:
    if name.startswith("synthetic"):
        return synthetic()
    return some_layers(load_token_trace(data / f"{name}.npz", "benchmark"), NUM_LAYERS)


def run_case(data: Path, name: str, gpus: int, phase: str, tokens: int, done: set) -> list[dict]:
    trace = load(data, name)
    cluster = load_cluster("h100-sxm-ib", num_gpus=gpus)
    index, _ = index_requests(trace, phase)
    tune, held_out = split_requests(index)
    counts = tuning_counts(trace, tune, phase, tokens, 0)[:TUNING_BATCHES]
    sample = draw_sample(trace, held_out, phase, tokens, 0)
    rows = []
    for redundant in range(0, MAX_REDUNDANT + 1, gpus):
        if (name, redundant) in done:
            continue
        problem = Problem(
            counts=counts,
            capacity=np.full(gpus, (trace.num_experts + redundant) // gpus),
            num_nodes=cluster.num_nodes,
            time_limit_s=300,
        )
        for solver in SOLVERS:
            started = time.monotonic()
            placement = find_solver(solver).solve(problem).placement
            seconds = time.monotonic() - started
            for policy in POLICIES:
                measured = measure(trace, sample, placement, policy=policy, dedup="gpu", step=None)
                found = figures(sample, measured)
                row = {
                    "trace": name,
                    "gpus": gpus,
                    "phase": phase,
                    "redundant": redundant,
                    "solver": solver,
                    "policy": policy,
                    "seconds": round(seconds, 1),
                }
                for field in FIELDS:
                    half = (found[field].high - found[field].low) / 2
                    row |= {field: f"{found[field].value:.5g}", f"{field}_half": f"{half:.2g}"}
                rows.append(row)
        print(name, redundant, flush=True)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(POLICIES, ("#4477aa", "#ccbb44", "#228833", "#ee6677"), strict=True))
    names = [case[0] for case in CASES if any(r["trace"] == case[0] for r in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.9), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for solver, style in (("eplb", "--"), ("local_search", "-")):
            for policy in POLICIES:
                own = [
                    (int(r["redundant"]), float(r["balancedness"]), float(r["balancedness_half"]))
                    for r in rows
                    if (r["trace"], r["solver"], r["policy"]) == (name, solver, policy)
                ]
                x, y, _ = zip(*sorted(own), strict=True)
                axis.plot(x, y, style, color=colours[policy], marker="o", markersize=3)
        case = next(r for r in rows if r["trace"] == name)
        axis.set_title(f"{name}, {case['gpus']} GPUs, {case['phase']}", fontsize=10)
        axis.set_xlabel("redundant slots per layer")
        axis.set_xticks(sorted({int(r["redundant"]) for r in rows if r["trace"] == name}))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("balancedness (mean / max load), held-out")
    lines = [plt.Line2D([], [], color=colours[p], label=p) for p in POLICIES]
    lines += [
        plt.Line2D([], [], color="k", ls=ls, label=n)
        for ls, n in (("--", "EPLB"), ("-", "local search"))
    ]
    figure.legend(handles=lines, loc="lower center", ncol=6, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(rows: list[dict], out: Path) -> None:
    lines = [
        "# Replicas: balance against redundant slots",
        "",
        "Balancedness (mean over max GPU load, averaged over batches and layers) on held-out",
        "requests, for EPLB and for the local search (`--objective balance`), when replicas are",
        f"chosen by each policy. {NUM_LAYERS} layers of each trace, {TUNING_BATCHES} tuning",
        "batches; half-widths of 95 % bootstrap intervals over requests are in results.csv. Both",
        "solvers tune for `split`. `lp` is the least possible largest load of each batch for a",
        "placement: no policy can be above it. The synthetic trace has DeepSeek-V3's experts (256,",
        "top 8) and made-up popularity: read it for the shape of the curves, not for their height.",
        "Regenerate with:",
        "",
        "    python benchmarks/replicas.py --data ../shared/data --out reports/replicas",
        "",
        days(rows),
        "",
        "![balancedness against redundant slots](balancedness.png)",
        "",
    ]
    for name, gpus, phase, tokens in CASES:
        own = [r for r in rows if r["trace"] == name]
        if not own:
            continue
        lines += [
            f"## {name}, {gpus} GPUs, {phase} of {tokens} tokens",
            "",
            "| redundant slots | EPLB: split | hash | nearest | lp | local search: split | hash |"
            " nearest | lp | ± | GPUs per token, EPLB lp and nearest | ours |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for redundant in sorted({int(r["redundant"]) for r in own}):
            here = {(r["solver"], r["policy"]): r for r in own if int(r["redundant"]) == redundant}
            cells = [f"{float(here[s, p]['balancedness']):.3f}" for s in SOLVERS for p in POLICIES]
            half = max(float(r["balancedness_half"]) for r in here.values())
            fans = [
                " ".join(f"{float(here[s, p]['fan_out']):.2f}" for p in ("lp", "nearest"))
                for s in SOLVERS
            ]
            lines.append(f"| {redundant} | " + " | ".join([*cells, f"{half:.3f}", *fans]) + " |")
        lines.append("")
    (out / "README.md").write_text("\n".join(lines))


def main() -> None:
    parser = arguments(__doc__, "reports/replicas")
    args = parser.parse_args()
    table = args.out / "results.csv"
    rows = begin(table, args.resume)
    for name, gpus, phase, tokens in CASES:
        done = {(r["trace"], int(r["redundant"])) for r in rows}
        rows += run_case(args.data, name, gpus, phase, tokens, done)
        write(table, rows)
    plot(rows, args.out / "balancedness.png")
    write_report(rows, args.out)


if __name__ == "__main__":
    main()
