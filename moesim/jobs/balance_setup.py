"""What `balance` compares, made ready: one setting, its course of steps, and its bench."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesim.choices import Phase
from moesim.cost.step import build_step_model
from moesim.errors import InputError, MismatchError
from moesim.figures import count
from moesim.jobs import inputs
from moesim.jobs.export import import_plan
from moesim.planning.balancing.bench import Bench, Costs
from moesim.planning.balancing.course import make_course
from moesim.planning.balancing.lineup import Asked, lineup
from moesim.planning.balancing.loads import LoadBench, load_course
from moesim.planning.case import Case, token_case
from moesim.planning.loads import load_case
from moesim.planning.request import DEFAULT_BATCH_TOKENS, PlanRequest, check_options
from moesim.planning.worth import Worth, worth_by_domain, worth_by_step
from moesim.sim.rearrange import said, weight_move
from moesim.trace.empty import loaded_layers, only_layers, require_load
from moesim.trace.format import LoadTrace, Trace

if TYPE_CHECKING:
    from moesim.choices import MoveThrough
    from moesim.cluster import Cluster
    from moesim.jobs.inputs import ClusterLike, ModelLike, PlanLike, TraceLike
    from moesim.model.spec import ModelSpec
    from moesim.placement import Placement
    from moesim.planning.balancing.bench import Scheme

MIN_HELD_OUT = 10
"""Held-out requests below which a bootstrap over them says little."""


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """One comparison. least: redundant slots that make slots equal on all GPUs; extra: more, in the
    schemes that use them. start: the placement in use, None for linear."""

    trace: Trace | LoadTrace
    cluster: Cluster
    model: ModelSpec
    phase: Phase | None
    batch_tokens: int | None
    least: int
    extra: int
    steps: int
    drift: bool
    schemes: tuple[str, ...]
    asked: Asked
    costs: Costs
    all_to_all: str | None
    time_limit: float
    ignore_memory: bool
    seed: int
    start: Placement | None = None

    @property
    def counts(self) -> bool:
        """Whether the trace has no tokens."""
        return isinstance(self.trace, LoadTrace)


@dataclass(eq=False)
class Setup:
    """schemes: in order, `none` first. worth: of plans on what tuning lacks, once asked."""

    setting: Setting
    case: Case
    bench: Bench
    schemes: list[Scheme]
    phase: Phase
    notices: list[str] = field(default_factory=list)

    def worth(self) -> Worth | None:
        """What plans with the redundant slots are worth on what tuning has not seen."""
        problem = replace(self.case.problem, capacity=self.bench.room(self.setting.extra))
        trace, data = self.setting.trace, self.case.data
        if isinstance(trace, LoadTrace):
            return worth_by_step(problem, trace.expert_load)
        assert data is not None
        return worth_by_domain(
            problem, trace, data.tune, data.held_out, data.phase, data.batch_tokens
        )


def set_up(setting: Setting) -> Setup:
    """Raises what `balance` raises."""
    cluster, model = setting.cluster, setting.model
    schemes = lineup(
        setting.extra,
        setting.least,
        model.num_moe_layers,
        cluster.num_nodes > 1 and model.n_group % cluster.num_nodes == 0,
        setting.asked,
        setting.schemes,
        shared=bool(model.shared_intermediate_size),
        counts=setting.counts,
    )
    request = PlanRequest.of(
        setting.trace,
        cluster,
        model,
        objective=None if setting.counts else "time",
        phase=None if setting.counts else setting.phase,
        batch_tokens=None if setting.counts else setting.batch_tokens,
        redundant_experts=setting.least,
        all_to_all=None if setting.counts else setting.all_to_all,
        seed=setting.seed,
        time_limit_s=setting.time_limit,
        check_memory=not setting.ignore_memory,
    )
    check_options(request)
    return (_from_counts if setting.counts else _from_tokens)(setting, request, schemes)


def _from_tokens(setting: Setting, request: PlanRequest, schemes: list[Scheme]) -> Setup:
    assert isinstance(setting.trace, Trace)
    case = token_case(request)
    data = case.data
    assert data is not None
    assert case.step is not None
    course = make_course(
        setting.trace,
        data.tune,
        data.held_out,
        data.phase,
        data.batch_tokens,
        setting.steps,
        setting.seed,
        drift=setting.drift,
    )
    bench = Bench(
        course,
        case.step,
        setting.cluster,
        setting.model,
        case.problem.capacity,
        case.problem,
        setting.costs,
        start=setting.start,
    )
    notices = []
    filled = float(np.diff(course.batches.indptr).mean())
    if filled < 0.9 * data.batch_tokens:
        notices.append(
            f"the held-out requests fill steps of {filled:.0f} tokens only, {data.batch_tokens}"
            " asked"
        )
    if course.num_requests < MIN_HELD_OUT:
        notices.append(
            f"{count(course.num_requests, 'held-out request')} only: intervals over requests are"
            " far too narrow and the verdict may be chance; give a trace of more requests"
        )
    return Setup(setting, case, bench, schemes, data.phase, notices)


def _from_counts(setting: Setting, request: PlanRequest, schemes: list[Scheme]) -> Setup:
    trace = setting.trace
    assert isinstance(trace, LoadTrace)
    if setting.drift:
        raise InputError(
            "`drift` needs domains, and the trace has expert counts only",
            "leave it out: recorded steps are gone through in their order",
        )
    case = load_case(request)
    phase: Phase = setting.phase or "decode"
    tokens = setting.batch_tokens or DEFAULT_BATCH_TOKENS[phase]
    if setting.phase is None:
        case.defaults["phase"] = phase
    if setting.batch_tokens is None:
        case.defaults["batch tokens"] = f"{tokens:,}"
    step = build_step_model(
        setting.cluster,
        setting.model,
        phase=phase,
        all_to_all=setting.all_to_all,  # type: ignore[arg-type]
    )
    course = load_course(trace, tokens, setting.model.top_k, setting.steps, setting.seed)
    bench = LoadBench(
        course,
        step,
        setting.cluster,
        setting.model,
        case.problem.capacity,
        case.problem,
        setting.costs,
        start=setting.start,
    )
    notice = (
        "from expert counts: dispatch and combine are not counted, replicas share equally, and"
        f" recorded steps are scaled to {tokens:,} tokens; schemes that choose by token are left"
        " out"
    )
    return Setup(setting, case, bench, schemes, phase, [notice])


def group_of(
    trace: TraceLike,
    model: ModelLike | None,
    cluster: ClusterLike | None,
    gpus: int | None,
    defaults: dict[str, str],
) -> tuple[Trace | LoadTrace, ModelSpec, Cluster]:
    """The trace without layers that have no load, its model, and the GPUs. Raises InputError where
    GPUs are not given, or some would hold no expert."""
    if gpus is None and not hasattr(cluster, "num_gpus"):
        raise InputError("the number of GPUs is not given", "give it with `gpus`")
    loaded = inputs.trace_of(trace, "moesim balance")
    loaded = only_layers(loaded, require_load(loaded_layers(loaded)))
    spec = inputs.model_required(model, loaded.meta.model)
    sized = inputs.cluster_of(cluster, gpus, defaults)
    if sized.num_gpus > spec.num_experts:
        raise InputError(
            f"{sized.num_gpus} GPUs for {spec.num_experts} experts: some would hold none",
            f"use at most {spec.num_experts} GPUs",
        )
    return loaded, spec, sized


def costs_of(
    cluster: Cluster, plan_ms: float, layer_ms: float | None, through: MoveThrough | None
) -> tuple[Costs, list[str]]:
    """Times of rearrangements, and what they rest on: those that stop serving, and those beside the
    steps if they differ. A library that was not measured beside the steps counts for the others
    only."""
    layer_us = None if layer_ms is None else layer_ms * 1e3
    stopped = weight_move(cluster, False, through, layer_us)
    try:
        beside = weight_move(cluster, True, through, layer_us)
    except InputError:
        beside = weight_move(cluster, True)
    costs = Costs(stopped, beside, plan_ms * 1e3)
    lines = [said(stopped, costs.plan_us), said(beside, costs.plan_us)]
    if lines[0] == lines[1]:
        return costs, lines[:1]
    return costs, [lines[0], f"beside the steps {lines[1]}"]


def in_use(
    file: PlanLike | None, trace: Trace | LoadTrace, cluster: Cluster, model: ModelSpec
) -> Placement | None:
    """The placement of a plan, or of ENGINE:FILE as `moesim import-plan` reads it. Raises
    MismatchError where it is of other layers, experts or GPUs."""
    if file is None:
        return None
    engine, _, path = str(file).partition(":")
    if isinstance(file, str | os.PathLike) and path and not Path(str(file)).exists():
        plan = import_plan(
            path, engine=engine, num_gpus=cluster.num_gpus, num_nodes=cluster.num_nodes, model=model
        )
    else:
        plan = inputs.plan_of(file)
    place = plan.placement
    layers, experts = (
        trace.expert_load.shape[1:]
        if isinstance(trace, LoadTrace)
        else (trace.num_layers, trace.num_experts)
    )
    for what, own, wanted in (
        ("MoE layers", place.num_layers, layers),
        ("experts", place.num_experts, experts),
        ("GPUs", place.num_gpus, cluster.num_gpus),
    ):
        if own != wanted:
            raise MismatchError(
                f"the placement in use has {own} {what}, the comparison {wanted}",
                "give the placement that this model runs with on these GPUs",
            )
    return place


def extra_slots(
    asked: int | None,
    least: int,
    gpus: int,
    experts: int,
    start: Placement | None,
    defaults: dict[str, str],
) -> int:
    """Redundant slots beyond the `least` that make slots equal on every GPU; by default as many as
    the placement in use has, else one per GPU."""
    most = gpus * experts - experts
    if asked is None:
        extra = gpus if least + gpus <= most else 0
        if start is not None and start.num_slots > experts + least:
            extra = start.num_slots - experts - least
        defaults["redundant experts"] = f"{least + extra}, in the schemes that use them"
        return extra
    extra = asked - least
    if extra < 0 or extra % gpus or asked > most:
        near = least + max(0, -(-extra // gpus)) * gpus
        raise InputError(
            f"{asked} redundant experts: {experts} experts and they do not fill {gpus} GPUs evenly",
            f"use `redundant_experts` {min(near, most - most % gpus + least % gpus)}",
        )
    return extra
