"""Do a trace, a model, a plan and a cluster belong together? Every such check, once.

Each raises MismatchError naming the sizes that differ, and returns notices where it lets a lesser
difference pass. A count that coincides is not an identity: names are compared where both have one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import MismatchError, plain

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec
    from moesim.placement import Placement, Plan
    from moesim.trace.format import Trace, TraceMeta


def trace_fits_model(meta: TraceMeta, model: ModelSpec, *, whole: bool = False) -> list[str]:
    """The trace may be of `model`: same experts and top-k, and its MoE layers or, unless `whole`,
    fewer of them, which a notice says. Layers for multi-token prediction may come behind them."""
    own = [x for x in meta.layer_ids if x < model.num_hidden_layers]
    beyond = meta.num_layers - len(own)
    layers = len(own) if own and beyond <= model.mtp_moe_layers else meta.num_layers
    have = (layers, meta.num_experts, meta.top_k)
    want = (model.num_moe_layers, model.num_experts, model.top_k)
    if meta.source.get("reroute"):  # a rule of routing may change top-k
        want = (want[0], want[1], have[2])
    if have[1:] != want[1:] or have[0] > want[0] or (whole and have[0] != want[0]):
        raise MismatchError(
            f"the trace has {have[0]} MoE layers, {have[1]} experts, top-{have[2]};"
            f" {model.name} has {want[0]}, {want[1]}, top-{want[2]}",
            "name the model that the trace was captured from with `model`",
        )
    if have[0] < want[0]:
        return [
            f"the trace covers {have[0]} of {model.name}'s {want[0]} MoE layers; figures are of"
            " those"
        ]
    return []


def plan_fits_trace(plan: Plan, meta: TraceMeta, *, called: str = "the plan") -> None:
    """The plan places the trace's layers and experts, of the same model as far as both name one."""
    placement = plan.placement
    placement_fits_trace(placement, meta.num_layers, meta.num_experts, called=called)
    _placed_once(placement, meta, called)
    names = (plan.model, meta.model)
    if all(names) and names[0] != names[1]:
        raise MismatchError(
            f"{called} is for {plain(names[0])}, the trace is of {plain(names[1])}",
            "use a trace and a plan of the same model",
        )
    for i, (planned, traced) in enumerate(zip(plan.layer_ids, meta.layer_ids, strict=True)):
        if planned != traced:
            raise MismatchError(
                f"MoE layer {i} is the model's layer {planned} in {called}, {traced} in the trace",
                "use a trace and a plan of the same layers",
            )


def _placed_once(placement: Placement, meta: TraceMeta, called: str) -> None:
    """Layers that share experts (`trace.pools`) have them in the same slots."""
    size = meta.layers_per_pool
    pools = placement.physical_to_logical.reshape(-1, size, placement.num_slots)
    differ = np.flatnonzero((pools != pools[:, :1]).any(axis=(1, 2)))
    if len(differ):
        first = int(differ[0]) * size
        raise MismatchError(
            f"layers {meta.layer_ids[first]} to {meta.layer_ids[first + size - 1]} share their"
            f" experts, and {called} keeps them in different slots for each",
            "plan again on this trace, or leave the plan out",
        )


def placement_fits_trace(
    placement: Placement, num_layers: int, num_experts: int, *, called: str = "the plan"
) -> None:
    """Same MoE layers and experts."""
    have, want = (num_layers, num_experts), (placement.num_layers, placement.num_experts)
    if have != want:
        raise MismatchError(
            f"the trace has {have[0]} MoE layers of {have[1]} experts, {called} {want[0]} of"
            f" {want[1]}",
            "use a trace and a plan of the same model",
        )


def placement_fits_cluster(
    placement: Placement, cluster: Cluster, *, called: str = "the plan"
) -> None:
    """Same GPUs and nodes."""
    size = (placement.num_gpus, placement.num_nodes)
    if size != (cluster.num_gpus, cluster.num_nodes):
        raise MismatchError(
            f"{called} is for {gpus_in_nodes(*size)}, {cluster.name} has"
            f" {gpus_in_nodes(cluster.num_gpus, cluster.num_nodes)}",
            "use `gpus` and `cluster` as the plan was made for, or make a new plan",
        )


def other_ranks(trace: Trace, num_gpus: int) -> str | None:
    """A notice where the trace's `rank_ids` are not of ranks 0 to `num_gpus` - 1, each with tokens,
    so that they tell nobody's home on these GPUs; None where they are, or there are none."""
    if trace.rank_ids is None:
        return None
    ranks = np.asarray(trace.rank_ids)
    low, high = int(ranks.min(initial=0)), int(ranks.max(initial=0))
    if low == 0 and high == num_gpus - 1 and np.bincount(ranks, minlength=num_gpus).all():
        return None
    count = len(np.unique(ranks))
    return (
        f"the trace's tokens are of {count} rank{'s' * (count != 1)} ({low} to {high}), not of"
        f" {num_gpus}: home ranks are taken as even, not from the trace"
    )


def gpus_in_nodes(gpus: int, nodes: int) -> str:
    """ "16 GPUs in 2 nodes"."""
    return f"{gpus} GPU{'s' * (gpus != 1)} in {nodes} node{'s' * (nodes != 1)}"
