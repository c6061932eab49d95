"""Fewer experts for tokens whose first choice stands out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.routing.base import Choices, Rule, Work, require


@dataclass(frozen=True, slots=True)
class PruneTokens(Rule):
    """A token keeps only its `keep` largest choices in a layer where the next one's gate weight,
    as a share of the largest, is below a limit: the `quantile` of that share over the layer's
    tuning tokens. The first `protect` tokens of a request keep all."""

    quantile: float = 0.5
    keep: int = 1
    protect: int = 0

    NAME = "prune-tokens"
    TITLE = "drop the lower choices of tokens whose first choice stands out"
    PAPER = (
        "MC-MoE's online dynamic pruning (Huang et al., arXiv:2410.06270; abstract read): the ratio"
        " of gate weights against a limit per layer, as models/wrapper.py of its repository, where"
        " Mixtral's limits are constants of 0.40 to 0.62"
    )
    LEFT_OUT = (
        "protected tokens are the 2% of most attention there, the first ones here; how its limits"
        " were found its repository does not say, here they are a quantile"
    )
    NEEDS = ("gates",)

    def __post_init__(self) -> None:
        require(0 <= self.quantile <= 1, f"quantile {self.quantile}", "give a share from 0 to 1")
        require(
            self.keep >= 1 and self.protect >= 0,
            f"keep {self.keep}, protect {self.protect}",
            "keep at least one choice, and protect 0 tokens or more",
        )

    def apply(self, work: Work) -> Choices:
        assert work.gates is not None
        keep = work.ids >= 0
        if self.keep >= work.trace.top_k:
            return work.kept(keep)
        gates = np.where(keep, work.gates, 0)
        order = np.argsort(-gates, axis=2, kind="stable")
        ranked = np.take_along_axis(gates, order, 2)
        ratio = ranked[..., self.keep] / np.maximum(ranked[..., 0], 1e-30)
        limit = np.quantile(ratio[work.tuning], self.quantile, axis=0)
        pruned = (ratio < limit) & (np.asarray(work.trace.positions) >= self.protect)[:, None]
        rank = np.argsort(order, axis=2, kind="stable")
        return work.kept(keep & ~(pruned[..., None] & (rank >= self.keep)))


RULE = PruneTokens
