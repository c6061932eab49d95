"""Giving what overfull experts cannot take to experts with room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.kernels import kernel
from moesim.routing.base import Choices, Need, Rule, Work
from moesim.routing.limits import beyond, capacity
from moesim.routing.rules.drop import check_factor
from moesim.trace.format import Trace
from moesim.types import Array

Reach = Literal["gpu", "node", "all"]


@dataclass(frozen=True, slots=True)
class ExpandedDrop(Rule):
    """`drop` by score; a choice that overflowed goes to an expert that the token did not choose and
    that has room, the highest in `score` or the one with most `room`, among those of the token's
    own GPU, of its node, or `all`. Choices look for room in the order of their gate weights; what
    finds none is dropped. A substitute has the gate weight of the choice it stands for."""

    factor: float
    by: Literal["score", "room"] = "score"
    reach: Reach = "gpu"

    NAME = "expanded-drop"
    TITLE = "give choices beyond an expert's capacity to experts with room"
    PAPER = "Capacity-aware inference, expanded drop (arXiv:2503.05066; abstract and a review read)"
    LEFT_OUT = (
        "substitutes by score are among the candidates that the trace lists; the paper takes"
        " further local experts as candidates of every token before it enforces the"
        " capacity; here only choices that overflowed move"
    )

    def __post_init__(self) -> None:
        check_factor(self.factor)

    def needs(self, trace: Trace) -> tuple[Need, ...]:
        out: list[Need] = ["gates"]
        if self.by == "score":
            out.append("candidates")
        return (*out, "plan") if self.reach != "all" else tuple(out)

    def apply(self, work: Work) -> Choices:
        ids = work.ids.copy()
        assert work.gates is not None
        experts = work.trace.num_experts
        for layer in range(work.trace.num_layers):
            for rows in work.batches:
                limit = capacity(self.factor, len(rows), work.trace.top_k, experts)
                part = ids[rows, layer]
                token, k = np.nonzero(part >= 0)
                cell = part[token, k].astype(np.int64)
                key = -work.gates[rows[token], layer, k].astype(np.float64)
                over = beyond(cell, key, limit)
                over = over[np.argsort(key[over], kind="stable")]
                open_to = np.ones((1, experts), bool)
                group = np.zeros(len(rows), np.int64)
                if self.reach != "all":
                    open_to, group = work.held(layer, self.reach), work.home[rows]
                room = limit - np.minimum(np.bincount(cell, minlength=experts), limit)
                scores = np.zeros((len(rows), experts), np.float32)
                if self.by == "score":
                    scores = work.scores(layer, rows)
                _substitute(
                    part, token[over], k[over], scores, open_to, group, room, self.by == "room"
                )
                ids[rows, layer] = part
        return Choices(ids, np.where(ids >= 0, work.gates, np.float32(0)))


@kernel
def _substitute(
    ids: Array,
    token: Array,
    k: Array,
    scores: Array,
    open_to: Array,
    group: Array,
    room: Array,
    by_room: bool,
) -> None:
    """Write into `ids` [n, K] the substitute of each overflowing choice, or -1."""
    original = ids.copy()
    for i in range(len(token)):
        row = token[i]
        found, most = -1, -np.inf
        for expert in range(len(room)):
            if room[expert] <= 0 or not open_to[group[row], expert]:
                continue
            value = float(room[expert]) if by_room else scores[row, expert]
            if value <= most:
                continue
            taken = False
            for j in range(ids.shape[1]):
                taken = taken or original[row, j] == expert or ids[row, j] == expert
            if not taken:
                found, most = expert, value
        ids[row, k[i]] = found
        if found >= 0:
            room[found] -= 1


RULE = ExpandedDrop
