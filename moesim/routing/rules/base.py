"""Balanced assignment of tokens to experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from moesim.routing.base import ScoredRule, Scores, Work, require
from moesim.types import Array, IntArray


@dataclass(frozen=True, slots=True)
class Base(ScoredRule):
    """Every expert takes as many tokens as any other (within one), so that the sum of scores is
    largest. Tokens of a batch are dealt at random into groups of about `group`, each assigned by
    itself; for K > 1 there are K rounds, each without the experts that a token has already."""

    group: int = 256

    NAME = "base"
    TITLE = "assign tokens to experts in equal numbers, with the largest sum of scores"
    PAPER = "BASE layers (Lewis et al., arXiv:2103.16716; abstract read)"
    LEFT_OUT = (
        "greedy routing at inference; K rounds are optimal for K = 1 alone; an expert that is no"
        " candidate scores 0"
    )
    BATCHWISE = True

    def __post_init__(self) -> None:
        require(1 <= self.group <= 4096, f"groups of {self.group}", "give from 1 to 4096 tokens")

    def choose(self, work: Work, layer: int, rows: IntArray, scores: Scores) -> Array:
        values = np.where(np.isneginf(scores), 0, scores).astype(np.float64)
        out = np.full((len(rows), work.trace.top_k), -1, np.int64)
        parts = max(1, round(len(rows) / self.group))
        shuffled = work.rng(layer, int(rows[0])).permutation(len(rows))
        for part in np.array_split(shuffled, parts):
            out[part] = balanced(values[part], work.trace.top_k)
        return out


def balanced(values: Array, top_k: int) -> Array:
    """[n, K] experts such that in each round every expert has floor(n / E) or ceil(n / E) tokens
    and the sum of `values` [n, E] is largest; -1 where a token could only repeat an expert.

    Each expert has ceil(n / E) places; rows beyond the tokens fill those that stay free, at most
    one of each expert."""
    num_tokens, experts = values.shape
    most = -(-num_tokens // experts)
    places = np.repeat(np.arange(experts), most)
    forbidden = 1.0 + float(np.abs(values).max(initial=0)) * (num_tokens + 1)
    fillers = np.full((len(places) - num_tokens, len(places)), forbidden)
    fillers[:, most - 1 :: most] = 0
    left = -values.astype(np.float64)
    out = np.full((num_tokens, top_k), -1, np.int64)
    for k in range(top_k):
        cost = np.concatenate([left[:, places], fillers])
        _, column = linear_sum_assignment(cost)
        taken = places[column[:num_tokens]]
        good = left[np.arange(num_tokens), taken] < forbidden
        out[good, k] = taken[good]
        left[np.arange(num_tokens), taken] = forbidden
    return out


RULE = Base
