"""Experts choose tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.routing.base import ScoredRule, Scores, Work
from moesim.routing.limits import capacity
from moesim.routing.rules.drop import check_factor
from moesim.types import Array, IntArray


@dataclass(frozen=True, slots=True)
class ExpertChoice(ScoredRule):
    """Every expert takes the C = ceil(factor K T / E) tokens of a batch that score it highest; a
    token may have any number of experts, also none."""

    factor: float = 1.0

    NAME = "expert-choice"
    TITLE = "every expert takes the tokens that score it highest, the same number each"
    PAPER = "Expert choice (Zhou et al., arXiv:2202.09368; abstract read)"
    LEFT_OUT = (
        "the cap on experts per token; an expert that fewer than C tokens list as a candidate takes"
        " those alone. A token's experts depend on the others of its batch, so it cannot decode"
    )
    BATCHWISE = True

    def __post_init__(self) -> None:
        check_factor(self.factor)

    def choose(self, work: Work, layer: int, rows: IntArray, scores: Scores) -> Array:
        limit = capacity(self.factor, len(rows), work.trace.top_k, scores.shape[1])
        order = np.argsort(-scores, axis=0, kind="stable")[: min(limit, len(rows))]
        taken = np.full(scores.shape, -np.inf)
        listed = np.take_along_axis(scores, order, 0)
        np.put_along_axis(taken, order, listed, 0)
        width = int(np.isfinite(taken).sum(axis=1).max(initial=1))
        best = np.argsort(-taken, axis=1, kind="stable")[:, : max(1, width)]
        return np.where(np.isfinite(np.take_along_axis(taken, best, 1)), best, -1)


RULE = ExpertChoice
