"""The study of one GPU's calibration and offloading, from its raw records: a table and a plot.

    python verification/hardware/study_one_gpu.py reports/hardware-h200x1 --inputs FOLDER

The report's `raw/` holds run1 and run2 as `run_one_gpu.sh` wrote them, gzipped; `--inputs` is what
`prepare.py --no-plans` wrote. The calibration of run1 predicts the replays of both runs. `before`
is the model without the host's enqueueing, gathering and hand-overs, from the same calibration.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tempfile
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

RUNS = ("run1", "run2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--inputs", type=Path, required=True)
    arguments = parser.parse_args()
    raw = arguments.report / "raw"
    calibration = calibration_of(raw / RUNS[0] / "calibration.json.gz")
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
                    (shape.name, result["label"]), predicted(shape, calibration, schedule, result)
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
    shape: ExpertShape, calibration: Calibration, schedule: Schedule, result: dict[str, Any]
) -> dict[str, Any]:
    """One cache's figures that need no measured replay."""
    costs = calibrated_costs(shape, calibration, schedule)
    sizes = (shape.hidden_size, shape.moe_intermediate_size)
    tokens = np.zeros(schedule.slots_per_layer or schedule.num_slots)
    tokens[: shape.top_k] = 1
    kernel = float(calibration.expert_ffn(shape.dtype, shape=sizes).layer_time_us(tokens, *sizes))
    before = StepCosts(costs.copy_us, max(kernel, calibration.issue_us.get("ffn", 0.0)))

    def mean(costs: StepCosts) -> float:
        return float(predict_tokens_us(schedule, costs)[-result["num_tokens"] :].mean())

    return {
        "model": shape.name,
        "cache": result["label"],
        "copies_per_token": result["copies_per_token"],
        "calibrated": mean(costs),
        "before": mean(before),
    }


def offload_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | cache | copies a token | measured, us a token (run 1, run 2) | predicted from"
        " the calibration | before | from the run's own copy and kernel times |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        measured = (row["run1"] + row["run2"]) / 2
        own = (row["own_run1"] + row["own_run2"]) / 2
        figures = (row["calibrated"], row["before"], own)
        cells = [f"{x:,.0f} ({x / measured - 1:+.1%})" for x in figures]
        lines.append(
            f"| {row['model']} | {row['cache']} | {row['copies_per_token']:.1f} |"
            f" {row['run1']:,.0f}, {row['run2']:,.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def error_table(rows: list[dict[str, Any]]) -> str:
    """Errors over all caches and both runs, and how much the runs differ."""
    lines = [
        "| prediction | median error | 90th percentile | largest | bias |",
        "|---|---|---|---|---|",
    ]
    names = {
        "from the calibration": ("calibrated", "calibrated"),
        "the same before": ("before", "before"),
        "from the run's own copy and kernel times": ("own_run1", "own_run2"),
        "the other run's measurement": ("run2", "run1"),
    }
    for name, columns in names.items():
        pairs = list(zip(RUNS, columns, strict=True))
        off = np.array([row[c] / row[run] - 1 for row in rows for run, c in pairs])
        size = np.abs(off)
        lines.append(
            f"| {name} | {np.median(size):.1%} | {np.percentile(size, 90):.1%} | {size.max():.1%} |"
            f" {np.median(off):+.1%} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.0, 0.42 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(rows))
    measured = [(r["run1"] + r["run2"]) / 2e3 for r in rows]
    axes.barh(at - 0.2, measured, 0.38, label="measured, mean of two runs")
    calibrated = [r["calibrated"] / 1e3 for r in rows]
    axes.barh(at + 0.2, calibrated, 0.38, label="predicted from the calibration")
    for i, r in enumerate(rows):
        axes.plot([r["run1"] / 1e3, r["run2"] / 1e3], [i - 0.2] * 2, "k|-", ms=7, lw=1)
    axes.set_yticks(at, [f"{r['model']}: {r['cache']}" for r in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time per token (ms)")
    figure.suptitle("Experts fetched over PCIe: six layers, one token at a time, one H200")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.2, axis="x")
    return figure


if __name__ == "__main__":
    main()
