"""Rows of a benchmark in its results.csv, written as they come, so that a stopped run can go on."""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    """--data, --out and --resume, as the benchmarks with a results.csv have them."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="real traces")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of results.csv and run what is missing: after a stopped run of the same"
        " code",
    )
    return parser


def begin(table: Path, resume: bool) -> list[dict]:
    """Rows to go on from: those of `table` with `resume`, else none. Makes its folder."""
    table.parent.mkdir(parents=True, exist_ok=True)
    if not (resume and table.exists()):
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def write(table: Path, rows: list[dict]) -> None:
    """All rows, with the columns of any of them in order of appearance; new ones get their day."""
    for row in rows:
        row.setdefault("run", time.strftime("%Y-%m-%d"))
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def days(rows: list[dict]) -> str:
    """The line of a report that says when its rows ran."""
    return "Run on " + " and ".join(sorted({row["run"] for row in rows})) + "."
