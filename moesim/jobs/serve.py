"""`serve`: requests through a service: TTFT, TPOT, end-to-end times, throughput, goodput."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from moesim.choices import MoeComm, Overlap, Router
from moesim.cluster import Cluster
from moesim.cluster.prices import Prices, check_names, parse_prices
from moesim.errors import InputError
from moesim.jobs import inputs
from moesim.jobs.arrivals import arriving_requests
from moesim.jobs.serve_result import ServeResult
from moesim.numerals import number
from moesim.serving.config import Level, ServingConfig
from moesim.serving.deployment import Deployment
from moesim.serving.fit import (
    Split,
    check_possible,
    default_pools,
    pools_text,
    service_gpus,
)
from moesim.serving.record import run_record
from moesim.serving.requests import Requests
from moesim.serving.routing import DomainRouting
from moesim.serving.run import simulate_serving
from moesim.serving.slo import parse_slo
from moesim.serving.speculative import Speculation
from moesim.serving.stall import stalls_of
from moesim.types import Progress

if TYPE_CHECKING:
    from moesim.jobs.inputs import ClusterLike, ModelLike, PlanLike, TraceLike

DRAFT_SHARE = 0.05
SPLIT = ("gpus", "replicas", "tp", "dp", "pp", "ep", "decode_gpus", "decode_replicas")
ENGINE = (
    "engine", "moe_comm", "redundant_experts", "two_batch_overlap", "expert_gpus", "micro_batches",
    "dispatch_tokens", "kv_scale", "kv_window", "expert_dtype", "kv_dtype", "max_batch_tokens",
    "max_sequences", "memory_fraction",
)  # fmt: skip
SERVICE = (
    "router", "length_error", "block_size", "prefix_cache", "shared_reads", "chunk_tokens", "seed",
)  # fmt: skip
"""Arguments of `serve` that go as they are: how GPUs are divided, of an engine, of the service."""
_LEVEL = re.compile(r"^(queue|refuse|shorten|demote)(?:@([0-9]{1,9}))?(?:=([0-9.]+))?$")


def serve(
    requests: Requests | str | os.PathLike[str],
    *,
    model: ModelLike | None = None,
    cluster: ClusterLike | None = None,
    gpus: int | None = None,
    replicas: int | None = None,
    tp: int | None = None,
    dp: int | None = None,
    pp: int = 1,
    ep: int | None = None,
    engine: str = "vllm",
    moe_comm: MoeComm | None = None,
    redundant_experts: int | None = None,
    two_batch_overlap: Overlap = "off",
    expert_gpus: int | None = None,
    micro_batches: int = 3,
    dispatch_tokens: int | None = None,
    kv_scale: float = 1.0,
    kv_window: int | None = None,
    expert_dtype: str | None = None,
    kv_dtype: str = "bf16",
    max_batch_tokens: int | None = None,
    max_sequences: int | None = None,
    memory_fraction: float | None = None,
    block_size: int = 16,
    prefix_cache: bool | None = None,
    shared_reads: bool = False,
    prefill: Literal["mixed", "first"] | None = None,
    chunk_tokens: int | None = None,
    router: Router = "least_loaded",
    length_error: float | None = None,
    decode_gpus: int | None = None,
    decode_replicas: int | None = None,
    transfer: float | None = None,
    speculate: float | Sequence[float] | None = None,
    drafts: int = 4,
    fixed_drafts: bool = False,
    draft_share: float | None = None,
    priorities: Sequence[float] | None = None,
    level: Sequence[str] = (),
    plan: PlanLike | None = None,
    trace: TraceLike | None = None,
    reroute: str | None = None,
    domain_mix: Mapping[str, float] | None = None,
    drift_hours: float | None = None,
    rebalance_every: Sequence[int] = (),
    rebalance_stall: Sequence[float] = (),
    slo: str | None = None,
    price: Sequence[str] = (),
    rate_scale: float = 1.0,
    first: int | None = None,
    skip_empty: bool = False,
    time_unit: str | None = None,
    block_tokens: int | None = None,
    until: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ServeResult:
    """Serve requests with a deployment.

    requests: a log by its path, or arrivals drawn as "poisson:rate=8,requests=2000,prompt=1000,
    output=200". time_unit, block_tokens: what a log does not say of itself. replicas, tp, dp, ep:
    what is left out is `serving.fit.default_split`'s, with a cluster given as an object in one
    engine. reroute: a rule of routing for the trace, as "drop:factor=1.25" for a capacity factor;
    expert loads are of what it leaves, messages of the model's top-k. rebalance_every,
    rebalance_stall: steps between two placements and ms that each stops an engine; two of each for
    engines that take prompts and engines that decode, one for both; without ms as long as moving
    all layers takes. speculate: the probability that a drafted token is accepted, or those of the
    first, the second and so on; without `draft_share` the model's multi-token-prediction layer
    drafts, where it has one. The other names and defaults
    are those of `moesim serve`; progress(done, total) counts requests.

    Raises InputError where the GPUs do not divide or nothing names the model, InfeasibleError where
    the model does not fit or a promise cannot be kept even by an idle service.
    """
    given = dict(locals())
    if prefill not in (None, "mixed", "first"):
        raise InputError(f"`prefill` {prefill}", "give mixed or first")
    if reroute is not None and trace is None:
        raise InputError("`reroute` without `trace`", "give the trace that the rule changes")
    promises = parse_slo(slo) if slo is not None else None
    prices = Prices(parse_prices(list(price)))
    defaults: dict[str, str] = {}
    arriving = arriving_requests(
        requests,
        seed=seed,
        skip_empty=skip_empty,
        time_unit=time_unit,
        block_tokens=block_tokens,
        first=first,
        rate_scale=rate_scale,
    )
    if priorities is not None:
        arriving = arriving.with_priorities(list(priorities), seed)
    options = {name: given[name] for name in ENGINE}
    options["mtp"] = speculate is not None and draft_share is None
    routed, changed = None, None
    if trace is not None:
        whole = inputs.token_trace_of(trace, "moesim serve")
        routed, changed = inputs.rerouted(whole, reroute, seed=seed)
    asked = {name: given[name] for name in SPLIT}
    front, back = _pools(model, cluster, plan, routed, asked, options, defaults)
    pools = [front.engine, *([] if back is None else [back.engine])]
    check_names(prices.given, {gpu.name for one in pools for gpu in one.cluster.gpus})
    config = _config(front, back, given, defaults)
    if promises is not None:
        check_possible(promises, front.engine, arriving, config)
    begin = time.perf_counter()
    result = simulate_serving(front.engine, arriving, config, progress=progress)
    return ServeResult(
        run_record(
            front.engine,
            arriving,
            config,
            result,
            slo=promises,
            defaults=defaults,
            notices=(*arriving.notices, *([] if changed is None else [changed])),
            seconds=time.perf_counter() - begin,
            prices=prices,
        )
    )


def _config(
    front: Split, back: Split | None, given: Mapping[str, Any], defaults: dict[str, str]
) -> ServingConfig:
    """The service around its engines. given: `serve`'s arguments."""
    engines = [split.engine for split in (front, back) if split is not None]
    until, prefill = given["until"], given["prefill"]
    return ServingConfig(
        replicas=front.replicas,
        decode=None if back is None else back.engine,
        decode_replicas=1 if back is None else back.replicas,
        transfer_gb_per_s=given["transfer"],
        prefill_first=None if prefill is None else prefill == "first",
        speculation=_speculation(
            front.engine,
            given["speculate"],
            given["drafts"],
            given["fixed_drafts"],
            given["draft_share"],
            defaults,
        ),
        levels=_level_rules(given["level"]),
        routing=_routing(front.engine, given["domain_mix"], given["drift_hours"], given["seed"]),
        stalls=stalls_of(given["rebalance_every"], given["rebalance_stall"], engines),
        until_s=float("inf") if until is None else until,
        **{name: given[name] for name in SERVICE},
    )


def _pools(
    model: ModelLike | None,
    cluster: ClusterLike | None,
    plan: PlanLike | None,
    trace: TraceLike | None,
    asked: dict[str, int | None],
    options: dict[str, Any],
    defaults: dict[str, str],
) -> tuple[Split, Split | None]:
    """The front (or only) engines, and the decoding ones. asked: `gpus` and how they are divided,
    None for the default."""
    from moesim.cluster import DEFAULT_CLUSTER

    made = inputs.plan_of(plan) if plan is not None else None
    routed = inputs.token_trace_of(trace, "moesim serve") if trace is not None else None
    named = (made.model if made is not None else "") or (
        routed.meta.model if routed is not None else ""
    )
    if model is None and not named:
        raise InputError(
            "nothing says which model is served", "name one with `model` (a preset or config.json)"
        )
    spec = inputs.model_required(model, named, "the plan or trace")
    options["mtp"] = options["mtp"] and spec.mtp_layers > 0
    split = dict(asked)
    gpus = split.pop("gpus")
    if gpus is None:
        apart = options["expert_gpus"]
        gpus = service_gpus(split["replicas"], split["tp"], split["dp"], split["pp"] or 1, apart)
        if isinstance(cluster, Cluster):
            gpus = cluster.num_gpus
        elif made is not None:
            gpus = made.placement.num_gpus * (split["replicas"] or 1)
        defaults["GPUs"] = str(gpus)
    if cluster is None:
        cluster = defaults["cluster"] = DEFAULT_CLUSTER
    if isinstance(cluster, Cluster) and split["replicas"] is None:
        split["replicas"] = 1
    front, back = default_pools(
        spec, partial(inputs.cluster_of, cluster), gpus, **split, **options, plan=made, trace=routed
    )
    defaults["deployment"] = pools_text(front, back)
    if made is not None and back is not None and back.engine.num_gpus != front.engine.num_gpus:
        raise InputError(
            f"the plan is for {front.engine.num_gpus} GPUs, a decoding engine has"
            f" {back.engine.num_gpus}",
            "give prompts and decoding engines of the plan's size, or no plan",
        )
    return front, back


def _speculation(
    deployment: Deployment,
    speculate: float | Sequence[float] | None,
    drafts: int,
    fixed: bool,
    share: float | None,
    defaults: dict[str, str],
) -> Speculation | None:
    if speculate is None:
        if share is not None:
            raise InputError("`draft_share` without `speculate`", "give an acceptance, as 0.7")
        return None
    given = tuple(speculate) if isinstance(speculate, Sequence) else (speculate,)
    if deployment.mtp:
        defaults["drafting"] = "multi-token-prediction layer"
        return Speculation(given, drafts, 0.0, fixed)
    if share is None:
        defaults["drafting"] = f"{DRAFT_SHARE:g} of a step per token"
    return Speculation(given, drafts, DRAFT_SHARE if share is None else share, fixed)


def _level_rules(texts: Sequence[str]) -> tuple[Level, ...]:
    """Levels from texts such as "queue", "refuse@8" and "shorten@8=0.5"."""
    out = []
    for text in texts:
        found = _LEVEL.match(text)
        if found is None or (found[3] is not None and found[1] != "shorten"):
            raise InputError(
                f"`level` {text!r:.60}", "write queue, refuse@8, shorten@8=0.5 or demote@8"
            )
        share = numbers(found[3], "level")[0] if found[3] is not None else 0.5
        out.append(Level(found[1], int(found[2] or 0), share))  # type: ignore[arg-type]
    return tuple(out)


def _routing(
    deployment: Deployment, mix: Mapping[str, float] | None, drift_hours: float | None, seed: int
) -> DomainRouting | None:
    """The domains of the deployment's trace. Raises InputError for a mix without a trace."""
    if deployment.trace is None:
        if mix is not None or drift_hours is not None:
            raise InputError(
                "a domain mix or drift without a routing trace", "name one with `trace`"
            )
        return None
    hours = float("inf") if drift_hours is None else drift_hours
    weights = None if mix is None else dict(mix)
    return DomainRouting(deployment.trace, weights, hours * 3600.0, seed)


def numbers(text: str, name: str) -> list[float]:
    """Numbers with commas between. Raises InputError that names the field."""
    try:
        return [number(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"`{name}` {text!r:.60} holds no number", "give numbers") from None
