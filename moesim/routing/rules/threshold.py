"""Only experts whose weight is worth it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.routing.base import Choices, Rule, Work, require


@dataclass(frozen=True, slots=True)
class Threshold(Rule):
    """Of a token's choices, those whose gate weight is at least `share` of its largest; that one
    always."""

    share: float

    NAME = "threshold"
    TITLE = "drop choices with less than a share of the token's largest gate weight"
    PAPER = "DA-MoE (arXiv:2409.06669; abstract read): fewer experts for lesser tokens"
    LEFT_OUT = "DA-MoE's importance of tokens, which it takes from attention: gate weights stand in"
    NEEDS = ("gates",)

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, f"share {self.share}", "give a share from 0 to 1")

    def apply(self, work: Work) -> Choices:
        assert work.gates is not None
        gates = np.where(work.ids >= 0, work.gates, -np.inf)
        top = gates.max(axis=2, keepdims=True)
        return work.kept((work.ids >= 0) & (gates >= self.share * top))


RULE = Threshold
