"""Predict every measured serving row and say how far off: `python verification/serving/accuracy.py
--data ../shared/data/measured/serving_h100_h200_moe.csv --out reports/serving-accuracy`.

Three passes. Kernels only: no engine constant at all, nothing fitted to serving rows. Held out:
each engine's constants fitted to its rows of all other models; every model is predicted by
constants that never saw it. All rows: constants fitted to all, which the shipped profiles have.
Which constants an engine has is chosen by held-out loss (`fit_constants.choose`); it keeps those
of the results in `--out` where their predictions have less.
Writes `results.json` (aggregates only), `tables.md` and a plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fit_constants import START, Linear, choose, fit, linearise, loss_of
from plots import scatter
from predict import CONSTANTS, NONE, Constants, Prediction, Predictor, errors
from rows import Row, read_rows, refusal

from moesim.files import atomic_write
from moesim.serving.engines import ENGINES

ITERATIONS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = read_rows(args.data)
    refused = {row.number: refusal(row, ENGINES[row.engine]) for row in rows}
    usable = [row for row in rows if not refused[row.number]]
    predictor = Predictor()
    kernels_only = predictor.predict_all(usable, NONE)
    shipped, without, losses = fit_all(predictor, usable)
    if (args.out / "results.json").exists():
        before = json.loads((args.out / "results.json").read_text())
        keep_better(predictor, usable, (shipped, without), before)
    held_out: dict[int, Prediction] = {}
    for group, constants in without.items():
        held_out |= predictor.predict_all([r for r in usable if r.group == group], constants)
    all_rows = predictor.predict_all(usable, shipped)
    passes = {"kernels only": kernels_only, "held out": held_out, "all rows": all_rows}
    results = {
        "rows": len(rows),
        "distinct_measurements": len({row.measurement for row in rows}),
        "predicted": len(usable),
        "refused": refusals(rows, refused),
        "held_out_loss": {
            engine: {name: round(loss, 3) for name, loss in found.items()}
            for engine, found in losses.items()
        },
        "constants": {engine: rounded(c) for engine, c in shipped.items()},
        "constants_without": {
            group: {engine: rounded(c) for engine, c in found.items()}
            for group, found in without.items()
        },
        "errors": {name: summaries(usable, found) for name, found in passes.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "results.json", json.dumps(results, indent=1, sort_keys=True) + "\n")
    atomic_write(args.out / "tables.md", tables(results))
    scatter(usable, kernels_only, held_out, args.out / "predicted_against_measured.png")
    print(tables(results))


def fit_all(
    predictor: Predictor, rows: list[Row]
) -> tuple[dict[str, Constants], dict[str, dict[str, Constants]], dict[str, dict[str, float]]]:
    """Constants by engine from all rows, and by left-out model from the others; and the held-out
    loss of every subset of constants that was tried."""
    engines = sorted({row.engine for row in rows})
    at: dict[str, Constants] = dict.fromkeys(engines, START)
    for _ in range(ITERATIONS):
        parts = _by_engine(predictor, rows, at)
        found = {engine: choose(linear) for engine, linear in parts.items()}
        at = {engine: fit(parts[engine], found[engine][0]) for engine in engines}
    groups = sorted({row.group for row in rows})
    without = {
        group: {engine: fit(parts[engine], found[engine][0], leave_out=group) for engine in engines}
        for group in groups
    }
    return at, without, {engine: losses for engine, (_, losses) in found.items()}


def keep_better(
    predictor: Predictor,
    rows: list[Row],
    found: tuple[dict[str, Constants], dict[str, dict[str, Constants]]],
    before: dict[str, Any],
) -> None:
    """An engine keeps the constants of the results `before` where the predictions by those without
    each model have less held-out loss; `found` is changed."""
    shipped, without = found
    for engine in shipped:
        own = [row for row in rows if row.engine == engine]
        losses = []
        for constants in (without, before["constants_without"]):
            held_out: dict[int, Prediction] = {}
            for group in {row.group for row in own}:
                these = {**NONE, **constants[group][engine]}
                held_out |= predictor.predict_all([r for r in own if r.group == group], these)
            losses.append(loss_of(own, errors(own, held_out)))
        print(f"{engine}: held-out loss {losses[0]:.3f}, before {losses[1]:.3f}")
        if losses[1] < losses[0]:
            shipped[engine] = before["constants"][engine]
            for group in without:
                without[group][engine] = before["constants_without"][group][engine]


def _by_engine(
    predictor: Predictor, rows: list[Row], at: dict[str, Constants]
) -> dict[str, Linear]:
    linear = linearise(predictor, rows, at)
    return {engine: linear.of(engine) for engine in at}


def rounded(constants: Constants) -> dict[str, float]:
    return {name: float(f"{constants[name]:.3g}") for name in CONSTANTS}


def refusals(rows: list[Row], refused: dict[int, str]) -> list[dict[str, Any]]:
    counts = Counter((r.engine, r.model, refused[r.number]) for r in rows if refused[r.number])
    return [
        {"engine": engine, "model": model, "rows": count, "why": why}
        for (engine, model, why), count in sorted(counts.items())
    ]


def summaries(rows: list[Row], predictions: dict[int, Prediction]) -> list[dict[str, Any]]:
    """Median and 90th percentile of |error|, and the median error, by engine and model."""
    tpot, ttft = errors(rows, predictions)
    groups: dict[tuple[str, str], list[int]] = {("all", "all"): list(range(len(rows)))}
    for i, row in enumerate(rows):
        groups.setdefault((row.engine, "all"), []).append(i)
        groups.setdefault((row.engine, row.group), []).append(i)
    first: dict[tuple[float, float], int] = {}
    for i, row in enumerate(rows):
        first.setdefault(row.measurement, i)
    groups["all, each measurement once", "all"] = sorted(first.values())
    out = []
    for (engine, model), members in sorted(groups.items()):
        line: dict[str, Any] = {"engine": engine, "model": model, "rows": len(members)}
        for name, error in (("tpot", tpot[members]), ("ttft", ttft[members])):
            line[f"{name}_median"] = round(float(np.median(np.abs(error))), 4)
            line[f"{name}_p90"] = round(float(np.quantile(np.abs(error), 0.9)), 4)
            line[f"{name}_bias"] = round(float(np.median(error)), 4)
        out.append(line)
    return out


def tables(results: dict[str, Any]) -> str:
    passes = ("kernels only", "held out", "all rows")
    heads = [f"{name} {kind}" for name in ("TPOT", "TTFT") for kind in passes]
    lines = [
        "| engine | model | rows | " + " | ".join(heads) + " |",
        "|---" * (3 + len(heads)) + "|",
    ]
    for found in zip(*(results["errors"][kind] for kind in passes), strict=True):
        cells = [
            f"{100 * line[f'{name}_median']:.1f} / {100 * line[f'{name}_p90']:.0f}%"
            for name in ("tpot", "ttft")
            for line in found
        ]
        first = found[0]
        lines.append(
            f"| {first['engine']} | {first['model']} | {first['rows']} | "
            + " | ".join(cells)
            + " |"
        )
    lines += ["", "| engine | " + " | ".join(CONSTANTS) + " |", "|---|" + "---|" * len(CONSTANTS)]
    for engine, found in results["constants"].items():
        lines.append(
            f"| {engine} | " + " | ".join(f"{found[name]:.3g}" for name in CONSTANTS) + " |"
        )
    losses = results["held_out_loss"]
    lines += ["", "| held-out loss with | " + " | ".join(losses) + " |", "|---" * 4 + "|"]
    for subset in next(iter(losses.values())):
        cells = " | ".join(f"{found[subset]:.2f}" for found in losses.values())
        lines.append(f"| {subset} | {cells} |")
    lines += ["", "| rows refused | engine | model | why |", "|---|---|---|---|"]
    for item in results["refused"]:
        lines.append(f"| {item['rows']} | {item['engine']} | {item['model']} | {item['why']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
