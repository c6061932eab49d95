"""Large neighbourhood search: a few GPUs freed at a time, filled again in the best possible way."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from math import comb, factorial

import numpy as np

from moesim.placement import EMPTY
from moesim.solvers.base import Problem, Solution, pack_table
from moesim.solvers.kernels.layer_state import LayerState, draw_gpus
from moesim.solvers.methods.local_search import (
    LayerSearch,
    LocalSearch,
    compile_kernels,
    message_kicks,
)
from moesim.solvers.objective import PlacementCost
from moesim.types import IntArray, Progress, stream

START_SHARE = 0.6
"""Of the time limit, at most, for the local search that gives the start."""
OPS = {"balance": 1.2e11, "time": 3e10, "traffic": 3e10}
"""Elementary steps over all layers: what sets the number of rounds, so that the same seed gives
the same plan on any machine and with any number of workers."""
MAX_ROUNDS = 400
KICK_OPS = 6e9
"""The same for kicks that look at messages, as the local search counts them."""
KICKS_AT_ONCE = 8
MAX_WAYS = 50_000
BATCHES = 192
"""Tuning batches that a sub-problem looks at; the others have their say when it is accepted."""
NODE_LIMIT = 300_000


class LargeNeighbourhoodSearch:
    """Improves the local search's placement by exact sub-problems (P. Shaw, Using Constraint
    Programming and Local Search Methods to Solve Vehicle Routing Problems, CP 1998).

    A round frees slots of two or three GPUs, the first drawn by how often it is the costliest,
    and places their experts again in the best of all ways (some ten thousand), by
    `moesim.solvers.kernels.enumerate_parts`: on a sample of batches and with the local search's
    estimate of messages. The answer is kept if the exact objective on all tuning data improves.
    Integer programs on the same sub-problems (`ilp`) take a hundred times as long.

    Layers are independent (C5) and run in parallel; each has its own random numbers and a counted
    number of rounds. When the time limit strikes, layers keep what they have, the status says
    time_limit, and the plan depends on the machine. The numbers of replicas stay as the local
    search chose them.
    """

    name = "lns"

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or os.cpu_count() or 1

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        from joblib import Parallel, delayed

        compile_kernels(problem)
        started = time.monotonic()
        begin = LocalSearch().solve(
            replace(problem, time_limit_s=problem.time_limit_s * START_SHARE)
        )
        ends = started + problem.time_limit_s
        objective = PlacementCost(problem)
        search = LayerSearch(objective)
        rounds, kicks = num_rounds(problem), message_kicks(problem, KICK_OPS)
        slots = [objective.layer_slots(begin.placement, i) for i in range(problem.num_layers)]
        run = Parallel(n_jobs=self.workers, require="sharedmem", return_as="generator")
        jobs = (
            delayed(improve_layer)(search, layer, slots[layer], kicks, rounds, ends)
            for layer in range(problem.num_layers)
        )
        late, gained = 0, 0
        for layer, (state, spent) in enumerate(run(jobs)):
            gained += int((state.slots != slots[layer]).any())
            slots[layer] = state.slots
            late += int(not spent)
            if progress is not None:
                progress(layer + 1, problem.num_layers)
        table = np.stack(slots)
        table[table == problem.num_experts] = EMPTY
        cut = late > 0 or begin.status == "time_limit"
        notes = [f"{gained} of {problem.num_layers} layers improved on local_search"]
        if late:
            notes.append(f"{late} layers had fewer than {rounds} rounds in the time limit")
        return Solution(
            pack_table(problem, table),
            "time_limit" if cut else "feasible",
            seconds=time.monotonic() - started,
            notes=(*begin.notes, *notes),
        )


def num_rounds(problem: Problem) -> int:
    """Rounds of a layer, from the counted budget."""
    per_round = MAX_WAYS * 8 * min(BATCHES, problem.num_batches) * problem.num_layers
    return int(np.clip(OPS[problem.objective] / per_round, 4, MAX_ROUNDS))


def improve_layer(
    search: LayerSearch, layer: int, slots: IntArray, kicks: int, rounds: int, ends: float
) -> tuple[LayerState, bool]:
    """(improved layer, whether all rounds were made before `ends` and without being stopped)"""
    problem = search.problem
    state = LayerState(search.objective, layer, slots)
    everything = np.arange(problem.num_gpus)
    for first in range(0, kicks, KICKS_AT_ONCE):
        if time.monotonic() > ends or problem.stop():
            return state, False
        trial = state.slots.copy()
        number = min(KICKS_AT_ONCE, kicks - first)
        search.search_messages(layer, trial, number, problem.seed + layer + 1000 * (first + 1))
        state.accept(everything, trial)
    rng = stream(problem.seed, layer, 0x175)
    step = max(1, problem.num_batches // BATCHES)
    idle = 0
    for number in range(rounds):
        if time.monotonic() > ends or problem.stop():
            return state, False
        size = min(2 + number % 2, problem.num_gpus)
        if size < 2 or idle > 4 * problem.num_gpus:
            break
        idle = 0 if deal_anew(state, draw_gpus(state, size, rng), step, rng) else idle + 1
    return state, True


def deal_anew(state: LayerState, gpus: IntArray, step: int, rng: np.random.Generator) -> bool:
    """Free slots of `gpus`, deal their contents in the best way; whether that was an improvement.

    Every `step`-th tuning batch is looked at.
    """
    from moesim.solvers.kernels.enumerate_parts import Terms, best_parts, make_parts
    from moesim.solvers.kernels.placed import Goal

    objective = state.objective
    empty = objective.problem.num_experts
    capacity = objective.capacity[gpus]
    freed = [
        np.sort(rng.choice(int(n), min(int(n), most_freed(len(gpus))), replace=False))
        for n in capacity
    ]
    item = np.concatenate([state.slots[g, s] for g, s in zip(gpus, freed, strict=True)])
    start = np.repeat(np.arange(len(gpus)), [len(s) for s in freed])
    kinds, unit = np.unique(objective.unit[gpus], return_inverse=True)
    work = np.ascontiguousarray(state.work[kinds][:, item][:, :, ::step])
    staying = state.slots.copy()
    for g, s in zip(gpus, freed, strict=True):
        staying[g, s] = empty
    kept = staying[gpus]
    if np.isin(item[item < empty], kept[kept < empty]).any():
        return False
    base = np.stack(
        [
            state.work[objective.unit[g], row][:, ::step].sum(axis=0)
            for g, row in zip(gpus, kept, strict=True)
        ]
    ).astype(np.int32)
    alone, apart = state.message_terms(item, gpus, staying)
    between = 1.0 - state.near()[np.ix_(gpus, gpus)]
    parts = make_parts(
        item,
        work,
        base,
        np.ascontiguousarray(state.others(gpus)[::step]),
        start,
        unit.reshape(-1).astype(np.int64),
        empty,
    )
    goal = Goal(*objective.limits(state.layer), state.grains)
    room = np.array([len(s) for s in freed])
    found, _, _ = best_parts(parts, Terms(alone, apart, between), goal, room, NODE_LIMIT)
    if (found == start).all():
        return False
    rows = state.slots[gpus].copy()
    for g, s in enumerate(freed):
        rows[g, s] = item[found == g]
    return state.accept(gpus, rows)


def most_freed(num_gpus: int) -> int:
    """Slots of each of `num_gpus` GPUs that can be filled in at most MAX_WAYS ways."""
    size = 1
    while ways(num_gpus, size + 1) <= MAX_WAYS:
        size += 1
    return size


def ways(num_gpus: int, slots: int) -> int:
    """Ways to deal `num_gpus` x `slots` different items to GPUs of `slots` each."""
    if num_gpus == 2:
        return comb(2 * slots, slots)
    return factorial(num_gpus * slots) // factorial(slots) ** num_gpus
