"""`balance`: is balancing worth it, which scheme, and with which settings?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moesim.choices import MoveThrough, Phase
from moesim.errors import InputError
from moesim.jobs.arrivals import arriving_requests
from moesim.jobs.balance_points import break_even as find_break_even
from moesim.jobs.balance_result import BalanceResult, Row
from moesim.jobs.balance_rows import kv_bytes, run_schemes, served
from moesim.jobs.balance_setup import Setting, costs_of, extra_slots, group_of, in_use, set_up
from moesim.planning.balancing.lineup import Asked
from moesim.serving.slo import parse_slo
from moesim.types import Progress

if TYPE_CHECKING:
    from moesim.jobs.inputs import ClusterLike, ModelLike, PlanLike, TraceLike
    from moesim.serving.requests import Requests
    from moesim.serving.slo import Slo

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
    rebalance_layer: float | None = None,
    rebalance_through: MoveThrough | None = None,
    old_plan: PlanLike | None = None,
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
    these, beside the engines' defaults. rebalance_layer, rebalance_through: see
    `moesim.sim.rearrange`. old_plan: the placement in use, a plan or ENGINE:FILE; doing nothing is
    then to stay with it, and what it takes to leave it is said. A load trace is compared by balance
    and expert times alone. The other names and defaults are those of `moesim balance`;
    requests: a log, or arrivals drawn, as for `serve`: every scheme serves them too, and time per
    output token decides. break_even: compare at other batches and paces of drift too.
    progress(done, total) counts schemes.

    Raises MismatchError where inputs do not belong together, InfeasibleError where the experts do
    not fit the memory, UnknownNameError for names and InputError for numbers that cannot be used.
    """
    defaults: dict[str, str] = {"steps": f"{steps:,}"} if steps == DEFAULT_STEPS else {}
    loaded, spec, sized = group_of(trace, model, cluster, gpus, defaults)
    least = -spec.num_experts % sized.num_gpus
    start = in_use(old_plan, loaded, sized, spec)
    costs, resting = costs_of(sized, rebalance_plan, rebalance_layer, rebalance_through)
    extra = extra_slots(redundant_experts, least, sized.num_gpus, spec.num_experts, start, defaults)
    setting = Setting(
        trace=loaded,
        cluster=sized,
        model=spec,
        phase=phase,
        batch_tokens=batch_tokens,
        least=least,
        extra=extra,
        steps=steps,
        drift=drift,
        schemes=tuple(schemes),
        asked=Asked(interval, window, threshold, layers_per_chunk, rebalance_async),
        costs=costs,
        all_to_all=all_to_all,
        time_limit=time_limit,
        ignore_memory=ignore_memory,
        seed=seed,
        start=start,
    )
    if break_even and setting.counts:
        raise InputError(
            "`break_even` needs token-level routing, and the trace has expert counts only",
            "leave it out, or give a trace with expert_ids (moesim trace capture)",
        )
    if requests is None and (slo is not None or first is not None or rate_scale != 1.0):
        raise InputError(
            "`slo`, `first` and `rate_scale` are about requests, and there are none",
            "give a log or arrivals with `requests`",
        )
    arriving = None
    if requests is not None:
        arriving = arriving_requests(requests, seed=seed, first=first, rate_scale=rate_scale)
    promises = parse_slo(slo) if slo is not None else None
    found = _compare(setting, arriving, promises, progress)
    result = replace(found, defaults={**found.defaults, **defaults}, stalls=tuple(resting))
    return _with_break_even(result, setting) if break_even else result


def _compare(
    setting: Setting, requests: Requests | None, slo: Slo | None, progress: Progress | None
) -> BalanceResult:
    setup = set_up(setting)
    bench, course = setup.bench, setup.bench.course
    kv = kv_bytes(setting.model, setting.cluster, setup.notices)
    rows = run_schemes(setup, kv, progress)
    worth = setup.worth()
    if worth is not None:
        setup.notices.extend(worth.notices())
    return BalanceResult(
        model=setting.model.name,
        cluster=setting.cluster.name,
        num_gpus=setting.cluster.num_gpus,
        phase=setup.phase,
        batch_tokens=course.batch_tokens,
        num_steps=setting.steps,
        num_judged=len(course.step_of),
        num_requests=course.num_requests,
        stretches=course.names,
        rows=rows,
        served=None if requests is None else served(rows, setup, requests, slo),
        points=None,
        step=bench.step,
        charged_for_kv=setup.phase == "decode" and kv is not None,
        redundant_experts=setting.least + setting.extra,
        from_counts=setting.counts,
        worth=worth,
        defaults=setup.case.defaults,
        notices=(*setup.case.notices, *setup.notices),
    )


def _with_break_even(result: BalanceResult, setting: Setting) -> BalanceResult:
    """The result with where balancing begins to pay, by batch and pace of drift."""
    pinned = replace(setting, phase=result.phase)

    def again(tokens: int, steps: int, names: Sequence[str]) -> Sequence[Row]:
        setup = set_up(replace(pinned, batch_tokens=tokens, steps=steps, schemes=tuple(names)))
        return run_schemes(setup, kv_bytes(setting.model, setting.cluster, []), None)

    return replace(result, points=find_break_even(result, again))
