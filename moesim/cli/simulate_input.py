"""What `moesim simulate` reads, and the defaults it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from moesim.caching.batching import Batching
    from moesim.caching.plan import CachePlan
    from moesim.cluster import Cluster
    from moesim.jobs.simulate import FaultSpec
    from moesim.model.spec import ModelSpec
    from moesim.placement import Plan
    from moesim.sim.capacity import DropPolicy
    from moesim.sim.rebalance import Rebalance
    from moesim.trace.format import Trace

DEFAULT_POOL = 32
DEFAULT_PATIENCE = 16


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Loaded inputs and the defaults taken on the way."""

    trace: Trace
    plan: Plan | None
    cluster: Cluster
    model: ModelSpec
    defaults: dict[str, str] = field(default_factory=dict)
    caches: tuple[CachePlan, ...] = ()


def load_inputs(
    trace: str,
    plan: Path | None,
    cluster: str | None,
    gpus: int | None,
    model: str | None,
    offload: bool = True,
) -> Inputs:
    """Read all files. The cluster defaults to the plan's by name, the GPUs to the plan's number.

    `plan` may be a cache plan by itself, for one GPU; `offload` False leaves the caches of a plan
    out. Raises InputError where a cache plan is all there is and is to be left out.
    """
    from moesim.caching.group import parse_group
    from moesim.caching.plan import is_cache_plan, load_cache_plan
    from moesim.cluster import DEFAULT_CLUSTER, cluster_names, load_cluster
    from moesim.model.names import load_model
    from moesim.placement import load_plan
    from moesim.trace.format import load_token_trace

    defaults: dict[str, str] = {}
    loaded = load_token_trace(trace, "moesim simulate")
    made: Plan | None = None
    caches: tuple[CachePlan, ...] = ()
    if plan is not None and is_cache_plan(plan):
        if not offload:
            raise InputError(
                f"{plan} holds nothing but a cache plan, and --no-offload leaves it out",
                "give a plan of moesim plan, or none for the linear placement",
            )
        caches = (load_cache_plan(plan),)
        gpus = 1 if gpus is None else gpus
        if cluster is None:
            cluster = _cluster_with(caches[0].gpu)
            defaults["cluster"] = cluster
        model = model or caches[0].model or None
    elif plan is not None:
        made = load_plan(plan)
        if made.cache is not None and offload:
            caches = parse_group(made.cache)
    if cluster is None:
        planned = str(made.provenance.get("cluster", "")) if made is not None else ""
        cluster = planned if planned in cluster_names() else DEFAULT_CLUSTER
        defaults["cluster"] = cluster
    if gpus is None and made is not None:
        gpus = made.placement.num_gpus
    name = model or (str(made.model) if made is not None and made.model else loaded.meta.model)
    if not name:
        raise InputError(
            "the trace names no model, so its sizes are not known",
            "name one with --model (a preset or a Hugging Face config.json)",
        )
    try:
        spec = load_model(name)
    except UnknownNameError:
        if model is not None:
            raise
        raise InputError(
            f"the trace is of {name!r}, whose sizes are not known",
            "name a preset or a Hugging Face config.json with --model",
        ) from None
    return Inputs(loaded, made, load_cluster(cluster, num_gpus=gpus), spec, defaults, caches)


def _cluster_with(gpu: str) -> str:
    """A bundled cluster of GPUs called `gpu`. Raises InputError."""
    from moesim.cluster import cluster_names, load_cluster

    for name in cluster_names():
        if load_cluster(name, num_gpus=1).gpus[0].name == gpu:
            return name
    raise InputError(
        f"no bundled cluster has GPUs of the type {gpu!r:.40} that the cache plan is for",
        "name one with --cluster (moesim topology list)",
    )


def batching_of(order: str | None, pool: int | None, patience: int | None) -> Batching | None:
    """How batches are to be formed. Raises InputError for options without an order."""
    from moesim.caching.batching import Batching

    if order is None:
        if pool is not None or patience is not None:
            raise InputError(
                "a pool of requests was given, but not how to batch them", "add --batching"
            )
        return None
    return Batching(
        order,  # type: ignore[arg-type]
        DEFAULT_POOL if pool is None else pool,
        DEFAULT_PATIENCE if patience is None else patience,
    )


def drop_policy(
    trace: Trace, factor: float | None, keep: str | None, scope: str, expand: bool, seed: int
) -> DropPolicy | None:
    """The capacity of experts that was asked for. Raises InputError for options without one."""
    from moesim.sim.capacity import DropPolicy

    if factor is None:
        if keep is not None or expand or scope != "step":
            raise InputError(
                "how to drop was given, but no capacity", "add --capacity-factor, as 1.5"
            )
        return None
    if keep is None:
        keep = "score" if trace.gate_weights is not None else "first"
    return DropPolicy(factor, keep, scope, expand, seed)  # type: ignore[arg-type]


def fault_spec(
    cluster: Cluster,
    model: ModelSpec,
    faults: list[str],
    mtbf_ms: float | None,
    repair_ms: float | None,
    on_loss: str,
    detect_ms: float,
    restart_ms: float,
) -> FaultSpec:
    """The faults that were asked for. A GPU has as many spare slots a layer as its memory has room
    for experts beyond one copy of everything else. Raises InputError."""
    from moesim.jobs.plan import HBM_USABLE
    from moesim.jobs.simulate import FaultSpec
    from moesim.sim.faults import Recovery, parse_fault

    if repair_ms is not None and mtbf_ms is None:
        raise InputError("--repair without --mtbf", "give the mean time between failures as well")
    least = min(gpu.hbm_gb for gpu in cluster.gpus) * 1e9 * HBM_USABLE
    experts = (least - model.non_expert_bytes()) / (model.expert_bytes() * model.num_moe_layers)
    own = -(-model.num_experts // cluster.num_gpus)
    return FaultSpec(
        tuple(parse_fault(text, cluster) for text in faults),
        math.inf if mtbf_ms is None else mtbf_ms * 1e3,
        math.inf if repair_ms is None else repair_ms * 1e3,
        Recovery(
            on_loss=on_loss,  # type: ignore[arg-type]
            detect_us=detect_ms * 1e3,
            restart_us=restart_ms * 1e3,
            spare_slots=max(0, int(experts) - own),
        ),
    )


def rebalance_policy(
    every: int | None, window: int, asynchronous: bool, plan_ms: float, above: float | None
) -> Rebalance | None:
    """The placing anew that was asked for. Raises InputError for options without an interval."""
    from moesim.sim.rebalance import Rebalance

    if every is None:
        if asynchronous or above is not None:
            raise InputError("how to rebalance was given, but not when", "add --rebalance-every")
        return None
    return Rebalance(
        every,
        window,
        asynchronous,
        plan_us=plan_ms * 1e3,
        threshold=math.inf if above is None else above,
    )


def choice(kind: str, value: str | None, known: tuple[str, ...]) -> str | None:
    """`value` if it is known or None. Raises UnknownNameError."""
    if value is not None and value not in known:
        raise UnknownNameError(kind, value, known)
    return value


def writable(*targets: Path | None) -> None:
    """Raise InputError before any work for an output whose folder does not exist."""
    for target in targets:
        if target is not None and not target.resolve().parent.is_dir():
            raise InputError(
                f"cannot write {target}: there is no folder {target.parent}",
                "name a file in a folder that exists",
            )
