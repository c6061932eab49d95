"""Pools: adjacent layers that choose from one set of experts, each of them stored once.

ReXMoE (Tan et al., arXiv:2510.17483; abstract read) lets routers reuse the experts of adjacent
layers. `TraceMeta.layers_per_pool` says how many layers share a set: expert e of any of them is the
same weights. Where it is 1, as everywhere else, every layer has experts of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import InputError, MismatchError

if TYPE_CHECKING:
    from moesim.placement import Placement
    from moesim.trace.format import LoadTrace, Trace, TraceMeta


def with_pools(meta: TraceMeta, layers_per_pool: int) -> TraceMeta:
    """`meta` with its layers in pools of so many. Raises InputError where they do not divide."""
    if layers_per_pool < 1 or meta.num_layers % layers_per_pool:
        raise InputError(
            f"{meta.num_layers} MoE layers do not divide into pools of {layers_per_pool}",
            "give a number of layers that divides them",
        )
    return replace(meta, layers_per_pool=layers_per_pool)


def own_experts(trace: Trace | LoadTrace, needed_by: str) -> None:
    """Raise MismatchError where layers share experts: `needed_by` would take the experts of each
    layer for others, and store, move or count them once per layer."""
    if trace.meta.layers_per_pool > 1:
        raise MismatchError(
            f"{trace.meta.layers_per_pool} adjacent layers of the trace share their experts, and"
            f" {needed_by} takes each layer's for its own",
            "use moesim plan and simulate, which know pools of layers",
        )


def placed_once(placement: Placement, meta: TraceMeta, *, called: str = "the plan") -> None:
    """Raise MismatchError where `placement` has the experts of a pool in other slots in one of its
    layers than in the rest."""
    size = meta.layers_per_pool
    table = placement.physical_to_logical
    pools = table.reshape(-1, size, table.shape[1])
    differ = np.flatnonzero((pools != pools[:, :1]).any(axis=(1, 2)))
    if len(differ):
        first = int(differ[0]) * size
        raise MismatchError(
            f"layers {meta.layer_ids[first]} to {meta.layer_ids[first + size - 1]} share their"
            f" experts, and {called} keeps them in different slots for each",
            "plan again on this trace, or leave the plan out",
        )
