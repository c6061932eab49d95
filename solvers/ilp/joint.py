"""The joint model of one layer: load of batches, fan-out, replicas, in the project's objective.

z[e, r, g] = 1 where expert e has r replicas and one of them is on GPU g:

    sum_r y[e, r] = 1,  sum_g z[e, r, g] = r y[e, r]          every expert, no GPU twice (INV-2)
    sum_er z[e, r, g] <= capacity[g]
    t[c] >= sum_er w[u(g), e, r, c] z[e, r, g]                for every GPU g and group c of batches
    minimise sum_c |c| t[c] / B + messages

w[u, e, r, c] is what a replica of e costs GPUs of kind u when e has r, averaged over the batches of
group c. The objective takes the largest GPU of every batch, and a mean of maxima is at least the
maximum of means: with groups of batches the model is a relaxation, so that its bound holds for the
project's objective, and it is exact at placements for which all batches of a group have the same
costliest GPU. Groups start as the batches with one costliest GPU in the start, and are split by
every placement that the model comes up with, until model and objective agree or time is up.

Messages are those of `moesim.solvers.ilp.messages` without redundancy. With it, which replica
serves a token is not linear in z; messages are then left out of the model, and the bound adds the
combinatorial one instead. The model of this file is the project's own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.placement import EMPTY
from moesim.solvers.base import Problem
from moesim.solvers.bounds.load import ROUNDING, load_bound
from moesim.solvers.bounds.messages import fewest_on_busiest, message_bound
from moesim.solvers.ilp.engine import IlpModel, Outcome, Terms
from moesim.solvers.ilp.messages import MessageTerms, patterns
from moesim.solvers.objective import PlacementCost
from moesim.types import FloatArray, IntArray

MAX_BINARIES = 6_000
MAX_LOAD_CELLS = 120_000
"""Nonzeros of the load rows; what sets the number of groups of batches."""
MAX_MESSAGE_CELLS = 60_000
PROVEN = 2e-6
"""Relative distance from the bound that rounding of single-precision loads can account for."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerResult:
    """slots: [G, S]; value: its exact objective; bound: proven, in the same unit."""

    slots: IntArray
    value: float
    bound: float
    outcome: Outcome

    @property
    def proven(self) -> bool:
        return self.value - self.bound <= PROVEN * max(self.value, 1e-12)


def most_replicas(problem: Problem) -> int:
    """The most replicas that an expert can have."""
    return min(problem.num_gpus, problem.num_slots - problem.num_experts + 1)


def fits(problem: Problem) -> bool:
    """Whether the whole-layer model is of a size that an engine takes."""
    replicas = most_replicas(problem)
    if problem.num_experts * problem.num_gpus * replicas > MAX_BINARIES:
        return False
    if problem.traffic is None or problem.objective == "balance" or replicas > 1:
        return True
    tokens, _, top_k = problem.traffic.expert_ids.shape
    return bool(tokens * top_k * problem.num_gpus <= MAX_MESSAGE_CELLS)


class JointLayer:
    """The model of one layer, rebuilt with finer groups of batches as it is solved."""

    def __init__(self, objective: PlacementCost, layer: int) -> None:
        self.objective, self.layer = objective, layer
        problem = self.problem = objective.problem
        self.replicas = most_replicas(problem)
        counts = objective.layer_counts(layer)
        self.work = _work_by_replicas(objective, counts, self.replicas)
        self.floor = load_bound(objective, layer)
        cells = problem.num_experts * problem.num_gpus * self.replicas
        self.max_groups = int(np.clip(MAX_LOAD_CELLS // cells, 1, counts.shape[1]))
        self.messages = objective.net is not None and self.replicas == 1
        self.constant = 0.0
        if objective.net is not None and not self.messages:
            self.constant = message_bound(objective, layer)
        self.key = np.zeros(counts.shape[1], np.int64)

    def solve(
        self, start: IntArray, time_limit_s: float, *, engine: str | None = None, seed: int = 0
    ) -> LayerResult:
        """Improve `start` [G, S] until proven, unchanged or out of time."""
        ends = time.monotonic() + time_limit_s
        problem, objective = self.problem, self.objective
        best, value = start, objective.layer_value(start, self.layer)
        bound, outcome = -np.inf, Outcome.TIME_LIMIT
        groups = self._split(start)
        while True:
            left = ends - time.monotonic()
            if left <= 0 or problem.stop():
                return LayerResult(best, value, bound, Outcome.TIME_LIMIT)
            model, place = self._model(groups, best)
            found = model.solve(time_limit_s=left, engine=engine, seed=seed, stop=problem.stop)
            outcome = found.outcome
            known = found.bound - ROUNDING * abs(found.bound)
            bound = max(bound, known + self.constant)
            if found.values is None:
                break
            slots = self._slots(model, place, found.values)
            reached = objective.layer_value(slots, self.layer)
            if reached < value:
                best, value = slots, reached
            result = LayerResult(best, value, bound, outcome)
            finer = self._split(slots)
            if result.proven or outcome != Outcome.OPTIMAL or finer.max() <= groups.max():
                return result
            groups = finer
        return LayerResult(best, value, bound, outcome)

    def _split(self, slots: IntArray) -> IntArray:
        """[B] group of every batch: by the costliest GPU in all placements seen, at most
        `max_groups`; neighbours in that order share a group where there would be more."""
        costliest = self._load(slots).argmax(axis=0)
        _, key = np.unique(self.key * len(slots) + costliest, return_inverse=True)
        self.key = key.astype(np.int64)
        num = int(key.max()) + 1
        if num <= self.max_groups:
            return self.key
        order = np.argsort(key, kind="stable")
        groups = np.empty(len(key), np.int64)
        groups[order] = np.arange(len(key)) * self.max_groups // len(key)
        return groups

    def _load(self, slots: IntArray) -> FloatArray:
        """[G, B]"""
        count = np.bincount(slots.ravel(), minlength=self.problem.num_experts + 1)
        load = np.zeros((len(slots), self.work.shape[3]))
        for gpu, row in enumerate(slots):
            held = row[row < self.problem.num_experts]
            load[gpu] = self.work[count[held] - 1, self.objective.unit[gpu], held].sum(axis=0)
        return load

    def _model(self, groups: IntArray, start: IntArray) -> tuple[IlpModel, list[list[list[Any]]]]:
        problem, objective = self.problem, self.objective
        size = np.bincount(groups).astype(np.float64)
        share = size / size.sum()
        member = np.zeros((len(groups), len(size)))
        member[np.arange(len(groups)), groups] = 1 / size[groups]
        work = self.work @ member
        floor = self.floor @ member
        model = IlpModel("joint")
        experts, gpus = range(problem.num_experts), range(problem.num_gpus)
        counts = range(self.replicas)
        place = [[[model.binary() for _ in gpus] for _ in counts] for _ in experts]
        for expert in experts:
            if self.replicas == 1:
                model.equal([(v, 1.0) for v in place[expert][0]], 1.0)
                continue
            has = [model.binary() for _ in counts]
            model.equal([(v, 1.0) for v in has], 1.0)
            held = int((start == expert).sum())
            for r in counts:
                model.equal([*((v, 1.0) for v in place[expert][r]), (has[r], -(r + 1.0))], 0.0)
                model.start(has[r], float(held == r + 1))
        for gpu in gpus:
            everything = [(place[e][r][gpu], 1.0) for e in experts for r in counts]
            model.at_most(everything, float(problem.capacity[gpu]))
        largest = []
        for c in range(len(size)):
            loads: list[tuple[Terms, float]] = [
                (
                    [
                        (place[e][r][g], float(work[r, objective.unit[g], e, c]))
                        for e in experts
                        for r in counts
                    ],
                    0.0,
                )
                for g in gpus
            ]
            largest.append(model.largest(loads, low=float(floor[c])))
        ceiling, weight = objective.limits(self.layer)
        if problem.objective == "traffic":
            mean = [(t, float(s)) for t, s in zip(largest, share, strict=True)]
            model.largest([(mean, -ceiling)], cost=weight)
        else:
            for t, s in zip(largest, share, strict=True):
                model.cost(t, float(s))
        if self.messages:
            assert problem.traffic is not None
            terms = MessageTerms(
                model,
                objective.net,
                problem.traffic,
                [place[e][0] for e in experts],
                fewest_on_busiest(objective, self.layer),
            )
            terms.add(patterns(problem.traffic, self.layer))
        self._break_symmetry(model, place, start)
        for expert in experts:
            held = int((start == expert).sum())
            for r in counts:
                for gpu in gpus:
                    on = held == r + 1 and expert in start[gpu]
                    model.start(place[expert][r][gpu], float(on))
        return model, place

    def _break_symmetry(
        self, model: IlpModel, place: list[list[list[Any]]], start: IntArray
    ) -> None:
        """Where GPUs are interchangeable, the heaviest expert stays where the start has it."""
        if self.objective.net is not None or not self.problem.uniform:
            return
        expert = int(self.work[0, 0].sum(axis=1).argmax())
        gpu = int(np.flatnonzero((start == expert).any(axis=1))[0])
        model.equal([(place[expert][r][gpu], 1.0) for r in range(self.replicas)], 1.0)

    def _slots(self, model: IlpModel, place: list[list[list[Any]]], values: FloatArray) -> IntArray:
        problem = self.problem
        slots = np.full(
            (problem.num_gpus, int(problem.capacity.max())), problem.num_experts, np.int64
        )
        for gpu in range(problem.num_gpus):
            held = [
                e
                for e in range(problem.num_experts)
                if any(values[model.column(by_gpu[gpu])] > 0.5 for by_gpu in place[e])
            ]
            slots[gpu, : len(held)] = held
        return slots


def _work_by_replicas(
    objective: PlacementCost, counts: npt.NDArray[np.float32], replicas: int
) -> FloatArray:
    """[R, U, E, B] cost of a replica of each expert when it has 1 .. R of them."""
    from moesim.solvers.kernels.placed import fill_row

    units = len(objective.scale)
    out = np.empty((replicas, units, *counts.shape))
    row = np.empty((units, counts.shape[1]), np.int32)
    grains, costs = objective.grains(counts), objective.costs(counts)
    for r in range(replicas):
        for expert in range(len(counts)):
            fill_row(costs, expert, r + 1, row)
            out[r, :, expert] = row / grains
    return out


def as_table(problem: Problem, slots: IntArray) -> npt.NDArray[np.int64]:
    """`slots` [.., G, S] with -1 for empty slots, at the end of every GPU's."""
    table = np.where(slots >= problem.num_experts, EMPTY, slots)
    order = np.argsort(table == EMPTY, axis=-1, kind="stable")
    return np.take_along_axis(table, order, axis=-1)
