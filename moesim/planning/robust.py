"""Plans for the worst rather than for the average: `--robust`.

Solvers minimise a mean over tuning batches. Which mean, is up to the batches that they are given.
So the worst is minimised by giving them more of what is worst for the placement that they found,
several times over (the multiplicative weights method for games: S. Arora, E. Hazan, S. Kale, Theory
of Computing 8, 2012), and by keeping the placement whose worst is best. The plain placement is the
first of those compared: on tuning data the worst is never worse than its.

worst-domain: the mean loss of the domain where it is largest; CVaR at level a: the mean loss of the
worst 1 - a of all batches (R. T. Rockafellar, S. Uryasev, Optimization of Conditional
Value-at-Risk, Journal of Risk 2, 2000). The loss of a batch is the mean over layers of the
costliest GPU's work over an even share of the work, which compares batches of different sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError, MismatchError
from moesim.placement import Placement
from moesim.planning.tuning import tuning_counts
from moesim.solvers.base import Problem, Solution, Solver, run_solver
from moesim.solvers.objective import PlacementCost
from moesim.trace.batches import Phase, RequestIndex
from moesim.trace.format import Trace
from moesim.types import FloatArray, Progress

Counts = npt.NDArray[np.float32]
ROUNDS = 4
RATE = 4.0
MIN_DOMAIN_SHARE = 0.25
"""Tokens of the tuning half, as a share of a batch, below which a domain counts as `other`."""
MAX_DOMAIN_BATCHES = 256
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Robust:
    """What is made as small as possible. level: of the CVaR, between 0 (the mean) and 1."""

    kind: Literal["worst-domain", "cvar", "unseen"]
    level: float = 0.0

    def __str__(self) -> str:
        return f"cvar:{self.level:g}" if self.kind == "cvar" else self.kind


def parse_robust(text: str) -> Robust:
    """`worst-domain`, `unseen` or `cvar:LEVEL`. Raises InputError for anything else."""
    if text == "worst-domain" or text == "unseen":
        return Robust(text)  # type: ignore[arg-type]
    kind, _, number = text.partition(":")
    try:
        level = float(number) if number else 0.9
    except ValueError:
        level = np.nan
    if kind != "cvar" or not 0 <= level < 1:
        raise InputError(
            f"`robust` {text[:40]!r} is unknown",
            "use worst-domain, unseen, or cvar:0.9 (the mean of the worst tenth of batches)",
        )
    return Robust("cvar", level)


@dataclass(frozen=True, slots=True, eq=False)
class RobustSolution:
    """The robust solution and what it is worth on tuning data. worst, plain_worst: its loss and the
    plain solution's; mean, plain_mean: over the tuning batches; rounds: solver runs compared."""

    solution: Solution
    worst: float
    plain_worst: float
    mean: float
    plain_mean: float
    rounds: int

    def to_json(self) -> dict[str, float]:
        return {
            "worst": self.worst,
            "plain_worst": self.plain_worst,
            "mean": self.mean,
            "plain_mean": self.plain_mean,
            "rounds": self.rounds,
        }


def domain_requests(
    trace: Trace, requests: RequestIndex, least_tokens: float
) -> dict[str, RequestIndex]:
    """Requests by domain (of their first token). Domains of fewer than `least_tokens` tokens go
    together as `other`, which is left out if it is still smaller than that."""
    if trace.domain_ids is None or not trace.meta.domains:
        raise MismatchError("the trace has no domains", "use `robust` cvar:0.9")
    lengths = np.diff(requests.indptr)
    domain = np.asarray(trace.domain_ids)[requests.token_idx[requests.indptr[:-1]]].astype(np.int64)
    tokens = np.bincount(domain, weights=lengths, minlength=len(trace.meta.domains))
    small = np.flatnonzero(tokens < least_tokens)
    out = {
        name: requests.select(domain == d)
        for d, name in enumerate(trace.meta.domains)
        if d not in small
    }
    rest = np.isin(domain, small)
    if lengths[rest].sum() >= max(least_tokens, 1):
        out[OTHER] = requests.select(rest)
    return out


def domain_counts(
    trace: Trace, tune: RequestIndex, phase: Phase, batch_tokens: int, seed: int
) -> dict[str, Counts]:
    """Tuning counts [B, L, E] of batches of one domain each. Raises MismatchError where the trace
    has fewer than two domains that are large enough."""
    groups = domain_requests(trace, tune, MIN_DOMAIN_SHARE * batch_tokens)
    if len(groups) < 2:
        raise MismatchError(
            f"{len(groups)} domain(s) of the trace have {MIN_DOMAIN_SHARE:.0%} of a batch of"
            f" {batch_tokens} tokens to tune on, two are needed",
            "use smaller `batch_tokens`, a trace with larger domains, or `robust` cvar:0.9",
        )
    return {
        name: tuning_counts(trace, requests, phase, batch_tokens, seed)[:MAX_DOMAIN_BATCHES]
        for name, requests in groups.items()
    }


class Losses:
    """Losses of placements on one set of batches.

    counts: [B, L, E]. The loss of a batch is the mean over layers of the costliest GPU's work over
    an even share of the work of all experts, each whole.
    """

    def __init__(self, problem: Problem, counts: Counts) -> None:
        self.cost = PlacementCost(replace(problem, counts=counts))
        alone = np.arange(problem.num_experts, dtype=np.int64)[None, :]
        self.even = np.empty((problem.num_layers, len(counts)))
        for layer in range(problem.num_layers):
            work = self.cost.work(self.cost.batch_counts(layer), alone)[:, :-1].sum(axis=1)
            self.even[layer] = work[self.cost.unit].mean(axis=0) / problem.num_gpus

    def of(self, placement: Placement) -> FloatArray:
        """[B]."""
        cost, (layers, num_batches) = self.cost, self.even.shape
        out = np.zeros(num_batches)
        for layer in range(layers):
            slots = cost.layer_slots(placement, layer)
            load = cost.placed(cost.batch_counts(layer), slots).load
            even = self.even[layer]
            out += np.where(even > 0, load.max(axis=0) / np.maximum(even, 1e-12), 1.0)
        return out / layers


def cvar(losses: FloatArray, level: float) -> float:
    """Mean of the worst 1 - level of the losses; at least one counts."""
    worst = max(1, round(len(losses) * (1 - level)))
    return float(np.sort(losses)[-worst:].mean())


def solve_robust(
    solver: Solver,
    problem: Problem,
    plain: Solution,
    robust: Robust,
    domains: Mapping[str, Counts] | None,
    *,
    progress: Progress | None = None,
) -> RobustSolution:
    """Run `solver` a few times on batches weighed by what was worst, within the time limit.

    plain: its solution of `problem`; domains: counts of each domain, for worst-domain. Raises
    InputError for objective traffic, whose load is only a limit.
    """
    if problem.objective == "traffic":
        raise InputError(
            "`robust` makes load even in the worst case, and objective traffic is about messages",
            "use `objective` balance or time",
        )
    adversary: _Domains | _Batches
    if robust.kind == "worst-domain":
        adversary = _Domains(problem, domains or {})
    else:
        adversary = _Batches(problem, robust.level)
    limit = problem.time_limit_s / ROUNDS
    first = adversary.judge(plain.placement)
    best, best_worst = plain, first
    everywhere = Losses(problem, problem.counts)
    mean = plain_mean = float(everywhere.of(plain.placement).mean())
    for turn in range(ROUNDS):
        weighed = replace(problem, counts=adversary.counts(), time_limit_s=limit)
        found = run_solver(solver, weighed, progress=_part(progress, turn, ROUNDS))
        worst = adversary.judge(found.placement)
        if worst < best_worst:
            best, best_worst = found, worst
            mean = float(everywhere.of(found.placement).mean())
    best = replace(best, objective_value=None, bound=None)
    return RobustSolution(best, best_worst, first, mean, plain_mean, ROUNDS + 1)


class _Domains:
    """Weights of domains, raised where the last placement lost most."""

    def __init__(self, problem: Problem, domains: Mapping[str, Counts]) -> None:
        self.total, self.domains = problem.num_batches, domains
        self.losses = [Losses(problem, counts) for counts in domains.values()]
        self.weight = np.full(len(domains), 1.0 / len(domains))

    def judge(self, placement: Placement) -> float:
        losses = np.array([batches.of(placement).mean() for batches in self.losses])
        excess = losses - 1.0
        self.weight = self.weight * np.exp(RATE * (excess / max(excess.max(), 1e-9) - 1.0))
        self.weight /= self.weight.sum()
        return float(losses.max())

    def counts(self) -> Counts:
        parts = []
        for weight, counts in zip(self.weight, self.domains.values(), strict=True):
            wanted = max(1, round(weight * self.total))
            parts.append(counts[np.arange(wanted) % len(counts)])
        return np.concatenate(parts)


class _Batches:
    """Weights of batches: all of them, and again those that were worst for some placement."""

    def __init__(self, problem: Problem, level: float) -> None:
        self.problem, self.level = problem, level
        self.losses = Losses(problem, problem.counts)
        self.times = np.zeros(problem.num_batches)

    def judge(self, placement: Placement) -> float:
        losses = self.losses.of(placement)
        worst = max(1, round(len(losses) * (1 - self.level)))
        self.times[np.argsort(-losses, kind="stable")[:worst]] += 1
        return cvar(losses, self.level)

    def counts(self) -> Counts:
        """Half of the batches drawn from the worst so far, half every other one of all."""
        total = self.problem.num_batches
        half = max(1, total // 2)
        share = np.cumsum(self.times) / self.times.sum()
        drawn = np.searchsorted(share, (np.arange(half) + 0.5) / half)
        spread = np.arange(total - half) * total // max(1, total - half)
        return self.problem.counts[np.concatenate((spread, drawn))]


def _part(progress: Progress | None, turn: int, turns: int) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(turn * total + done, turns * total)
