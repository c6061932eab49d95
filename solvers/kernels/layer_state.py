"""One layer under reoptimisation: its slots, loads and exact objective, with replicas as they are.

A move gives a few GPUs new contents made of the slots that they held before, so that the number
of replicas of every expert, and with it the work of a slot, stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.solvers.kernels.placed import MARGIN, objective
from moesim.solvers.objective import PlacementCost, make_flow
from moesim.types import IntArray

FloatArray = npt.NDArray[np.floating[Any]]
LoadArray = npt.NDArray[np.int32]


class LayerState:
    """slots: [G, S] int64, the number of experts for an empty slot. work: [U, E + 1, B] cost of a
    slot of each expert on each kind of GPU and load: [G, B], both in grains (`grains` a unit);
    value: the objective of the layer.
    messages_us: its message term; per_message: that term a sampled choice, 0 without messages."""

    def __init__(self, objective: PlacementCost, layer: int, slots: IntArray) -> None:
        self.objective, self.layer = objective, layer
        self.slots = slots.copy()
        counts = objective.layer_counts(layer)
        self.work, self.grains = objective.work(counts, self.slots), objective.grains(counts)
        self.load = np.stack([self._row(g, self.slots[g]) for g in range(len(slots))])
        self.tokens: Any = None
        self.per_message = 0.0
        self._hits: FloatArray | None = None
        if objective.net is not None:
            self.tokens = objective.tokens(layer)
            self._flow = make_flow(self.tokens, objective.net)
        self.messages_us = self._messages(self.slots)
        if self.tokens is not None:
            self.per_message = self.messages_us / max(1, len(self.tokens.token))
        self.value = self._value(self.load, self.messages_us)

    def _row(self, gpu: int, experts: IntArray) -> LoadArray:
        unit = self.objective.unit[gpu]
        held = experts[: self.objective.capacity[gpu]]
        return np.asarray(self.work[unit, held].sum(axis=0, dtype=np.int32))

    def _messages(self, slots: IntArray) -> float:
        if self.tokens is None:
            return 0.0
        return self.objective.message_value(slots, self.tokens, self._flow)

    def _mean_largest(self, load: LoadArray) -> float:
        return int(load.max(axis=0).sum(dtype=np.int64)) / (load.shape[1] * self.grains)

    def _value(self, load: LoadArray, messages_us: float) -> float:
        mean = self._mean_largest(load)
        return float(objective(mean, messages_us, *self.objective.limits(self.layer)))

    def blame(self) -> FloatArray:
        """[G]: share of the tuning batches in which each GPU is the costliest."""
        count = np.bincount(self.load.argmax(axis=0), minlength=len(self.load))
        return count / self.load.shape[1]

    def others(self, gpus: IntArray) -> LoadArray:
        """[B]: the costliest of the GPUs that are not among `gpus`, 0 where there is none."""
        rest = np.delete(np.arange(len(self.load)), gpus)
        if not len(rest):
            return np.zeros(self.load.shape[1], np.int32)
        return np.asarray(self.load[rest].max(axis=0))

    def home_hits(self) -> FloatArray:
        """[E, G]: sampled choices of each expert by the token's home; zeros without messages."""
        if self._hits is None:
            hits = np.zeros((self.objective.problem.num_experts, len(self.slots)))
            if self.tokens is not None:
                expert = np.repeat(np.arange(len(hits)), np.diff(self.tokens.indptr))
                home = self.tokens.run_home[self.tokens.run_of[self.tokens.token >> 6]]
                np.add.at(hits, (expert, home), 1)
            self._hits = hits
        return self._hits

    def near(self) -> FloatArray:
        """[G, G]: what part of a message two choices of one token save by where they are: all of
        it on one GPU; with dedup per node, on one node the part that is between nodes."""
        near = np.eye(len(self.slots))
        if self.objective.net is not None and self.objective.net.dedup == 2:
            node = self.objective.net.node_of
            cost = self.objective.net.pair_us
            same = node[:, None] == node[None, :]
            inside = cost[same & (near < 1)]
            least, most = float(inside.mean()) if inside.size else 0.0, float(cost.max())
            near[same] = np.maximum(near[same], most / max(least + most, 1e-12))
        return near

    def message_terms(
        self, experts: IntArray, gpus: IntArray, staying: IntArray
    ) -> tuple[FloatArray, FloatArray]:
        """(alone [n, len(gpus)], apart [n, n]): an estimate of messages, in microseconds, by which
        to choose moves. For the content of n slots: `alone` what it costs on each of `gpus`, by the
        homes of its tokens and the experts of `staying` [G, S], the slots that are not dealt;
        `apart` what two of them cost that share nothing (see `near`). Shares of replicas."""
        if self.tokens is None:
            return np.zeros((len(experts), len(gpus))), np.zeros((len(experts), len(experts)))
        num_experts = len(self.work[0]) - 1
        count = np.maximum(np.bincount(self.slots.ravel(), minlength=num_experts + 1), 1)
        both = np.zeros((num_experts + 1, num_experts + 1))
        both[:-1, :-1] = self.tokens.together / np.outer(count[:-1], count[:-1])
        np.fill_diagonal(both, 0.0)
        hits = np.vstack([self.home_hits(), np.zeros(len(self.slots))])[experts]
        pair_us = self.objective.net.pair_us
        alone = hits @ (pair_us[:, gpus] / max(float(pair_us.max()), 1e-12))
        alone /= count[experts][:, None]
        company = np.stack([both[experts][:, row].sum(axis=1) for row in staying], axis=1)
        alone -= company @ self.near()[:, gpus]
        return self.per_message * alone, self.per_message * both[np.ix_(experts, experts)]

    def accept(self, gpus: IntArray, rows: IntArray) -> bool:
        """Take the new contents `rows` [len(gpus), S] of `gpus` if that improves the objective."""
        slots, load = self.slots.copy(), self.load.copy()
        for gpu, row in zip(gpus, rows, strict=True):
            slots[gpu] = row
            load[gpu] = self._row(gpu, row)
        by_load = self.objective.net is None or not self.objective.limits(self.layer)[0]
        if by_load and self._mean_largest(load) >= self.value * (1 - MARGIN):
            return False
        messages = self._messages(slots)
        value = self._value(load, messages)
        if not value < self.value * (1 - MARGIN):
            return False
        self.slots, self.load, self.messages_us, self.value = slots, load, messages, value
        return True


def draw_gpus(state: LayerState, size: int, rng: np.random.Generator) -> IntArray:
    """`size` GPUs, in order: the first by how often each is the costliest, the others evenly."""
    num_gpus = len(state.slots)
    first = int(rng.choice(num_gpus, p=state.blame()))
    rest = np.delete(np.arange(num_gpus), first)
    return np.sort(np.append(rng.choice(rest, size - 1, replace=False), first))
