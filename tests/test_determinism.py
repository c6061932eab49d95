"""INV-6: a plan's bytes do not depend on the CPU's vector units, on threads or on hash seeds."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import hashlib
import numpy as np
from moesim.solvers.base import Problem, run_solver
from moesim.solvers.registry import find_solver

rng = np.random.default_rng(1)
counts = rng.poisson(rng.gamma(0.7, 12, (2, 48)), (60, 2, 48)).astype(np.float32)
problem = Problem(counts, np.full(8, 7), 2)
for name in ("eplb", "greedy", "coclustering", "local_search", "lns"):
    table = run_solver(find_solver(name), problem).placement.physical_to_logical
    print(name, hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest())
"""

MACHINES = (
    {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
    {
        "PYTHONHASHSEED": "1",
        "NUMBA_CPU_NAME": "x86-64",
        "OPENBLAS_CORETYPE": "Prescott",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX",
    },
)
"""This one with one thread; and one with SSE2 alone for compiled code and linear algebra."""


def test_plans_are_the_same_on_every_cpu() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CODE],
            env={**os.environ, **machine},
            stdout=subprocess.PIPE,
            text=True,
        )
        for machine in MACHINES
    ]
    said = [run.communicate(timeout=280)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert said[0].count("\n") == 5
    assert said[0] == said[1]
