"""What the evaluators that route a trace share: its model, and plans made once for many points."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from moesim.errors import InputError, UnknownNameError
from moesim.studies.evaluator import Evaluator, Factor, Params, Tokens, Whole, Word
from moesim.studies.inputs import (
    check_rule,
    kept,
    model_hash,
    model_of,
    rerouted_trace,
    trace_hash,
    trace_of,
)

if TYPE_CHECKING:
    from moesim.jobs.plan_result import PlanResult
    from moesim.model.spec import ModelSpec

DEFAULT_TIME_LIMIT_S = 600.0


class RoutingParams(Params):
    """Parameters of a placement on a routing trace. reroute: a rule of routing that it goes through
    first, as "drop:factor=1.25"."""

    trace: Word
    reroute: Word | None = None
    model: Word | None = None
    solver: Word = "local_search"
    objective: Word | None = None
    redundant_experts: Annotated[Whole, Field(ge=0, le=1 << 20)] = 0
    phase: Literal["prefill", "decode"] | None = None
    batch_tokens: Tokens | None = None
    replica_policy: Literal["split", "hash", "nearest", "lp"] = "split"
    all_to_all: Word | None = None
    seed: Annotated[Whole, Field(ge=0, le=2**31)] = 0
    time_limit_s: Annotated[float, Field(gt=0, le=1e6)] = DEFAULT_TIME_LIMIT_S
    check_memory: bool = True
    load_scale: Factor = 1.0


class RoutingEvaluator(Evaluator):
    """Inputs of evaluators over `RoutingParams`."""

    def check_named(self, params: Mapping[str, Any]) -> None:
        super().check_named(params)
        trace_of(params["trace"])
        check_rule(params)
        if params["model"] is not None:
            model_of(params["model"])

    def inputs(self, params: Mapping[str, Any]) -> dict[str, str]:
        found = {**super().inputs(params), "trace": trace_hash(params["trace"])}
        name = model_name(params)
        if name is not None:
            found["model"] = model_hash(name)
        return found


def model_name(params: Mapping[str, Any]) -> str | None:
    """The model asked for, else the preset that the trace names; None where it names none."""
    from moesim.model.names import preset_aliases

    if params["model"] is not None:
        return str(params["model"])
    name = trace_of(params["trace"]).meta.model
    try:
        preset_aliases(name)
    except UnknownNameError:
        return None
    return name


def model_required(params: Mapping[str, Any]) -> ModelSpec:
    """The model of a point. Raises InputError where it is not known."""
    name = model_name(params)
    if name is None:
        raise InputError(
            "the trace names no model whose sizes are known", "fix the model: --set model=NAME"
        )
    return model_of(name)


def batch_tokens(params: Mapping[str, Any]) -> int | None:
    """Tokens of a step, times `load_scale`; None for the default of the phase."""
    from moesim.planning.request import DEFAULT_BATCH_TOKENS

    scale = params["load_scale"]
    tokens = params["batch_tokens"]
    if tokens is None:
        if scale == 1.0:
            return None
        tokens = DEFAULT_BATCH_TOKENS[phase_of(params)]
    return max(1, round(tokens * scale))


def phase_of(params: Mapping[str, Any]) -> Literal["prefill", "decode"]:
    """The phase asked for, else prefill where the trace has any."""
    if params["phase"] is not None:
        return params["phase"]  # type: ignore[no-any-return]
    has_prefill = (trace_of(params["trace"]).phases == 0).any()
    return "prefill" if has_prefill else "decode"


def plan_of(evaluator: Evaluator, params: Mapping[str, Any]) -> PlanResult:
    """The evaluated plan of a point, made once for points that share it."""
    from moesim.jobs.plan import make_plan
    from moesim.planning.request import PlanRequest

    names = RoutingParams.model_fields
    shared = {name: params[name] for name in names if name in params}
    trace, changed = rerouted_trace(params, batch_tokens(params))
    name = model_name(params)
    request = PlanRequest.of(
        trace=trace,
        cluster=evaluator.cluster(params),
        model=model_of(name) if name is not None else None,
        objective=params["objective"],
        solver=params["solver"],
        redundant_experts=params["redundant_experts"],
        phase=phase_of(params),
        batch_tokens=batch_tokens(params),
        replica_policy=params["replica_policy"],
        all_to_all=params["all_to_all"],
        seed=params["seed"],
        time_limit_s=params["time_limit_s"],
        check_memory=params["check_memory"],
        network_scale=params["network_scale"],
        proof=False,
    )
    content = json.dumps([shared, trace.content_hash() if trace.path == "" else trace.path])

    def make() -> PlanResult:
        made = make_plan(request)
        return replace(made, notices=(*changed, *made.notices))

    return kept(f"plan {content}", params["trace"], make)  # type: ignore[no-any-return]
