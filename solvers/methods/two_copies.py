"""Placements that survive the loss of any one GPU, as far as slots allow.

With redundant slots enough, every expert has two replicas on different GPUs, and nothing has to be
loaded when a GPU fails. With fewer, the experts with most load have two: no placement with these
slots keeps a larger share of the choices served, since each second copy covers one expert.
"""

from __future__ import annotations

import numpy as np

from moesim.solvers.base import Problem, Solution, empty_slots, pack_table
from moesim.solvers.methods.greedy import place_replicas, replica_counts
from moesim.solvers.repair import separate_replicas
from moesim.types import FloatArray, IntArray, Progress


class TwoCopies:
    """Second copies first, by load; further slots and the GPUs as `greedy` does.

    Ignores batches, traffic, nodes (a node's GPUs fail together, one GPU is what is survived).
    """

    name = "two_copies"

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        table = empty_slots(problem)
        load = problem.mean_load
        for layer in range(problem.num_layers):
            place_replicas(load[layer], _counts(load[layer], problem), problem, table[layer])
        separate_replicas(table, load)
        found = pack_table(problem, table)
        share = covered(load, found.replica_count)
        best = covered(load, np.stack([_counts(row, problem) for row in load]))
        whole = int((found.replica_count >= 2).sum())
        note = (
            f"any one GPU may fail: {whole} of {found.replica_count.size} experts, with"
            f" {share:.1%} of the choices, are on two GPUs; no placement with these slots covers"
            f" more than {best:.1%}"
        )
        return Solution(found, "feasible", notes=(note,))


def covered(load: FloatArray, replicas: IntArray) -> float:
    """Share of the load [L, E] that is of experts with two replicas or more [L, E]."""
    total = load.sum()
    return float(load[replicas >= 2].sum() / total) if total else 1.0


def _counts(load: FloatArray, problem: Problem) -> IntArray:
    """[E] replicas: two of as many of the most loaded experts as slots allow, then `greedy`'s."""
    experts, slots = len(load), problem.num_slots
    second = min(slots - experts, experts)
    count = np.ones(experts, np.int64)
    count[np.argsort(-load, kind="stable")[:second]] += 1
    if slots <= 2 * experts:
        return count
    return np.maximum(count, replica_counts(load / 2, slots - experts, problem.num_gpus - 1) + 1)
