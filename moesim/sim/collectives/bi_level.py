"""Bi-level routing: to the node first, then to the GPU within it.

SMILE (He et al., 2022, arXiv:2212.05191): a router picks nodes, a second one experts within the
node, with one all-to-all for each level, over groups of N and of g GPUs instead of one of N g. Here
the experts are the trace's own: a token goes once to each node that holds one of them, to the GPU
of its own local rank, and from there to the GPUs that hold the experts. (SMILE trains its two
routers; what that does to the choice of experts is not in a trace.) The same path as DeepEP's, but
in two collectives, the second waiting for the first.
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


def split_levels(messages: IntArray, num_nodes: int) -> tuple[IntArray, IntArray]:
    """(within nodes, between nodes), both [..., G, G], of messages deduplicated by node."""
    within = np.zeros_like(messages)
    view, source = by_node(within, num_nodes), by_node(messages, num_nodes)
    for node in range(num_nodes):
        view[..., node, :, node, :] = source[..., node, :, node, :]
    return within, messages - within


class BiLevel:
    """SMILE's two all-to-alls; `intra` and `inter` are the curves of one node and of one GPU a
    node."""

    name = "bi-level"
    dedup: Dedup = "node"

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
        within, between = split_levels(routed.messages, self.num_nodes)
        size = self.step.dispatch_bytes
        return [self._inter(between, size), self._intra(within, size)]

    def combine(self, routed: Routed) -> Sequence[Stage]:
        back = np.ascontiguousarray(np.swapaxes(routed.messages, -1, -2))
        within, between = split_levels(back, self.num_nodes)
        size = self.step.combine_bytes
        return [self._intra(within, size), self._inter(between, size)]

    def _intra(self, messages: IntArray, size: float) -> Stage:
        return make_stage(
            self.step, self.links, self.intra, messages, size, label=" intra", within_node=True
        )

    def _inter(self, messages: IntArray, size: float) -> Stage:
        return make_stage(self.step, self.links, self.inter, messages, size, label=" inter")
