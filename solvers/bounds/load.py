"""Lower bounds on the objective that hold for every placement of a problem.

The combinatorial bound takes each batch by itself: the average over GPUs, the largest expert share
that the redundant slots leave, and the pigeonhole principle (P. Brucker, Scheduling Algorithms,
section 5.1: of the k G + 1 heaviest jobs some machine gets k + 1). What one placement cannot do for
all batches at once is the subject of `moesim.solvers.bounds.colocation`, messages that of
`moesim.solvers.bounds.messages`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.base import Problem
from moesim.solvers.bounds.colocation import applies, colocation_bound
from moesim.solvers.bounds.messages import message_bound
from moesim.solvers.objective import PlacementCost
from moesim.types import Array, FloatArray

T = TypeVar("T")
ROUNDING = 1e-6
LP_LAYERS = 4
"""Layers that the co-location relaxation is solved for, a second or so each. A number and not a
time limit, so that the same plan always states the same bound."""


@dataclass(frozen=True, slots=True, eq=False)
class LowerBound:
    """A proven lower bound. layers: [L] bound of each layer; value: their mean, in the unit of the
    objective; kind: what proved it."""

    layers: FloatArray
    kind: str

    @property
    def value(self) -> float:
        return float(self.layers.mean())

    def gap(self, objective_value: float) -> float:
        """Relative distance of a plan's objective from the bound, at least 0."""
        if objective_value <= 0:
            return 0.0
        return max(0.0, (objective_value - self.value) / objective_value)


def lower_bound(
    problem: Problem,
    *,
    layer_values: FloatArray | None = None,
    lp_layers: int = LP_LAYERS,
    objective: PlacementCost | None = None,
) -> LowerBound:
    """The best bound that the methods here give.

    layer_values: [L] objective of a known plan; the co-location relaxation is solved for the
    `lp_layers` layers that are farthest above their other bound (the first ones if not given).
    Time: expert work and messages are bounded apart and added. Traffic: the penalty for load is
    taken as 0. Rounding of the float32 tuning counts is allowed for. objective: that of `problem`
    where it is at hand, to save what it has worked out.
    """
    objective = objective or PlacementCost(problem)
    num_layers = problem.num_layers
    messages = np.zeros(num_layers)
    if problem.objective != "balance":
        messages = np.array(_every_layer(lambda i: message_bound(objective, i), num_layers))
    if problem.objective == "traffic":
        return LowerBound(messages * (1 - ROUNDING), "messages: homes, pairs")
    floor = _every_layer(lambda layer: load_bound(objective, layer), num_layers)
    layers = np.array([float(batch.mean()) for batch in floor])
    kind = "batch by batch"
    if applies(problem):
        distance = (
            np.zeros(num_layers) if layer_values is None else layer_values - layers - messages
        )
        for layer in np.argsort(-distance, kind="stable")[:lp_layers]:
            work = unreplicated_work(objective, int(layer))
            found = colocation_bound(work, problem.num_gpus, floor[layer])
            if found > layers[layer]:
                layers[layer], kind = found, "batch by batch and co-location LP"
    if problem.objective == "time":
        kind += ", messages"
    return LowerBound((layers + messages) * (1 - ROUNDING), kind)


def _every_layer(run: Callable[[int], T], num_layers: int) -> list[T]:
    """`run` of every layer, on threads: what takes time lets go of the interpreter."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, range(num_layers)))


def base_table(objective: PlacementCost) -> FloatArray:
    """[N + 1] the cheapest kind's time by tokens, or [1] where load is counted in tokens."""
    return np.asarray(objective.table.min(axis=0), np.float64)


def unreplicated_work(objective: PlacementCost, layer: int) -> FloatArray:
    """[E, B]: what each expert costs by itself on the cheapest and fastest kind of GPU."""
    return _work(objective.layer_counts(layer), base_table(objective)) * objective.scale.min()


def load_bound(objective: PlacementCost, layer: int) -> FloatArray:
    """[B]: a lower bound on the costliest GPU of each tuning batch, whatever the placement."""
    problem = objective.problem
    counts = objective.layer_counts(layer)
    table = base_table(objective)
    held = problem.capacity > 0
    scale = objective.scale[objective.unit][held]
    rate = np.zeros(1)
    if len(table) > 1:
        steps = table[1:] / np.arange(1, len(table))
        rate = np.minimum.accumulate(np.concatenate((steps[:1], steps)))
    out = np.empty(counts.shape[1])
    _load_bounds(
        counts,
        table,
        rate,
        float((1 / scale).sum()),
        float(scale.min()),
        len(scale),
        problem.num_slots - problem.num_experts,
        int(problem.capacity[held].min()),
        out,
    )
    return out


@kernel
def _at(table: Array, tokens: float) -> float:
    """Cost of `tokens` by linear interpolation, as `search_load.fill_row` has it."""
    last = len(table) - 1
    if last == 0:
        return tokens
    low = min(int(tokens), last - 1)
    return table[low] + (table[low + 1] - table[low]) * (tokens - low)


@kernel
def _work(counts: Array, table: Array) -> Array:
    out = np.empty(counts.shape)
    for e in range(counts.shape[0]):
        for b in range(counts.shape[1]):
            out[e, b] = _at(table, counts[e, b])
    return out


@kernel
def _load_bounds(
    counts: Array,
    table: Array,
    rate: Array,
    total_rate: float,
    least_scale: float,
    num_gpus: int,
    spare: int,
    least_slots: int,
    out: Array,
) -> None:
    """Body of `load_bound`. rate: [N + 1] least cost a token of an expert with up to n tokens;
    total_rate: sum over GPUs of 1 / scale; spare: redundant slots."""
    num_experts, num_batches = counts.shape
    work = np.empty(num_experts)
    replicas = np.empty(num_experts, np.int64)
    for b in range(num_batches):
        total = 0.0
        for e in range(num_experts):
            tokens = counts[e, b]
            work[e] = _at(table, tokens)
            least = work[e]
            if spare > 0 and len(table) > 1:
                least = tokens * rate[min(len(rate) - 1, int(np.ceil(tokens)))]
            total += least
        best = total / total_rate
        replicas[:] = 1
        left = spare
        largest = 0.0
        while True:
            top = 0
            for e in range(1, num_experts):
                if counts[e, b] * replicas[top] > counts[top, b] * replicas[e]:
                    top = e
            largest = counts[top, b] / replicas[top]
            if left == 0 or replicas[top] == num_gpus:
                break
            replicas[top] += 1
            left -= 1
        best = max(best, least_scale * _at(table, largest))
        work.sort()
        k = 1
        while spare + k * num_gpus + 1 <= num_experts:
            together = 0.0
            for i in range(k + 1):
                together += work[num_experts - (spare + k * num_gpus + 1) + i]
            best = max(best, least_scale * together)
            k += 1
        if spare == 0:
            together = work[num_experts - 1]
            for i in range(least_slots - 1):
                together += work[i]
            best = max(best, least_scale * together)
        out[b] = best
