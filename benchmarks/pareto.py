"""Fan-out against imbalance: what objectives and networks make of one trace, held-out.

DeepSeek-V2-Lite on one node of 8 GPUs: plans for balance, for time on networks 4 times faster, as
they are and 4 times slower, and for traffic, beside linear placement and EPLB. Then two nodes of 8,
planned for traffic with one message per GPU and per node. Writes `reports/pareto/`: results.csv
(plan by plan: --resume goes on after a stopped run), pareto.png and README.md. Usage:

    python benchmarks/pareto.py --data ../shared/data --out reports/pareto
"""

from __future__ import annotations

from pathlib import Path

from rows import arguments, begin, days, write

from moesim.cluster import load_cluster
from moesim.jobs.plan import make_plan
from moesim.model.names import load_model
from moesim.planning.request import PlanRequest
from moesim.trace.format import load_token_trace

TRACE = "deepseek-v2-lite"
CASES = (
    (8, "balance", 1.0, "gpu"),
    (8, "time", 4.0, "gpu"),
    (8, "time", 1.0, "gpu"),
    (8, "time", 0.25, "gpu"),
    (8, "traffic", 1.0, "gpu"),
    (16, "traffic", 1.0, "gpu"),
    (16, "traffic", 1.0, "node"),
)
KEPT = ("fan_out", "imbalance", "imbalance_p99", "node_fan_out", "inter_node_bytes")


def run_case(data: Path, gpus: int, objective: str, scale: float, dedup: str) -> list[dict]:
    trace = load_token_trace(data / f"{TRACE}.npz", "benchmark")
    result = make_plan(
        PlanRequest.of(
            trace=trace,
            cluster=load_cluster("h100-sxm-ib", num_gpus=gpus),
            model=load_model(trace.meta.model),
            objective=objective,  # type: ignore[arg-type]
            phase="prefill",
            batch_tokens=4096,
            dedup=dedup,  # type: ignore[arg-type]
            network_scale=scale,
            time_limit_s=3600,
        )
    )
    rows = []
    for candidate in result.candidates:
        ours = candidate is result.chosen
        row = {
            "gpus": gpus,
            "dedup": dedup,
            "plan": f"{objective}, network x {scale:g}" if ours else candidate.name,
            "ours": int(ours),
        }
        for key in KEPT:
            figure = candidate.figures[key]
            row[key] = f"{figure.value:.6g}"
            row[f"{key}_half"] = f"{(figure.high - figure.low) / 2:.3g}"
        rows.append(row)
    return rows


def one_each(rows: list[dict], gpus: int, dedup: str) -> list[dict]:
    """Every plan of one setting once."""
    found = {r["plan"]: r for r in rows if (int(r["gpus"]), r["dedup"]) == (gpus, dedup)}
    return list(found.values())


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2))
    own = one_each(rows, 8, "gpu")
    labels = {"imbalance": "mean imbalance (max / mean load)", "imbalance_p99": "p99 imbalance"}
    for axis, key in zip(axes, labels, strict=True):
        for row in own:
            colour = "#4477aa" if int(row["ours"]) else "#ee6677"
            axis.errorbar(
                float(row["fan_out"]),
                float(row[key]),
                float(row[f"{key}_half"]),
                float(row["fan_out_half"]),
                fmt="o",
                ms=5,
                capsize=2,
                color=colour,
            )
            ours = bool(int(row["ours"]))
            axis.annotate(
                row["plan"].replace(", network x", " x").removesuffix(" x 1"),
                (float(row["fan_out"]), float(row[key])),
                xytext=(-5, -12) if ours else (5, 5),
                ha="right" if ours else "left",
                textcoords="offset points",
                fontsize=8,
            )
        curve = sorted((float(r["fan_out"]), float(r[key])) for r in own if int(r["ours"]))
        axis.plot(*zip(*curve, strict=True), color="#4477aa", lw=1, alpha=0.5)
        axis.set_xlabel("GPUs per token (fan-out)")
        axis.set_ylabel(labels[key])
        axis.margins(x=0.16)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{TRACE}, 8 GPUs, prefill of 4,096 tokens, held-out", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(rows: list[dict], out: Path) -> None:
    lines = [
        "# Fan-out against imbalance",
        "",
        "DeepSeek-V2-Lite, prefill batches of 4,096 tokens, 64 experts in 64 slots, held-out",
        "requests; `±` is half of a 95 % bootstrap interval over requests. `balance`, `time` and",
        "`traffic` are the local search with that `--objective`; `network x 4` plans for links",
        "four times as fast. Regenerate with:",
        "",
        "    python benchmarks/pareto.py --data ../shared/data --out reports/pareto",
        "",
        days(rows),
        "",
        "![fan-out against imbalance](pareto.png)",
        "",
        "## 8 GPUs of one node",
        "",
        "| plan | GPUs per token | against EPLB | imbalance, mean | imbalance, p99 |",
        "|---|---|---|---|---|",
    ]
    own = sorted(one_each(rows, 8, "gpu"), key=lambda r: -float(r["fan_out"]))
    base = next((float(r["fan_out"]) for r in own if r["plan"] == "eplb"), 0.0)
    lines += [
        f"| {r['plan']} | {float(r['fan_out']):.2f} ±{float(r['fan_out_half']):.2f} |"
        f" {100 * (float(r['fan_out']) / base - 1):+.1f}% |"
        f" {float(r['imbalance']):.3f} ±{float(r['imbalance_half']):.3f} |"
        f" {float(r['imbalance_p99']):.2f} ±{float(r['imbalance_p99_half']):.2f} |"
        for r in own
    ]
    lines += [
        "",
        "## 16 GPUs of two nodes, planned for traffic",
        "",
        "With one message per node (`node`) the search weighs a message by its slowest link's",
        "time, so that what crosses nodes counts most; with one per GPU (`gpu`) every GPU reached",
        "on the other node is a message between nodes.",
        "",
        "| one message per | plan | nodes per token | inter-node KB per token | against EPLB |"
        " GPUs per token | imbalance, p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    for dedup in ("gpu", "node"):
        own = one_each(rows, 16, dedup)
        base = next((float(r["inter_node_bytes"]) for r in own if r["plan"] == "eplb"), 0.0)
        for r in own:
            size = float(r["inter_node_bytes"])
            lines.append(
                f"| {dedup} | {r['plan']} | {float(r['node_fan_out']):.3f} | {size / 1e3:.1f} |"
                f" {100 * (size / base - 1):+.1f}% | {float(r['fan_out']):.2f} |"
                f" {float(r['imbalance_p99']):.2f} |"
            )
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = arguments(__doc__, "reports/pareto")
    args = parser.parse_args()
    table = args.out / "results.csv"
    rows = begin(table, args.resume)
    for gpus, objective, scale, dedup in CASES:
        name = f"{objective}, network x {scale:g}"
        if any((int(r["gpus"]), r["dedup"], r["plan"]) == (gpus, dedup, name) for r in rows):
            continue
        rows += run_case(args.data, gpus, objective, scale, dedup)
        write(table, rows)
        print(gpus, name, dedup, flush=True)
    plot(rows, args.out / "pareto.png")
    write_report(rows, args.out)


if __name__ == "__main__":
    main()
