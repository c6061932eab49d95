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

from moesim.plan import EMPTY
from moesim.solvers.base import Problem, Progress, Solution, pack_table
from moesim.solvers.greedy import Greedy
from moesim.solvers.linear import Linear
from moesim.solvers.objective import (
    CEILING_WEIGHT,
    PlacementCost,
    layer_tokens,
    make_flow,
)

MAX_KICKS = 120
LOAD_OPS = 1.8e9
"""Steps spent on kicks, over all layers, a step being a pair of slots in one batch. It keeps small
cases thorough and large ones quick without looking at a clock, so that the same seed gives the
same plan."""
MESSAGE_OPS = 4e8
"""The same for kicks that look at messages; a step is one token moved from GPU to GPU."""
MAX_MESSAGE_KICKS = 12
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
        _compile(problem)
        started = time.monotonic()
        start = Greedy().solve(problem).placement.physical_to_logical
        size = int(problem.capacity.max())
        slots = start.reshape(problem.num_layers, problem.num_gpus, size).astype(np.int64)
        slots[slots == EMPTY] = problem.num_experts
        shared = _Shared(problem)
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


def _compile(problem: Problem) -> None:
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
    _Shared(tiny, thorough=False).search(0, slots)


class _Shared:
    """What the layers of one problem have in common."""

    def __init__(self, problem: Problem, *, thorough: bool = True) -> None:
        from moesim.solvers.search_load import search_layer

        self.problem = problem
        self.search_layer = search_layer
        self.objective = PlacementCost(problem)
        pairs = problem.num_gpus * int(problem.capacity.max()) ** 2
        per_kick = pairs * problem.num_batches * problem.num_layers
        self.kicks = int(np.clip(LOAD_OPS / per_kick, 1, MAX_KICKS)) if thorough else 0
        self.message_kicks = 0
        if thorough and problem.traffic is not None:
            choices = problem.traffic.expert_ids.size / problem.num_experts
            moves = 60 * problem.num_gpus**2 * choices
            self.message_kicks = int(np.clip(MESSAGE_OPS / moves, 0, MAX_MESSAGE_KICKS))

    def search(self, layer: int, slots: npt.NDArray[np.int64]) -> float:
        """Improve `slots` [G, S] of one layer; returns the objective."""
        problem = self.problem
        counts = self.objective.layer_counts(layer)
        if problem.objective != "balance":
            loads = problem.num_layers * problem.num_gpus * problem.num_batches
            counts = np.ascontiguousarray(counts[:, :: max(1, round(loads / MESSAGE_LOADS))])
        if problem.objective != "traffic":
            value = self.search_layer(
                counts,
                slots,
                self.objective.capacity,
                self.objective.unit,
                self.objective.scale,
                self.objective.table,
                self.kicks,
                problem.seed + layer,
            )
            if problem.objective == "balance":
                return float(value)
        return self._search_messages(layer, counts, slots)

    def _search_messages(
        self, layer: int, counts: npt.NDArray[np.float32], slots: npt.NDArray[np.int64]
    ) -> float:
        from moesim.solvers.search_messages import search_messages
        from moesim.solvers.search_traffic import fill_flow, message_us, replica_gpus

        problem, objective = self.problem, self.objective
        traffic = problem.traffic
        assert traffic is not None
        tokens = layer_tokens(traffic, layer, problem.num_experts)
        flow = make_flow(traffic, problem.num_gpus, problem.num_nodes)
        ceiling, weight = 0.0, 0.0
        if not objective.by_time:
            linear = Linear().solve(problem).placement
            ceiling = objective.load_value(objective.layer_slots(linear, layer), counts)
            gpus, held = replica_gpus(slots, objective.capacity, problem.num_experts)
            fill_flow(tokens, objective.net, flow, gpus, held)
            weight = CEILING_WEIGHT * message_us(objective.net, flow)
        return float(
            search_messages(
                tokens,
                objective.net,
                flow,
                objective.work(counts, slots),
                slots,
                objective.capacity,
                objective.unit,
                ceiling,
                weight,
                self.message_kicks,
                problem.seed + layer,
            )
        )
