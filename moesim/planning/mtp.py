"""Multi-token-prediction layers in traces and plans: layers behind the model's own, numbered on.

Engines compute them in a forward pass of their own to draft a token. A trace has their routing only
where the engine recorded it. Without it nothing is known of their experts: plans place them in
order, and a simulated step takes them to be chosen as unevenly as the last layer's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from moesim.errors import InputError
from moesim.placement import Plan, in_order
from moesim.trace.empty import only_layers
from moesim.trace.format import LoadTrace, Trace

if TYPE_CHECKING:
    from moesim.model.spec import ModelSpec

AnyTrace = TypeVar("AnyTrace", bound=Trace | LoadTrace)


def mtp_ids(model: ModelSpec | None) -> tuple[int, ...]:
    """Numbers of the model's multi-token-prediction layers with experts. Raises InputError where
    there is no model or it has none."""
    if model is None:
        raise InputError("`mtp` of a model that is not known", "name it with `model`")
    if not model.mtp_moe_layers:
        raise InputError(
            f"{model.name} has no multi-token-prediction layer with experts", "leave `mtp` out"
        )
    return tuple(model.num_hidden_layers + i for i in range(model.mtp_moe_layers))


def without_mtp(trace: AnyTrace, model: ModelSpec | None) -> tuple[AnyTrace, list[str]]:
    """The trace without the model's multi-token-prediction layers, and what is said of them. Other
    layers behind the model's own stay: whoever compares layers finds that they do not fit."""
    behind = set(mtp_ids(model)) if model is not None and model.mtp_moe_layers else set()
    keep = np.array([layer not in behind for layer in trace.meta.layer_ids])
    if keep.all() or not keep.any():
        return trace, []
    left = [str(x) for x, kept in zip(trace.meta.layer_ids, keep, strict=True) if not kept]
    return only_layers(trace, keep), [
        f"layers {', '.join(left)} of the trace are for multi-token prediction: left out without"
        " `mtp`"
    ]


def with_mtp(trace: Trace, model: ModelSpec) -> tuple[Trace, list[str]]:
    """The trace with a row for each of the model's layers of `mtp_ids`: its own, or the last MoE
    layer's choices; and what is assumed."""
    missing = [layer for layer in mtp_ids(model) if layer not in trace.meta.layer_ids]
    if not missing:
        return trace, []
    own = [i for i, x in enumerate(trace.meta.layer_ids) if x < model.num_hidden_layers]
    taken = [*range(trace.num_layers), *([own[-1] if own else trace.num_layers - 1] * len(missing))]
    gates = trace.gate_weights
    out = replace(
        trace,
        expert_ids=np.asarray(trace.expert_ids)[:, taken],
        gate_weights=None if gates is None else np.asarray(gates)[:, taken],
        candidate_ids=None,
        candidate_scores=None,
        meta=replace(trace.meta, layer_ids=(*trace.meta.layer_ids, *missing)),
    )
    return out, [
        f"the trace has no routing of the multi-token-prediction layer {_named(missing)}: its"
        " experts are assumed to be chosen as the last layer's are"
    ]


def plan_with_mtp(plan: Plan, layers: tuple[int, ...]) -> tuple[Plan, list[str]]:
    """The plan with rows for `layers`, in order where it has none, and what is said of them."""
    missing = [layer for layer in layers if layer not in plan.layer_ids]
    provenance = {**plan.provenance, "mtp_layers": list(layers)}
    if not missing:
        return replace(plan, provenance=provenance), []
    placement = plan.placement
    rows = np.tile(in_order(placement), (len(missing), 1))
    table = np.concatenate([placement.physical_to_logical, rows])
    whole = replace(
        plan,
        layer_ids=(*plan.layer_ids, *missing),
        placement=replace(placement, physical_to_logical=table),
        provenance=provenance,
    )
    return whole, [
        f"the trace has no routing of the multi-token-prediction layer {_named(missing)}: its"
        " experts are placed in order, and left out of objective, bound and figures"
    ]


def mtp_bytes(model: ModelSpec) -> tuple[float, float]:
    """Of all multi-token-prediction layers: bytes of one expert in each, and of all else."""
    experts = model.mtp_moe_layers * model.expert_bytes()
    rest = model.mtp_params - model.mtp_expert_params
    return experts, rest * model.bytes_per_weight("attention", model.dense_dtype)


def _named(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
