"""Random experts: the control."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.routing.base import Choices, Rule, Work


@dataclass(frozen=True, slots=True)
class Random(Rule):
    """As many experts for each token and layer as before, drawn evenly without replacement; equal
    gate weights."""

    NAME = "random"
    TITLE = "random experts, the control"
    PAPER = "THOR (Zuo et al., arXiv:2110.04260; abstract read)"
    LEFT_OUT = "training for consistency between random experts"

    def apply(self, work: Work) -> Choices:
        ids = np.full(work.ids.shape, -1, np.int16)
        count = (work.ids >= 0).sum(axis=2)
        for layer in range(work.trace.num_layers):
            keys = work.rng(layer).random((len(ids), work.trace.num_experts))
            order = np.argpartition(keys, work.trace.top_k - 1, axis=1)[:, : work.trace.top_k]
            wanted = np.arange(work.trace.top_k) < count[:, layer, None]
            ids[:, layer] = np.where(wanted, order, -1)
        if work.gates is None:
            return Choices(ids, None)
        share = work.gates.sum(axis=2, keepdims=True) / np.maximum(count, 1)[..., None]
        return Choices(ids, np.where(ids >= 0, share, 0).astype(np.float32))


RULE = Random
