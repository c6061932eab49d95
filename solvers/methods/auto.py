"""`auto`: one of the other solvers, chosen by the size of the problem and the time limit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moesim.solvers.base import Problem, Solution
from moesim.solvers.registry import find_solver
from moesim.types import Progress

PROVABLE_CELLS = 32
"""Experts x GPUs up to which the integer program proves a layer's best balance in seconds."""
PROOF_S = 5.0
"""Time limit a layer that such a proof is given."""
LOAD_S = 0.25
"""Local search of a layer on load alone, in seconds on two cores."""
MESSAGES_S = 0.2
"""The same with messages."""
LNS_FACTOR = 3.5
"""A large neighbourhood search, local search included, over the local search alone."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The solver chosen, and why, in words."""

    solver: str
    reason: str


def choose(problem: Problem) -> Choice:
    """What `auto` takes. Looks at sizes, objective and time limit only, never at a clock or at the
    machine, so that the same problem gives the same choice anywhere. The efforts it reckons with
    are those of reports/solvers, on two cores, rounded up."""
    limit = problem.time_limit_s
    layers, experts, gpus = problem.num_layers, problem.num_experts, problem.num_gpus
    if gpus == 1 or experts == 1:
        return Choice("linear", "every placement is the same")
    local_s = layers * (LOAD_S if problem.objective == "balance" else MESSAGES_S)
    simple = "eplb" if problem.uniform else "greedy"
    if limit < local_s:
        return Choice(
            simple,
            f"{layers} layers take the local search about {local_s:.0f} s, the limit is {limit:g}",
        )
    provable = (
        problem.objective == "balance"
        and problem.num_slots == experts
        and experts * gpus <= PROVABLE_CELLS
    )
    if provable and limit >= PROOF_S * layers:
        return Choice(
            "ilp", f"{experts} experts on {gpus} GPUs are few enough to prove the best placement"
        )
    lns_s = LNS_FACTOR * local_s
    if limit >= lns_s:
        return Choice("lns", f"{limit:g} s are enough for {layers} layers (about {lns_s:.0f} s)")
    return Choice(
        "local_search",
        f"{limit:g} s are too few for lns on {layers} layers (about {lns_s:.0f} s)",
    )


class Auto:
    """Solves by the solver that `choose` names; the first note says which and why.

    What it minimises, ignores and promises is what that solver does.
    """

    name = "auto"

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        choice = choose(problem)
        found = find_solver(choice.solver).solve(problem, progress=progress)
        return replace(found, notes=(f"took {choice.solver}: {choice.reason}", *found.notes))
