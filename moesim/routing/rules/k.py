"""Fewer or more experts per token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.routing.base import Choices, Need, Rule, Work, best, layer_positions, require
from moesim.trace.format import Trace


@dataclass(frozen=True, slots=True)
class K(Rule):
    """`k` experts per token in `layers` (as 1-4+7; all by default). Fewer: the choices of largest
    gate weight. More: the choices, then the candidates of largest score that are not among them."""

    k: int
    layers: str = ""

    NAME = "k"
    TITLE = "fewer or more experts per token, by layer"
    PAPER = (
        "SMoE-Dropout (arXiv:2303.01610), which changes k at inference, and SCMoE"
        " (arXiv:2405.14507), which contrasts a run with other experts; abstracts read"
    )
    LEFT_OUT = "SMoE-Dropout's training; SCMoE runs both and contrasts their outputs"

    def __post_init__(self) -> None:
        require(self.k >= 1, f"k {self.k}", "give 1 or more")

    def needs(self, trace: Trace) -> tuple[Need, ...]:
        return ("gates",) if self.k <= trace.top_k else ("candidates",)

    def apply(self, work: Work) -> Choices:
        inside = np.zeros(work.trace.num_layers, bool)
        inside[layer_positions(work.trace, self.layers)] = True
        if self.k <= work.trace.top_k:
            assert work.gates is not None
            gates = np.where(work.ids >= 0, work.gates, -np.inf)
            rank = np.argsort(np.argsort(-gates, axis=2, kind="stable"), axis=2, kind="stable")
            return work.kept((work.ids >= 0) & ((rank < self.k) | ~inside[:, None]))
        listed = work.trace.num_candidates
        require(self.k <= listed, f"k {self.k} of {listed} candidates", "capture more candidates")
        ids = np.full((*work.ids.shape[:2], self.k), -1, np.int16)
        ids[..., : work.trace.top_k] = work.ids
        for layer in np.flatnonzero(inside).tolist():
            scores = np.where(work.chosen_mask(layer), np.float32(np.inf), work.scores(layer))
            ids[:, layer] = best(scores, self.k)
        return work.weighed(ids)


RULE = K
