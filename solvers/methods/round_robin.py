"""Round-robin placement: expert i on GPU i modulo the number of GPUs."""

from __future__ import annotations

from itertools import cycle

from moesim.solvers.base import Problem, Solution, empty_slots, pack_table
from moesim.types import Progress


class RoundRobin:
    """Deal experts 0, 1, 2, ... to the GPUs in turn, skipping full ones; redundant slots go on
    dealing from expert 0, past GPUs that hold the expert already and past experts that every GPU
    with room holds. vLLM's `--expert-placement-strategy round_robin`. Ignores load.
    """

    name = "round_robin"

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        held: list[list[int]] = [[] for _ in problem.capacity]
        gpu, left = 0, problem.num_slots
        for expert in cycle(range(problem.num_experts)):
            if left == 0:
                break
            for _ in range(problem.num_gpus):
                free = len(held[gpu]) < problem.capacity[gpu] and expert not in held[gpu]
                if free:
                    held[gpu].append(expert)
                    left -= 1
                gpu = (gpu + 1) % problem.num_gpus
                if free:
                    break
        table = empty_slots(problem)
        for gpu, experts in enumerate(held):
            table[:, gpu, : len(experts)] = experts
        return Solution(pack_table(problem, table), "feasible")
