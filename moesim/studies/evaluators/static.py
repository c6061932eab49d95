"""Points as closed-loop load tests: a fixed number of requests in flight, all of one length.

The GPUs are cut into `replicas` engines of tp x dp x pp GPUs, each with its share of the requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

import numpy as np
from pydantic import Field, model_validator

from moesim.choices import MoeComm, Overlap
from moesim.errors import InputError, UnknownNameError
from moesim.figures import count, figures_named
from moesim.model.dtypes import KV_BYTES, WEIGHT_BYTES
from moesim.serving.engines import engine_profile
from moesim.serving.fit import DEFAULT_GPUS, Split, default_pools, service_gpus
from moesim.serving.speculative import MAX_DRAFTS, Speculation, speculation_of
from moesim.studies.evaluator import (
    Evaluated,
    Evaluator,
    Factor,
    Gpus,
    Number,
    Params,
    Tokens,
    Whole,
    Word,
)
from moesim.studies.inputs import (
    check_rule,
    cluster_of,
    model_hash,
    model_of,
    rerouted_trace,
    trace_hash,
    trace_of,
)

if TYPE_CHECKING:
    from moesim.placement import Plan
    from moesim.serving.deployment import Deployment

Degree = Annotated[Whole, Field(ge=1, le=65_536)]
STATS = ("mean", "p50", "p90", "p99")


class DeploymentParams(Params):
    """What a deployment is made of. What is left out of tp, dp, ep and replicas is
    `serving.fit.default_split`'s; gpus without the others is DEFAULT_GPUS."""

    gpus: Gpus = DEFAULT_GPUS
    model: Word
    engine: Word = "vllm"
    replicas: Degree | None = None
    tp: Degree | None = None
    dp: Degree | None = None
    pp: Degree = 1
    ep: Degree | None = None
    moe_tp: Degree | None = None
    moe_comm: Word | None = None
    expert_dtype: Word | None = None
    dense_dtype: Word | None = None
    kv_dtype: Word = "bf16"
    max_batch_tokens: Tokens | None = None
    max_sequences: Degree | None = None
    memory_fraction: Annotated[Number, Field(gt=0, le=1)] | None = None
    trace: Word | None = None
    reroute: Word | None = None
    solver: Word | None = None
    redundant_experts: Annotated[Whole, Field(ge=0, le=1 << 20)] | None = None
    two_batch_overlap: Overlap = "off"
    expert_gpus: Degree | None = None
    micro_batches: Degree = 3
    dispatch_tokens: Degree | None = None
    speculate: Annotated[Number, Field(gt=0, lt=1)] | None = None
    drafts: Annotated[Whole, Field(ge=1, le=MAX_DRAFTS)] = 4
    draft_share: Annotated[Number, Field(ge=0, le=100)] | None = None
    kv_scale: Annotated[Number, Field(gt=0, le=1)] = 1.0
    seed: Annotated[Whole, Field(ge=0, le=2**31)] = 0
    imbalance_scale: Factor = 1.0

    @model_validator(mode="before")
    @classmethod
    def _gpus(cls, raw: Any) -> Any:
        """`gpus` where tp, dp, pp and replicas say it."""
        if not isinstance(raw, dict):
            return raw
        given = {name: raw.get(name) for name in ("replicas", "tp", "dp", "pp")}
        known = {name: value for name, value in given.items() if value is not None}
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in known.values()):
            return raw
        gpus = raw.get("gpus")
        if gpus is None:
            apart = raw.get("expert_gpus")
            apart = apart if isinstance(apart, int) else None
            sizes = service_gpus(
                given["replicas"], given["tp"], given["dp"], given["pp"] or 1, apart
            )
            return {**raw, "gpus": sizes}
        product = prod(known.values())
        pools = raw.get("decode_gpus") or raw.get("expert_gpus")
        if isinstance(gpus, int) and not pools and gpus % product:
            said = " x ".join(f"{name} {value}" for name, value in known.items())
            raise ValueError(f"{count(gpus, 'GPU')} cannot be divided over {said}")
        return raw


class StaticParams(DeploymentParams):
    """concurrency: requests in flight over all replicas. num_requests: of a replica's test, ten
    times its share where None."""

    input_tokens: Tokens = 1024
    output_tokens: Tokens = 128
    concurrency: Annotated[Whole, Field(ge=1, le=1_000_000)] = 64
    num_requests: Annotated[Whole, Field(ge=1, le=1_000_000)] | None = None
    range_ratio: Annotated[Number, Field(gt=0, le=1)] = 1.0
    load_scale: Factor = 1.0


class DeploymentEvaluator(Evaluator):
    """Inputs of evaluators over `DeploymentParams`."""

    def check_named(self, params: Mapping[str, Any]) -> None:
        super().check_named(params)
        engine_profile(params["engine"])
        model_of(params["model"])
        if params["trace"] is not None:
            trace_of(params["trace"])
        check_rule(params)
        for name, known in (
            ("expert_dtype", WEIGHT_BYTES),
            ("dense_dtype", WEIGHT_BYTES),
            ("kv_dtype", KV_BYTES),
            ("moe_comm", get_args(MoeComm)),
        ):
            if params[name] is not None and params[name] not in known:
                raise UnknownNameError(name, params[name], known)

    def inputs(self, params: Mapping[str, Any]) -> dict[str, str]:
        found = super().inputs(params)
        found["model"] = model_hash(params["model"])
        if params["trace"] is not None:
            found["trace"] = trace_hash(params["trace"])
        return found


class StaticEvaluator(DeploymentEvaluator):
    """TTFT and TPOT under a fixed number of requests in flight."""

    name: ClassVar = "static"
    about: ClassVar = "TTFT, TPOT and throughput with a fixed number of requests in flight"
    params: ClassVar = StaticParams
    figures: ClassVar = figures_named(
        *(f"ttft_{stat}" for stat in STATS),
        *(f"tpot_{stat}" for stat in STATS),
        "output_tokens_per_s",
        "output_tokens_per_s_per_gpu",
        "output_tokens_per_s_per_user",
        "kv_token_capacity",
    )
    goal: ClassVar = "output_tokens_per_s_per_gpu"
    throughput: ClassVar = "output_tokens_per_s"
    front: ClassVar = ("tpot_mean", "output_tokens_per_s_per_gpu")
    scales: ClassVar = {
        "network bandwidth": "network_scale",
        "compute": "compute_scale",
        "load": "load_scale",
        "imbalance": "imbalance_scale",
    }

    def evaluate(self, params: Mapping[str, Any]) -> Evaluated:
        from moesim.serving.memory import gpu_memory
        from moesim.serving.static import LoadTest, run_load_test
        from moesim.serving.step_cost import EngineStepCost

        (split, _), notes = service_of(params)
        deployment, replicas = split.engine, split.replicas
        in_flight = max(1, round(params["concurrency"] * params["load_scale"]))
        share = -(-in_flight // replicas)
        cost = EngineStepCost(deployment)
        test = LoadTest(
            params["input_tokens"],
            params["output_tokens"],
            share,
            params["num_requests"],
            params["range_ratio"],
            params["seed"],
        )
        speculation, _ = drafting_of(params, deployment)
        result = run_load_test(cost, test, speculation)
        rate = result.steady_output_tokens_per_s * in_flight / share
        if not result.has_middle:
            notes = (*notes, "fewer than three requests for each in flight: rates hold the warm-up")
        out: dict[str, float | None] = {
            **_stats("ttft", result.ttft_ms),
            **_stats("tpot", result.tpot_ms),
            "output_tokens_per_s": rate,
            "output_tokens_per_s_per_gpu": rate / params["gpus"],
            "kv_token_capacity": float(
                gpu_memory(deployment).kv_token_capacity * deployment.dp * replicas
            ),
        }
        tpot = out["tpot_mean"]
        out["output_tokens_per_s_per_user"] = 1 / tpot if tpot else None
        return Evaluated(out, cost.basis, (*notes, *cost.notes), str(split))


def drafting_of(
    params: Mapping[str, Any], deployment: Deployment
) -> tuple[Speculation | None, str]:
    """Speculation of a point, as `moesim serve` has it, and who drafts."""
    fixed = params.get("fixed_drafts", True)
    given = (params["speculate"], params["drafts"], fixed, params["draft_share"])
    return speculation_of(deployment, *given)


def service_of(
    params: Mapping[str, Any],
) -> tuple[tuple[Split, Split | None], tuple[str, ...]]:
    """The engines of a point, prompts' and decoding ones, hardware scaled; and remarks."""
    names = (
        "engine", "tp", "dp", "pp", "ep", "moe_tp", "moe_comm", "expert_dtype", "dense_dtype",
        "kv_dtype", "max_batch_tokens", "max_sequences", "memory_fraction", "replicas",
        "two_batch_overlap", "expert_gpus", "micro_batches", "dispatch_tokens", "kv_scale",
    )  # fmt: skip
    given = {name: params[name] for name in names}
    given["kv_window"] = params.get("kv_window")
    if params["trace"] is None:
        given["redundant_experts"] = params["redundant_experts"]
    trace, changed = None, tuple[str, ...]()
    if params["trace"] is not None:
        trace, changed = rerouted_trace(params)
    elif params["reroute"] is not None:
        raise InputError("`reroute` without `trace`", "fix one: --set trace=sample:debian-moe")
    sized = partial(cluster_of, params["cluster"])
    model = model_of(params["model"])
    drafts = params["speculate"] is not None and params["draft_share"] is None
    given["mtp"] = drafts and model.mtp_layers > 0
    back = {name: params.get(name) for name in ("decode_gpus", "decode_replicas")}
    pools = default_pools(model, sized, params["gpus"], **back, **given, trace=trace)
    plan, notes = _plan(params, pools[0].engine)
    if plan is not None:
        given |= {"tp": pools[0].engine.tp, "dp": pools[0].engine.dp}
        pools = default_pools(model, sized, params["gpus"], **back, **given, trace=trace, plan=plan)
    front, decode = (
        None if one is None else replace(one, engine=_scaled(one.engine, params)) for one in pools
    )
    assert front is not None
    return (front, decode), (*changed, *(n for n in notes if n not in changed))


def _scaled(deployment: Deployment, params: Mapping[str, Any]) -> Deployment:
    """`deployment` on hardware, and with routing, changed by the scales of `params`."""
    from moesim.cost.scaled import faster_calibration
    from moesim.serving.deployment import calibration_of

    network, compute = params["network_scale"], params["compute_scale"]
    out = replace(deployment, imbalance_scale=params["imbalance_scale"])
    if (network, compute) == (1.0, 1.0):
        return out
    cluster = deployment.cluster
    gpus = tuple(replace(gpu, hbm_gb_per_s=gpu.hbm_gb_per_s * compute) for gpu in cluster.gpus)
    return replace(
        out,
        cluster=replace(cluster, gpus=gpus),
        calibration=faster_calibration(
            calibration_of(deployment), network=network, compute=compute
        ),
    )


def _plan(params: Mapping[str, Any], engine: Deployment) -> tuple[Plan | None, tuple[str, ...]]:
    """The placement that `solver` or `redundant_experts` ask for."""
    from moesim.studies.evaluators.routing import RoutingParams, plan_of

    if params["trace"] is None and params["solver"] is not None:
        raise InputError(
            "solver places experts by a routing trace, and there is none",
            "fix one: --set trace=sample:debian-moe",
        )
    if params["trace"] is None or (params["solver"] is None and not params["redundant_experts"]):
        return None, ()
    groups = params["ep"] or engine.ep
    content = RoutingParams(
        cluster=params["cluster"],
        gpus=groups,
        trace=params["trace"],
        reroute=params["reroute"],
        model=params["model"],
        solver=params["solver"] or "eplb",
        redundant_experts=params["redundant_experts"] or 0,
        objective="balance",
        seed=params["seed"],
        check_memory=False,
    ).model_dump()
    result = plan_of(_Placing(), content)
    return result.plan, result.notices


class _Placing(Evaluator):
    """A stand-in for `plan_of`, which asks for the cluster alone."""


def _stats(name: str, times_ms: np.ndarray) -> dict[str, float | None]:
    """Mean and percentiles in seconds; None where no request has the figure."""
    values = times_ms[np.isfinite(times_ms)] / 1e3
    if not len(values):
        return {f"{name}_{stat}": None for stat in STATS}
    found = {f"{name}_{q}": float(np.percentile(values, float(q[1:]))) for q in STATS[1:]}
    return {f"{name}_mean": float(values.mean()), **found}
