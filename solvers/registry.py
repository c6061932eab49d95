"""The solvers by name. Modules are imported when asked for, so that listing them is quick."""

from __future__ import annotations

from moesim.plugins import Registry
from moesim.solvers.base import Solver

ABOUT: dict[str, str] = {
    "auto": "one of these, by size, objective and time limit; says which and why",
    "linear": "experts in order, as engines start; ignores load",
    "round_robin": "expert i on GPU i mod G; ignores load",
    "eplb": "DeepSeek's load balancer: average load, replicas, node groups",
    "greedy": "longest processing time first: average load, unequal GPUs",
    "two_copies": "every expert on two GPUs, as far as slots allow: any one GPU may fail",
    "coclustering": "spectral co-clustering of tokens and experts: few GPUs per token first",
    "local_search": "swaps and replica moves on batch-by-batch load, traffic or time (default)",
    "lns": "local_search, then the contents of two or three GPUs dealt out again, exactly",
    "moetuner": "MoETuner's two programs: even clusters, then traffic between layers",
    "exflow": "ExFlow's affinity of adjacent layers; ignores load",
    "transmissions": "experts near the GPUs whose tokens choose them; ignores load",
    "ilp": "integer programs on the same objective, from local_search's answer; proves bounds",
}
"""What `moesim solver list` says of each of moesim's own."""

SOLVERS = Registry(
    "solver",
    "moesim.solvers",
    {
        "auto": "moesim.solvers.methods.auto:Auto",
        "linear": "moesim.solvers.methods.linear:Linear",
        "round_robin": "moesim.solvers.methods.round_robin:RoundRobin",
        "eplb": "moesim.solvers.methods.eplb:Eplb",
        "greedy": "moesim.solvers.methods.greedy:Greedy",
        "two_copies": "moesim.solvers.methods.two_copies:TwoCopies",
        "coclustering": "moesim.solvers.methods.coclustering:Coclustering",
        "local_search": "moesim.solvers.methods.local_search:LocalSearch",
        "lns": "moesim.solvers.methods.lns:LargeNeighbourhoodSearch",
        "moetuner": "moesim.solvers.ilp.moetuner:MoETuner",
        "exflow": "moesim.solvers.ilp.exflow:ExFlow",
        "transmissions": "moesim.solvers.ilp.transmissions:Transmissions",
        "ilp": "moesim.solvers.ilp.solver:JointIlp",
    },
)


def solver_names() -> list[str]:
    """Names accepted by `find_solver`."""
    return SOLVERS.names()


def about(name: str) -> str:
    """One line on the solver called `name`: of moesim's own, or a class's `about`."""
    return ABOUT.get(name) or str(getattr(SOLVERS.get(name), "about", "of another package"))


def find_solver(solver: str | Solver) -> Solver:
    """The solver called so, or `solver` itself; UnknownNameError proposes the nearest name."""
    if not isinstance(solver, str):
        return solver
    found: Solver = SOLVERS.get(solver)()
    return found
