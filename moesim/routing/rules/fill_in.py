"""Using what a capacity drops and what it leaves empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.kernels import kernel
from moesim.routing.base import Choices, Need, Rule, Work, require
from moesim.routing.limits import beyond, capacity
from moesim.routing.rules.drop import check_factor
from moesim.trace.format import Trace
from moesim.types import Array


@dataclass(frozen=True, slots=True)
class FillIn(Rule):
    """After a drop by score, `parts` says what follows: `intra` gives a dropped choice to the best
    expert of the token's own GPU that it did not choose, whatever its load; `fill` gives the room
    that experts have left to the tokens that score them highest, at most `extra` each."""

    factor: float
    parts: Literal["both", "intra", "fill"] = "both"
    extra: int = 1

    NAME = "fill-in"
    TITLE = "give dropped choices to the own GPU, and free room to the tokens that score it highest"
    PAPER = "Rectify-Router (Zeng et al., arXiv:2402.12399; abstract and a review read)"
    LEFT_OUT = "training with the rectified router"

    def __post_init__(self) -> None:
        check_factor(self.factor)
        require(self.extra >= 1, f"extra {self.extra}", "give 1 or more")

    def needs(self, trace: Trace) -> tuple[Need, ...]:
        return ("gates", "candidates") if self.parts == "fill" else ("gates", "candidates", "plan")

    def apply(self, work: Work) -> Choices:
        assert work.gates is not None
        experts, top_k = work.trace.num_experts, work.trace.top_k
        width = top_k + (0 if self.parts == "intra" else self.extra)
        ids = np.full((*work.ids.shape[:2], width), -1, np.int16)
        ids[..., :top_k] = work.ids
        filled = 0
        for layer in range(work.trace.num_layers):
            held = None if self.parts == "fill" else work.held(layer, "gpu")
            for rows in work.batches:
                limit = capacity(self.factor, len(rows), top_k, experts)
                part = ids[rows, layer]
                token, k = np.nonzero(part >= 0)
                cell = part[token, k].astype(np.int64)
                key = -work.gates[rows[token], layer, k].astype(np.float64)
                over = beyond(cell, key, limit)
                part[token[over], k[over]] = -1
                scores = work.scores(layer, rows)
                if held is not None:
                    own = np.where(held[work.home[rows]], scores, -np.inf)
                    own[work.chosen_mask(layer, rows)] = -np.inf
                    _to_own_gpu(part, token[over], k[over], own)
                if self.parts != "intra":
                    room = limit - np.bincount(part[part >= 0].astype(np.int64), minlength=experts)
                    filled += _fill(part, *_ranked(scores, work, layer, rows), room, top_k)
                ids[rows, layer] = part
        return work.weighed(ids, {"filled": float(filled)})


def _ranked(scores: Array, work: Work, layer: int, rows: Array) -> tuple[Array, Array]:
    """Tokens and experts of all scores that no choice has, the highest first."""
    open_to = np.isfinite(scores) & ~work.chosen_mask(layer, rows)
    token, expert = np.nonzero(open_to)
    order = np.argsort(-scores[token, expert], kind="stable")
    return token[order], expert[order]


@kernel
def _to_own_gpu(ids: Array, token: Array, k: Array, own: Array) -> None:
    """Write into `ids` [n, K] the best of `own` [n, E] for each dropped choice; taken ones become
    -inf there."""
    for i in range(len(token)):
        row = token[i]
        found = int(np.argmax(own[row]))
        if own[row, found] > -np.inf:
            ids[row, k[i]] = found
            own[row, found] = -np.inf


@kernel
def _fill(ids: Array, token: Array, expert: Array, room: Array, top_k: int) -> int:
    """Give room to (token, expert) pairs in order, into columns from `top_k` on."""
    count = 0
    for i in range(len(token)):
        row, wanted = token[i], expert[i]
        if room[wanted] <= 0:
            continue
        place = -1
        for j in range(ids.shape[1]):
            if ids[row, j] == wanted:
                place = -2
            elif j >= top_k and ids[row, j] < 0 and place == -1:
                place = j
        if place >= 0:
            ids[row, place] = wanted
            room[wanted] -= 1
            count += 1
    return count


RULE = FillIn
