"""Items of every layer to GPUs so that tokens travel little from layer to layer.

    minimise sum_l sum_ij T[l, i, j] d[g(l, i), g(l + 1, j)]
    with at most capacity[g] items of a layer on GPU g

A chain of quadratic assignments. Small ones are solved whole, with flows f[l, i, g, j, h] between
the positions of two items in adjacent layers, sum_h f = x[l, i, g] and sum_g f = x[l + 1, j, h]
(the linearisation of W. P. Adams and H. D. Sherali, A Tight Linearization and an Algorithm for
Zero-One Quadratic Programming Problems, Management Science 32, 1986). In larger ones each layer is
solved with its neighbours held, forth and back until nothing changes: that is a transportation
problem, whose optimum an assignment algorithm finds, but the chain as a whole has then no bound.
Nodes and sweeps are counted, so that a time limit that is not reached changes nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.solvers.base import Problem, Stop, Traffic, never
from moesim.solvers.ilp.engine import IlpModel, Outcome
from moesim.types import FloatArray, IntArray

MAX_FLOWS = 1_000
MAX_SWEEPS = 20
NODES = 2_000


@dataclass(frozen=True, slots=True, eq=False)
class ChainResult:
    """gpu: [L, I] of every item; cost: the chain's; bound: proven, -infinite without."""

    gpu: IntArray
    cost: float
    bound: float
    outcome: Outcome


def tokens_of(problem: Problem) -> Traffic:
    """The sampled tokens, which a solver of need "tokens" was given."""
    assert problem.traffic is not None
    return problem.traffic


def transitions(traffic: Traffic, num_experts: int) -> FloatArray:
    """[L - 1, E, E]: sampled tokens that chose an expert in one layer and one in the next."""
    tokens, layers, _ = traffic.expert_ids.shape
    out = np.zeros((max(0, layers - 1), num_experts, num_experts))
    before: Any = None
    for layer in range(layers):
        ids = traffic.expert_ids[:, layer].astype(np.int64)
        hit = np.zeros((tokens, num_experts + 1), np.float32)
        np.put_along_axis(hit, np.where(ids < 0, num_experts, ids), 1, axis=1)
        hit = hit[:, :num_experts]
        if layer:
            out[layer - 1] = before.T @ hit
        before = hit
    return out


def chain_cost(together: FloatArray, distance: FloatArray, gpu: IntArray) -> float:
    """The objective. together: [L - 1, I, I]; distance: [G, G]; gpu: [L, I]."""
    total = 0.0
    for layer, counts in enumerate(together):
        total += float((counts * distance[gpu[layer][:, None], gpu[layer + 1][None]]).sum())
    return total


def solve_chain(
    together: FloatArray,
    distance: FloatArray,
    capacity: IntArray,
    start: IntArray,
    *,
    time_limit_s: float,
    engine: str | None = None,
    seed: int = 0,
    stop: Stop = never,
) -> ChainResult:
    """Improve `start` [L, I]; arguments as in `chain_cost`, capacity: [G] items a layer."""
    ends = time.monotonic() + time_limit_s
    gpu, late = _sweep(together, distance, capacity, start, ends, stop)
    cost = chain_cost(together, distance, gpu)
    layers, items = start.shape
    if late or (layers - 1) * (items * len(capacity)) ** 2 > MAX_FLOWS:
        outcome = Outcome.TIME_LIMIT if late else Outcome.FEASIBLE
        return ChainResult(gpu, cost, -np.inf, outcome)
    model, place = _model(together, distance, capacity, gpu)
    found = model.solve(
        time_limit_s=ends - time.monotonic(),
        engine=engine,
        node_limit=NODES,
        seed=seed,
        stop=stop,
    )
    if found.values is not None:
        values = found.values
        picked = np.array(
            [[int(np.argmax([values[model.column(v)] for v in on])) for on in row] for row in place]
        )
        reached = chain_cost(together, distance, picked)
        if reached < cost:
            gpu, cost = picked, reached
    return ChainResult(gpu, cost, min(found.bound, cost), found.outcome)


def _sweep(
    together: FloatArray,
    distance: FloatArray,
    capacity: IntArray,
    start: IntArray,
    ends: float,
    stop: Stop,
) -> tuple[IntArray, bool]:
    """(placement no worse than `start`, whether time ran out)"""
    gpu = start.copy()
    layers = len(gpu)
    order = [*range(layers), *range(layers - 2, -1, -1)]
    for _ in range(MAX_SWEEPS):
        changed = False
        for layer in order:
            if time.monotonic() > ends or stop():
                return gpu, True
            cost = np.zeros((gpu.shape[1], len(capacity)))
            if layer:
                cost += together[layer - 1].T @ distance[gpu[layer - 1]]
            if layer + 1 < layers:
                cost += together[layer] @ distance[:, gpu[layer + 1]].T
            picked = assign(cost, capacity)
            rows = np.arange(len(cost))
            now, then = cost[rows, gpu[layer]].sum(), cost[rows, picked].sum()
            if then < now * (1 - 1e-9) - 1e-12:
                gpu[layer], changed = picked, True
        if not changed:
            break
    return gpu, False


def assign(cost: FloatArray, capacity: IntArray) -> IntArray:
    """[I]: the GPU of every item at the least total cost [I, G], a transportation problem."""
    from scipy.optimize import linear_sum_assignment

    slots = np.repeat(np.arange(len(capacity)), capacity)
    rows, columns = linear_sum_assignment(cost[:, slots])
    gpu = np.empty(len(cost), np.int64)
    gpu[rows] = slots[columns]
    return gpu


def _model(
    together: FloatArray, distance: FloatArray, capacity: IntArray, start: IntArray
) -> tuple[IlpModel, list[list[list[Any]]]]:
    layers, items = start.shape
    gpus = range(len(capacity))
    model = IlpModel("chain")
    place = [[[model.binary() for _ in gpus] for _ in range(items)] for _ in range(layers)]
    for layer in range(layers):
        for item in range(items):
            model.equal([(v, 1.0) for v in place[layer][item]], 1.0)
            for g in gpus:
                model.start(place[layer][item][g], float(start[layer, item] == g))
        for g in gpus:
            model.at_most([(place[layer][i][g], 1.0) for i in range(items)], float(capacity[g]))
    for layer, i, j in zip(*np.nonzero(together), strict=True):
        weight = float(together[layer, i, j])
        flow = [[model.continuous(cost=weight * float(distance[g, h])) for h in gpus] for g in gpus]
        for g in gpus:
            model.equal([*((v, 1.0) for v in flow[g]), (place[layer][i][g], -1.0)], 0.0)
            model.equal([*((flow[k][g], 1.0) for k in gpus), (place[layer + 1][j][g], -1.0)], 0.0)
            for h in gpus:
                both = start[layer, i] == g and start[layer + 1, j] == h
                model.start(flow[g][h], float(both))
    return model, place


def slots_from(gpu: IntArray, problem: Problem) -> npt.NDArray[np.int64]:
    """[L, G, S] experts of every GPU, -1 for empty, from the GPU of every expert [L, E]."""
    width = int(problem.capacity.max())
    table = np.full((len(gpu), problem.num_gpus, width), -1, np.int64)
    for layer, row in enumerate(gpu):
        for g in range(problem.num_gpus):
            held = np.flatnonzero(row == g)
            table[layer, g, : len(held)] = held
    return table
