"""Pools: adjacent layers that choose from one set of experts, each of them stored once.

ReXMoE (Tan et al., arXiv:2510.17483; abstract read) lets routers reuse the experts of adjacent
layers. `TraceMeta.layers_per_pool` says how many layers share a set: expert e of any of them is the
same weights. Where it is 1, as everywhere else, every layer has experts of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moesim.errors import InputError, MismatchError

if TYPE_CHECKING:
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
