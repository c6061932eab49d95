"""A short table of what a run of the replay measured: `python summary.py measured.json ...`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"{path.name}: not readable ({error})")
            continue
        print(f"-- {path.name}: {path.stat().st_size / 1e6:.2f} MB")
        if record.get("format") == "moesim-measured":
            measured(record)
        elif record.get("format") == "moesim-calibration-raw":
            calibration(record)
        else:
            print(json.dumps(record)[:1500])


def measured(record: dict[str, Any]) -> None:
    checks = record["checks"]
    worst = max((c["relative_error"] for c in checks), default=float("nan"))
    print(
        f"{record['kernels']} sets {record['weight_sets']}, {len(checks)} checks, worst {worst:.3g}"
    )
    for note in record["notes"]:
        print(f"note: {note}")
    table: dict[tuple[int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in record["results"]:
        key = (r["tokens_per_rank"], r["mode"])
        num_layers = len(r["layer_us"]["median"])
        table[key][r["plan"]].append(sum(r["layer_us"]["median"]) / num_layers)
    for (tokens, mode), plans in table.items():
        cells = ", ".join(f"{p} {sum(v) / len(v):.0f}" for p, v in plans.items())
        print(f"{tokens:5d} {mode:5s} us a layer: {cells}")
    for r in record["results"][:1] + record["results"][-1:]:
        print(f"phases of {r['plan']} {r['tokens_per_rank']} {r['mode']}: {r['phase_us'][0]}")


def calibration(record: dict[str, Any]) -> None:
    print(record["kernels"])
    for note in record["notes"]:
        print(f"note: {note}")
    for name, rows in record["tables"].items():
        print(f"{name}: {len(rows)} rows")
        picks = rows if name == "launch" else rows[:: max(1, len(rows) // 12)]
        for row in picks:
            shown = {k: v for k, v in row.items() if k not in ("counts", "rounds", "dtype")}
            print("  " + " ".join(f"{k}={v}" for k, v in shown.items()))


if __name__ == "__main__":
    main()
