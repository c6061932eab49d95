"""The solvers by name. Modules are imported when asked for, so that listing them is quick."""

from __future__ import annotations

from importlib import import_module

from moesim.errors import UnknownNameError
from moesim.solvers.base import Solver

SOLVERS: dict[str, tuple[str, str, str]] = {
    "auto": (
        "methods.auto",
        "Auto",
        "one of these, by size, objective and time limit; says which and why",
    ),
    "linear": ("methods.linear", "Linear", "experts in order, as engines start; ignores load"),
    "round_robin": ("methods.round_robin", "RoundRobin", "expert i on GPU i mod G; ignores load"),
    "eplb": (
        "methods.eplb",
        "Eplb",
        "DeepSeek's load balancer: average load, replicas, node groups",
    ),
    "greedy": (
        "methods.greedy",
        "Greedy",
        "longest processing time first: average load, unequal GPUs",
    ),
    "coclustering": (
        "methods.coclustering",
        "Coclustering",
        "spectral co-clustering of tokens and experts: few GPUs a token, balance second",
    ),
    "local_search": (
        "methods.local_search",
        "LocalSearch",
        "swaps and replica moves on batch-by-batch load, traffic or time (default)",
    ),
    "lns": (
        "methods.lns",
        "LargeNeighbourhoodSearch",
        "local_search, then the contents of two or three GPUs dealt anew, exactly",
    ),
    "moetuner": (
        "ilp.moetuner",
        "MoETuner",
        "MoETuner's two programs: even clusters, then traffic between layers",
    ),
    "exflow": ("ilp.exflow", "ExFlow", "ExFlow's affinity of adjacent layers; ignores load"),
    "transmissions": (
        "ilp.transmissions",
        "Transmissions",
        "experts near the GPUs whose tokens choose them; ignores load",
    ),
    "ilp": (
        "ilp.solver",
        "JointIlp",
        "integer programs on the same objective, from local_search's answer; proves bounds",
    ),
}


def solver_names() -> list[str]:
    """Names accepted by `get_solver`."""
    return list(SOLVERS)


def get_solver(name: str) -> Solver:
    """The solver called `name`; UnknownNameError proposes the nearest known one."""
    if name not in SOLVERS:
        raise UnknownNameError("solver", name, SOLVERS)
    module, cls, _ = SOLVERS[name]
    solver: Solver = getattr(import_module(f"moesim.solvers.{module}"), cls)()
    return solver
