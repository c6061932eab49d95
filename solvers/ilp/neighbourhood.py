"""A few GPUs freed: which of them takes which of their experts, as an integer program.

With all other GPUs as they are, x[i, g] = 1 where item i (a slot's content) goes to GPU g of the
freed ones:

    sum_g x[i, g] = 1,  sum_i x[i, g] <= capacity[g],  replicas of one expert on different GPUs
    t[c] >= o[c],  t[c] >= sum_i w[u(g), i, c] x[i, g]        for every g and group c of batches
    minimise sum_c |c| t[c] / B  +  m (sum_ig r[i, g] x[i, g] + sum_ij a[i, j] d[i, j])

o[c] is the costliest of the other GPUs. The second term stands for messages, which are not linear
in x: m is the microseconds of messages a sampled choice, r[i, g] the choices of i from other homes
less the tokens that i shares with what stays near g, a[i, j] the tokens that chose both, and
d[i, j] >= x[i, g] - x[j, g] whether they are apart (on nodes, for a part of a, with dedup per
node). What comes out is judged by the exact objective, and dropped if that has not improved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moesim.solvers.base import never
from moesim.solvers.ilp.engine import IlpModel, IlpSolution, Terms
from moesim.solvers.kernels.layer_state import LayerState
from moesim.types import FloatArray, IntArray

MAX_GROUPS = 48
"""Groups of batches: the same costliest GPU in the present placement, split evenly."""


def regroup(
    state: LayerState,
    gpus: IntArray,
    *,
    time_limit_s: float,
    engine: str | None = None,
    node_limit: int | None = None,
    seed: int = 0,
    stop: Callable[[], bool] = never,
) -> tuple[bool, IlpSolution]:
    """Solve the program of `gpus` and take its answer if the layer's objective improves.

    Returns whether it did, and how the solve ended.
    """
    capacity = state.objective.capacity
    empty = state.objective.problem.num_experts
    items = [
        (int(e), g)
        for g, gpu in enumerate(gpus)
        for e in state.slots[gpu, : capacity[gpu]]
        if e < empty
    ]
    model, place = _model(state, gpus, items)
    found = model.solve(
        time_limit_s=time_limit_s, engine=engine, node_limit=node_limit, seed=seed, stop=stop
    )
    if found.values is None:
        return False, found
    rows = np.full((len(gpus), state.slots.shape[1]), empty, np.int64)
    for g in range(len(gpus)):
        held = [
            expert
            for (expert, _), on in zip(items, place, strict=True)
            if found.values[model.column(on[g])] > 0.5
        ]
        rows[g, : len(held)] = held
    return state.accept(gpus, rows), found


def _model(
    state: LayerState, gpus: IntArray, items: list[tuple[int, int]]
) -> tuple[IlpModel, list[list[Any]]]:
    objective = state.objective
    work, others, share = _grouped(state, gpus)
    model = IlpModel("neighbourhood")
    place = [[model.binary() for _ in gpus] for _ in items]
    for i, (expert, origin) in enumerate(items):
        model.equal([(v, 1.0) for v in place[i]], 1.0)
        for g in range(len(gpus)):
            model.start(place[i][g], float(g == origin))
            for j in range(i):
                if items[j][0] == expert:
                    model.at_most([(place[i][g], 1.0), (place[j][g], 1.0)], 1.0)
    for g, gpu in enumerate(gpus):
        model.at_most([(on[g], 1.0) for on in place], float(objective.capacity[gpu]))
    largest = []
    for c in range(len(share)):
        loads: list[tuple[Terms, float]] = [
            (
                [
                    (place[i][g], float(work[objective.unit[gpu], expert, c]))
                    for i, (expert, _) in enumerate(items)
                ],
                0.0,
            )
            for g, gpu in enumerate(gpus)
        ]
        largest.append(model.largest(loads, low=float(others[c])))
    ceiling, weight = objective.limits(state.layer)
    if ceiling > 0:
        mean = [(t, float(s)) for t, s in zip(largest, share, strict=True)]
        model.largest([(mean, -ceiling)], cost=weight)
    else:
        for t, s in zip(largest, share, strict=True):
            model.cost(t, float(s))
    if state.tokens is not None:
        _messages(state, model, gpus, items, place)
    return model, place


def _grouped(state: LayerState, gpus: IntArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(work [U, E + 1, C], costliest other GPU [C], share of batches [C])"""
    num_batches = state.load.shape[1]
    others = state.others(gpus)
    freed = state.load[gpus]
    costliest = np.where(others >= freed.max(axis=0), len(gpus), freed.argmax(axis=0))
    order = np.lexsort((freed.max(axis=0) - others, costliest))
    num = min(MAX_GROUPS, num_batches)
    groups = np.empty(num_batches, np.int64)
    groups[order] = np.arange(num_batches) * num // num_batches
    size = np.bincount(groups, minlength=num).astype(np.float64)
    unit = size * state.grains
    work = np.zeros((*state.work.shape[:2], num), np.int64)
    rest = np.zeros(num, np.int64)
    for b in range(num_batches):
        work[:, :, groups[b]] += state.work[:, :, b]
        rest[groups[b]] += others[b]
    return work / unit, rest / unit, size / num_batches


def _messages(
    state: LayerState,
    model: IlpModel,
    gpus: IntArray,
    items: list[tuple[int, int]],
    place: list[list[Any]],
) -> None:
    staying = state.slots.copy()
    staying[gpus] = state.objective.problem.num_experts
    alone, apart = state.message_terms(np.array([e for e, _ in items]), gpus, staying)
    near = state.near()[np.ix_(gpus, gpus)]
    inside = float(near[near < 1].max(initial=0.0))
    _, node = np.unique(state.objective.net.node_of[gpus], return_inverse=True)
    groups = [[g] for g in range(len(gpus))]
    nodes = [np.flatnonzero(node == n).tolist() for n in np.unique(node)]
    for i in range(len(items)):
        for g in range(len(gpus)):
            model.cost(place[i][g], float(alone[i, g]))
        for j in range(i):
            for parts, share in ((groups, 1 - inside), (nodes, inside)):
                if apart[i, j] > 0 and share > 0 and len(parts) > 1:
                    differ: list[tuple[Terms, float]] = [
                        (
                            [(place[i][g], 1.0) for g in part]
                            + [(place[j][g], -1.0) for g in part],
                            0.0,
                        )
                        for part in parts
                    ]
                    model.largest(differ, cost=float(apart[i, j]) * share)
