"""Steering text of other languages to one language's experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.routing.base import Choices, Rule, Work, best, gathered, layer_positions, require
from moesim.routing.rules.prune import domain_tokens, expert_usage
from moesim.types import Array


@dataclass(frozen=True, slots=True)
class Steer(Rule):
    """In `layers` (as 1-4+7; the middle third by default), tokens of other domains choose as if
    `strength` were added to the scores of the `experts` most over-used by the domain `toward`:
    those whose share of its choices exceeds that of all domains most, on tuning requests."""

    toward: str
    experts: int = 4
    strength: float = 0.1
    layers: str = ""

    NAME = "steer"
    TITLE = "promote one domain's experts for the text of all others, in the middle layers"
    PAPER = "Multilingual routing (Bandarkar et al., arXiv:2510.04694; abstract read)"
    LEFT_OUT = (
        "experts are found from a task's text in English there, and logits are moved: here scores"
        " after softmax or sigmoid"
    )
    NEEDS = ("candidates", "domains")

    def __post_init__(self) -> None:
        require(
            self.experts >= 1 and 0 <= self.strength <= 1e6,
            f"{self.experts} experts, strength {self.strength}",
            "give at least one expert and a strength of 0 or more",
        )

    def apply(self, work: Work) -> Choices:
        trace = work.trace
        usage = expert_usage(work, "load", domain_tokens(work, self.toward))
        everyone = expert_usage(work, "load", work.tuning)
        lift = _shares(usage) - _shares(everyone)
        promoted = np.argsort(-lift, axis=1, kind="stable")[:, : self.experts]
        third = trace.num_layers // 3
        inside = range(third, max(third + 1, trace.num_layers - third))
        layers = set(layer_positions(trace, self.layers) if self.layers else inside)
        others = np.asarray(trace.domain_ids) != trace.meta.domains.index(self.toward)
        blocks = []
        for layer in range(trace.num_layers):
            ids = work.ids[:, layer].copy()
            if layer in layers:
                scores = work.scores(layer)
                scores[:, promoted[layer]] += np.float32(self.strength)
                ids = np.where(others[:, None], best(scores, trace.top_k), ids)
            blocks.append((slice(None), layer, ids))
        return work.weighed(gathered(trace, iter(blocks)))


def _shares(usage: Array) -> Array:
    return np.asarray(usage / np.maximum(usage.sum(axis=1, keepdims=True), 1))


RULE = Steer
