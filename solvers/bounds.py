"""Lower bounds on the objective that hold for every placement of a problem.

The combinatorial bound takes each batch by itself: the average over GPUs, the largest expert share
that the redundant slots leave, and the pigeonhole principle (P. Brucker, Scheduling Algorithms,
section 5.1: of the k G + 1 heaviest jobs some machine gets k + 1). What one placement cannot do for
all batches at once is the subject of `moesim.solvers.colocation`. Messages are bounded from what a
GPU's own slots can serve and from how often experts are chosen together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit

from moesim.solvers.base import Problem, Traffic
from moesim.solvers.colocation import applies, colocation_bound
from moesim.solvers.objective import PlacementCost

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
T = TypeVar("T")
ROUNDING = 1e-6
LP_LAYERS = 4
"""Layers that the co-location relaxation is solved for, a second or so each. A number and not a
time limit, so that the same plan always states the same bound."""


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """A proven lower bound. layers: [L] bound of each layer; value: their mean, in the unit of the
    objective; kind: what proved it."""

    layers: FloatArray
    kind: str

    @property
    def value(self) -> float:
        return float(self.layers.mean())

    def gap(self, objective_value: float) -> float:
        """Relative distance of a plan's objective from the bound, at least 0."""
        if objective_value <= 0:
            return 0.0
        return max(0.0, (objective_value - self.value) / objective_value)


def lower_bound(
    problem: Problem,
    *,
    layer_values: FloatArray | None = None,
    lp_layers: int = LP_LAYERS,
    objective: PlacementCost | None = None,
) -> Bound:
    """The best bound that the methods here give.

    layer_values: [L] objective of a known plan; the co-location relaxation is solved for the
    `lp_layers` layers that are farthest above their other bound (the first ones if not given).
    Time: expert work and messages are bounded apart and added. Traffic: the penalty for load is
    taken as 0. Rounding of the float32 tuning counts is allowed for. objective: that of `problem`
    where it is at hand, to save what it has worked out.
    """
    objective = objective or PlacementCost(problem)
    num_layers = problem.num_layers
    messages = np.zeros(num_layers)
    if problem.objective != "balance":
        messages = np.array(_every_layer(lambda i: message_bound(objective, i), num_layers))
    if problem.objective == "traffic":
        return Bound(messages * (1 - ROUNDING), "local and joint choices")
    floor = _every_layer(lambda layer: load_bound(objective, layer), num_layers)
    layers = np.array([float(batch.mean()) for batch in floor])
    kind = "batch by batch"
    if applies(problem):
        distance = (
            np.zeros(num_layers) if layer_values is None else layer_values - layers - messages
        )
        for layer in np.argsort(-distance, kind="stable")[:lp_layers]:
            work = unreplicated_work(objective, int(layer))
            found = colocation_bound(work, problem.num_gpus, floor[layer])
            if found > layers[layer]:
                layers[layer], kind = found, "batch by batch and co-location LP"
    if problem.objective == "time":
        kind += ", messages"
    return Bound((layers + messages) * (1 - ROUNDING), kind)


def _every_layer(run: Callable[[int], T], num_layers: int) -> list[T]:
    """`run` of every layer, on threads: what takes time lets go of the interpreter."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, range(num_layers)))


def base_table(objective: PlacementCost) -> FloatArray:
    """[N + 1] the cheapest kind's time by tokens, or [1] where load is counted in tokens."""
    return np.asarray(objective.table.min(axis=0), np.float64)


def unreplicated_work(objective: PlacementCost, layer: int) -> FloatArray:
    """[E, B]: what each expert costs by itself on the cheapest and fastest kind of GPU."""
    return _work(objective.layer_counts(layer), base_table(objective)) * objective.scale.min()


def load_bound(objective: PlacementCost, layer: int) -> FloatArray:
    """[B]: a lower bound on the costliest GPU of each tuning batch, whatever the placement."""
    problem = objective.problem
    counts = objective.layer_counts(layer)
    table = base_table(objective)
    scale = objective.scale[objective.unit]
    rate = np.zeros(1)
    if len(table) > 1:
        steps = table[1:] / np.arange(1, len(table))
        rate = np.minimum.accumulate(np.concatenate((steps[:1], steps)))
    out = np.empty(counts.shape[1])
    _load_bounds(
        counts,
        table,
        rate,
        float((1 / scale).sum()),
        float(scale.min()),
        problem.num_gpus,
        problem.num_slots - problem.num_experts,
        int(problem.capacity.min()),
        out,
    )
    return out


@njit(cache=True, nogil=True)
def _at(table: Array, tokens: float) -> float:
    """Cost of `tokens` by linear interpolation, as `search_load.fill_row` has it."""
    last = len(table) - 1
    if last == 0:
        return tokens
    low = min(int(tokens), last - 1)
    return table[low] + (table[low + 1] - table[low]) * (tokens - low)


@njit(cache=True, nogil=True)
def _work(counts: Array, table: Array) -> Array:
    out = np.empty(counts.shape)
    for e in range(counts.shape[0]):
        for b in range(counts.shape[1]):
            out[e, b] = _at(table, counts[e, b])
    return out


@njit(cache=True, nogil=True)
def _load_bounds(
    counts: Array,
    table: Array,
    rate: Array,
    total_rate: float,
    least_scale: float,
    num_gpus: int,
    spare: int,
    least_slots: int,
    out: Array,
) -> None:
    """Body of `load_bound`. rate: [N + 1] least cost a token of an expert with up to n tokens;
    total_rate: sum over GPUs of 1 / scale; spare: redundant slots."""
    num_experts, num_batches = counts.shape
    work = np.empty(num_experts)
    replicas = np.empty(num_experts, np.int64)
    for b in range(num_batches):
        total = 0.0
        for e in range(num_experts):
            tokens = counts[e, b]
            work[e] = _at(table, tokens)
            least = work[e]
            if spare > 0 and len(table) > 1:
                least = tokens * rate[min(len(rate) - 1, int(np.ceil(tokens)))]
            total += least
        best = total / total_rate
        replicas[:] = 1
        left = spare
        largest = 0.0
        while True:
            top = 0
            for e in range(1, num_experts):
                if counts[e, b] * replicas[top] > counts[top, b] * replicas[e]:
                    top = e
            largest = counts[top, b] / replicas[top]
            if left == 0 or replicas[top] == num_gpus:
                break
            replicas[top] += 1
            left -= 1
        best = max(best, least_scale * _at(table, largest))
        work.sort()
        k = 1
        while spare + k * num_gpus + 1 <= num_experts:
            together = 0.0
            for i in range(k + 1):
                together += work[num_experts - (spare + k * num_gpus + 1) + i]
            best = max(best, least_scale * together)
            k += 1
        if spare == 0:
            together = work[num_experts - 1]
            for i in range(least_slots - 1):
                together += work[i]
            best = max(best, least_scale * together)
        out[b] = best


def message_bound(objective: PlacementCost, layer: int) -> float:
    """Lower bound on the objective's message term of one layer, in microseconds."""
    problem = objective.problem
    traffic = problem.traffic
    assert traffic is not None
    found = _Messages(objective, traffic, layer)
    return found.link_us(objective) if problem.objective == "time" else found.total_us(objective)


class _Messages:
    """How few messages a layer can do with.

    A home GPU's tokens need no message only where all their choices lie in its own slots: at most
    as many as its most wanted experts could serve. A token whose K choices make p co-located pairs
    reaches at least K + 1/2 - sqrt(1 + 8 p) / 2 GPUs (most pairs come from one large group), which
    is convex in p; and pairs are at most what each slot's best neighbours give. The same holds for
    nodes in place of GPUs.
    """

    def __init__(self, objective: PlacementCost, traffic: Traffic, layer: int) -> None:
        problem = self.problem = objective.problem
        self.traffic = traffic
        ids = traffic.expert_ids[:, layer].astype(np.int64)
        self.num_choices = (ids >= 0).sum(axis=1)
        self.ids = ids
        self.together = objective.tokens(layer).together
        self.per_node = problem.num_gpus // problem.num_nodes
        self.node_slots = problem.capacity.reshape(problem.num_nodes, -1).sum(axis=1)

    def remote(self, place_of_home: Array, slots: Array, batch_idx: Array) -> FloatArray:
        """[batches, places]: messages that tokens of a place must send out of it, at least.

        place_of_home: [G] GPU or node of each home; slots: [places].
        """
        experts = self.problem.num_experts
        place = place_of_home[self.traffic.home]
        num_batches = int(batch_idx.max()) + 1
        token, choice = np.nonzero(self.ids >= 0)
        expert = self.ids[token, choice]
        single = self.traffic.dedup == 0
        weight = np.ones(len(token)) if single else 1.0 / self.num_choices[token]
        hits = np.zeros((num_batches, len(slots), experts))
        np.add.at(hits, (batch_idx[token], place[token], expert), weight)
        sent = np.zeros((num_batches, len(slots)))
        per_token = self.num_choices if single else (self.num_choices > 0)
        np.add.at(sent, (batch_idx, place), per_token)
        hits = -np.sort(-hits, axis=2)
        for p, size in enumerate(slots):
            sent[:, p] -= hits[:, p, : int(size)].sum(axis=1)
        return np.maximum(sent, 0.0)

    def reached(self, slots: int) -> float:
        """Sum over tokens of the GPUs (or nodes) of at most `slots` slots that serve them."""
        spare = self.problem.num_slots - self.problem.num_experts
        ordered = -np.sort(-self.together * (1 - np.eye(len(self.together))), axis=1)
        upto = np.concatenate((np.zeros((len(ordered), 1)), np.cumsum(ordered, axis=1)), axis=1)
        steps = np.minimum(np.arange(spare + 2) * (slots - 1), len(ordered) - 1)
        gains = np.diff(upto[:, steps], axis=1)
        pairs = gains[:, 0].sum()
        if spare:
            pairs += np.sort(gains[:, 1:], axis=None)[::-1][:spare].sum()
        num_tokens = max(1, int((self.num_choices > 0).sum()))
        mean = pairs / 2 / num_tokens
        least = self.num_choices.sum() + num_tokens * (1 - np.sqrt(1 + 8 * mean)) / 2
        return float(max(num_tokens, least))

    def totals(self) -> tuple[float, float]:
        """(messages between GPUs, messages between nodes), over all sampled tokens."""
        problem, dedup = self.problem, self.traffic.dedup
        gpus = np.arange(problem.num_gpus)
        once = np.zeros(len(self.ids), np.int64)
        between = float(self.remote(gpus, problem.capacity, once).sum())
        across = 0.0
        if problem.num_nodes > 1:
            across = float(self.remote(gpus // self.per_node, self.node_slots, once).sum())
        if dedup:
            num_tokens = int((self.num_choices > 0).sum())
            between = max(between, self.reached(int(problem.capacity.max())) - num_tokens)
            if problem.num_nodes > 1:
                across = max(across, self.reached(int(self.node_slots.max())) - num_tokens)
        return between, across

    def total_us(self, objective: PlacementCost) -> float:
        """Summed link time a batch."""
        pair_us = objective.net.pair_us
        node = objective.net.node_of
        other = ~np.eye(self.problem.num_gpus, dtype=bool)
        far = other & (node[:, None] != node[None, :])
        if not other.any():
            return 0.0
        between, across = self.totals()
        least, least_far = pair_us[other].min(), pair_us[far].min() if far.any() else 0.0
        total = across * max(least, least_far) + max(0.0, between - across) * least
        return float(total) / self.traffic.num_batches

    def link_us(self, objective: PlacementCost) -> float:
        """Dispatch and combine time, mean over the sampled batches."""
        problem = self.problem
        gpus = np.arange(problem.num_gpus)
        if problem.num_gpus == 1:
            return 0.0
        batch = self.traffic.batch_idx.astype(np.int64)
        if problem.num_nodes == 1:
            sent = self.remote(gpus, problem.capacity, batch)
            return self._time(objective, sent.max(axis=1), sent, problem.capacity)
        sent = self.remote(gpus // self.per_node, self.node_slots, batch) / self.per_node
        return self._time(objective, sent.max(axis=1), sent, self.node_slots)

    def _time(
        self, objective: PlacementCost, busiest: FloatArray, sent: FloatArray, slots: Array
    ) -> float:
        """busiest: [batches] messages of the busiest home GPU."""
        problem, traffic = self.problem, self.traffic
        tables = _exit_tables(objective)
        if tables is None:
            return 0.0
        last = tables.shape[1] - 1
        per_batch = tables[:, np.minimum(last, np.floor(busiest + 1e-6).astype(np.int64))]
        best = float(per_batch.sum(axis=0).mean())
        if traffic.dedup:
            num_tokens = int((self.num_choices > 0).sum())
            total = self.reached(int(slots.max())) - num_tokens
            mean = total / (problem.num_gpus * traffic.num_batches)
            hulls = [np.interp(mean, *_lower_hull(t)) for t in tables]
            best = max(best, float(sum(hulls)))
        return best


def _exit_tables(objective: PlacementCost) -> FloatArray | None:
    """[2, M + 1]: least dispatch and combine time when some home GPU sends m messages out of its
    GPU (one node) or of its node (several); None where no link is common to all its routes."""
    net = objective.net
    num_gpus = len(net.node_of)
    one_node = net.node_of[-1] == 0
    tables = None
    for way in range(2):
        per_gpu = []
        for home in range(num_gpus):
            common: set[int] | None = None
            for other in range(num_gpus):
                if other == home or (not one_node and net.node_of[other] == net.node_of[home]):
                    continue
                row = home * num_gpus + other if way == 0 else other * num_gpus + home
                links = net.route_links[net.route_indptr[row] : net.route_indptr[row + 1]]
                common = set(links.tolist()) if common is None else common & set(links.tolist())
            curves = [
                net.time_us[way, net.group[link]][
                    np.minimum(
                        net.time_us.shape[2] - 1,
                        np.floor(np.arange(net.time_us.shape[2]) * net.scale[link] + 0.5),
                    ).astype(np.int64)
                ]
                for link in common or ()
                if net.group[link] >= 0
            ]
            if not curves:
                return None
            per_gpu.append(np.max(curves, axis=0))
        least = np.min(per_gpu, axis=0)
        least = np.minimum.accumulate(least[::-1])[::-1]
        tables = least[None] if tables is None else np.concatenate((tables, least[None]))
    return tables


def _lower_hull(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Corners of the largest convex function below `values` at 0, 1, 2, ..."""
    hull: list[int] = []
    for i, value in enumerate(values):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (i - a) < (value - values[a]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    return np.array(hull, np.float64), values[hull]
