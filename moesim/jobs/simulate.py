"""`simulate`: steps of a trace through a plan on a cluster, event by event."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.choices import Fidelity, Keep, MoveThrough, OnLoss, Order, Phase, ReplicaPolicy, Scope
from moesim.cluster import DEFAULT_CLUSTER, Cluster, cluster_names, is_shipped, load_cluster
from moesim.errors import InputError, plain
from moesim.jobs import inputs
from moesim.jobs.simulate_request import DEFAULT_PARTS, DEFAULT_STEPS, FaultSpec, SimRequest
from moesim.jobs.simulate_result import SimReport
from moesim.jobs.simulate_steps import simulate_steps
from moesim.planning.request import HBM_USABLE
from moesim.sim.capacity import DropPolicy
from moesim.sim.faults import Recovery, parse_fault
from moesim.sim.rearrange import said, weight_move
from moesim.sim.rebalance import Rebalance
from moesim.sim.stragglers import SlowWindow, parse_slow
from moesim.types import Progress

if TYPE_CHECKING:
    from moesim.caching.batching import Batching
    from moesim.caching.plan import CachePlan
    from moesim.jobs.inputs import ClusterLike, ModelLike, PlanLike, TraceLike
    from moesim.model.spec import ModelSpec
    from moesim.placement import Plan
    from moesim.trace.format import Trace

DEFAULT_POOL = 32
DEFAULT_PATIENCE = 16


def simulate(
    trace: TraceLike,
    *,
    plan: PlanLike | None = None,
    cluster: ClusterLike | None = None,
    gpus: int | None = None,
    model: ModelLike | None = None,
    compare: Sequence[str] = (),
    phase: Phase | None = None,
    batch_tokens: int | None = None,
    steps: int = DEFAULT_STEPS,
    fidelity: Fidelity = "event",
    all_to_all: str | None = None,
    schedule: str = "sequential",
    chunks: int | None = None,
    reduce: float = 1.0,
    replica_policy: ReplicaPolicy | None = None,
    context_tokens: int | None = None,
    moe_only: bool = False,
    slow: Mapping[int, float] | Sequence[str] = (),
    speed_spread: float = 0.0,
    speed_period: float | None = None,
    capacity_factor: float | None = None,
    drop: Keep | None = None,
    capacity_scope: Scope = "step",
    expanded_drop: bool = False,
    drift: bool = False,
    fault: Sequence[str] = (),
    mtbf: float | None = None,
    repair: float | None = None,
    on_loss: OnLoss = "reload",
    detect: float = 100.0,
    restart: float = 1000.0,
    rebalance_every: int | None = None,
    rebalance_window: int = 100,
    rebalance_async: bool = False,
    rebalance_plan: float = 10.0,
    rebalance_layer: float | None = None,
    rebalance_above: float | None = None,
    rebalance_solver: str = "eplb",
    rebalance_through: MoveThrough | None = None,
    expert_gpus: int | None = None,
    micro_batches: int = DEFAULT_PARTS,
    mtp: bool = False,
    offload: bool = True,
    batching: Order | None = None,
    pool: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    timeline_steps: int = 0,
    progress: Progress | None = None,
) -> SimReport:
    """Replay held-out requests of a trace through a plan: time per step, where it goes, load of
    GPUs and links.

    plan: a plan, or a cache plan by its path; None for linear placement. slow: {GPU: relative
    speed}, or texts such as "3=0.5@10-20" (from 10 to 20 ms). Times of options are milliseconds.
    The other names and defaults are those of `moesim simulate`.

    Raises MismatchError where trace, plan, model and cluster do not belong together,
    UnknownNameError for names and InputError for numbers that cannot be used.
    """
    found = _inputs(trace, plan, cluster, gpus, model, offload, expert_gpus)
    request = SimRequest(
        trace=found.trace,
        cluster=found.cluster,
        model=found.model,
        plan=found.plan,
        compare=tuple(compare),
        phase=phase,
        batch_tokens=batch_tokens,
        num_steps=steps,
        all_to_all=all_to_all,
        schedule=schedule,
        num_chunks=chunks,
        reduce=reduce,
        fidelity=fidelity,
        replica_policy=replica_policy,
        context_tokens=context_tokens,
        home_ranks=not moe_only,
        seed=seed,
        drift=drift,
        faults=_faults(found, fault, mtbf, repair, on_loss, detect, restart),
        rebalance=_rebalance(
            rebalance_every,
            rebalance_window,
            rebalance_async,
            rebalance_plan,
            rebalance_layer,
            rebalance_above,
            rebalance_through,
            found.cluster,
        ),
        rebalance_solver=rebalance_solver,
        expert_gpus=found.expert_gpus,
        micro_batches=micro_batches,
        mtp=mtp,
        caches=found.caches,
        batching=_batching(batching, pool, patience),
        timeline_steps=timeline_steps,
        slow=_slow(slow, found.cluster.num_gpus),
        speed_sigma=speed_spread,
        speed_period_us=math.inf if speed_period is None else speed_period * 1e3,
        drop=_drop(found.trace, capacity_factor, drop, capacity_scope, expanded_drop, seed),
    )
    report = run_simulation(request, progress=progress)
    report.defaults.update(found.defaults)
    return report


def run_simulation(request: SimRequest, *, progress: Progress | None = None) -> SimReport:
    """`simulate` from a request."""
    for name, given in (("expert_gpus", request.expert_gpus is not None), ("mtp", request.mtp)):
        if request.caches and given:
            raise InputError(f"`{name}` of a plan with caches of experts", f"leave `{name}` out")
    if request.caches:
        from moesim.jobs.simulate_offloaded import simulate_offloaded

        return simulate_offloaded(request, progress=progress)
    return simulate_steps(request, progress=progress)


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    trace: Trace
    plan: Plan | None
    cluster: Cluster
    model: ModelSpec
    defaults: dict[str, str] = field(default_factory=dict)
    caches: tuple[CachePlan, ...] = ()
    expert_gpus: int | None = None


def _inputs(
    trace: TraceLike,
    plan: PlanLike | None,
    cluster: ClusterLike | None,
    gpus: int | None,
    model: ModelLike | None,
    offload: bool,
    expert_gpus: int | None,
) -> _Inputs:
    """Read all files. The cluster defaults to the plan's by name, the GPUs to the plan's number,
    with those of attention where the plan has experts on GPUs of their own.

    `plan` may be a cache plan by itself, for one GPU; without `offload` the caches of a plan are
    left out. Raises InputError where a cache plan is all there is and is to be left out.
    """
    from moesim.caching.group import parse_group
    from moesim.caching.plan import is_cache_plan, load_cache_plan
    from moesim.placement import Plan

    defaults: dict[str, str] = {}
    loaded = inputs.token_trace_of(trace, "moesim simulate", pools=True)
    made: Plan | None = None
    caches: tuple[CachePlan, ...] = ()
    if plan is not None and not isinstance(plan, Plan) and is_cache_plan(Path(plan)):
        if not offload:
            raise InputError(
                f"{plan} holds nothing but a cache plan, which is to be left out",
                "give a plan of moesim plan, or none for the linear placement",
            )
        caches = (load_cache_plan(Path(plan)),)
        gpus = 1 if gpus is None else gpus
        if cluster is None:
            cluster = defaults["cluster"] = _cluster_of(caches[0])
        model = model or caches[0].model or None
    elif plan is not None:
        made = inputs.plan_of(plan, apart=True)
        if made.cache is not None and offload:
            caches = parse_group(made.cache)
    if cluster is None:
        planned = str(made.provenance.get("cluster", "")) if made is not None else ""
        cluster = planned if planned in cluster_names() or is_shipped(planned) else DEFAULT_CLUSTER
        defaults["cluster"] = cluster
    if made is not None and made.attention_gpus and expert_gpus is None:
        expert_gpus = made.placement.num_gpus
        defaults["expert GPUs"] = f"{expert_gpus}, the plan's"
    if gpus is None and made is not None:
        gpus = made.placement.num_gpus + made.attention_gpus
    named = made.model if made is not None and made.model else loaded.meta.model
    spec = inputs.model_required(model, named) if not caches else _stored(caches[0], model, named)
    sized = inputs.cluster_of(cluster, gpus)
    return _Inputs(loaded, made, sized, spec, defaults, caches, expert_gpus)


def _stored(plan: CachePlan, model: ModelLike | None, named: str) -> ModelSpec:
    """The model with the types that the cache plan was made for. Raises InputError."""
    from moesim.jobs.cache_engines import weights_of

    quant = plan.provenance.get("quant")
    if plan.provenance.get("kernels") != "engine" or not isinstance(quant, str | None):
        return inputs.model_required(model, named)
    return weights_of(model, named, quant, None)[0].spec


def _cluster_of(plan: CachePlan) -> str:
    """The machine that the cache plan names, where its parts are shipped, else a bundled cluster of
    its GPUs. Raises InputError."""
    machine, gpu = str(plan.provenance.get("machine", "")), plan.gpu
    if plan.provenance.get("kernels") == "engine":
        if is_shipped(machine):
            return machine
        raise InputError(
            f"the cache plan is for the machine {plain(machine)!r:.60}, which is not one of"
            " moesim's",
            "name its file with `cluster`",
        )
    for name in cluster_names():
        if load_cluster(name, num_gpus=1).gpus[0].name == gpu:
            return name
    raise InputError(
        f"no bundled cluster has GPUs of the type {gpu!r:.40} that the cache plan is for",
        "name one with `cluster` (moesim topology list)",
    )


def _slow(given: Mapping[int, float] | Sequence[str], num_gpus: int) -> tuple[SlowWindow, ...]:
    if isinstance(given, Mapping):
        given = [f"{gpu}={speed}" for gpu, speed in given.items()]
    return tuple(parse_slow(text, num_gpus) for text in given)


def _batching(order: Order | None, pool: int | None, patience: int | None) -> Batching | None:
    from moesim.caching.batching import Batching

    if order is None:
        if pool is not None or patience is not None:
            raise InputError(
                "a pool of requests was given, but not how to batch them", "add `batching`"
            )
        return None
    return Batching(
        order,
        DEFAULT_POOL if pool is None else pool,
        DEFAULT_PATIENCE if patience is None else patience,
    )


def _drop(
    trace: Trace, factor: float | None, keep: Keep | None, scope: Scope, expand: bool, seed: int
) -> DropPolicy | None:
    if factor is None:
        if keep is not None or expand or scope != "step":
            raise InputError(
                "how to drop was given, but no capacity", "add `capacity_factor`, as 1.5"
            )
        return None
    if keep is None:
        keep = "score" if trace.gate_weights is not None else "first"
    return DropPolicy(factor, keep, scope, expand, seed)


def _faults(
    found: _Inputs,
    faults: Sequence[str],
    mtbf_ms: float | None,
    repair_ms: float | None,
    on_loss: OnLoss,
    detect_ms: float,
    restart_ms: float,
) -> FaultSpec:
    """A GPU has as many spare slots per layer as its memory has room for experts beyond one copy of
    everything else."""
    if repair_ms is not None and mtbf_ms is None:
        raise InputError("`repair` without `mtbf`", "give the mean time between failures as well")
    cluster, model = found.cluster, found.model
    least = min(gpu.hbm_gb for gpu in cluster.gpus) * 1e9 * HBM_USABLE
    experts = (least - model.non_expert_bytes()) / (model.expert_bytes() * model.num_moe_layers)
    own = -(-model.num_experts // cluster.num_gpus)
    return FaultSpec(
        tuple(parse_fault(text, cluster) for text in faults),
        math.inf if mtbf_ms is None else mtbf_ms * 1e3,
        math.inf if repair_ms is None else repair_ms * 1e3,
        Recovery(
            on_loss=on_loss,
            detect_us=detect_ms * 1e3,
            restart_us=restart_ms * 1e3,
            spare_slots=max(0, int(experts) - own),
        ),
    )


def _rebalance(
    every: int | None,
    window: int,
    asynchronous: bool,
    plan_ms: float,
    layer_ms: float | None,
    above: float | None,
    through: MoveThrough | None,
    cluster: Cluster,
) -> Rebalance | None:
    if every is None:
        given = (above, through, layer_ms)
        if asynchronous or any(value is not None for value in given):
            raise InputError("how to rebalance was given, but not when", "add `rebalance_every`")
        return None
    layer_us = None if layer_ms is None else layer_ms * 1e3
    move = weight_move(cluster, asynchronous, through, layer_us)
    return Rebalance(
        every,
        window,
        asynchronous,
        plan_us=plan_ms * 1e3,
        layer_us=move.layer_us,
        threshold=math.inf if above is None else above,
        gb_per_s=move.gb_per_s,
        through=through,
        source=said(move, plan_ms * 1e3),
    )
