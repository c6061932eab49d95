"""The study of one GPU's calibration and offloading, from its raw records: a table and a plot.

    python verification/hardware/study_one_gpu.py reports/hardware-h200x1 --inputs FOLDER

The report's `raw/` holds run1 to run3 as `run_one_gpu.sh` wrote them, gzipped; `--inputs` is what
`prepare.py --no-plans` wrote. The calibration of run1 predicts the replays of every run, and so do
the others', for comparison. `before` is the model without the host's enqueueing, gathering and
hand-overs, from the same calibration; `eager` the present one with `eager_launch_us` for kernels.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from study import at_hand

from moesim.cost.calibration import Calibration, load_calibration
from moesim.replay.cache_schedule import calibrated_costs
from moesim.replay.records import read_record
from moesim.replay.schedule import Schedule, StepCosts, predict_tokens_us
from moesim.replay.shape import ExpertShape, parse_shape
from moesim.replay.tables import load_raw, write_calibration

RUNS = ("run1", "run2", "run3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--inputs", type=Path, required=True)
    arguments = parser.parse_args()
    raw = arguments.report / "raw"
    made = {run: calibration_of(raw / run / "calibration.json.gz") for run in RUNS}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for run in RUNS:
        for path in sorted((raw / run).glob("offload*.json.gz")):
            record = read_record(path, "moesim-offload-measured", "pack it again")
            shape = parse_shape(record["model"])
            for result in record["results"]:
                schedule = at_hand(arguments.inputs, shape, result)
                if schedule is None:
                    raise SystemExit(f"{shape.name}: {result['label']} is not among the inputs")
                row = rows.setdefault(
                    (shape.name, result["label"]), predicted(shape, made, schedule, result)
                )
                row[run] = result["token_us"]["mean"]
                row[f"own_{run}"] = result["predicted_us"]
    found = list(rows.values())
    (arguments.report / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    readme = arguments.report / "README.md"
    text = readme.read_text()
    for name, table in (("offload", offload_table(found)), ("errors", error_table(found))):
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text = re.sub(pattern, lambda m, t=table: m[1] + t + m[2], text, flags=re.S)
    readme.write_text(text)
    plot(found).savefig(arguments.report / "offload.png", dpi=110)


def calibration_of(path: Path) -> Calibration:
    """The calibration that `moesim calibrate --from-raw` makes of a record."""
    with tempfile.TemporaryDirectory() as folder:
        raw, made = Path(folder) / "raw.json", Path(folder) / "made.yaml"
        raw.write_bytes(gzip.decompress(path.read_bytes()))
        write_calibration(load_raw(raw), made, "h200-one-gpu")
        return load_calibration(made)


def predicted(
    shape: ExpertShape, made: dict[str, Calibration], schedule: Schedule, result: dict[str, Any]
) -> dict[str, Any]:
    """One cache's figures that need no measured replay."""
    calibration = made[RUNS[0]]
    costs = calibrated_costs(shape, calibration, schedule)
    sizes = (shape.hidden_size, shape.moe_intermediate_size)
    tokens = np.zeros(schedule.slots_per_layer or schedule.num_slots)
    tokens[: shape.top_k] = 1
    experts = calibration.expert_ffn(shape.dtype, shape=sizes)
    kernel = float(experts.layer_time_us(tokens, *sizes))
    eager = float(experts.layer_time_us(tokens, *sizes, eager=True))
    before = StepCosts(costs.copy_us, max(kernel, calibration.issue_us.get("ffn", 0.0)))

    def mean(costs: StepCosts) -> float:
        return float(predict_tokens_us(schedule, costs)[-result["num_tokens"] :].mean())

    return {
        "model": shape.name,
        "cache": result["label"],
        "copies_per_token": result["copies_per_token"],
        "calibrated": mean(costs),
        "before": mean(before),
        "eager": mean(replace(costs, step_us=costs.step_us - kernel + eager)),
        **{f"by_{run}": mean(calibrated_costs(shape, c, schedule)) for run, c in made.items()},
    }


def offload_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | cache | copies a token | measured, us a token (runs 1, 2, 3) | predicted from"
        " the calibration | before | from the run's own copy and kernel times |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        measured = middle(row)
        own = float(np.median([row[f"own_{run}"] for run in RUNS]))
        figures = (row["calibrated"], row["before"], own)
        cells = [f"{x:,.0f} ({x / measured - 1:+.1%})" for x in figures]
        every = ", ".join(f"{row[run]:,.0f}" for run in RUNS)
        lines.append(
            f"| {row['model']} | {row['cache']} | {row['copies_per_token']:.1f} |"
            f" {every} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def middle(row: dict[str, Any]) -> float:
    """The median of the runs' measurements."""
    return float(np.median([row[run] for run in RUNS]))


def error_table(rows: list[dict[str, Any]]) -> str:
    """Errors over all caches and runs, and how much the runs differ."""
    lines = [
        "| prediction | runs | median error | 90th percentile | largest | bias |",
        "|---|---|---|---|---|---|",
    ]
    every = list(RUNS)
    names = [
        ("**from the calibration**", [(run, "calibrated") for run in every]),
        ("from the calibration", [(run, "calibrated") for run in every[:2]]),
        ("from the calibration", [("run3", "calibrated")]),
        ("the same before", [(run, "before") for run in every]),
        ("with `eager_launch_us` for the kernels", [(run, "eager") for run in every]),
        ("from run 2's calibration", [(run, "by_run2") for run in every]),
        ("from run 3's calibration", [(run, "by_run3") for run in every]),
        ("from the run's own copy and kernel times", [(run, f"own_{run}") for run in every]),
        ("another run's measurement", [(a, b) for a in every for b in every if a != b]),
    ]
    for name, pairs in names:
        off = np.array([row[column] / row[run] - 1 for row in rows for run, column in pairs])
        size = np.abs(off)
        which = ", ".join(sorted({run.removeprefix("run") for run, _ in pairs}))
        lines.append(
            f"| {name} | {which} | {np.median(size):.1%} | {np.percentile(size, 90):.1%} |"
            f" {size.max():.1%} | {np.median(off):+.1%} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.0, 0.42 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(rows))
    measured = [middle(r) / 1e3 for r in rows]
    axes.barh(at - 0.2, measured, 0.38, label="measured, median of three runs (marks: each)")
    calibrated = [r["calibrated"] / 1e3 for r in rows]
    axes.barh(at + 0.2, calibrated, 0.38, label="predicted from the calibration")
    for i, r in enumerate(rows):
        axes.plot([r[run] / 1e3 for run in RUNS], [i - 0.2] * len(RUNS), "k|-", ms=7, lw=1)
    axes.set_yticks(at, [f"{r['model']}: {r['cache']}" for r in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time per token (ms)")
    figure.suptitle("Experts fetched over PCIe: six layers, one token at a time, one H200")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.2, axis="x")
    return figure


if __name__ == "__main__":
    main()
