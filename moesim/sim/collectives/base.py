"""What dispatch and combine are made of: stages, each one collective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from moesim.cost.collective import CollectiveCurve
from moesim.cost.routing import Dedup, Routed
from moesim.cost.step import StepModel
from moesim.sim.links import LinkTable, collective_flow
from moesim.sim.network import Flow
from moesim.types import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """One collective in every batch and layer.

    us: [B, L] alone on the network, latency included; link_bytes: [B, L, links]; us_per_byte:
    [links]; within_node: whether it crosses no link between nodes.
    """

    label: str
    us: FloatArray
    latency_us: float
    link_bytes: FloatArray
    us_per_byte: FloatArray
    within_node: bool = False

    def flow(self, batch: int, layer: int, category: str, note: str = "") -> Flow:
        """The flow of one batch and layer."""
        return collective_flow(
            f"layer {layer} {category}{self.label}{note}",
            category,
            float(self.us[batch, layer]),
            self.latency_us,
            self.link_bytes[batch, layer],
            self.us_per_byte,
        )


class Exchange(Protocol):
    """A way to dispatch and combine. `dedup` is what `route` must count messages by."""

    name: str
    dedup: Dedup

    def dispatch(self, routed: Routed) -> Sequence[Stage]:
        """Collectives that bring tokens to their experts, one after the other."""
        ...

    def combine(self, routed: Routed) -> Sequence[Stage]:
        """Collectives that bring results back, one after the other."""
        ...


def make_stage(
    step: StepModel,
    links: LinkTable,
    curve: CollectiveCurve,
    messages: npt.NDArray[Any],
    bytes_per_message: float,
    *,
    label: str = "",
    within_node: bool = False,
) -> Stage:
    """The collective that moves `messages` [B, L, G, G], timed as `StepModel.cost` times it."""
    crossing = step.link_messages(messages)
    us = step.collective_us(curve, step.group_max(crossing) * bytes_per_message)
    return Stage(
        label,
        us,
        curve.latency_us,
        crossing * bytes_per_message,
        links.us_per_byte(curve),
        within_node,
    )


def by_node(messages: npt.NDArray[Any], num_nodes: int) -> npt.NDArray[Any]:
    """[..., N, g, N, g] view of [..., G, G]: source node and local rank, destination likewise."""
    num_gpus = messages.shape[-1]
    per_node = num_gpus // num_nodes
    return messages.reshape(*messages.shape[:-2], num_nodes, per_node, num_nodes, per_node)
