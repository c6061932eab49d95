"""Dropping what overfull experts cannot take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moesim.choices import Keep
from moesim.routing.base import Choices, Need, Rule, Work, require
from moesim.routing.limits import beyond, capacity
from moesim.trace.format import Trace
from moesim.types import Array, IntArray


@dataclass(frozen=True, slots=True)
class Drop(Rule):
    """An expert takes C = ceil(factor K T / E) of a batch's choices; of more, those stay that
    `keep` prefers: the highest gate weights (`score`), the `first` or `last` in the batch, `random`
    ones, or those at the earliest `position` in their request. `auto` is score where the trace has
    gate weights, else first. Gate weights of the others stay as they are.
    """

    factor: float
    keep: Literal[Keep, "auto"] = "auto"

    NAME = "drop"
    TITLE = "drop the choices beyond an expert's capacity"
    PAPER = (
        "Capacity-aware inference (arXiv:2503.05066; abstract and a review read): token drop by"
        " score; OpenMoE (arXiv:2402.01739): drops towards the end of sequences, here keep=position"
    )
    LEFT_OUT = "capacity for each device by itself: it is the whole batch's"

    def __post_init__(self) -> None:
        check_factor(self.factor)

    def needs(self, trace: Trace) -> tuple[Need, ...]:
        return ("gates",) if self.keep == "score" else ()

    def resolved(self, trace: Trace) -> Drop:
        if self.keep != "auto":
            return self
        return replace(self, keep="first" if trace.gate_weights is None else "score")

    def apply(self, work: Work) -> Choices:
        assert self.keep != "auto"
        keep = work.ids >= 0
        for number, rows in enumerate(work.batches):
            limit = capacity(self.factor, len(rows), work.trace.top_k, work.trace.num_experts)
            for layer in range(work.trace.num_layers):
                token, k = np.nonzero(work.ids[rows, layer] >= 0)
                key = choice_keys(work, self.keep, rows, layer, token, k, number)
                cell = work.ids[rows[token], layer, k].astype(np.int64)
                over = beyond(cell, key, limit)
                keep[rows[token[over]], layer, k[over]] = False
        return work.kept(keep, {"dropped_late_share": _late(work, keep)})


def check_factor(factor: float) -> None:
    """Raise InputError unless it is a capacity factor."""
    require(
        math.isfinite(factor) and factor > 0,
        f"capacity factor {factor}",
        "give one above 0, as 1.5",
    )


def choice_keys(
    work: Work, keep: Keep, rows: IntArray, layer: int, token: IntArray, k: IntArray, number: int
) -> Array:
    """Keys of choices (rows[token], layer, k): an expert keeps the smallest."""
    if keep == "score":
        assert work.gates is not None
        return -work.gates[rows[token], layer, k].astype(np.float64)
    if keep == "random":
        return work.rng(number, layer).random(len(token))
    if keep == "position":
        return np.asarray(work.trace.positions)[rows[token]]
    return token if keep == "first" else -token


def _late(work: Work, keep: Array) -> float:
    """Share of the drops that fell on the later half of their request."""
    positions = np.asarray(work.trace.positions)
    requests = np.asarray(work.trace.request_ids)
    ids, where = np.unique(requests, return_inverse=True)
    last = np.zeros(len(ids), np.int64)
    np.maximum.at(last, where, positions)
    dropped = ((work.ids >= 0) & ~keep).sum(axis=(1, 2))
    late = dropped[2 * positions > last[where]].sum()
    return float(late / max(1, dropped.sum()))


RULE = Drop
