"""Steps that no fit has seen: models and sizes of their own, predicted before they were measured.

    python verification/engine/later_tables.py reports/engine-vllm [--write]

Reads raw/later-*, `predictions_later.json` (written before) and `after.json` (the same steps and
the first ones with the code as it is); writes the tables between the marks of their names.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from tables import host_bound, interval, load, put, samples

Row = tuple[str, str, str, bool, np.ndarray, dict[str, float]]
KINDS = {
    "decode, trace": lambda r: r[1].startswith("decode") and r[2] != "same",
    "decode, the same experts for all": lambda r: r[1].startswith("decode") and r[2] == "same",
    "prefill, bound by the GPU": lambda r: r[1].startswith("prefill") and not r[3],
    "prefill, bound by the host": lambda r: r[3],
    "all": lambda r: True,
    "all under real or uniform routing": lambda r: r[2] != "same",
}


def later(report: Path) -> list[Row]:
    """(model, step, routing, bound by the host, ms by round, predictions)."""
    said = json.loads((report / "predictions_later.json").read_text())["models"]
    found: list[Row] = []
    for path in sorted((report / "raw").glob("later-*.json.gz")):
        record = json.loads(gzip.decompress(path.read_bytes()))
        for case in record["cases"]:
            host = case.startswith("prefill") and host_bound(record, case)
            for routing, row in said[record["model"]]["steps"][case].items():
                ms = samples(record, case, routing, "graph")
                found.append((record["model"], case, routing, host, ms, row))
    return found


def first(report: Path) -> list[Row]:
    """The same of the first study's steps, with predictions before and after."""
    records, before = load(report)
    after = json.loads((report / "after.json").read_text())["models"]
    found: list[Row] = []
    for record in records:
        for case in record["cases"]:
            host = case.startswith("prefill") and host_bound(record, case)
            for routing in ("trace", "uniform", "same"):
                row = after[record["key"]]["steps"][case][routing]
                row = row | {"before_ms": before[record["key"]]["steps"][case][routing]["ms"]}
                ms = samples(record, case, routing, "graph")
                found.append((record["name"], case, routing, host, ms, row))
    return found


def errors(rows: list[Row], names: dict[str, str]) -> str:
    """Median and 90th percentile by kind of step, a column for each prediction."""
    lines = [
        "| steps | cases | " + " | ".join(names.values()) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for kind, keep in KINDS.items():
        own = [r for r in rows if keep(r)]
        cells = []
        for name in names:
            size = np.abs([r[5][name] / np.median(r[4]) - 1 for r in own])
            cells.append(f"{np.median(size):.1%}, {np.percentile(size, 90):.1%}")
        lines.append(f"| {kind} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps(rows: list[Row]) -> str:
    """Every step under the trace's routing."""
    lines = ["| model | step | measured, ms (95%) | profile of vLLM | with this host | before |"]
    lines += ["|---|---|---|---|---|---|"]
    for model, case, routing, host, ms, row in rows:
        if routing != "trace":
            continue
        mid, low, high = interval(ms)
        cells = [
            f"{row[n]:.2f} ({row[n] / mid - 1:+.0%})" for n in ("ms", "with_host_ms", "before_ms")
        ]
        about = (
            f"| {model} | {case}{', host' if host else ''} | {mid:.2f} ({low:.2f} to {high:.2f})"
        )
        lines.append(f"{about} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    new = later(args.report)
    names = {"before_ms": "before", "ms": "profile of vLLM", "with_host_ms": "with this host"}
    tables: dict[str, Any] = {
        "later errors": errors(new, names),
        "later steps": steps(new),
        "after errors": errors(
            first(args.report),
            {"before_ms": "first prediction", "ms": "profile of vLLM", "host_ms": "with this host"},
        ),
    }
    put(args.report, tables, write=args.write)


if __name__ == "__main__":
    main()
