"""Merging experts by routing statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.kernels import kernel
from moesim.routing.base import Choices, Rule, Work, require
from moesim.routing.rules.prune import expert_usage
from moesim.types import Array


@dataclass(frozen=True, slots=True)
class Merge(Rule):
    """Each layer keeps the `keep` most used experts of the tuning requests; every other one is
    merged into the kept one whose scores over those tokens are most alike (cosine). A choice goes
    to the expert that its own was merged into; two that meet are one, with both gate weights, and
    the note `met` counts them. Experts keep their numbers; those merged away get no choices."""

    keep: int

    NAME = "merge"
    TITLE = "merge each layer's experts into the most used ones, by likeness of their scores"
    PAPER = (
        "MC-SMoE (Li et al., arXiv:2310.01334; abstract read); UNCURL (arXiv:2409.01483; abstract"
        " read, which does not say how) reduces experts for a task"
    )
    LEFT_OUT = (
        "weights: alignment of neurons, merging by frequency, low rank. Without candidates,"
        " likeness is of gate weights of the choices alone"
    )
    NEEDS = ("gates",)

    def __post_init__(self) -> None:
        require(self.keep >= 1, f"keep {self.keep}", "keep at least one expert")

    def apply(self, work: Work) -> Choices:
        experts = work.trace.num_experts
        require(self.keep <= experts, f"keep {self.keep} of {experts} experts", "keep fewer")
        assert work.gates is not None
        ids, gates = work.ids.copy(), work.gates.copy()
        usage = expert_usage(work, "load", work.tuning)
        met = 0
        for layer in range(work.trace.num_layers):
            values = work.listed(layer)[work.tuning]
            into = groups(np.where(np.isneginf(values), 0, values), usage[layer], self.keep)
            part, weights = (
                np.ascontiguousarray(ids[:, layer]),
                np.ascontiguousarray(gates[:, layer]),
            )
            met += _join(part, weights, into)
            ids[:, layer], gates[:, layer] = part, weights
        return Choices(ids, gates, {"met": float(met)})


def groups(values: Array, usage: Array, keep: int) -> Array:
    """[E] the expert that each is merged into, itself for the `keep` most used; from scores
    [n, E]."""
    dominant = np.argsort(-usage, kind="stable")[:keep]
    norm = np.maximum(np.sqrt((values.astype(np.float64) ** 2).sum(axis=0)), 1e-30)
    unit = values / norm
    likeness = unit.T @ unit[:, dominant]
    into = dominant[np.argmax(likeness, axis=1)]
    into[dominant] = dominant
    return np.asarray(into, np.int64)


@kernel
def _join(ids: Array, gates: Array, into: Array) -> int:
    """Rewrite choices [n, K] and their weights; returns how many met another."""
    count = 0
    for row in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if ids[row, k] < 0:
                continue
            ids[row, k] = into[ids[row, k]]
            for j in range(k):
                if ids[row, j] == ids[row, k]:
                    gates[row, j] += gates[row, k]
                    ids[row, k] = -1
                    gates[row, k] = 0
                    count += 1
                    break
    return count


RULE = Merge
