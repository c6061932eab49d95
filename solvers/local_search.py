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
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.plan import EMPTY
from moesim.solvers.base import Problem, Progress, Solution, Traffic, pack_table
from moesim.solvers.greedy import Greedy
from moesim.solvers.linear import Linear

MAX_KICKS = 60
LOAD_OPS = 5e10
"""Elementary steps spent on kicks, over all layers; what keeps small cases thorough and large
ones quick without looking at a clock, so that the same seed gives the same plan."""
MESSAGE_OPS = 4e8
"""The same for kicks that look at messages; a step is one token moved from GPU to GPU."""
MAX_MESSAGE_KICKS = 12
MESSAGE_BATCHES = 512
"""Tuning batches on which load is judged while messages are."""
CEILING_WEIGHT = 4.0


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
            if time.monotonic() - started < problem.time_limit_s:
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
        kinds = np.stack([problem.gpu_type, problem.speed], axis=1)
        unique, unit = np.unique(kinds, axis=0, return_inverse=True)
        self.unit = np.ascontiguousarray(unit.reshape(-1), np.int64)
        self.capacity = np.asarray(problem.capacity, np.int64)
        self.by_time = problem.objective == "time"
        if self.by_time:
            assert problem.expert_us is not None
            self.table = np.ascontiguousarray(problem.expert_us[unique[:, 0].astype(np.int64)])
            self.scale = 1.0 / unique[:, 1]
        else:
            self.table = np.zeros((len(unique), 1))
            self.scale = problem.speed.mean() / unique[:, 1]
        pairs = problem.num_gpus**2 / 2 * int(problem.capacity.max()) ** 2
        per_kick = 3 * pairs * problem.num_batches * problem.num_layers
        self.kicks = int(np.clip(LOAD_OPS / per_kick, 1, MAX_KICKS)) if thorough else 0
        self.message_kicks = 0
        if thorough and problem.traffic is not None:
            choices = problem.traffic.expert_ids.size / problem.num_experts
            per_kick = 60 * problem.num_gpus**2 * choices
            self.message_kicks = int(np.clip(MESSAGE_OPS / per_kick, 0, MAX_MESSAGE_KICKS))

    def search(self, layer: int, slots: npt.NDArray[np.int64]) -> float:
        """Improve `slots` [G, S] of one layer; returns the objective."""
        problem = self.problem
        counts = self.layer_counts(layer)
        if problem.objective != "traffic":
            value = self.search_layer(
                counts,
                slots,
                self.capacity,
                self.unit,
                self.scale,
                self.table,
                self.kicks,
                problem.seed + layer,
            )
            if not self.by_time:
                return float(value)
        few = np.ascontiguousarray(counts[:, :: max(1, counts.shape[1] // MESSAGE_BATCHES)])
        return self._search_messages(layer, few, slots)

    def layer_counts(self, layer: int) -> npt.NDArray[np.float32]:
        """[E, B]: tokens, or for load objectives tokens over the batch's mean a GPU."""
        counts = self.problem.counts[:, layer]
        if not self.by_time:
            mean = counts.sum(axis=1, keepdims=True) / self.problem.num_gpus
            counts = counts / np.maximum(mean, 1e-9)
        return np.ascontiguousarray(counts.T, np.float32)

    def _search_messages(
        self, layer: int, counts: npt.NDArray[np.float32], slots: npt.NDArray[np.int64]
    ) -> float:
        from moesim.solvers.search_load import fill_row, mean_max, rebuild
        from moesim.solvers.search_traffic import fill_flow, message_us, replica_gpus
        from moesim.solvers.search_traffic import search_messages as search

        problem = self.problem
        traffic = problem.traffic
        assert traffic is not None
        tokens = layer_tokens(traffic, layer, problem.num_experts)
        net = make_net(traffic, problem.num_gpus, problem.num_nodes, by_time=self.by_time)
        flow = make_flow(traffic, problem.num_gpus, problem.num_nodes)
        replicas = np.bincount(slots.ravel(), minlength=problem.num_experts + 1)
        work = np.zeros((len(self.scale), problem.num_experts + 1, counts.shape[1]), np.float32)
        for e in range(problem.num_experts):
            fill_row(counts, e, replicas[e], self.scale, self.table, work[:, e])
        ceiling, weight = 0.0, 0.0
        if not self.by_time:
            load = np.zeros((problem.num_gpus, counts.shape[1]), np.float32)
            linear = Linear().solve(problem).placement.physical_to_logical[layer]
            reference = linear.reshape(problem.num_gpus, -1).astype(np.int64)
            reference[reference == EMPTY] = problem.num_experts
            own = np.zeros_like(work)
            count = np.bincount(reference.ravel(), minlength=problem.num_experts + 1)
            for e in range(problem.num_experts):
                fill_row(counts, e, count[e], self.scale, self.table, own[:, e])
            rebuild(own, reference, self.capacity, self.unit, load)
            ceiling = float(mean_max(load))
            gpus, held = replica_gpus(slots, self.capacity, problem.num_experts)
            fill_flow(tokens, net, flow, gpus, held)
            weight = CEILING_WEIGHT * message_us(net, flow)
        return float(
            search(
                tokens,
                net,
                flow,
                work,
                slots,
                self.capacity,
                self.unit,
                ceiling,
                weight,
                self.message_kicks,
                problem.seed + layer,
            )
        )


def layer_tokens(traffic: Traffic, layer: int, num_experts: int) -> Any:
    """The `search_traffic.Tokens` of one layer."""
    from moesim.solvers.search_traffic import Tokens

    ids = traffic.expert_ids[:, layer].astype(np.int64)
    token = np.repeat(np.arange(len(ids)), ids.shape[1])
    expert = ids.reshape(-1)
    chosen = expert >= 0
    token, expert = token[chosen], expert[chosen]
    order = np.argsort(expert, kind="stable")
    token, expert = token[order], expert[order]
    indptr = np.searchsorted(expert, np.arange(num_experts + 1))
    group = expert * traffic.num_batches + traffic.batch_idx[token]
    turn = np.arange(len(group)) - np.searchsorted(group, group)
    hit = np.zeros((len(ids), num_experts), np.float32)
    hit[token, expert] = 1
    together = hit.T @ hit
    return Tokens(
        indptr.astype(np.int64),
        token,
        turn,
        traffic.home.astype(np.int64),
        traffic.batch_idx.astype(np.int64),
        together,
    )


def make_net(traffic: Traffic, num_gpus: int, num_nodes: int, *, by_time: bool) -> Any:
    """The `search_traffic.Net` of a problem."""
    from moesim.solvers.search_traffic import Net

    per_node = num_gpus // num_nodes
    last = traffic.time_us.shape[2] - 1
    slope = (traffic.time_us[:, :, last] - traffic.time_us[:, :, last // 2]) / (last - last // 2)
    pair_us = np.zeros((num_gpus, num_gpus))
    for src in range(num_gpus):
        for dst in range(num_gpus):
            for way, row in ((0, src * num_gpus + dst), (1, dst * num_gpus + src)):
                links = traffic.link_idx[traffic.indptr[row] : traffic.indptr[row + 1]]
                group = traffic.link_group[links]
                pair_us[src, dst] += float(
                    (slope[way][group] * traffic.link_scale[links]).max(initial=0.0)
                )
    return Net(
        traffic.indptr.astype(np.int64),
        traffic.link_idx.astype(np.int64),
        traffic.link_group.astype(np.int64),
        traffic.link_scale.astype(np.float64),
        traffic.time_us.astype(np.float64),
        np.arange(num_gpus) // per_node,
        per_node,
        traffic.dedup,
        pair_us,
        int(by_time),
    )


def make_flow(traffic: Traffic, num_gpus: int, num_nodes: int) -> Any:
    """An empty `search_traffic.Flow` of the right size."""
    from moesim.solvers.search_traffic import Flow

    tokens, batches, links = len(traffic.home), traffic.num_batches, len(traffic.link_group)
    return Flow(
        np.zeros((tokens, num_gpus), np.uint16),
        np.zeros((tokens, num_nodes), np.uint16),
        np.zeros((batches, links), np.int32),
        np.zeros((batches, links), np.int32),
        np.zeros(1),
    )
