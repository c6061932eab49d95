"""Damaged files and odd options, many of them, from a seed.

    python -m verification.fuzz --count 10000 --seed 1 --keep findings

Exit code 1 where anything was found. `--first N --count 1` shows input N of a seed again.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from verification.fuzz.harness import Finding, fuzz


def main() -> int:
    """Parse, run, print the report."""
    parser = argparse.ArgumentParser(prog="python -m verification.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--kinds", default="", help="pattern: only kinds of file whose names match")
    parser.add_argument("--keep", type=Path, help="folder for the files of findings")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin none after so long")
    options = parser.parse_args()
    keep = None if options.keep is None else options.keep.resolve()
    report = fuzz(
        options.count, options.seed, options.first, keep, _say, options.kinds, options.minutes
    )
    print("\n".join(report.lines()))
    return 1 if report.findings else 0


def _say(found: Finding) -> None:
    print(f"{found.number}: {found.kind}: {found.detail[-300:]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
