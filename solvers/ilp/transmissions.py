"""`transmissions`: experts near the GPUs whose tokens choose them, after arXiv:2508.09229."""

from __future__ import annotations

import time

import numpy as np

from moesim.solvers.base import Need, Problem, Solution, Traffic, pack_table
from moesim.solvers.ilp.chain import assign, slots_from, tokens_of
from moesim.solvers.ilp.engine import IlpModel, Outcome
from moesim.solvers.objective import make_net
from moesim.types import FloatArray, IntArray, Progress


class Transmissions:
    """The least expected transmissions over the cluster's graph.

    From the paper's abstract and introduction (D. Sivtsov, A. Katrutsa, I. Oseledets, Cluster
    Topology-Driven Placement of Experts Reduces Network Traffic in MoE Inference): the cluster is
    a graph of GPUs and servers with weighted edges, an integer program places every expert so that
    the expected number of transmissions is least, and load statistics weigh experts. The sections
    with the equations were not read for this. Our reading, for every layer:

        minimise sum_eg (sum_h n[h, e] d[h, g]) x[e, g],  sum_g x[e, g] = 1,  sum_e x[e, g] <= S[g]

    with n[h, e] the sampled choices of expert e by tokens of home GPU h and d[h, g] the link time
    of a message there and back. Every choice counts as a message (nothing is deduplicated), and
    load is ignored. A transportation problem, so that the relaxation is integral and the optimum is
    proven at once. Where homes choose alike, all placements are alike to it.
    """

    name = "transmissions"
    needs: tuple[Need, ...] = ("no replicas", "tokens")

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        started = time.monotonic()
        traffic = tokens_of(problem)
        distance = make_net(traffic, problem.num_gpus, problem.num_nodes, by_time=False).pair_us
        slots = np.repeat(np.arange(problem.num_gpus), problem.capacity)[: problem.num_experts]
        gpu = np.tile(slots, (problem.num_layers, 1))
        before = after = 0.0
        proven = 0
        rows = np.arange(problem.num_experts)
        for layer in range(problem.num_layers):
            cost = home_choices(traffic, layer, problem).T @ distance
            left = started + problem.time_limit_s - time.monotonic()
            before += float(cost[rows, slots].sum())
            if left > 0 and not problem.stop():
                gpu[layer], outcome = least_cost(cost, problem.capacity, left, seed=problem.seed)
                proven += outcome is Outcome.OPTIMAL
            after += float(cost[rows, gpu[layer]].sum())
            if progress is not None:
                progress(layer + 1, problem.num_layers)
        change = after / before - 1 if before else 0.0
        return Solution(
            pack_table(problem, slots_from(gpu, problem)),
            "feasible" if proven == problem.num_layers else "time_limit",
            seconds=time.monotonic() - started,
            notes=(
                f"expected transmissions {change:+.1%} against experts in order,"
                f" {proven} of {problem.num_layers} layers proven least",
            ),
        )


def home_choices(traffic: Traffic, layer: int, problem: Problem) -> FloatArray:
    """[G, E]: sampled choices of each expert by tokens of each home GPU."""
    ids = traffic.expert_ids[:, layer].astype(np.int64)
    out = np.zeros((problem.num_gpus, problem.num_experts))
    token, choice = np.nonzero(ids >= 0)
    np.add.at(out, (traffic.home[token], ids[token, choice]), 1)
    return out


def least_cost(
    cost: FloatArray,
    capacity: IntArray,
    time_limit_s: float,
    *,
    seed: int = 0,
    engine: str | None = None,
) -> tuple[IntArray, Outcome]:
    """[E] GPU of each expert at the least total of `cost` [E, G]."""
    scale = max(float(np.abs(cost).max()), 1e-12)
    model = IlpModel("transmissions")
    place = [[model.binary(cost=float(c) / scale) for c in row] for row in cost]
    for row in place:
        model.equal([(v, 1.0) for v in row], 1.0)
    for g, size in enumerate(capacity):
        model.at_most([(row[g], 1.0) for row in place], float(size))
    found = model.solve(time_limit_s=time_limit_s, seed=seed, engine=engine)
    if found.values is None:
        return assign(cost, capacity), found.outcome
    values = found.values
    picked = [int(np.argmax([values[model.column(v)] for v in row])) for row in place]
    return np.array(picked), found.outcome
