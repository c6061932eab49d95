"""`exflow`: inter-layer affinity, after ExFlow (arXiv:2401.08383)."""

from __future__ import annotations

import time

import numpy as np

from moesim.solvers.base import Need, Problem, Solution, pack_table
from moesim.solvers.ilp.chain import (
    ChainResult,
    chain_cost,
    slots_from,
    solve_chain,
    tokens_of,
    transitions,
)
from moesim.solvers.ilp.engine import Outcome
from moesim.types import FloatArray, IntArray, Progress


class ExFlow:
    """Keeps tokens on the GPU, and before that on the node, of the expert they used last.

    From the authors' program (github.com/YJHMITWEB/ExFlow, solve_affinity.py): x[n, c] = 1 where
    expert n is in partition c, every expert in one partition, every partition the same number of
    experts of each layer, and cost[k, s] >= |x[e(k, s), c] - x[e(k, s + 1), c]| for every token k,
    step s between layers and partition c; the mean of cost is minimised, over nodes first and then
    over the GPUs of each node. Ours, and not theirs: tokens that make the same step are counted
    together, a token with several choices counts for all pairs of adjacent choices (they have one
    choice a token), the linearisation is that of `moesim.solvers.ilp.chain`, and what is too large
    for it is swept layer by layer.

    Serves the context-coherent schedule (C5), where a token stays where its last expert was. In
    the usual one tokens come back to their home GPU after every layer, and nothing is gained.
    Ignores load. Needs tokens and one slot per expert.
    """

    name = "exflow"
    needs: tuple[Need, ...] = ("no replicas", "tokens")
    schedule = "context-coherent"

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        started = time.monotonic()
        ends = started + problem.time_limit_s
        together = transitions(tokens_of(problem), problem.num_experts)
        layers, experts = problem.num_layers, problem.num_experts
        slots = np.repeat(np.arange(problem.num_gpus), problem.capacity)
        start = np.tile(slots[:experts], (layers, 1))
        per_node = problem.num_gpus // problem.num_nodes
        node = start // per_node
        results: list[ChainResult] = []

        def run(
            counts: FloatArray, capacity: IntArray, begin: IntArray, share: float
        ) -> ChainResult:
            apart = 1.0 - np.eye(len(capacity))
            left = max(0.0, ends - time.monotonic()) * share
            result = solve_chain(
                counts,
                apart,
                capacity,
                begin,
                time_limit_s=left,
                seed=problem.seed,
                stop=problem.stop,
            )
            results.append(result)
            return result

        if problem.num_nodes > 1:
            of_node = problem.capacity.reshape(problem.num_nodes, -1).sum(axis=1)
            node = run(together, of_node, node, 0.5).gpu
        gpu = np.empty((layers, experts), np.int64)
        for n in range(problem.num_nodes):
            capacity = problem.capacity[n * per_node : (n + 1) * per_node]
            mine = np.stack([np.flatnonzero(row == n) for row in node])
            counts = (
                np.stack(
                    [t[np.ix_(a, b)] for t, a, b in zip(together, mine, mine[1:], strict=False)]
                )
                if layers > 1
                else together
            )
            begin = np.tile(np.repeat(np.arange(per_node), capacity), (layers, 1))
            inside = run(counts, capacity, begin, 1 / (problem.num_nodes - n)).gpu
            np.put_along_axis(gpu, mine, inside + n * per_node, axis=1)
            if progress is not None:
                progress(n + 1, problem.num_nodes)
        apart = 1.0 - np.eye(problem.num_gpus)
        total = max(1.0, float(together.sum()))
        before = chain_cost(together, apart, start) / total
        after = chain_cost(together, apart, gpu) / total
        proven = all(r.outcome is Outcome.OPTIMAL for r in results)
        late = any(r.outcome is Outcome.TIME_LIMIT for r in results)
        return Solution(
            pack_table(problem, slots_from(gpu, problem)),
            "time_limit" if late else "feasible",
            seconds=time.monotonic() - started,
            notes=(
                f"steps between layers that change GPU: {after:.1%}, {before:.1%} in order"
                + ("; every stage proven optimal" if proven else ""),
            ),
        )
