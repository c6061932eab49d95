"""How long `moesim --help` and every command's help take, beside an empty Python.

Fails (exit code 1) when the median of `moesim --help` is above 0.4 s. Usage:

    python benchmarks/cli_startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from moesim.cli.reference import available_commands

LIMIT_S = 0.4
MOESIM = str(Path(sys.executable).with_name("moesim"))


def median_s(command: list[str], repeats: int) -> float:
    """Median wall-clock time of `command`, after one run that fills the disk cache."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print(f"{'python -c pass':<26} {median_s([sys.executable, '-c', 'pass'], args.repeats):.3f} s")
    overall = median_s([MOESIM, "--help"], args.repeats)
    print(f"{'moesim --help':<26} {overall:.3f} s")
    for name in available_commands():
        took = median_s([MOESIM, name, "--help"], max(3, args.repeats // 3))
        print(f"{f'moesim {name} --help':<26} {took:.3f} s")
    print(f"limit for moesim --help: {LIMIT_S} s, {'kept' if overall < LIMIT_S else 'EXCEEDED'}")
    return 0 if overall < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
