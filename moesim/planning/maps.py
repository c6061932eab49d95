"""Load per GPU and traffic between GPUs of a plan and of what it is compared with.

The same held-out batches as the plan's evaluation, drawn again from the trace, so that the load's
imbalance is the plan's figure to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.compat import placement_fits_trace
from moesim.cost.routing import Dedup, home_ranks, route
from moesim.cost.step import StepModel, build_step_model
from moesim.errors import MismatchError
from moesim.metrics import imbalance
from moesim.placement import Placement, Plan
from moesim.planning.baselines import capacity_of
from moesim.planning.mtp import without_mtp
from moesim.planning.tuning import tuning_counts
from moesim.solvers.base import Problem, run_solver
from moesim.solvers.registry import find_solver
from moesim.trace.batches import Batches, Phase, draw_batches, index_requests, split_requests
from moesim.trace.format import Trace
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class PlacementMap:
    """gpu_load: [L, G] token-choices of a mean batch, of the GPUs with experts where these are GPUs
    of their own; messages: [G, G] hidden states that GPU s
    sends to GPU d in dispatch of a mean step, all layers; busiest: [B * L] max over mean load;
    layer_parts_us: [L, 3] dispatch, compute and combine of a mean batch, where cluster and model
    are known."""

    gpu_load: FloatArray
    messages: FloatArray
    busiest: FloatArray
    layer_parts_us: FloatArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PlanMaps:
    """Maps by name of placement, the plan's last. message_bytes: of one hidden state in dispatch,
    None where the model's sizes are not known. same_trace: whether the trace is the plan's own."""

    maps: Mapping[str, PlacementMap]
    num_batches: int
    dedup: str
    message_bytes: float | None
    same_trace: bool
    notes: tuple[str, ...]


def plan_maps(
    trace: Trace, plan: Plan, cluster: Cluster | None = None, model: ModelSpec | None = None
) -> PlanMaps:
    """Route the plan's held-out batches through the plan, the linear placement and EPLB's (greedy
    where GPUs have different numbers of slots).

    Without `cluster` GPUs count as equally fast; without `cluster` and `model` messages are
    deduplicated by GPU. Raises MismatchError where trace and plan do not go together.
    """
    plan, _ = plan.mtp_apart()
    trace, notes = without_mtp(_domain_of(trace, plan), model)
    placement_fits_trace(plan.placement, trace.num_layers, trace.num_experts)
    options = _options(plan)
    phase: Phase = "decode" if plan.evaluation.get("phase") == "decode" else "prefill"
    batch_tokens = int(plan.evaluation.get("batch_tokens") or 4096)
    num_batches = int(plan.evaluation.get("num_batches") or 16)
    seed = int(options.get("seed") or 0)
    step = _step(options, phase, cluster, model, notes)
    given = options.get("dedup")
    dedup: Dedup = given if given in ("gpu", "node", "none") else "gpu"
    dedup = dedup if step is None else step.dedup
    index, _ = index_requests(trace, phase)
    tune, held_out = split_requests(index)
    batches = draw_batches(held_out, phase, batch_tokens, num_batches, seed + 1)
    placements = _baselines(trace, plan, cluster, model, tune, phase, batch_tokens, seed)
    placements[_own_name(plan, placements)] = plan.placement
    first, nodes = plan.attention_gpus, 1 if cluster is None else cluster.num_nodes
    speed = None if cluster is None else np.asarray(cluster.speed_factor[first:], np.float64)
    maps = {
        name: _route(trace, batches, placement.behind(first, nodes), plan, dedup, speed, step)
        for name, placement in placements.items()
    }
    same = trace.content_hash() == plan.provenance.get("trace")
    message_bytes = None if step is None else step.dispatch_bytes
    return PlanMaps(maps, len(batches), dedup, message_bytes, same, tuple(notes))


def _options(plan: Plan) -> dict[str, Any]:
    options = plan.provenance.get("options")
    return options if isinstance(options, dict) else {}


def _own_name(plan: Plan, others: Mapping[str, Placement]) -> str:
    name = plan.solver or "plan"
    return name if name not in others else f"{name} (plan)"


def _domain_of(trace: Trace, plan: Plan) -> Trace:
    domain = _options(plan).get("domain")
    if not isinstance(domain, str) or trace.domain_ids is None:
        return trace
    if domain not in trace.meta.domains:
        raise MismatchError(
            f"the plan is for domain {domain!r}, which the trace does not have",
            "give the trace that the plan was made from",
        )
    return trace.take(
        np.flatnonzero(np.asarray(trace.domain_ids) == trace.meta.domains.index(domain))
    )


def _step(
    options: dict[str, Any],
    phase: Phase,
    cluster: Cluster | None,
    model: ModelSpec | None,
    notes: list[str],
) -> StepModel | None:
    if cluster is None or model is None:
        missing = " and ".join(
            what for what, it in (("cluster", cluster), ("model", model)) if it is None
        )
        notes.append(f"the plan's {missing} is not known here: messages are counted, not bytes")
        return None
    named, dedup = options.get("all_to_all"), options.get("dedup")
    return build_step_model(cluster, model, phase=phase, all_to_all=named, dedup=dedup)


def _baselines(
    trace: Trace,
    plan: Plan,
    cluster: Cluster | None,
    model: ModelSpec | None,
    tune: Any,
    phase: Phase,
    batch_tokens: int,
    seed: int,
) -> dict[str, Placement]:
    capacity = capacity_of(plan.placement)
    problem = Problem(
        counts=tuning_counts(trace, tune, phase, batch_tokens, seed),
        capacity=capacity,
        num_nodes=plan.placement.num_nodes,
        speed=np.ones(0)
        if cluster is None
        else np.asarray(cluster.speed_factor, np.float64)[plan.attention_gpus :],
        num_groups=1 if model is None else model.n_group,
        seed=seed,
    )
    names = ["linear", "eplb" if len(np.unique(capacity)) == 1 else "greedy"]
    return {
        name: run_solver(find_solver(name), problem).placement
        for name in names
        if name != plan.solver
    }


def _route(
    trace: Trace,
    batches: Batches,
    placement: Placement,
    plan: Plan,
    dedup: Dedup,
    speed: FloatArray | None,
    step: StepModel | None,
) -> PlacementMap:
    """One batch at a time: messages are [layers, GPUs, GPUs]."""
    gpus, first = placement.num_gpus, plan.attention_gpus
    load = np.zeros((trace.num_layers, gpus - first))
    messages = np.zeros((gpus, gpus))
    parts_us = np.zeros((trace.num_layers, 3))
    busiest = []
    for b in range(len(batches)):
        tokens = batches[b]
        one = replace(batches, token_idx=tokens, indptr=np.array([0, len(tokens)]))
        home = home_ranks(trace, one, first or gpus)
        routed = route(trace, one, placement, policy=plan.replica_policy, dedup=dedup, home=home)
        per_gpu = routed.gpu_tokens(gpus)[..., first:]
        load += per_gpu[0]
        messages += routed.messages[0].sum(axis=0)
        busiest.append(imbalance(per_gpu, speed)[0])
        if step is not None:
            parts_us += step.cost(routed).layer_parts_us[0]
    ratios = np.concatenate(busiest)
    return PlacementMap(
        load / len(batches),
        messages / len(batches),
        ratios[~np.isnan(ratios)],  # layers without load have none
        None if step is None else parts_us / len(batches),
    )
