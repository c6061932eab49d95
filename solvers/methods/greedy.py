"""Longest processing time first, with slot limits, replicas and unequal GPUs."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.solvers.base import Problem, Solution, empty_slots, pack_table
from moesim.solvers.repair import moved_note, separate_replicas
from moesim.types import Progress


class Greedy:
    """Balances the average load.

    Redundant slots go one by one to the expert with the most load a replica (at most one a GPU);
    then replicas, heaviest first, go to the GPU that would finish them first, by its speed, among
    those with a free slot that do not hold the expert (R. L. Graham, Bounds on Multiprocessing
    Timing Anomalies, SIAM J. Appl. Math. 17, 1969; on unequal machines Gonzalez, Ibarra and
    Sahni 1977). Ignores batches and traffic.
    """

    name = "greedy"

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        table = empty_slots(problem)
        load = problem.mean_load
        for layer in range(problem.num_layers):
            count = replica_counts(load[layer], problem.num_slots, problem.num_gpus)
            place_replicas(load[layer], count, problem, table[layer])
        moved = separate_replicas(table, load)
        notes = (moved_note(moved),) if moved else ()
        return Solution(pack_table(problem, table), "feasible", notes=notes)


def replica_counts(load: npt.NDArray[Any], num_slots: int, num_gpus: int) -> npt.NDArray[np.int64]:
    """[E] replicas of each expert, `num_slots` in all, at most `num_gpus` each: every further
    replica goes to the expert with the most load a replica, which minimises the largest."""
    count = np.ones(len(load), np.int64)
    heap = [(-float(w), e) for e, w in enumerate(load)]
    heapq.heapify(heap)
    for _ in range(num_slots - len(load)):
        _, expert = heapq.heappop(heap)
        count[expert] += 1
        if count[expert] < num_gpus:
            heapq.heappush(heap, (-float(load[expert]) / count[expert], expert))
    return count


def place_replicas(
    load: npt.NDArray[Any], count: npt.NDArray[np.int64], problem: Problem, out: npt.NDArray[Any]
) -> None:
    """Fill out [G, S] of one layer with `count` [E] replicas of its experts, by their load [E]."""
    share = load / count
    total = np.zeros(problem.num_gpus)
    used = np.zeros(problem.num_gpus, np.int64)
    for expert in np.argsort(-share, kind="stable"):
        finish = (total + share[expert]) / problem.speed
        finish[used >= problem.capacity] = np.inf
        without = finish.copy()
        for _ in range(count[expert]):
            gpu = int(np.argmin(without))
            if not np.isfinite(without[gpu]):
                gpu = int(np.argmin(finish))
            out[gpu, used[gpu]] = expert
            total[gpu] += share[expert]
            used[gpu] += 1
            full = used[gpu] >= problem.capacity[gpu]
            finish[gpu] = np.inf if full else (total[gpu] + share[expert]) / problem.speed[gpu]
            without[gpu] = np.inf
