"""Every solver side by side: held-out quality, bound, gap and seconds, on the same problems.

Real traces and a synthetic DeepSeek-V3 (58 layers of 256 experts in 288 slots on 32 GPUs of 4
nodes), fitted to the DeepSeek-V2-Lite trace as `moesim trace synth --like` does it. With --eplb,
the original EPLB (DeepSeek's eplb.py, github.com/deepseek-ai/EPLB, MIT, not part of this project;
it needs torch) gives a placement from the same tuning loads. Writes `reports/solvers/`: results.csv
(row by row: --resume goes on after a stopped run), solvers.png and README.md. Usage:

    python benchmarks/solvers.py --data ../shared/data --eplb eplb.py --out reports/solvers
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from eplb_peer import load_peer
from rows import arguments, begin, write

from moesim.cluster import load_cluster
from moesim.cost.step import StepModel, build_step_model
from moesim.errors import InputError
from moesim.model.names import load_model
from moesim.planning.evaluate import Measured, Sample, difference, draw_sample, figures, measure
from moesim.planning.traffic import sample_traffic
from moesim.planning.tuning import tuning_counts
from moesim.solvers.base import Objective, Problem, Solution, pack_table
from moesim.solvers.base import run_solver as run_checked
from moesim.solvers.bounds.load import lower_bound
from moesim.solvers.objective import PlacementCost
from moesim.solvers.registry import find_solver, solver_names
from moesim.solvers.repair import separate_replicas
from moesim.trace.batches import Phase, index_requests, split_requests
from moesim.trace.format import Trace, load_token_trace

SYNTHETIC = "synthetic DeepSeek-V3"
SYNTHETIC_TOKENS = 100_000
ORIGINAL = "EPLB (original)"
COUNTED_S = 3600.0
"""Time limit of solvers that end by counted work: none, so that a busy machine changes no plan."""
CLOCKED = {"ilp": 60.0, "moetuner": 60.0, "exflow": 60.0, "transmissions": 60.0}
"""Time limits of those that end by the clock."""
FIGURE = {"balance": "imbalance", "time": "step_us"}
REFUSED = "refused"
PROGRESS = ("solver", "status", "value", "change", "seconds")
KEPT = ("imbalance", "imbalance_p99", "fan_out", "node_fan_out", "step_us")


@dataclass(frozen=True)
class Case:
    trace: str
    gpus: int
    phase: Phase
    tokens: int
    slots: int
    objective: Objective

    @property
    def title(self) -> str:
        return (
            f"{self.trace}, {self.gpus} GPUs, {self.slots} slots, {self.phase} of {self.tokens}"
            f" tokens, {self.objective}"
        )


CASES = (
    Case("deepseek-v2-lite", 8, "prefill", 4096, 64, "time"),
    Case("debian-moe", 8, "prefill", 4096, 72, "balance"),
    Case("gpt-oss-20b", 16, "decode", 256, 32, "time"),
    Case(SYNTHETIC, 32, "prefill", 8192, 288, "time"),
)


@dataclass(frozen=True)
class Setting:
    """A case made ready: the problem, its held-out sample, and EPLB's figures to compare with."""

    problem: Problem
    trace: Trace
    sample: Sample
    step: StepModel
    cost: PlacementCost

    def measure(self, solution: Solution) -> Measured:
        return measure(
            self.trace,
            self.sample,
            solution.placement,
            policy="split",
            dedup=self.step.dedup,
            step=self.step,
            speed=self.problem.speed,
        )


def synthetic(data: Path, cache: Path) -> Trace:
    """The DeepSeek-V3 trace, made once."""
    from moesim.trace.synth import write_synthetic
    from moesim.trace.synth_fit import fit
    from moesim.trace.synth_shape import reshape

    path = cache / "moesim-synthetic-deepseek-v3.npz"
    if not path.exists():
        model = load_model("DeepSeek-V3")
        real = load_token_trace(data / "deepseek-v2-lite.npz", "benchmark")
        spec = reshape(
            fit(real, 0, None),
            tuple(model.moe_layer_ids),
            model.num_experts,
            model.top_k,
            model=model.name,
            seed=0,
            progress=None,
        )
        write_synthetic(spec, path, SYNTHETIC_TOKENS, 0)
    return load_token_trace(path, "benchmark")


def prepare(case: Case, data: Path, cache: Path) -> Setting:
    if case.trace == SYNTHETIC:
        trace = synthetic(data, cache)
    else:
        trace = load_token_trace(data / f"{case.trace}.npz", "benchmark")
    cluster = load_cluster("h100-sxm-ib", num_gpus=case.gpus)
    model = load_model(trace.meta.model)
    step = build_step_model(cluster, model, phase=case.phase)
    tune, held_out = split_requests(index_requests(trace, case.phase)[0])
    counts = tuning_counts(trace, tune, case.phase, case.tokens, 0)
    traffic = None
    if case.objective != "balance":
        traffic = sample_traffic(trace, tune, case.phase, case.tokens, step, 0)
    problem = Problem(
        counts=counts,
        capacity=np.full(case.gpus, case.slots // case.gpus),
        num_nodes=cluster.num_nodes,
        objective=case.objective,
        gpu_type=step.gpu_type,
        expert_us=step.expert_tables_us(int(counts.max()) + 1),
        num_groups=model.n_group,
        traffic=traffic,
    )
    sample = draw_sample(trace, held_out, case.phase, case.tokens, 0)
    return Setting(problem, trace, sample, step, PlacementCost(problem))


def original_eplb(peer: Any, problem: Problem) -> Solution:
    """The original's placement, replicas that share a GPU moved apart as no plan may have them."""
    import torch

    weight = problem.counts.sum(axis=0, dtype=np.float64)
    table = peer.rebalance_experts(
        torch.from_numpy(weight),
        problem.num_slots,
        problem.num_groups,
        problem.num_nodes,
        problem.num_gpus,
    )[0].numpy()
    slots = table.reshape(problem.num_layers, problem.num_gpus, -1).astype(np.int32)
    doubled = sum(len(row) - len(set(row.tolist())) for layer in slots for row in layer)
    separate_replicas(slots, weight)
    notes = (f"{doubled} replicas moved off a GPU that held their expert twice",) if doubled else ()
    return Solution(pack_table(problem, slots), "feasible", notes=notes)


def cpu_seconds() -> float:
    """Of this process and the engines that it started."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, who))


def run_solver(name: str, setting: Setting, peer: Any, base: Measured, bound: float) -> dict:
    problem = replace(setting.problem, time_limit_s=CLOCKED.get(name, COUNTED_S))
    clock, cpu = time.monotonic(), cpu_seconds()
    if name == ORIGINAL:
        solution = original_eplb(peer, problem)
    else:
        solution = run_checked(find_solver(name), problem)
    clock, cpu = time.monotonic() - clock, cpu_seconds() - cpu
    value = float(setting.cost.layer_values(solution.placement).mean())
    if solution.layer_bounds is not None:
        bound = max(bound, solution.bound or 0.0)
    measured = setting.measure(solution)
    found = figures(setting.sample, measured)
    name_of = FIGURE[problem.objective]
    delta = difference(setting.sample, measured, base, name_of)
    of = figures(setting.sample, base)[name_of].value
    row = {
        "solver": name,
        "status": solution.status,
        "value": f"{value:.6g}",
        "bound": f"{bound:.6g}",
        "seconds": f"{clock:.3g}",
        "cpu_seconds": f"{cpu:.3g}",
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "notes": "; ".join(solution.notes),
    }
    for key in KEPT:
        row[key] = f"{found[key].value:.6g}"
        row[f"{key}_half"] = f"{(found[key].high - found[key].low) / 2:.3g}"
    change = (delta.value, delta.low, delta.high) if delta is not None else (0.0, 0.0, 0.0)
    row |= {
        key: f"{100 * x / of:.4g}" for key, x in zip(("change", "low", "high"), change, strict=True)
    }
    return row


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [c for c in CASES if any(r["case"] == c.title for r in rows)]
    names = list(dict.fromkeys(r["solver"] for r in rows))[::-1]
    figure, axes = plt.subplots(
        1, len(cases), figsize=(1.2 + 3.4 * len(cases), 4.4), squeeze=False, sharey=True
    )
    for axis, case in zip(axes[0], cases, strict=True):
        own = [r for r in rows if r["case"] == case.title and r["status"] != REFUSED]
        for row in own:
            change, low, high = (float(row[k]) for k in ("change", "low", "high"))
            at = names.index(row["solver"])
            axis.errorbar(
                change,
                at,
                xerr=[[change - low], [high - change]],
                fmt="o",
                ms=4,
                capsize=2,
                color="#4477aa" if change <= 0 else "#ee6677",
            )
            seconds = float(row["cpu_seconds"])
            axis.annotate(
                f"{seconds:.1f} s" if seconds >= 0.1 else "< 0.1 s",
                (high, at),
                xytext=(5, -3),
                textcoords="offset points",
                fontsize=7,
            )
        axis.axvline(0, color="grey", lw=0.8)
        what = {"balance": "imbalance", "time": "predicted MoE time"}[case.objective]
        axis.set_title(f"{case.trace}, {case.gpus} GPUs\n{case.phase}, {what}", fontsize=9)
        axis.set_xlabel("against EPLB, held-out, %")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.margins(x=0.2)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(rows: list[dict], out: Path) -> None:
    lines = [
        "# Solvers side by side",
        "",
        "The same problems for every solver; quality on held-out requests that no solver saw.",
        "`objective` is on tuning data, in the unit of the objective (microseconds per layer, or",
        "max over mean load), `bound` what no placement can be below, `gap` the distance between",
        "the two. `against EPLB`: predicted MoE time per step, or mean imbalance where the",
        "objective is balance, with a 95 % bootstrap interval over requests. `±` is half of such",
        "an interval.",
        "Times are predictions that rest on calibrated H100 figures (see docs/calibration.md).",
        "Integer programs had 60 s each; the others end by counted work and had no limit.",
        "Processor seconds are of all threads together, on two cores that other work shared (load",
        "averages are in results.csv): wall seconds are longer than on a machine of one's own.",
        "",
        f"`{ORIGINAL}` is DeepSeek's own program (`eplb.py` of",
        "github.com/deepseek-ai/EPLB; it needs torch) on the same tuning loads. The synthetic",
        "DeepSeek-V3 has 58 layers and the statistics of the DeepSeek-V2-Lite trace: read it for",
        "scale, not as that model's routing. Regenerate with:",
        "",
        "    python benchmarks/solvers.py --data ../shared/data --eplb eplb.py",
        "",
        "![held-out change against EPLB, with processor seconds](solvers.png)",
        "",
        "| case | solver | status | objective | bound | gap | imbalance | p99 | GPUs per token |"
        " nodes per token | MoE time, ms | against EPLB | processor s | wall s | run on |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = solver_names()

    def place(row: dict) -> float:
        """Solvers as they are listed, the original behind EPLB."""
        return (
            names.index("eplb") + 0.5 if row["solver"] == ORIGINAL else names.index(row["solver"])
        )

    for case in CASES:
        own = sorted((r for r in rows if r["case"] == case.title), key=place)
        bound = max((float(r.get("bound") or 0) for r in own), default=0.0)
        for row in own:
            if row["status"] == REFUSED:
                cells = [case.title, row["solver"], REFUSED + ": " + row["notes"], *[""] * 12]
                lines.append("| " + " | ".join(cells) + " |")
                continue
            value = float(row["value"])
            change = f"{float(row['change']):+.1f}%"
            change += f" ({float(row['low']):+.1f} to {float(row['high']):+.1f})"
            lines.append(
                f"| {case.title} | {row['solver']} | {row['status']} | {value:.4g} | {bound:.4g} |"
                f" {100 * max(0.0, value - bound) / value:.1f}% |"
                f" {float(row['imbalance']):.3f} ±{float(row['imbalance_half']):.3f} |"
                f" {float(row['imbalance_p99']):.2f} | {float(row['fan_out']):.2f} |"
                f" {float(row['node_fan_out']):.2f} |"
                f" {float(row['step_us']) / 1e3:.3f} ±{float(row['step_us_half']) / 1e3:.3f} |"
                f" {change} | {float(row['cpu_seconds']):.1f} | {float(row['seconds']):.1f} |"
                f" {row['run']} |"
            )
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = arguments(__doc__, "reports/solvers")
    parser.add_argument("--eplb", type=Path, help="the original's eplb.py")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()), help="for the synthetic trace"
    )
    args = parser.parse_args()
    peer = load_peer(args.eplb) if args.eplb is not None else None
    names = [n for n in solver_names() if n != "auto"]
    if peer is not None:
        names.insert(names.index("eplb") + 1, ORIGINAL)
    table = args.out / "results.csv"
    rows = begin(table, args.resume)
    for case in CASES:
        missing = [
            n for n in names if not any((r["case"], r["solver"]) == (case.title, n) for r in rows)
        ]
        if not missing:
            continue
        setting = prepare(case, args.data, args.cache)
        eplb = find_solver("eplb").solve(setting.problem)
        base = setting.measure(eplb)
        values = setting.cost.layer_values(eplb.placement)
        bound = lower_bound(setting.problem, layer_values=values, objective=setting.cost).value
        for name in missing:
            try:
                row = run_solver(name, setting, peer, base, bound or 0.0)
            except InputError as error:
                row = {"solver": name, "status": REFUSED, "notes": error.cause}
            rows.append({"case": case.title, **row})
            write(table, rows)
            print(case.trace, *(row.get(k) for k in PROGRESS), flush=True)
    plot(rows, args.out / "solvers.png")
    write_report(rows, args.out)


if __name__ == "__main__":
    main()
