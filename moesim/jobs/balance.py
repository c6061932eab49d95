"""`balance`: is balancing worth it, which scheme, and with which settings?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moesim.choices import Phase
from moesim.errors import InputError, MoesimError
from moesim.jobs import inputs
from moesim.jobs.arrivals import arriving_requests
from moesim.jobs.balance_points import break_even as find_break_even
from moesim.jobs.balance_result import BalanceResult, Row
from moesim.planning.balancing.bench import PARTS, Bench, Costs, Outcome, Scheme
from moesim.planning.balancing.course import Course, make_course
from moesim.planning.balancing.lineup import NONE, Asked, lineup
from moesim.planning.balancing.service import Load, Served, serve_schemes
from moesim.planning.case import token_case
from moesim.planning.evaluate import Interval
from moesim.planning.request import PlanRequest, check_options
from moesim.planning.worth import worth_by_domain
from moesim.serving.config import Stall
from moesim.serving.deployment import deploy
from moesim.serving.memory import gpu_memory
from moesim.serving.slo import parse_slo
from moesim.trace.empty import loaded_layers, only_layers, require_load
from moesim.types import FloatArray, Progress

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.jobs.inputs import ClusterLike, ModelLike, TraceLike
    from moesim.model.spec import ModelSpec
    from moesim.serving.requests import Requests
    from moesim.serving.slo import Slo
    from moesim.trace.format import Trace

DEFAULT_STEPS = 12_000
DEFAULT_SEARCH_S = 60.0


def balance(
    trace: TraceLike,
    *,
    gpus: int | None = None,
    cluster: ClusterLike | None = None,
    model: ModelLike | None = None,
    phase: Phase | None = None,
    batch_tokens: int | None = None,
    redundant_experts: int | None = None,
    steps: int = DEFAULT_STEPS,
    drift: bool = False,
    schemes: Sequence[str] = (),
    interval: int | None = None,
    window: int | None = None,
    threshold: float | None = None,
    layers_per_chunk: int | None = None,
    rebalance_async: bool = False,
    rebalance_plan: float = 10.0,
    rebalance_layer: float = 9.0,
    requests: Requests | str | os.PathLike[str] | None = None,
    first: int | None = None,
    rate_scale: float = 1.0,
    slo: str | None = None,
    break_even: bool = False,
    all_to_all: str | None = None,
    time_limit: float = DEFAULT_SEARCH_S,
    ignore_memory: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> BalanceResult:
    """Compare ways to balance experts on held-out requests in their order: MoE time per step with
    stalls, and what redundant slots take from the KV cache.

    redundant_experts: slots beyond one for each expert in the schemes that use them, one per GPU by
    default. interval, window, threshold, layers_per_chunk, rebalance_async: EPLB once more with
    these, beside the engines' defaults. The other names and defaults are those of `moesim balance`;
    requests: a log, or arrivals drawn, as for `serve`: every scheme serves them too, and time per
    output token decides. break_even: compare at other batches and paces of drift too.
    progress(done, total) counts schemes.

    Raises MismatchError where inputs do not belong together, InfeasibleError where the experts do
    not fit the memory, UnknownNameError for names and InputError for numbers that cannot be used.
    """
    if gpus is None and not hasattr(cluster, "num_gpus"):
        raise InputError("the number of GPUs is not given", "give it with `gpus`")
    loaded = inputs.token_trace_of(trace, "moesim balance")
    loaded = only_layers(loaded, require_load(loaded_layers(loaded)))
    defaults: dict[str, str] = {}
    spec = inputs.model_required(model, loaded.meta.model)
    sized = inputs.cluster_of(cluster, gpus, defaults)
    if sized.num_gpus > loaded.num_experts:
        raise InputError(
            f"{sized.num_gpus} GPUs for {loaded.num_experts} experts: some would hold none",
            f"use at most {loaded.num_experts} GPUs",
        )
    least = -loaded.num_experts % sized.num_gpus
    extra = _extra(redundant_experts, least, sized.num_gpus, loaded.num_experts, defaults)
    asked = Asked(interval, window, threshold, layers_per_chunk, rebalance_async)
    hierarchical = sized.num_nodes > 1 and spec.n_group % sized.num_nodes == 0
    some = lineup(extra, least, hierarchical, asked, tuple(schemes))
    request = PlanRequest.of(
        loaded,
        sized,
        spec,
        objective="time",
        phase=phase,
        batch_tokens=batch_tokens,
        redundant_experts=least,
        all_to_all=all_to_all,
        seed=seed,
        time_limit_s=time_limit,
        check_memory=not ignore_memory,
    )
    check_options(request)
    case = token_case(request)
    data = case.data
    assert data is not None
    assert case.step is not None
    course = make_course(
        loaded,
        data.tune,
        data.held_out,
        data.phase,
        data.batch_tokens,
        steps,
        seed,
        drift=drift,
    )
    if steps == DEFAULT_STEPS:
        defaults["steps"] = f"{steps:,}"
    costs = Costs(plan_us=rebalance_plan * 1e3, layer_us=rebalance_layer * 1e3)
    bench = Bench(course, case.step, sized, spec, case.problem.capacity, case.problem, costs)
    filled = float(np.diff(course.batches.indptr).mean())
    if filled < 0.9 * data.batch_tokens:
        case.notices.append(
            f"the held-out requests fill steps of {filled:.0f} tokens only, {data.batch_tokens}"
            " asked"
        )
    outcomes = []
    for done, scheme in enumerate(some):
        outcomes.append(scheme.run(bench))
        if progress is not None:
            progress(done + 1, len(some))
    case.notices.extend(bench.notices)
    worth = worth_by_domain(
        replace(case.problem, capacity=bench.room(extra)),
        loaded,
        data.tune,
        data.held_out,
        data.phase,
        data.batch_tokens,
    )
    if worth is not None:
        case.notices.extend(worth.notices())
    served = None
    kv = _kv_bytes(spec, sized, case.notices)
    charged = data.phase == "decode" and kv is not None
    rows = _rows(bench, some, outcomes, kv, charged)
    if requests is not None:
        arriving = arriving_requests(requests, seed=seed, first=first, rate_scale=rate_scale)
        promises = parse_slo(slo) if slo is not None else None
        served = _served(rows, spec, sized, loaded, arriving, promises)
    elif slo is not None or first is not None or rate_scale != 1.0:
        raise InputError(
            "`slo`, `first` and `rate_scale` are about requests, and there are none",
            "give a log or arrivals with `requests`",
        )
    result = BalanceResult(
        model=spec.name,
        cluster=sized.name,
        num_gpus=sized.num_gpus,
        phase=data.phase,
        batch_tokens=data.batch_tokens,
        num_steps=steps,
        num_judged=len(course.step_of),
        num_requests=course.num_requests,
        stretches=course.names,
        rows=rows,
        served=served,
        points=None,
        step=case.step,
        charged_for_kv=charged,
        redundant_experts=least + extra,
        worth=worth,
        defaults={**case.defaults, **defaults},
        notices=tuple(case.notices),
    )
    if not break_even:
        return result

    def again(tokens: int, steps: int, names: Sequence[str]) -> BalanceResult:
        return balance(
            loaded,
            cluster=sized,
            model=spec,
            phase=data.phase,
            batch_tokens=tokens,
            redundant_experts=least + extra,
            steps=steps,
            drift=drift,
            schemes=names,
            rebalance_plan=rebalance_plan,
            rebalance_layer=rebalance_layer,
            all_to_all=all_to_all,
            time_limit=time_limit,
            ignore_memory=ignore_memory,
            seed=seed,
        )

    return replace(result, points=find_break_even(result, again))


def _extra(asked: int | None, least: int, gpus: int, experts: int, defaults: dict[str, str]) -> int:
    """Redundant slots beyond the `least` that make slots equal on every GPU."""
    most = gpus * experts - experts
    if asked is None:
        extra = gpus if least + gpus <= most else 0
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


def _kv_bytes(model: ModelSpec, cluster: Cluster, notices: list[str]) -> float | None:
    """KV cache of a GPU with attention data-parallel and no redundant slots, None with a notice
    where the model cannot be deployed so."""
    try:
        memory = gpu_memory(deploy(model, cluster, tp=1, dp=cluster.num_gpus))
    except MoesimError as error:
        notices.append(f"the KV cache is not known, redundant slots are not charged: {error.cause}")
        return None
    if memory.kv_cache_bytes <= 0:
        notices.append("no memory is left for a KV cache: redundant slots are not charged")
        return None
    return memory.kv_cache_bytes


def _served(
    rows: Sequence[Row],
    model: ModelSpec,
    cluster: Cluster,
    trace: Trace,
    requests: Requests,
    slo: Slo | None,
) -> dict[str, Served]:
    """What every scheme is worth to the requests, those left out whose slots leave no KV cache."""
    base = rows[0].step_us.value
    loads = {}
    for row in rows:
        done, share = row.outcome, row.kv_share
        if share is not None and share <= 0:
            continue
        stall = None
        if done.num_plans and done.stall_us:
            stall = Stall(
                max(1, round(row.num_steps / done.num_plans)), done.stall_us / done.num_plans
            )
        moe_us = row.step_us.value - done.stall_us / row.num_steps
        loads[row.name] = Load(moe_us / base, 1.0 if share is None else share, stall)
    deployment = deploy(model, cluster, tp=1, dp=cluster.num_gpus, trace=trace)
    return serve_schemes(deployment, requests, loads, slo)


def _rows(
    bench: Bench,
    schemes: Sequence[Scheme],
    outcomes: Sequence[Outcome],
    kv: float | None,
    charged: bool,
) -> tuple[Row, ...]:
    course = bench.course
    none = next(o for s, o in zip(schemes, outcomes, strict=True) if s.name == NONE)
    base = none.priced.step_us
    rows = []
    for scheme, done in zip(schemes, outcomes, strict=True):
        spread = (done.stall_us + done.slowed_us) / course.num_steps
        time = done.priced.step_us + spread
        less = bench.expert_bytes * (done.slots * course.trace.num_layers + done.pool)
        share = None if kv is None else 1.0 - less / kv
        outcome = done
        if share is not None and share <= 0:
            outcome = replace(done, note="its slots leave no KV cache")
        parts = {name: float(done.priced.parts_us[name].mean()) for name in PARTS}
        rows.append(
            Row(
                name=scheme.name,
                about=scheme.about,
                outcome=outcome,
                step_us=course.interval(time),
                against_none=_against(course, time, base),
                charged=_against(
                    course, time / max(share, 1e-9) if charged and share is not None else time, base
                ),
                imbalance=course.interval(done.priced.imbalance),
                parts_us={**parts, "stalls": spread},
                kv_bytes_less=less,
                kv_share=share,
                pays_from_steps=_pays_from(done, base),
                num_steps=course.num_steps,
            )
        )
    return tuple(rows)


def _against(course: Course, time: FloatArray, base: FloatArray) -> Interval:
    """Mean of `time` over that of `base`, less 1, paired."""
    found = course.interval(time - base)
    mean = float(base.mean())
    return Interval(found.value / mean, found.low / mean, found.high / mean)


def _pays_from(done: Outcome, base: FloatArray) -> float | None:
    """Steps between plans from which a plan's stall is less than what its steps save, as they were
    saved at the interval that was run."""
    lost = done.stall_us + done.slowed_us
    if not done.num_plans or lost <= 0:
        return None
    saved = float((base - done.priced.step_us).mean())
    return lost / done.num_plans / saved if saved > 0 else float("inf")
