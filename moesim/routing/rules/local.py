"""Preferring the experts that are near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.routing.base import Choices, Need, ScoredRule, Scores, Work, best, require
from moesim.trace.format import Trace
from moesim.types import Array, IntArray


@dataclass(frozen=True, slots=True)
class Local(ScoredRule):
    """The K experts of largest score plus `weight` for those on the token's own GPU or node. The
    home GPU is the trace's rank, or else the request's number in turn over the GPUs. The note
    `capacity_floor` is the capacity factor below which a batch's busiest expert would drop, mean
    over batches and layers."""

    weight: float = 0.1
    reach: Literal["gpu", "node"] = "gpu"

    NAME = "local"
    TITLE = "prefer experts on the token's own GPU or node"
    PAPER = "LocMoE (Li et al., arXiv:2401.13920; abstract and a review read)"
    LEFT_OUT = (
        "the locality loss acts in training and its bound on the capacity takes the router's"
        " weights: a constant on the score and the measured capacity stand in; grouped average"
        " pooling"
    )

    def __post_init__(self) -> None:
        require(0 <= self.weight <= 1e6, f"weight {self.weight}", "give a number of 0 or more")

    def needs(self, trace: Trace) -> tuple[Need, ...]:
        return ("candidates", "plan")

    def choose(self, work: Work, layer: int, rows: IntArray, scores: Scores) -> Array:
        near = work.held(layer, self.reach)[work.home[rows]]
        return best(scores + np.float32(self.weight) * near, work.trace.top_k)

    def apply(self, work: Work) -> Choices:
        # slots=True makes a new class, which breaks super() without arguments
        found = ScoredRule.apply(self, work)
        floors = []
        for rows in work.batches:
            fair = len(rows) * work.trace.top_k / work.trace.num_experts
            for layer in range(work.trace.num_layers):
                ids = found.expert_ids[rows, layer]
                floors.append(np.bincount(ids[ids >= 0].astype(np.int64)).max(initial=0) / fair)
        found.notes["capacity_floor"] = float(np.mean(floors)) if floors else 0.0
        return found


RULE = Local
