"""What a plan is worth on traffic that it has not seen: domains, or stretches of steps, left out.

A placement is as good as the traffic that it was tuned on. Domains are put into at most FOLDS
groups of about equal size; each group is left out in turn, a plan for balance is made from the
others, and both it and one made from all are judged on held-out batches of each left-out domain.
The figure is the excess imbalance (max/mean - 1 of the GPUs' tokens, mean over layers and
batches), whatever objective the plan has. Plans here are tuned on few batches, by greedy placement
where local search would take long: the two figures stand beside each other, not beside the plan's
own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.choices import ReplicaPolicy
from moesim.cost.replica_lp import least_loads
from moesim.errors import plain
from moesim.metrics import gpu_loads, imbalance
from moesim.placement import Placement
from moesim.planning.robust import MIN_DOMAIN_SHARE, domain_requests
from moesim.planning.tuning import batch_counts
from moesim.solvers.base import Problem, run_solver
from moesim.solvers.registry import find_solver
from moesim.trace.batches import Phase, RequestIndex, draw_batches
from moesim.trace.format import Trace
from moesim.types import FloatArray

Counts = npt.NDArray[np.float32]
FOLDS = 4
MAX_JUDGED = 16
TUNING_BATCHES = 128
JUDGING_BATCHES = 8
SEARCHED_EXPERTS = 2048
"""Experts of all layers, or half of their slots where those are more, up to which plans are
searched, not placed greedily."""
NARROW = 1.25
"""An unseen excess of so many times the seen one makes a trace narrow, if it is NARROW_EXCESS more.
"""
NARROW_EXCESS = 0.05
MIN_STEPS = 8


@dataclass(frozen=True, slots=True)
class Worth:
    """Excess imbalance, {name: (seen, unseen)}. what: "domain", or "part of the steps"."""

    by_name: Mapping[str, tuple[float, float]]
    what: str
    folds: int
    solver: str

    @property
    def seen(self) -> float:
        """Mean over domains with all of them in the tuning data."""
        return float(np.mean([seen for seen, _ in self.by_name.values()]))

    @property
    def unseen(self) -> float:
        """Mean over domains, each left out."""
        return float(np.mean([unseen for _, unseen in self.by_name.values()]))

    @property
    def narrow(self) -> bool:
        """Whether the tuning data are too narrow for other traffic."""
        return self.unseen > max(NARROW * self.seen, self.seen + NARROW_EXCESS)

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"on a {self.what} that tuning has not seen: excess imbalance {self.unseen:.2f},"
            f" against {self.seen:.2f} where it has (plans for balance by {self.solver},"
            f" {self.folds} groups left out in turn)"
        ]

    def notices(self) -> list[str]:
        """What to capture, where the trace is narrow."""
        if not self.narrow:
            return []
        loss = {name: unseen - seen for name, (seen, unseen) in self.by_name.items()}
        worst = sorted(loss, key=lambda name: -loss[name])[:3]
        named = ", ".join(f"{plain(n, 24)} {self.by_name[n][1]:.2f}" for n in worst)
        return [
            "the trace is narrow: what tuning has not seen is far less even (worst when left out:"
            f" {named}); capture requests of every kind that will be served, those above all, and"
            " plan again when the traffic changes"
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "figure": "excess imbalance, max/mean - 1",
            "left_out": self.what,
            "seen": self.seen,
            "unseen": self.unseen,
            "narrow": self.narrow,
            "folds": self.folds,
            "solver": self.solver,
            "by_name": {n: {"seen": s, "unseen": u} for n, (s, u) in self.by_name.items()},
        }


def worth_by_domain(
    problem: Problem,
    trace: Trace,
    tune: RequestIndex,
    held_out: RequestIndex,
    phase: Phase,
    batch_tokens: int,
    policy: ReplicaPolicy = "split",
) -> Worth | None:
    """For the slots and GPUs of `problem`; None for a trace with fewer than two domains of a size
    worth judging on both sides."""
    if trace.domain_ids is None or not trace.meta.domains:
        return None
    least = MIN_DOMAIN_SHARE * batch_tokens
    tuned, judged = (domain_requests(trace, side, least) for side in (tune, held_out))
    names = [name for name in tuned if name in judged]
    if len(names) < 2:
        return None

    def without(left_out: Sequence[str]) -> Counts:
        rest = tune
        if left_out:
            own = np.concatenate([tuned[name].ids for name in left_out])
            rest = tune.select(~np.isin(tune.ids, own))
        return batch_counts(
            trace, draw_batches(rest, phase, batch_tokens, TUNING_BATCHES, problem.seed)
        )

    sizes = {name: len(tuned[name].token_idx) for name in names}
    shown = sorted(sizes, key=lambda name: -sizes[name])[:MAX_JUDGED]
    batches = {
        name: batch_counts(
            trace,
            draw_batches(judged[name], phase, batch_tokens, JUDGING_BATCHES, problem.seed + 1),
        )
        for name in shown
    }
    return _worth(problem, without, folds_of(sizes), batches, "domain", policy)


def worth_by_step(problem: Problem, steps: npt.NDArray[np.int64]) -> Worth | None:
    """The same for recorded loads [S, L, E] of steps or workloads: FOLDS runs of consecutive ones,
    the even steps to tune on, the odd ones to judge. None for fewer than MIN_STEPS."""
    steps = steps[steps.any(axis=(1, 2))]
    if len(steps) < MIN_STEPS:
        return None
    runs = np.array_split(np.arange(len(steps)), FOLDS)
    names = [f"steps {run[0]} to {run[-1]}" for run in runs]

    def without(left_out: Sequence[str]) -> Counts:
        kept = [r[r % 2 == 0] for n, r in zip(names, runs, strict=True) if n not in left_out]
        return steps[np.concatenate(kept)].astype(np.float32)

    batches = {n: steps[r[r % 2 == 1]].astype(np.float32) for n, r in zip(names, runs, strict=True)}
    return _worth(problem, without, [[name] for name in names], batches, "part of the steps")


def excess_by_layer(
    placement: Placement, counts: Counts, policy: ReplicaPolicy, speed: FloatArray
) -> FloatArray:
    """[L] excess imbalance of `counts` [B, L, E], NaN without load. Replicas share equally, or for
    policy lp as well as they can, in each batch; speeds count for equal shares only."""
    if policy != "lp":
        found = imbalance(gpu_loads(counts, placement), speed)
        number = (~np.isnan(found)).sum(axis=0)
        mean = np.nansum(found, axis=0) / np.maximum(number, 1)
        return np.where(number > 0, mean - 1.0, np.nan)
    slots, count = placement.logical_to_physical(), placement.replica_count
    out = np.empty(placement.num_layers)
    for layer in range(len(out)):
        own = np.ascontiguousarray(counts[:, layer])
        most = np.zeros(len(own))
        least_loads(
            own, slots[layer], count[layer], placement.gpu_of_slot, placement.node_of_gpu, most
        )
        even = own.sum(axis=1) / placement.num_gpus
        out[layer] = np.mean(most[even > 0] / even[even > 0]) - 1.0 if even.any() else np.nan
    return out


def _worth(
    problem: Problem,
    without: Callable[[Sequence[str]], Counts],
    folds: Sequence[Sequence[str]],
    batches: Mapping[str, Counts],
    what: str,
    policy: ReplicaPolicy = "split",
) -> Worth:
    size = max(problem.num_experts, problem.num_slots / 2)
    searched = problem.num_layers * size <= SEARCHED_EXPERTS
    solver = "local_search" if searched else "greedy"

    def excess(left_out: Sequence[str], judged: Sequence[str]) -> dict[str, float]:
        tuned = replace(
            problem, counts=without(left_out), objective="balance", traffic=None, num_groups=1
        )
        placement = run_solver(find_solver(solver), tuned).placement
        return {
            name: float(
                np.nanmean(excess_by_layer(placement, batches[name], policy, problem.speed))
            )
            for name in judged
        }

    seen = excess((), list(batches))
    unseen: dict[str, float] = {}
    for fold in folds:
        judged = [name for name in fold if name in batches]
        if judged:
            unseen |= excess(fold, judged)
    said = solver if policy == "split" else f"{solver}, replicas {policy}"
    return Worth({n: (seen[n], unseen[n]) for n in batches}, what, len(folds), said)


def folds_of(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in at most FOLDS groups, the largest first to the smallest group so far."""
    folds: list[list[str]] = [[] for _ in range(min(FOLDS, len(sizes)))]
    total = [0] * len(folds)
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        at = total.index(min(total))
        folds[at].append(name)
        total[at] += sizes[name]
    return folds
