"""Plans for domains that tuning lacks: `--robust unseen`.

Batches as served mix domains, so that a plan tuned on them is even on the mix; a plan tuned on
batches of one domain each is even on every domain by itself. Which carries over to a domain that
neither has seen differs from layer to layer, and is found by trial: groups of domains are left out
in turn, both plans are made from the others, and every layer takes the kind that was more even on
what was left out. One layer's trial is noisy, so that half of what decides is the mean over layers.
Replicas, slots and objective are those of the plain plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moesim.choices import ReplicaPolicy
from moesim.errors import MismatchError
from moesim.placement import Placement
from moesim.planning.robust import MIN_DOMAIN_SHARE, domain_requests
from moesim.planning.tuning import batch_counts
from moesim.planning.worth import TUNING_BATCHES, excess_by_layer, folds_of
from moesim.solvers.base import Problem, Solution, Solver, run_solver
from moesim.trace.batches import Phase, RequestIndex, draw_batches
from moesim.trace.format import Trace

Counts = npt.NDArray[np.float32]
MIN_DOMAINS = 3


@dataclass(frozen=True, slots=True, eq=False)
class UnseenSolution:
    """The solution, and the excess imbalance (max/mean - 1) on left-out domains of the tuning
    requests: unseen with the kind that every layer takes, plain_unseen with mixed batches in all.
    by_domain: layers that take batches of one domain each."""

    solution: Solution
    unseen: float
    plain_unseen: float
    by_domain: int
    folds: int

    def line(self) -> str:
        """For people."""
        return (
            f"robust to unseen domains: {self.by_domain} of {self.solution.placement.num_layers}"
            f" layers are tuned on batches of one domain each; excess imbalance on left-out domains"
            f" {self.unseen:.3f} against {self.plain_unseen:.3f} (tuning requests,"
            f" {self.folds} groups left out in turn; which layers was chosen on them)"
        )

    def to_json(self) -> dict[str, float]:
        return {
            "unseen": self.unseen,
            "plain_unseen": self.plain_unseen,
            "layers_by_domain": self.by_domain,
            "folds": self.folds,
        }


def solve_unseen(
    solver: Solver,
    problem: Problem,
    plain: Solution,
    trace: Trace,
    tune: RequestIndex,
    phase: Phase,
    batch_tokens: int,
    policy: ReplicaPolicy,
) -> UnseenSolution:
    """Choose between mixed batches and those of one domain, layer by layer; plain: the solution of
    `problem`. Raises MismatchError where the trace has fewer than MIN_DOMAINS large domains."""
    groups = domain_requests(trace, tune, MIN_DOMAIN_SHARE * batch_tokens)
    if len(groups) < MIN_DOMAINS:
        raise MismatchError(
            f"{len(groups)} domain(s) of the trace are large enough to be left out in turn,"
            f" {MIN_DOMAINS} are needed",
            "use smaller `batch_tokens`, a trace of more domains, or `robust` cvar:0.9",
        )
    folds = folds_of({name: len(index.token_idx) for name, index in groups.items()})
    chosen: ReplicaPolicy = "lp" if policy == "lp" else "split"

    def draw(index: RequestIndex, batches: int) -> Counts:
        return batch_counts(trace, draw_batches(index, phase, batch_tokens, batches, problem.seed))

    def mixed(names: Sequence[str]) -> Counts:
        ids = np.concatenate([groups[name].ids for name in names])
        return draw(tune.select(np.isin(tune.ids, ids)), TUNING_BATCHES)

    def apart(names: Sequence[str]) -> Counts:
        each = max(1, TUNING_BATCHES // len(names))
        return np.concatenate([draw(groups[name], each) for name in names])

    def place(counts: Counts) -> Placement:
        limit = problem.time_limit_s / (2 * len(folds) + 1)
        return run_solver(solver, replace(problem, counts=counts, time_limit_s=limit)).placement

    excess = np.zeros((2, problem.num_layers))
    for fold in folds:
        others = [name for name in groups if name not in fold]
        judged = apart(fold)
        for kind, counts in enumerate((mixed(others), apart(others))):
            excess[kind] += excess_by_layer(place(counts), judged, chosen, problem.speed)
    excess /= len(folds)
    gain = excess[0] - excess[1]
    by_domain = gain + np.nanmean(gain) > 0
    table = np.where(
        by_domain[:, None],
        place(apart(list(groups))).physical_to_logical,
        plain.placement.physical_to_logical,
    )
    found = Placement(
        table, plain.placement.num_gpus, plain.placement.num_nodes, plain.placement.num_experts
    )
    return UnseenSolution(
        replace(plain, placement=found, objective_value=None, bound=None),
        float(np.nanmean(np.where(by_domain, excess[1], excess[0]))),
        float(np.nanmean(excess[0])),
        int(by_domain.sum()),
        len(folds),
    )
