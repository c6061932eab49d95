"""What a placement costs on the tuning data, layer by layer: the figure that solvers minimise.

balance: mean over tuning batches with load of the largest GPU load over the mean load. time: mean
over tuning batches of the slowest GPU's expert time, plus mean over the sampled batches of messages
of dispatch and combine time, in microseconds a layer. traffic: mean over those batches of the link
time of all messages, in microseconds, plus a penalty where the mean load ratio is above that of
linear placement.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.placement import EMPTY, Placement
from moesim.solvers.base import Problem, Traffic
from moesim.solvers.methods.linear import Linear

CEILING_WEIGHT = 4.0
"""Objective traffic: a whole unit of max/mean load above the ceiling costs as much as this many
times linear placement's messages."""

WIDE_GPUS = 256
"""Beyond so many GPUs one layer at a time is costed, since the flow of each takes 100s of MB."""


class PlacementCost:
    """The objective of one problem. Layers are independent of each other (C5).

    unit: [G] index of each GPU's kind; scale: [U] factor of a kind's costs; table: [U, N + 1] cost
    of one expert by tokens in microseconds, or [U, 1] where load is counted in tokens.
    `slots` in the methods is [G, S] int64 of one layer, the number of experts for an empty slot.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
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
        self.net: Any = None
        if problem.objective != "balance" and problem.traffic is not None:
            self.net = make_net(
                problem.traffic, problem.num_gpus, problem.num_nodes, by_time=self.by_time
            )
        self._linear = Linear().solve(problem).placement if problem.objective == "traffic" else None
        self._limits: dict[int, tuple[float, float]] = {}
        self._tokens: dict[int, Any] = {}

    def layer_counts(self, layer: int) -> npt.NDArray[np.float32]:
        """[E, B]: as `batch_counts`; for objective balance without the batches that have no load in
        this layer, whose ratio of largest to mean load has no value."""
        counts = self.batch_counts(layer)
        if self.problem.objective != "balance":
            return counts
        busy = counts.any(axis=0)
        return counts if busy.all() or not busy.any() else np.ascontiguousarray(counts[:, busy])

    def batch_counts(self, layer: int) -> npt.NDArray[np.float32]:
        """[E, B]: tokens, or for load objectives tokens over the batch's mean a GPU."""
        counts = self.problem.counts[:, layer]
        if not self.by_time:
            mean = counts.sum(axis=1, keepdims=True) / self.problem.num_gpus
            counts = counts / np.maximum(mean, 1e-9)
        return np.ascontiguousarray(counts.T, np.float32)

    def tokens(self, layer: int) -> Any:
        """The `traffic.Tokens` of one layer, made once. Needs traffic."""
        if layer not in self._tokens:
            assert self.problem.traffic is not None
            self._tokens[layer] = layer_tokens(
                self.problem.traffic, layer, self.problem.num_experts
            )
        return self._tokens[layer]

    def layer_slots(self, placement: Placement, layer: int) -> npt.NDArray[np.int64]:
        """[G, S]: the table of one layer as the kernels take it."""
        row = placement.physical_to_logical[layer].reshape(self.problem.num_gpus, -1)
        slots = row.astype(np.int64)
        slots[slots == EMPTY] = self.problem.num_experts
        return slots

    def grains(self, counts: npt.NDArray[np.float32]) -> float:
        """Grains a unit of cost for `counts` [E, B]: a power of two, such that what a GPU can be
        given in a batch stays below 2**30 grains.

        Searches count load in whole grains. Sums of integers do not depend on the order in which a
        CPU's vector units take them, so that near ties fall the same way on every CPU (INV-6).
        """
        most = float(counts.max(initial=0.0))
        last = self.table.shape[1] - 1
        cost = np.full(len(self.table), most)
        if last > 0:
            beyond = max(0.0, most - last) * (self.table[:, last] - self.table[:, last - 1])
            cost = self.table[:, : int(min(most, last)) + 2].max(axis=1) + np.maximum(beyond, 0.0)
        largest = float((cost * self.scale).max()) * (int(self.capacity.max()) + 1)
        return float(2.0 ** np.floor(np.log2(2**30 / max(largest, 1e-30))))

    def costs(self, counts: npt.NDArray[np.float32]) -> Any:
        """The `placed.Costs` of `counts` [E, B], in grains."""
        from moesim.solvers.kernels.placed import Costs

        return Costs(counts, self.scale * self.grains(counts), self.table)

    def work(
        self, counts: npt.NDArray[np.float32], slots: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int32]:
        """[U, E + 1, B]: what a slot of each expert costs, shared among its replicas, in grains."""
        from moesim.solvers.kernels.placed import make_work

        return np.asarray(make_work(self.costs(counts), slots))

    def placed(self, counts: npt.NDArray[np.float32], slots: npt.NDArray[np.int64]) -> Any:
        """The `placed.Placed` of `slots` [G, S], which searches change in place."""
        from moesim.solvers.kernels.placed import make_placed

        return make_placed(self.work(counts, slots), slots, self.capacity, self.unit)

    def load_value(self, slots: npt.NDArray[np.int64], counts: npt.NDArray[np.float32]) -> float:
        """Mean over the batches of `counts` [E, B] of the costliest GPU."""
        from moesim.solvers.kernels.placed import mean_max

        return float(mean_max(self.placed(counts, slots).load)) / self.grains(counts)

    def message_value(self, slots: npt.NDArray[np.int64], tokens: Any, flow: Any = None) -> float:
        """Microseconds of messages: dispatch and combine, or for traffic summed link time. flow:
        a `traffic.Flow` to work in."""
        from moesim.solvers.kernels.traffic import fill_flow, message_us, replica_gpus

        flow = flow or make_flow(tokens, self.net)
        gpus, held = replica_gpus(slots, self.capacity, self.problem.num_experts)
        fill_flow(tokens, self.net, flow, gpus, held)
        return float(message_us(self.net, flow))

    def limits(self, layer: int) -> tuple[float, float]:
        """(ceiling, weight) of one layer: for objective traffic linear placement's mean load ratio
        and what a unit above it costs; (0, 0) otherwise."""
        if self._linear is None:
            return 0.0, 0.0
        if layer not in self._limits:
            slots = self.layer_slots(self._linear, layer)
            self._limits[layer] = (
                self.load_value(slots, self.layer_counts(layer)),
                CEILING_WEIGHT * self.message_value(slots, self.tokens(layer)),
            )
        return self._limits[layer]

    def layer_value(self, slots: npt.NDArray[np.int64], layer: int) -> float:
        """The objective of one layer."""
        from moesim.solvers.kernels.placed import objective

        load = self.load_value(slots, self.layer_counts(layer))
        if self.net is None:
            return load
        messages = self.message_value(slots, self.tokens(layer))
        return float(objective(load, messages, *self.limits(layer)))

    def layer_values(self, placement: Placement) -> npt.NDArray[np.float64]:
        """[L]: the objective of every layer of a placement."""

        def value(layer: int) -> float:
            return self.layer_value(self.layer_slots(placement, layer), layer)

        many = self.net is not None and self.problem.num_gpus > WIDE_GPUS
        with ThreadPoolExecutor(1 if many else os.cpu_count()) as pool:
            return np.array(list(pool.map(value, range(self.problem.num_layers))))


def layer_tokens(traffic: Traffic, layer: int, num_experts: int) -> Any:
    """The `traffic.Tokens` of one layer."""
    from moesim.solvers.kernels.traffic import Tokens, group_choices, number_tokens

    ids = np.ascontiguousarray(traffic.expert_ids[:, layer], np.int64)
    batch = traffic.batch_idx.astype(np.int64)
    number, *runs = number_tokens(traffic.home, batch)
    return Tokens(*group_choices(ids, batch, number, num_experts), *runs)


def make_net(traffic: Traffic, num_gpus: int, num_nodes: int, *, by_time: bool) -> Any:
    """The `traffic.Net` of a problem."""
    from moesim.solvers.kernels.traffic import Net

    per_node = num_gpus // num_nodes
    last = traffic.time_us.shape[2] - 1
    slope = (traffic.time_us[:, :, last] - traffic.time_us[:, :, last // 2]) / (last - last // 2)
    indptr, links, us = _pair_links(traffic, num_gpus, slope)
    pair_us = us.sum(axis=0).reshape(num_gpus, num_gpus)
    gpus = np.arange(num_gpus)
    node_of = gpus // per_node
    relay = np.repeat(gpus[:, None], num_nodes, axis=1)
    if traffic.dedup == 2:
        relay = np.arange(num_nodes) * per_node + gpus[:, None] % per_node
    return Net(
        indptr,
        links,
        traffic.link_group.astype(np.int64),
        traffic.link_scale.astype(np.float64),
        traffic.time_us.astype(np.float64),
        node_of,
        traffic.dedup,
        pair_us,
        relay,
        pair_us[relay[:, node_of], gpus],
        pair_us[gpus[:, None], relay],
        int(by_time),
    )


def _pair_links(
    traffic: Traffic, num_gpus: int, slope: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """`indptr` and `link` of a Net, and us [2, G * G]: slowest link there and back of a message.

    One source after the other: routes of 1,000 GPUs have 10 million links.
    """
    back = np.arange(num_gpus**2).reshape(num_gpus, num_gpus).T.ravel()
    length = np.diff(traffic.indptr).astype(np.int64)
    indptr = np.append(0, np.cumsum(length + length[back]))
    links = np.empty(int(indptr[-1]), np.int32)
    us = np.zeros((2, num_gpus**2))
    for source in range(num_gpus):
        pairs = np.arange(source * num_gpus, (source + 1) * num_gpus)
        for way, rows in enumerate((pairs, back[pairs])):
            crossed = length[rows]
            first = np.cumsum(crossed) - crossed
            within = np.arange(crossed.sum()) - np.repeat(first, crossed)
            route = traffic.link_idx[within + np.repeat(traffic.indptr[rows], crossed)]
            cost = slope[way][traffic.link_group[route]] * traffic.link_scale[route]
            np.maximum.at(us[way], np.repeat(pairs, crossed), cost)
            begin = indptr[pairs] + (length[pairs] if way else 0)
            links[within + np.repeat(begin, crossed)] = route + way * len(traffic.link_group)
    return indptr, links, us


def make_flow(tokens: Any, net: Any) -> Any:
    """An empty `traffic.Flow` of the right size."""
    from moesim.solvers.kernels.traffic import Flow, Held

    words, batches = len(tokens.run_of), int(tokens.run_batch[-1]) + 1
    most = int(np.bincount(tokens.token).max(initial=0))
    number = np.int8 if most < 128 else np.int16

    def held(places: int) -> Held:
        bits = (np.zeros((places, words), np.uint64) for _ in range(2))
        return Held(np.zeros((places, 64 * words), number), *bits)

    load = np.zeros((batches, 2 * len(net.group)), np.int32)
    return Flow(held(len(net.node_of)), held(net.relay.shape[1]), load, np.zeros(1))
