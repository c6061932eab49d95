"""Held-out quality of `moesim plan` against EPLB on the real traces.

Runs every trace at 8 and 16 GPUs, prefill and decode, for each objective, and writes
`reports/plan-quality/`: results.csv (case by case: --resume goes on after a stopped run) and
README.md. Usage:

    python benchmarks/plan_quality.py --data ../shared/data --out reports/plan-quality
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from rows import arguments, begin, days, write

from moesim.cluster import load_cluster
from moesim.jobs.plan import make_plan
from moesim.model.names import load_model
from moesim.planning.request import PlanRequest
from moesim.trace.format import load_token_trace

TRACES = ("debian-moe", "deepseek-v2-lite", "gpt-oss-20b")
WORKLOADS = (("prefill", 4096), ("decode", 256))
GPUS = (8, 16)
OBJECTIVES = ("balance", "time", "traffic")
KEPT = (
    "imbalance",
    "imbalance_p99",
    "balancedness_worst_layer",
    "fan_out",
    "node_fan_out",
    "inter_node_bytes",
    "step_us",
)
FIGURE_OF = {"balance": "imbalance", "time": "step_us", "traffic": "fan_out"}


def run_case(data: Path, name: str, gpus: int, phase: str, tokens: int, objective: str) -> list:
    trace = load_token_trace(data / f"{name}.npz", "benchmark")
    started = time.monotonic()
    result = make_plan(
        PlanRequest.of(
            trace=trace,
            cluster=load_cluster("h100-sxm-ib", num_gpus=gpus),
            model=load_model(trace.meta.model),
            objective=objective,
            phase=phase,
            batch_tokens=tokens,
            time_limit_s=300,
        )
    )
    seconds = time.monotonic() - started
    rows = []
    for candidate in result.candidates:
        row = {
            "trace": name,
            "gpus": gpus,
            "phase": phase,
            "objective": objective,
            "plan": candidate.name,
            "status": candidate.solution.status,
            "seconds": round(seconds, 1),
        }
        for key in KEPT:
            figure = candidate.figures[key]
            row[key] = f"{figure.value:.6g}"
            row[f"{key}_half"] = f"{(figure.high - figure.low) / 2:.3g}"
        if candidate is result.chosen:
            delta = result.improvement[FIGURE_OF[objective]]
            row["delta"], row["delta_low"], row["delta_high"] = (
                f"{x:.6g}" for x in (delta.value, delta.low, delta.high)
            )
        rows.append(row)
    return rows


def write_report(rows: list[dict], out: Path) -> None:
    lines = [
        "# Plans against EPLB on real traces",
        "",
        "Held-out figures of the linear placement, EPLB and the local search, from requests that",
        "tuning never saw, on H100 nodes (`h100-sxm-ib`), no redundant experts. `±` is half of a",
        "95 % bootstrap interval over requests. Excess imbalance is the mean over batches and",
        "layers of max/mean GPU load, minus 1. Regenerate with:",
        "",
        "    python benchmarks/plan_quality.py --data ../shared/data --out reports/plan-quality",
        "",
        days(rows),
        "",
        "Predicted times rest on calibrated H100 figures (see docs/calibration.md), not on runs of",
        "these plans. Decode-only and prefill-only traces are used for both batch shapes.",
        "",
    ]
    for objective in OBJECTIVES:
        chosen = [r for r in rows if r["objective"] == objective]
        if chosen:
            lines += _section(objective, chosen)
    (out / "README.md").write_text("\n".join(lines) + "\n")


def _section(objective: str, rows: list[dict]) -> list[str]:
    figure = FIGURE_OF[objective]
    title = {
        "imbalance": "excess imbalance",
        "step_us": "MoE time per step, us",
        "fan_out": "GPUs per token",
    }[figure]
    shift = 1.0 if figure == "imbalance" else 0.0
    lines = [
        f"## `--objective {objective}`: {title}",
        "",
        "| trace | GPUs | phase | linear | EPLB | local search | against EPLB | 95 % interval |"
        " p99 imbalance: linear, EPLB, ours | nodes per token: EPLB, ours | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (row["trace"], int(row["gpus"]), row["phase"])
        cases.setdefault(key, {})[row["plan"]] = row
    excess: dict[str, list[float]] = {"eplb": [], "local_search": []}
    for (trace, gpus, phase), plans in sorted(
        cases.items(), key=lambda kv: (kv[0][2] != "prefill", kv[0])
    ):
        linear, eplb, ours = (plans[p] for p in ("linear", "eplb", "local_search"))
        base = float(eplb[figure]) - shift
        relative = [100 * float(ours[k]) / base for k in ("delta", "delta_low", "delta_high")]

        def cell(row: dict) -> str:
            return f"{float(row[figure]) - shift:.4g} ±{float(row[figure + '_half']):.2g}"

        if phase == "prefill":
            excess["eplb"].append(base)
            excess["local_search"].append(float(ours[figure]) - shift)
        tail = ", ".join(f"{float(r['imbalance_p99']):.2f}" for r in (linear, eplb, ours))
        nodes = ", ".join(f"{float(r['node_fan_out']):.2f}" for r in (eplb, ours))
        lines.append(
            f"| {trace} | {gpus} | {phase} | {cell(linear)} | {cell(eplb)} | {cell(ours)} |"
            f" {relative[0]:+.1f}% | {relative[1]:+.1f}% to {relative[2]:+.1f}% | {tail} |"
            f" {nodes} | {ours['seconds']} |"
        )
    lines.append("")
    if figure == "imbalance" and excess["eplb"]:
        eplb, ours = np.array(excess["eplb"]), np.array(excess["local_search"])
        lines += [
            f"Over the {len(eplb)} prefill cases the mean excess imbalance is {ours.mean():.4f}"
            f" against EPLB's {eplb.mean():.4f}, {100 * (ours.mean() / eplb.mean() - 1):+.1f}%; the"
            f" mean of the cases' changes is {100 * (ours / eplb - 1).mean():+.1f}%.",
            "",
        ]
    return lines


def main() -> None:
    parser = arguments(__doc__, "reports/plan-quality")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    args = parser.parse_args()
    table = args.out / "results.csv"
    rows = begin(table, args.resume)
    done = {(r["trace"], int(r["gpus"]), r["phase"], r["objective"]) for r in rows}
    for objective in args.objectives.split(","):
        for name in TRACES:
            for gpus in GPUS:
                for phase, tokens in WORKLOADS:
                    if (name, gpus, phase, objective) in done:
                        continue
                    rows += run_case(args.data, name, gpus, phase, tokens, objective)
                    write(table, rows)
                    print(name, gpus, phase, objective, rows[-1]["seconds"], "s", flush=True)
    write_report(rows, args.out)


if __name__ == "__main__":
    main()
