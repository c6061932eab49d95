"""Would the engine's own figures predict prefill better? Three constants, each model held out.

    python verification/engine/held_out.py reports/engine-vllm

In prefill: experts x a, small kernels (`elementwise`) x b, and at least h milliseconds a layer of
host time without a CUDA graph. Fitted to the prefill steps of the other models, judged on the
model left out. Decode stays as it is: it is replayed from graphs. A table, on stdout.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from tables import load, samples

LAYERS = {
    "qwen3-30b": 48,
    "gpt-oss-20b": 24,
    "dsv2-lite": 27,
    "olmoe": 16,
    "qwen3-235b-16": 16,
}


def steps_of(report: Path) -> list[dict[str, Any]]:
    """Prefill steps without graphs: model, measured ms, predicted parts, layers."""
    records, predicted = load(report)
    found = []
    for record in records:
        key = record["key"].removesuffix("-compile")
        for case in record["cases"]:
            graphed = record["name"].endswith("-compile") and case == "prefill-1x512"
            if not case.startswith("prefill") or graphed:
                continue
            for routing in ("trace", "uniform", "same"):
                parts = predicted[record["key"]]["steps"][case][routing]["parts_ms"]
                found.append(
                    {
                        "model": key,
                        "ms": float(np.median(samples(record, case, routing, "graph"))),
                        "parts": parts,
                        "layers": LAYERS[key],
                    }
                )
    return found


def predict(step: dict[str, Any], constants: np.ndarray) -> float:
    """Milliseconds under (a, b, h)."""
    experts, small, host = constants
    parts = step["parts"]
    gpu = sum(parts.values()) - parts["host"]
    gpu += (experts - 1) * parts["experts"] + (small - 1) * parts["elementwise"]
    return float(max(gpu, host * step["layers"]))


def fit(steps: list[dict[str, Any]]) -> np.ndarray:
    """(a, b, h) with the least mean absolute logarithmic error."""

    def loss(constants: np.ndarray) -> float:
        if (constants <= 0).any():
            return 1e9
        return float(np.mean([abs(np.log(predict(s, constants) / s["ms"])) for s in steps]))

    starts = [np.array([1.1, b, h]) for b in (2.0, 4.0) for h in (0.8, 1.4)]
    results = [minimize(loss, s, method="Nelder-Mead", options={"maxiter": 4000}) for s in starts]
    return np.asarray(min(results, key=lambda r: r.fun).x)


def main() -> None:
    """One row a model left out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    args = parser.parse_args()
    steps = steps_of(args.report)
    before, after = [], []
    print(
        "| left out | experts x | small kernels x | host, ms a layer | before: median, 90th |",
        end="",
    )
    print(" held out: median, 90th |\n|---|---|---|---|---|---|")
    for model in LAYERS:
        constants = fit([s for s in steps if s["model"] != model])
        mine = [s for s in steps if s["model"] == model]
        old = np.array([sum(s["parts"].values()) / s["ms"] - 1 for s in mine])
        new = np.array([predict(s, constants) / s["ms"] - 1 for s in mine])
        before.append(old)
        after.append(new)
        cells = " | ".join(f"{c:.2f}" for c in constants)
        print(f"| {model} | {cells} | {figures(old)} | {figures(new)} |")
    print(f"| all | | | | {figures(np.concatenate(before))} | {figures(np.concatenate(after))} |")
    print(json.dumps([round(float(c), 3) for c in fit(steps)]), "fitted to all")


def figures(errors: np.ndarray) -> str:
    """Median and 90th percentile of their sizes."""
    size = np.abs(errors)
    return f"{np.median(size):.1%}, {np.percentile(size, 90):.1%}"


if __name__ == "__main__":
    main()
