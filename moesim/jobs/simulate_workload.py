"""What steps are simulated of: a trace's held-out tokens, and the placements that serve them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim import compat
from moesim.choices import Fidelity as Fidelity
from moesim.cost.step import StepModel
from moesim.errors import InputError, MismatchError
from moesim.jobs.simulate_request import SimRequest
from moesim.placement import Placement, Plan
from moesim.planning.baselines import capacity_of, place_by_counts
from moesim.planning.mtp import mtp_ids, plan_with_mtp, with_mtp, without_mtp
from moesim.planning.own_schedule import other_schedule
from moesim.planning.request import DEFAULT_BATCH_TOKENS
from moesim.planning.traffic import sample_traffic
from moesim.planning.tuning import tuning_counts
from moesim.sim.collectives.registry import HIERARCHICAL
from moesim.sim.schedules.registry import MAX_CHUNKS
from moesim.solvers.registry import find_solver
from moesim.trace.batches import (
    Batches,
    Phase,
    RequestIndex,
    draw_batches,
    index_requests,
    split_requests,
)
from moesim.trace.format import DECODE, PREFILL, Trace
from moesim.trace.pools import own_experts

if TYPE_CHECKING:
    from moesim.cluster import Cluster


def check_plan(plan: Plan, trace: Trace, cluster: Cluster, attention_gpus: int = 0) -> None:
    """Raise MismatchError unless `plan` fits the trace, and the GPUs of the cluster behind the
    first `attention_gpus`."""
    compat.plan_fits_trace(plan, trace.meta)
    if not attention_gpus:
        compat.placement_fits_cluster(plan.placement, cluster)
    elif plan.placement.num_gpus != cluster.num_gpus - attention_gpus:
        raise MismatchError(
            f"the plan places experts on {plan.placement.num_gpus} GPUs, `expert_gpus` is"
            f" {cluster.num_gpus - attention_gpus}",
            "give `expert_gpus` as many GPUs as the plan was made for",
        )


def check_apart(request: SimRequest) -> None:
    """Raise InputError for pools that cannot be, and for what is not simulated with two."""
    attention, experts = request.attention_gpus, request.expert_gpus or 0
    if min(experts, attention) < 1:
        raise InputError(
            f"`expert_gpus` {experts} of {request.cluster.num_gpus} GPUs",
            "leave at least one GPU to each of attention and experts",
        )
    if not 1 <= request.micro_batches <= MAX_CHUNKS:
        raise InputError(f"`micro_batches` {request.micro_batches}", f"give 1 to {MAX_CHUNKS}")
    refused = {
        f"schedule {request.schedule}": request.schedule != "sequential",
        "faults": not request.faults.none,
        f"{request.all_to_all} all-to-all": request.all_to_all in HIERARCHICAL,
    }
    for name, wanted in refused.items():
        if wanted:
            raise InputError(f"{name} with experts on GPUs of their own", "leave one of them out")


def workload_of(request: SimRequest, defaults: dict[str, str]) -> tuple[Phase, int]:
    """Phase and tokens per batch: as asked, else the plan's, else the trace's; what is taken
    without being asked goes into `defaults`."""
    made_for = request.plan.evaluation if request.plan is not None else {}
    phases = np.asarray(request.trace.phases)
    phase = request.phase
    if phase is None:
        phase = made_for.get("phase")
        if phase not in ("prefill", "decode"):
            phase = "prefill" if (phases == PREFILL).any() else "decode"
        share = float((phases == DECODE).mean())
        defaults["phase"] = f"{phase} ({share:.0%} of the trace's tokens are decode)"
    batch_tokens = request.batch_tokens
    if batch_tokens is None:
        planned = made_for.get("batch_tokens") if made_for.get("phase") == phase else None
        batch_tokens = planned if isinstance(planned, int) else DEFAULT_BATCH_TOKENS[phase]
        defaults["batch tokens"] = f"{batch_tokens} over all GPUs"
    if not 1 <= batch_tokens <= 1 << 24:
        raise InputError(f"`batch_tokens` {batch_tokens}", "give the tokens of one step")
    if not 1 <= request.num_steps <= 1 << 20:
        raise InputError(f"`steps` {request.num_steps}", "give at least 1")
    if request.context_tokens is not None and not 1 <= request.context_tokens <= 1 << 30:
        raise InputError(f"`context_tokens` {request.context_tokens}", "give at least 1")
    if request.fidelity == "analytic":
        _check_closed_form(request)
    return phase, batch_tokens


def _check_closed_form(request: SimRequest) -> None:
    """Raise InputError for what only the event simulation can do."""
    asked = {
        f"schedule {request.schedule}": request.schedule != "sequential",
        f"{request.micro_batches} parts between two pools": request.expert_gpus is not None
        and request.micro_batches > 1,
        "a timeline": request.timeline_steps > 0,
        "GPUs that change speed": bool(request.slow) or request.speed_sigma > 0,
        "faults": not request.faults.none,
        "rebalancing": request.rebalance is not None,
    }
    for name, wanted in asked.items():
        if wanted:
            raise InputError(f"{name}: the analytic cost has no such thing", "use `fidelity` event")


def with_mtp_layers(request: SimRequest, notices: list[str]) -> SimRequest:
    """The request with the layers for multi-token prediction in trace and plan, or without."""
    model, plan = request.model, request.plan
    if not request.mtp:
        trace, notes = without_mtp(request.trace, model)
        plan = None if plan is None else plan.mtp_apart()[0]
    else:
        trace, notes = with_mtp(request.trace, model)
        if plan is not None:
            plan, _ = plan_with_mtp(plan, mtp_ids(model))
    notices += notes
    return replace(request, trace=trace, plan=plan)


def placements_of(
    request: SimRequest,
    step: StepModel,
    phase: Phase,
    batch_tokens: int,
    defaults: dict[str, str],
    notices: list[str],
) -> tuple[dict[str, Placement], npt.NDArray[np.float32], RequestIndex]:
    """Placements by name, the plan and what it is compared with; the tuning counts [B, L, E] they
    were made from; and the held-out requests."""
    trace, cluster = request.trace, request.cluster
    index, notice = index_requests(trace, phase)
    if notice:
        notices.append(notice)
    tune, held_out = split_requests(index)
    if request.rebalance is not None or not request.faults.none:
        own_experts(trace, "a simulation with `rebalance` or failures")
    names = list(request.compare)
    out: dict[str, Placement] = {}
    if request.plan is not None:
        made_from = request.plan.provenance.get("trace")
        if made_from is not None and made_from != trace.content_hash():
            notices.append("the plan was made from another trace than this one")
        placed = request.plan.placement.behind(request.attention_gpus, cluster.num_nodes)
        out["plan"] = placed
        capacity = capacity_of(placed)
    else:
        first, holders = request.attention_gpus, request.expert_gpus or cluster.num_gpus
        per_gpu, over = divmod(trace.num_experts, holders)
        if not per_gpu:
            raise InputError(
                f"{trace.num_experts} experts on {holders} GPUs: some would hold none",
                f"use at most {trace.num_experts} GPUs, or a plan with redundant experts",
            )
        capacity = np.full(cluster.num_gpus, per_gpu, np.int64)
        capacity[first : first + over] += 1
        capacity[:first] = 0
        names = ["linear", *(n for n in names if n != "linear")]
        defaults["placement"] = "linear (no `plan`)"
    counts = np.zeros((0, trace.num_layers, trace.num_experts), np.float32)
    if names or request.faults.recovery.on_loss == "replan":
        counts = tuning_counts(trace, tune, phase, batch_tokens, request.seed)
        needing = [n for n in names if "tokens" in getattr(find_solver(n), "needs", ())]
        traffic = None
        if needing:
            traffic = sample_traffic(
                trace, tune, phase, batch_tokens, step, request.seed, request.attention_gpus
            )
        notices += other_schedule(names, request.schedule)
        for name in dict.fromkeys(names):
            out[name] = place_by_counts(
                name,
                counts,
                capacity,
                cluster,
                num_groups=request.model.n_group,
                seed=request.seed,
                traffic=traffic,
                layers_per_pool=trace.meta.layers_per_pool,
                notices=notices,
            )
    return out, counts, held_out


def steps_of(
    request: SimRequest,
    held_out: RequestIndex,
    phase: Phase,
    batch_tokens: int,
    notices: list[str],
) -> Batches:
    """The steps to simulate, drawn from held-out requests; a notice where these are too few."""
    seed = request.seed + 1
    if request.drift:
        batches = _by_domain(request, held_out, phase, batch_tokens, seed)
    else:
        batches = draw_batches(held_out, phase, batch_tokens, request.num_steps, seed)
    filled = float(np.diff(batches.indptr).mean())
    if filled < 0.9 * batch_tokens:
        notices.append(
            f"the held-out requests fill steps of {filled:.0f} tokens only, {batch_tokens} asked"
        )
    return replace(batches, batch_tokens=batch_tokens)


def _by_domain(
    request: SimRequest, held_out: RequestIndex, phase: Phase, batch_tokens: int, seed: int
) -> Batches:
    """Steps from one domain after the other, in the order of the trace's meta, equally many."""
    trace = request.trace
    if trace.domain_ids is None:
        raise MismatchError("the trace has no domains to drift through", "leave out `drift`")
    domain = np.asarray(trace.domain_ids)[held_out.token_idx[held_out.indptr[:-1]]]
    present = np.unique(domain)
    cuts = np.linspace(0, request.num_steps, len(present) + 1).astype(int)
    parts = [
        draw_batches(held_out.select(domain == d), phase, batch_tokens, int(count), seed)
        for d, count in zip(present, np.diff(cuts), strict=True)
        if count
    ]
    lengths = np.concatenate([np.diff(p.indptr) for p in parts])
    return Batches(
        np.concatenate([p.token_idx for p in parts]),
        np.concatenate(([0], np.cumsum(lengths))),
        phase,
        batch_tokens,
    )
