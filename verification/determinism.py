"""INV-6 across processors, threads and hash seeds, wider than the test: plans of the sample trace.

    python verification/determinism.py

Compiled searches are built for each processor's instructions in turn (NUMBA_CPU_NAME); this machine
has to know them all. Prints the digests of the plans per setting, and whether all agree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import cycle

CODE = """
import hashlib, json
import moesim
for objective, solver in (
    ("time", "local_search"), ("balance", "local_search"), ("traffic", "local_search"),
    ("time", "coclustering"), ("balance", "eplb"), ("balance", "lns"),
):
    plan = moesim.plan(
        "sample:debian-moe", gpus=8, objective=objective, solver=solver, seed=3,
        redundant_experts=8 if objective == "balance" else 0,
    ).plan
    table = plan.placement.physical_to_logical
    print(objective, solver, hashlib.sha256(table.tobytes()).hexdigest()[:12])
"""
PROCESSORS = ("", "x86-64", "haswell", "znver3", "skylake-avx512")
THREADS = ("2", "1")
"""Alternate over the processors."""


def main() -> int:
    """0 where every setting gives the same bytes."""
    seen = set()
    for seed, (processor, threads) in enumerate(zip(PROCESSORS, cycle(THREADS), strict=False)):
        with tempfile.TemporaryDirectory() as folder:
            more = {"PYTHONHASHSEED": str(seed), "NUMBA_NUM_THREADS": threads}
            more |= {"OMP_NUM_THREADS": threads, "NUMBA_CACHE_DIR": folder}
            if processor:
                more["NUMBA_CPU_NAME"] = processor
            run = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", CODE],
                env=os.environ | more, capture_output=True, text=True, check=False,
            )  # fmt: skip
        said = run.stdout.strip() or run.stderr.strip().splitlines()[-1]
        seen.add(said)
        print(f"{processor or 'native'}, {threads} threads, hash seed {seed}:", flush=True)
        print("  " + said.replace("\n", "\n  "), flush=True)
    print("all the same" if len(seen) == 1 else f"{len(seen)} different results")
    return int(len(seen) > 1)


if __name__ == "__main__":
    raise SystemExit(main())
