"""Two-dimensional hierarchical all-to-all: within the node first, then between nodes.

Tutel's 2DH (Hwang et al., MLSys 2023, arXiv:2206.03382): the GPUs of a node first
exchange rows so that local rank j holds all that the node sends to GPUs of local rank j anywhere;
then GPUs of equal local rank exchange between nodes. Each byte crosses NVLink at most once and the
network at most once, in N - 1 messages per GPU instead of G - g: messages get larger, at the
price of one more collective. The copies that align rows in memory between the two are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.collective import CollectiveCurve
from moesim.cost.routing import Dedup, Routed
from moesim.cost.step import StepModel
from moesim.sim.collectives.base import Stage, by_node, make_stage
from moesim.sim.links import LinkTable

IntArray = npt.NDArray[Any]


def two_level_messages(messages: IntArray, num_nodes: int) -> tuple[IntArray, IntArray]:
    """([..., G, G] within nodes, [..., G, G] between nodes) from messages [..., G, G]."""
    split = by_node(messages, num_nodes)
    within = np.zeros_like(messages)
    between = np.zeros_like(messages)
    to_rank = split.sum(axis=-2)
    gathered = split.sum(axis=-3)
    within_view, between_view = by_node(within, num_nodes), by_node(between, num_nodes)
    for node in range(num_nodes):
        within_view[..., node, :, node, :] = to_rank[..., node, :, :]
    ranks = np.arange(split.shape[-1])
    for rank in ranks:
        between_view[..., :, rank, :, rank] = gathered[..., :, :, rank]
    diagonal = np.arange(messages.shape[-1])
    within[..., diagonal, diagonal] = 0
    between[..., diagonal, diagonal] = 0
    return within, between


class TwoLevel:
    """Tutel's 2DH; `intra` and `inter` are the curves of one node and of one GPU per node."""

    name = "two-level"
    dedup: Dedup = "gpu"

    def __init__(
        self,
        step: StepModel,
        links: LinkTable,
        intra: CollectiveCurve,
        inter: CollectiveCurve,
        num_nodes: int,
    ) -> None:
        self.step, self.links, self.num_nodes = step, links, num_nodes
        self.intra, self.inter = intra, inter

    def dispatch(self, routed: Routed) -> Sequence[Stage]:
        return self._stages(routed.messages, self.step.dispatch_bytes)

    def combine(self, routed: Routed) -> Sequence[Stage]:
        return self._stages(np.swapaxes(routed.messages, -1, -2), self.step.combine_bytes)

    def _stages(self, messages: IntArray, size: float) -> Sequence[Stage]:
        within, between = two_level_messages(np.ascontiguousarray(messages), self.num_nodes)
        return [
            make_stage(
                self.step, self.links, self.intra, within, size, label=" intra", within_node=True
            ),
            make_stage(self.step, self.links, self.inter, between, size, label=" inter"),
        ]
