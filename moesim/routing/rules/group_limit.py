"""Choosing groups of experts first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.routing.base import ScoredRule, Scores, Work, best, require
from moesim.types import Array, IntArray


@dataclass(frozen=True, slots=True)
class GroupLimit(ScoredRule):
    """Experts are in `groups` of equal size, in order of their ids. A token keeps the `keep` groups
    with the best expert (`by` best) or the best two together (`two`), and takes its K experts from
    those; fewer where fewer of the candidates are in them."""

    groups: int
    keep: int = 1
    by: Literal["best", "two"] = "best"

    NAME = "group-limit"
    TITLE = "choose the best groups of experts, then experts within them"
    PAPER = (
        "SMILE's bi-level routing (arXiv:2212.05191; abstract read), keep=1; DeepSeek-V2 (by=best)"
        " and DeepSeek-V3 (by=two), as huggingface/transformers modeling_deepseek_v2.py, _v3.py"
    )
    LEFT_OUT = "SMILE's router between nodes has weights of its own: the best expert stands in"

    def __post_init__(self) -> None:
        require(
            1 <= self.keep <= self.groups,
            f"{self.keep} of {self.groups} groups",
            "keep from 1 to all of the groups",
        )

    def choose(self, work: Work, layer: int, rows: IntArray, scores: Scores) -> Array:
        experts = scores.shape[1]
        require(
            experts % self.groups == 0,
            f"{self.groups} groups of {experts} experts",
            "give a number of groups that divides the experts",
        )
        split = scores.reshape(len(scores), self.groups, -1)
        value = split.max(axis=2)
        if self.by == "two":
            two = np.sort(np.where(np.isneginf(split), 0, split), axis=2)[..., -2:].sum(axis=2)
            value = np.where(np.isneginf(value), -np.inf, two)
        order = np.argsort(-value, axis=1, kind="stable")[:, : self.keep]
        open_to = np.zeros(value.shape, bool)
        np.put_along_axis(open_to, order, True, 1)
        inside = np.repeat(open_to, experts // self.groups, axis=1)
        return best(np.where(inside, scores, -np.inf), work.trace.top_k)


RULE = GroupLimit
