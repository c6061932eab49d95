"""Linear placement: experts in order, the first slots to the first GPU. What engines do unasked."""

from __future__ import annotations

import numpy as np

from moesim.solvers.base import Problem, Solution, empty_slots, pack_table
from moesim.types import Progress


class Linear:
    """Fill GPU after GPU with experts 0, 1, 2, ... in order; redundant slots start over at 0.

    This is the initial placement of vLLM, SGLang and TensorRT-LLM; ignores load.
    """

    name = "linear"

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        table = empty_slots(problem)
        order = np.arange(problem.num_slots) % problem.num_experts
        start = 0
        for gpu, size in enumerate(problem.capacity):
            table[:, gpu, :size] = order[start : start + size]
            start += int(size)
        return Solution(pack_table(problem, table), "feasible")
