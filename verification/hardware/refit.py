"""Would denser rows an expert predict the stored replays better? A table, on stdout.

    python verification/hardware/refit.py reports/hardware-h200x1/raw/run2/rows.json.gz \
        reports/hardware-h200x2 [--calibration h200-torch] [--raw RUN/calibration.json.gz]

The expert model is fitted again, in its present form, to the report's own calibration record
(`--raw` within its `raw/`) with every case of at most as many mean rows a slot as the dense record
goes to replaced by the dense record's cases of the same shape. All else is as bundled. Nothing is
written.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from study import bias, compare_all, overall

from moesim.cost.calibration import build_calibration, load_calibration
from moesim.cost.calibration_schema import CalibrationFile
from moesim.replay.compare import Comparison
from moesim.replay.tables import calibration_data, load_raw

SIZES = (128, 1024, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--calibration", default="h200-torch")
    parser.add_argument("--raw", default="run3/calibration.json.gz")
    arguments = parser.parse_args()
    raw = arguments.report / "raw"
    bundled = load_calibration(arguments.calibration)
    merged = with_dense(load_raw(raw / arguments.raw), load_raw(arguments.rows))
    fitted = build_calibration(CalibrationFile.model_validate(calibration_data(merged, "refit")))
    for name, calibration in (
        ("bundled", bundled),
        ("with denser rows", replace(bundled, experts=fitted.experts)),
    ):
        print(f"{name}:")
        show(compare_all(raw, calibration))


def with_dense(raw: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the cases that `dense` has more of replaced."""
    rows = dense["tables"]["ffn"]
    shapes = {(r["hidden"], r["intermediate"]) for r in raw["tables"]["ffn"]}
    most = max(_mean(r) for r in rows)
    known = {(r["hidden"], r["intermediate"]) for r in rows}
    kept = [
        r
        for r in raw["tables"]["ffn"]
        if _mean(r) > most or (r["hidden"], r["intermediate"]) not in known
    ]
    added = [r for r in rows if (r["hidden"], r["intermediate"]) in shapes]
    return {**raw, "tables": {**raw["tables"], "ffn": [*added, *kept]}}


def _mean(row: dict[str, Any]) -> float:
    return float(row["tokens"]) / float(row["local_experts"])


def show(found: list[Comparison]) -> None:
    every = overall(found)
    for tokens in SIZES:
        line(f"graph, {tokens} tokens", every[f"graph {tokens}"])
    line("graph, all", every["graph"])
    print(f"  orders met: {every['graph']['orders_met']} of {every['graph']['orders']}")
    for comparison in found:
        for group in (g for g in comparison.groups if g.mode == "graph"):
            off = bias(comparison, group.mode, group.tokens_per_rank)
            rho = "" if group.spearman is None else f", Spearman {group.spearman:.2f}"
            print(
                f"  {comparison.model}, {group.tokens_per_rank}: median {group.median_error:.1%},"
                f" p90 {group.p90_error:.1%}, bias {off:+.1%}{rho}"
            )


def line(name: str, figures: dict[str, float]) -> None:
    print(
        f"  {name}: median {figures['median']:.2%}, p90 {figures['p90']:.2%},"
        f" largest {figures['largest']:.1%}, bias {figures['bias']:+.2%}"
    )


if __name__ == "__main__":
    main()
