"""A bias on every expert that follows its load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.routing.base import Choices, ScoredRule, Scores, Work, best, gathered, require
from moesim.types import Array, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Bias(ScoredRule):
    """The K experts of largest score plus bias. After each batch, the bias of experts with more
    than the mean load falls and that of the others rises: by `rate` (`update` sign), or by `rate`
    times the load's distance from the mean, as a share of the batch's choices (`dual`). `passes`
    over all batches come first, to warm the biases up; weights are the scores without them."""

    rate: float = 0.001
    update: Literal["sign", "dual"] = "sign"
    passes: int = 1

    NAME = "bias"
    TITLE = "balance by a bias on every expert's score, without an auxiliary loss"
    PAPER = (
        "Auxiliary-loss-free balancing (Wang et al., arXiv:2408.15664) as a primal-dual step (Han"
        " and Zhong, arXiv:2512.03915; abstracts and reviews read)"
    )
    LEFT_OUT = "the router learns along with the bias; here its scores stand"
    BATCHWISE = True

    def __post_init__(self) -> None:
        require(0 < self.rate <= 10, f"rate {self.rate}", "give a number above 0, up to 10")
        require(0 <= self.passes <= 1000, f"{self.passes} passes", "give from 0 to 1000")

    def choose(self, work: Work, layer: int, rows: IntArray, scores: Scores) -> Array:
        raise NotImplementedError("batches follow each other: see apply")

    def apply(self, work: Work) -> Choices:
        blocks = []
        spread = 0.0
        for layer in range(work.trace.num_layers):
            bias = np.zeros(work.trace.num_experts)
            for turn in range(self.passes + 1):
                for rows in work.batches:
                    scores = work.scores(layer, rows)
                    ids = best(scores + bias, work.trace.top_k)
                    if turn == self.passes:
                        blocks.append((rows, layer, ids))
                    bias = self.updated(bias, ids)
            spread = max(spread, float(np.ptp(bias)))
        return work.weighed(gathered(work.trace, iter(blocks)), {"largest_bias_spread": spread})

    def updated(self, bias: FloatArray, ids: Array) -> FloatArray:
        """The bias [E] after a batch that chose `ids` [n, K]."""
        load = np.bincount(ids[ids >= 0].astype(np.int64), minlength=len(bias))
        over = load - load.mean()
        if self.update == "sign":
            return np.asarray(bias - self.rate * np.sign(over))
        return np.asarray(bias - self.rate * over / max(1, load.sum()))


def lagrangian(scores: Array, bias: FloatArray, top_k: int) -> float:
    """The dual of the balanced assignment: the sum of the K largest score plus bias of each token
    [n, E], minus the biases at equal load. No balanced assignment's sum of scores is above it, and
    its slope in an expert's bias is the expert's load beyond the mean."""
    values = scores.astype(np.float64) + bias
    top = np.sort(values, axis=1)[:, -top_k:].sum()
    return float(top - bias.sum() * scores.shape[0] * top_k / scores.shape[1])


RULE = Bias
