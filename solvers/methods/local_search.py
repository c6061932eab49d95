"""Local search on the batch-by-batch objective: swaps and replica moves, compiled, seeded.

Balancing averages leaves the batches unbalanced; here the objective is the mean over many tuning
batches of what the slowest GPU costs, as C7 of the design has it. Layers are independent and run
on threads (the kernels release the GIL).
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moesim.placement import EMPTY
from moesim.solvers.base import Problem, Solution, pack_table
from moesim.solvers.methods.greedy import Greedy
from moesim.solvers.methods.linear import Linear
from moesim.solvers.objective import (
    CEILING_WEIGHT,
    PlacementCost,
    make_flow,
)
from moesim.types import Progress

MAX_KICKS = 120
LOAD_OPS = {"balance": 1.8e9, "time": 1e8}
"""Steps spent on kicks, over all layers, a step being a pair of slots in one batch. It keeps small
cases thorough and large ones quick without looking at a clock, so that the same seed gives the
same plan. Where messages count, load alone is only where the search begins."""
MESSAGE_OPS = 1.3e9
"""The same for kicks that look at messages; a step is 64 tokens of a replica, or one choice."""
MESSAGE_LOADS = 1.1e6
"""GPU loads, about, over all layers and batches, by which objectives that see messages judge load:
batches are left out, evenly, where there are more."""


class LocalSearch:
    """Iterated local search from the greedy placement.

    balance: mean over batches of max/mean GPU load. time: mean over batches of the slowest GPU's
    expert time plus dispatch and combine (the analytic step time without its constants), load
    first and then load and messages together. traffic: summed link time of all messages, while
    the mean imbalance stays below linear placement's.

    Stops at the time limit between layers: layers not reached keep the greedy placement, and the
    status says time_limit. Ignores that layers could trade off against each other, which under
    C5 they cannot.
    """

    name = "local_search"

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        compile_kernels(problem)
        started = time.monotonic()
        start = Greedy().solve(problem).placement.physical_to_logical
        size = int(problem.capacity.max())
        slots = start.reshape(problem.num_layers, problem.num_gpus, size).astype(np.int64)
        slots[slots == EMPTY] = problem.num_experts
        shared = LayerSearch(PlacementCost(problem))
        values = np.full(problem.num_layers, np.nan)

        def run(layer: int) -> None:
            if time.monotonic() - started < problem.time_limit_s and not problem.stop():
                values[layer] = shared.search(layer, slots[layer])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, _ in enumerate(pool.map(run, range(problem.num_layers)), start=1):
                if progress is not None:
                    progress(done, problem.num_layers)
        slots[slots == problem.num_experts] = EMPTY
        late = int(np.isnan(values).sum())
        return Solution(
            pack_table(problem, slots),
            "time_limit" if late else "feasible",
            objective_value=float(np.nanmean(values)) if late < len(values) else None,
            seconds=time.monotonic() - started,
            notes=(f"{late} of {len(values)} layers were not reached in time",) if late else (),
        )


def compile_kernels(problem: Problem) -> None:
    """Run the kernels once on next to nothing, so that compiling them, which a fresh installation
    does at the first call, does not count against the time limit and change the plan."""
    traffic = problem.traffic
    if traffic is not None:
        traffic = replace(
            traffic,
            expert_ids=traffic.expert_ids[:8, :1],
            home=traffic.home[:8],
            batch_idx=np.zeros(len(traffic.home[:8]), np.int32),
        )
    tiny = replace(problem, counts=problem.counts[:2, :1], traffic=traffic)
    slots = Linear().solve(tiny).placement.physical_to_logical[0].astype(np.int64)
    slots = slots.reshape(problem.num_gpus, -1)
    slots[slots == EMPTY] = problem.num_experts
    LayerSearch(PlacementCost(tiny), thorough=False).search(0, slots)


class LayerSearch:
    """The search of one layer after another of one problem."""

    def __init__(self, objective: PlacementCost, *, thorough: bool = True) -> None:
        self.problem, self.objective = objective.problem, objective
        problem = self.problem
        pairs = problem.num_gpus * int(problem.capacity.max()) ** 2
        per_kick = pairs * problem.num_batches * problem.num_layers
        ops = LOAD_OPS.get(problem.objective, 0.0) if thorough else 0.0
        self.kicks = int(np.clip(ops / per_kick, 1 if thorough else 0, MAX_KICKS))
        self.message_kicks = message_kicks(problem, MESSAGE_OPS) if thorough else 0

    def search(self, layer: int, slots: npt.NDArray[np.int64]) -> float:
        """Improve `slots` [G, S] of one layer; returns the objective."""
        from moesim.solvers.kernels.load import search_layer

        problem, objective = self.problem, self.objective
        if problem.objective != "traffic":
            counts = self._counts(layer)
            grains, placed = objective.grains(counts), objective.placed(counts, slots)
            costs = objective.costs(counts)
            value = search_layer(placed, costs, self.kicks, problem.seed + layer)
            if problem.objective == "balance":
                return float(value) / grains
        return self.search_messages(layer, slots, self.message_kicks, problem.seed + layer)

    def search_messages(
        self, layer: int, slots: npt.NDArray[np.int64], kicks: int, seed: int
    ) -> float:
        """Improve `slots` [G, S] of one layer by load and messages; returns the objective. The
        numbers of replicas stay."""
        from moesim.solvers.kernels.messages import search_messages
        from moesim.solvers.kernels.placed import Goal

        problem, objective = self.problem, self.objective
        counts, tokens = self._counts(layer), objective.tokens(layer)
        flow = make_flow(tokens, objective.net)
        ceiling, weight = 0.0, 0.0
        if not objective.by_time:
            linear = Linear().solve(problem).placement
            ceiling = objective.load_value(objective.layer_slots(linear, layer), counts)
            weight = CEILING_WEIGHT * objective.message_value(slots, tokens, flow)
        placed = objective.placed(counts, slots)
        goal = Goal(ceiling, weight, objective.grains(counts))
        return float(search_messages(placed, tokens, objective.net, flow, goal, kicks, seed))

    def _counts(self, layer: int) -> npt.NDArray[np.float32]:
        """[E, B]: see `PlacementCost.layer_counts`; of some batches where messages count."""
        problem = self.problem
        counts = self.objective.layer_counts(layer)
        if problem.objective == "balance":
            return counts
        loads = problem.num_layers * problem.num_gpus * problem.num_batches
        return np.ascontiguousarray(counts[:, :: max(1, round(loads / MESSAGE_LOADS))])


def message_kicks(problem: Problem, ops: float) -> int:
    """Kicks of each layer, looking at messages, for `ops` steps over all layers."""
    if problem.traffic is None or problem.objective == "balance":
        return 0
    traffic, gpus = problem.traffic, problem.num_gpus
    words = len(traffic.home) / 64 + traffic.num_batches * gpus / 2
    estimated = 3 * gpus * problem.num_slots * words
    tried = 0.5 * gpus**2 * traffic.num_batches * (4 * len(traffic.link_group) + 10 * gpus)
    filled = 30 * traffic.expert_ids[:, 0].size
    per_kick = problem.num_layers * (estimated + tried + filled)
    return int(np.clip(ops / per_kick, 0, MAX_KICKS))
