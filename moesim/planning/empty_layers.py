"""Layers without load: left out of objective, bound and figures, then given the linear placement.

A layer that routes by token id (the hash layers of DeepSeek-V4), or that an engine did not record,
has no load to balance. As a value in a mean it would count as 0 in the objective, which is at
least 1, and as a perfect layer in the figures.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesim.placement import Plan, in_order
from moesim.trace.empty import Mask, layers_text


def plan_of_layers(plan: Plan, keep: Mask) -> Plan:
    """The plan of the layers `keep` [L], where it has all of them; else the plan as it is."""
    if plan.placement.num_layers != len(keep):
        return plan
    layers = np.flatnonzero(keep)
    table = plan.placement.physical_to_logical[layers]
    return replace(
        plan,
        layer_ids=tuple(plan.layer_ids[i] for i in layers),
        placement=replace(plan.placement, physical_to_logical=table),
    )


def whole_plan(
    plan: Plan, layer_ids: tuple[int, ...], keep: Mask, trace_hash: str
) -> tuple[Plan, str]:
    """The plan of the layers `keep` with the linear placement in the others, and a notice."""
    placement = plan.placement
    table = np.empty((len(keep), placement.num_slots), placement.physical_to_logical.dtype)
    table[keep] = placement.physical_to_logical
    table[~keep] = in_order(placement)
    without = [layer for layer, there in zip(layer_ids, keep, strict=True) if not there]
    whole = replace(
        plan,
        layer_ids=layer_ids,
        placement=replace(placement, physical_to_logical=table),
        provenance={**plan.provenance, "trace": trace_hash, "layers_without_load": without},
    )
    return whole, (
        f"layers {layers_text(layer_ids, keep)} have no load in the trace ({len(without)} of"
        f" {len(keep)}): placed in order, and left out of objective, bound and figures"
    )
