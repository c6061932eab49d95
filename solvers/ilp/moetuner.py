"""`moetuner`: clusters of even load, then clusters to GPUs by traffic between layers, after
MoETuner (arXiv:2502.06643)."""

from __future__ import annotations

import time

import numpy as np

from moesim.solvers.base import Need, Problem, Solution, pack_table
from moesim.solvers.ilp.chain import chain_cost, slots_from, solve_chain, tokens_of, transitions
from moesim.solvers.ilp.engine import IlpModel, Outcome
from moesim.solvers.methods.greedy import Greedy
from moesim.solvers.objective import make_net
from moesim.types import FloatArray, IntArray, Progress

CLUSTER_GAP = 1e-3
MAX_PLACES = 256
NODES = 2_000


class MoETuner:
    """Two integer programs: load within layers, then traffic between them.

    From the paper's abstract: an integer program places experts so that token load, communication
    and computation are balanced, using that tokens of an expert in one layer tend to few experts
    in the next. Its sections were not read for this. Our reading of the two stages:

    1. in every layer clusters of equal size, one for each GPU, with the least largest load: swaps
       of two experts, and the integer program where MAX_PLACES or fewer experts x GPUs leave
       a gap. The program alone got less far in seconds a layer, and how far depended on the clock;
    2. clusters to GPUs, for all layers, with the least sum over tokens' steps between layers of
       the link time between the two GPUs.

    Both end at counted work (nodes, sweeps), so that the plan is the same on every machine unless
    the time limit runs out first; the status says `time_limit` then.

    Serves the context-coherent schedule (C5), as `exflow` does. Balances averages, not batches.
    Needs tokens, one slot per expert and equal slots per GPU.
    """

    name = "moetuner"
    needs: tuple[Need, ...] = ("no replicas", "tokens", "equal slots")
    schedule = "context-coherent"

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        started = time.monotonic()
        traffic = tokens_of(problem)
        layers, gpus = problem.num_layers, problem.num_gpus
        begin = Greedy().solve(problem).placement.physical_to_logical.reshape(layers, gpus, -1)
        cluster = np.empty((layers, problem.num_experts), np.int64)
        proven, late = 0, False
        for layer in range(layers):
            start = np.empty(problem.num_experts, np.int64)
            start[begin[layer].ravel()] = np.repeat(np.arange(gpus), begin.shape[2])
            cluster[layer], outcome = even_clusters(
                problem.mean_load[layer],
                start,
                max(0.0, started + problem.time_limit_s - time.monotonic()),
                seed=problem.seed,
                stopped=problem.stop(),
            )
            proven += outcome is Outcome.OPTIMAL
            late = late or outcome is Outcome.TIME_LIMIT
            if progress is not None:
                progress(layer + 1, layers)
        steps = transitions(traffic, problem.num_experts)
        member = np.zeros((layers, problem.num_experts, gpus))
        np.put_along_axis(member, cluster[:, :, None], 1, axis=2)
        together = np.swapaxes(member[:-1], 1, 2) @ steps @ member[1:]
        distance = make_net(traffic, gpus, problem.num_nodes, by_time=False).pair_us
        in_order = np.tile(np.arange(gpus), (layers, 1))
        found = solve_chain(
            together,
            distance,
            np.ones(gpus, np.int64),
            in_order,
            time_limit_s=max(0.0, started + problem.time_limit_s - time.monotonic()),
            seed=problem.seed,
            stop=problem.stop,
        )
        gpu = np.take_along_axis(found.gpu, cluster, axis=1)
        before = chain_cost(together, distance, in_order)
        change = found.cost / before - 1 if before else 0.0
        late = late or found.outcome is Outcome.TIME_LIMIT
        return Solution(
            pack_table(problem, slots_from(gpu, problem)),
            "time_limit" if late else "feasible",
            seconds=time.monotonic() - started,
            notes=(
                f"stage 1: {proven} of {layers} layers within {CLUSTER_GAP:.1%} of the optimum;"
                f" stage 2: traffic between layers {change:+.1%}"
                + (", proven optimal" if found.outcome is Outcome.OPTIMAL else ""),
            ),
        )


def even_clusters(
    load: FloatArray,
    start: IntArray,
    time_limit_s: float,
    *,
    seed: int = 0,
    stopped: bool = False,
    engine: str | None = None,
) -> tuple[IntArray, Outcome]:
    """[E] cluster of each expert, all of the size they have in `start` [E], with the least
    largest sum of `load` [E], to within 0.1% where OPTIMAL; FEASIBLE where it is not known how near
    swaps came, or the node limit ended the program.

        minimise t  with  sum_c x[e, c] = 1, sum_e x[e, c] = size[c], t >= sum_e load[e] x[e, c]
    """
    if stopped:
        return start, Outcome.TIME_LIMIT
    start, near = swapped(load, start)
    size = np.bincount(start)
    if near or len(load) * len(size) > MAX_PLACES:
        return start, Outcome.OPTIMAL if near else Outcome.FEASIBLE
    scale = max(float(load.sum()) / len(size), 1e-12)
    model = IlpModel("clusters")
    place = [[model.binary() for _ in size] for _ in load]
    for expert, row in enumerate(place):
        model.equal([(v, 1.0) for v in row], 1.0)
        for c, variable in enumerate(row):
            model.start(variable, float(start[expert] == c))
    for c, number in enumerate(size):
        model.equal([(row[c], 1.0) for row in place], float(number))
    model.largest(
        [
            ([(row[c], float(w) / scale) for row, w in zip(place, load, strict=True)], 0.0)
            for c in range(len(size))
        ],
        low=max(1.0, float(load.max()) / scale),
        cost=1.0,
    )
    found = model.solve(
        time_limit_s=time_limit_s, gap=CLUSTER_GAP, node_limit=NODES, seed=seed, engine=engine
    )
    if found.values is None:
        return start, found.outcome
    values = found.values
    picked = np.array([int(np.argmax([values[model.column(v)] for v in row])) for row in place])
    now = np.bincount(start, load).max()
    return (picked if np.bincount(picked, load).max() < now else start), found.outcome


def swapped(load: FloatArray, start: IntArray) -> tuple[IntArray, bool]:
    """(clusters after swaps of an expert of the fullest one with one elsewhere, the best swap
    first, as long as the fuller of the two gets less load than it had; whether the fullest is
    within CLUSTER_GAP of what no clusters can be below: the mean, or the heaviest expert)."""
    cluster = start.copy()
    sums = np.bincount(cluster, load)
    floor = max(float(sums.mean()), float(load.max()))
    while sums.max() > floor * (1 + CLUSTER_GAP):
        top = int(sums.argmax())
        own, others = np.flatnonzero(cluster == top), np.flatnonzero(cluster != top)
        if not len(others):
            break
        less = load[own][:, None] - load[others][None]
        fuller = np.maximum(sums[top] - less, sums[cluster[others]][None] + less)
        i, j = np.unravel_index(int(fuller.argmin()), fuller.shape)
        if fuller[i, j] >= sums[top] * (1 - 1e-9):
            break
        cluster[own[i]], cluster[others[j]] = cluster[others[j]], top
        sums = np.bincount(cluster, load)
    return cluster, bool(sums.max() <= floor * (1 + CLUSTER_GAP))
