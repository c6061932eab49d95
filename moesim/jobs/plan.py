"""`plan`: from a trace and a number of GPUs to an evaluated plan."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.cluster import is_machine
from moesim.errors import InputError, UnknownNameError
from moesim.jobs import inputs
from moesim.jobs.plan_result import Candidate, PlanResult
from moesim.placement import Placement, Plan, ReplicaPolicy
from moesim.planning.case import Case, Judge, token_case
from moesim.planning.empty_layers import plan_of_layers, whole_plan
from moesim.planning.evaluate import Interval, difference, figures
from moesim.planning.home_ranks import HOME_RANKS
from moesim.planning.loads import load_case, split_steps
from moesim.planning.migration import DEFAULT_STEPS
from moesim.planning.mtp import mtp_ids, plan_with_mtp, without_mtp
from moesim.planning.own_schedule import own_schedule
from moesim.planning.pools import check_pools, unfolded
from moesim.planning.refine import Refined, predicted_homes, price_line, refine, robust_figures
from moesim.planning.request import (
    DEFAULT_SOLVER,
    DEFAULT_TIME_LIMIT_S,
    PlanRequest,
    check_options,
)
from moesim.planning.robust import parse_robust
from moesim.planning.worth import worth_by_domain, worth_by_step
from moesim.solvers.base import (
    Objective,
    Solution,
    Solver,
    Stop,
    never,
    of_holders,
    run_solver,
)
from moesim.solvers.bounds.load import LP_LAYERS, LowerBound, lower_bound
from moesim.solvers.objective import PlacementCost
from moesim.solvers.registry import find_solver
from moesim.trace.batches import Phase
from moesim.trace.empty import Mask, loaded_layers, only_layers, require_load
from moesim.trace.format import LoadTrace, Trace, require_tokens
from moesim.trace.pools import own_experts
from moesim.types import Progress

if TYPE_CHECKING:
    from moesim.caching.group import GroupPlan
    from moesim.jobs.inputs import ClusterLike, ModelLike, PlanLike, TraceLike


def plan(
    trace: TraceLike,
    *,
    gpus: int | None = None,
    cluster: ClusterLike | None = None,
    model: ModelLike | None = None,
    solver: str | Solver = DEFAULT_SOLVER,
    objective: Objective | None = None,
    redundant_experts: int = 0,
    slots: int | Sequence[int] | None = None,
    phase: Phase | None = None,
    batch_tokens: int | None = None,
    domain: str | None = None,
    reroute: str | None = None,
    replica_policy: ReplicaPolicy = "split",
    all_to_all: str | None = None,
    seed: int = 0,
    time_limit: float = DEFAULT_TIME_LIMIT_S,
    ignore_memory: bool = False,
    robust: str | None = None,
    old_plan: PlanLike | None = None,
    steps_between_moves: float | None = None,
    home_ranks: str | None = None,
    offload: bool = False,
    hbm: float | None = None,
    expert_gpus: int | None = None,
    mtp: bool = False,
    progress: Progress | None = None,
    stop: Stop = never,
) -> PlanResult:
    """Place the experts of a model on GPUs from a routing trace.

    Half of the trace's requests find the placement, every figure comes from the other half. A load
    trace (expert counts by step) gives a plan for balance, tuned on the first half of its steps.

    trace, cluster, model, old_plan: names, paths or objects; a machine (`load_machine`) is a
    cluster too. gpus: of one expert-parallel group; may be left out where `cluster` is an object or
    a machine. reroute: a rule of routing that the trace goes
    through first, as "drop:factor=1.25" for a capacity factor. The other names and defaults are
    those of `moesim plan`. progress(done, total) counts layers; once `stop()` is true the search
    ends with the best it has, and the plan is evaluated all the same.

    Raises MismatchError when inputs do not belong together, InfeasibleError when the experts do not
    fit the slots or the memory, UnknownNameError for an unknown name, InputError for the rest.
    """
    if steps_between_moves is not None and old_plan is None:
        raise InputError(
            "`steps_between_moves` without `old_plan`", "name the plan in use with `old_plan`"
        )
    if home_ranks is not None and home_ranks not in HOME_RANKS:
        raise UnknownNameError("home ranks", home_ranks, HOME_RANKS)
    if gpus is None and not _has_a_size(cluster):
        raise InputError("the number of GPUs is not given", "give it with `gpus`")
    loaded, changed = inputs.rerouted(
        inputs.trace_of(trace, pools=True), reroute, batch_tokens=batch_tokens, seed=seed
    )
    if offload:
        own_experts(require_tokens(loaded, "`offload`"), "`offload`")
        if expert_gpus is not None:
            raise InputError("`offload` with experts on GPUs of their own", "leave one of them out")
    defaults: dict[str, str] = {}
    spec = inputs.model_or_named(model, loaded.meta.model)
    layers = mtp_ids(spec) if mtp else ()
    loaded, notes = (loaded, []) if mtp else without_mtp(loaded, spec)
    request = PlanRequest.of(
        loaded,
        inputs.cluster_of(cluster, gpus, defaults),
        spec,
        objective=objective,
        solver=solver,
        redundant_experts=redundant_experts,
        slots=(slots,) if isinstance(slots, int) else None if slots is None else tuple(slots),
        phase=phase,
        batch_tokens=batch_tokens,
        domain=domain,
        replica_policy=replica_policy,
        all_to_all=all_to_all,
        seed=seed,
        time_limit_s=time_limit,
        check_memory=not (ignore_memory or offload),
        robust=parse_robust(robust) if robust is not None else None,
        old_plan=inputs.plan_of(old_plan) if old_plan is not None else None,
        steps_between_moves=DEFAULT_STEPS if steps_between_moves is None else steps_between_moves,
        home_ranks=home_ranks,
        expert_gpus=expert_gpus,
        mtp=mtp,
    )
    result = make_plan(request, progress=progress, stop=stop)
    result.defaults.update(defaults)
    if mtp:
        made, notes = plan_with_mtp(result.plan, layers)
        result = replace(result, plan=made)
    result = replace(result, notices=(*notes, *result.notices))
    if changed is not None:
        noted = replace(result.plan, evaluation={**result.plan.evaluation, "reroute": changed})
        result = replace(result, plan=noted, lines=(changed, *result.lines))
    if offload:
        cached = _offload(result, request, hbm)
        result = replace(result, plan=replace(result.plan, cache=cached.to_dict()), cached=cached)
    return result


def _has_a_size(cluster: ClusterLike | None) -> bool:
    if isinstance(cluster, str | os.PathLike):
        return is_machine(cluster)
    return cluster is not None


def make_plan(
    request: PlanRequest, *, progress: Progress | None = None, stop: Stop = never
) -> PlanResult:
    """`plan` from a request: prepare, solve, evaluate beside linear placement and EPLB."""
    check_options(request)
    check_pools(request)
    whole = request.workload.trace
    keep = _planned_layers(whole)
    if not keep.all():
        result = make_plan(_of_layers(request, keep), progress=progress, stop=stop)
        made, notice = whole_plan(result.plan, whole.meta.layer_ids, keep, whole.content_hash())
        return replace(result, plan=made, notices=(notice, *result.notices))
    seconds: dict[str, float] = {}
    with _timed(seconds, "tuning data"):
        counts_only = isinstance(request.workload.trace, LoadTrace)
        case = (load_case if counts_only else token_case)(request, stop)
    with _timed(seconds, "solving"):
        solved, refined = _solve(case, progress)
    with _timed(seconds, "bound"):
        bound = _value(case, solved, refined)
        solved = _of_layers_again(case, solved)
    with _timed(seconds, "evaluation"):
        judge = case.make_judge(case)
        candidates = _evaluate(case, judge, solved, refined)
    with _timed(seconds, "worth on unseen traffic"):
        _unseen(case, refined)
    return _assemble(case, judge, candidates, refined, bound, seconds)


def _planned_layers(trace: Trace | LoadTrace) -> Mask:
    """[L]: layers with load in what the plan is tuned on. Raises InputError where none has any."""
    if isinstance(trace, LoadTrace):
        return np.asarray(split_steps(trace.expert_load).tune.any(axis=(0, 2)))
    return require_load(loaded_layers(trace))


def _of_layers(request: PlanRequest, keep: Mask) -> PlanRequest:
    """The request for the layers `keep` [L] alone."""
    work, old = request.workload, request.extras.old_plan
    return replace(
        request,
        workload=replace(work, trace=only_layers(work.trace, keep)),
        extras=replace(request.extras, old_plan=None if old is None else plan_of_layers(old, keep)),
    )


def _baseline(case: Case) -> str:
    """What plans are compared with: EPLB, or greedy where it wants equal slots in vain."""
    held = case.problem.capacity[case.problem.capacity > 0]
    return "eplb" if len(np.unique(held)) == 1 else "greedy"


def _solve(case: Case, progress: Progress | None) -> tuple[dict[str, Solution], Refined]:
    own = case.request.solver
    solvers = {name: find_solver(name) for name in ("linear", _baseline(case))} | {own.name: own}
    solved = {
        name: run_solver(solver, case.problem, progress=progress if name == own.name else None)
        for name, solver in solvers.items()
    }
    if case.data is None:
        return solved, Refined(own.name)
    return solved, refine(case.request, case.problem, solved, case.data, progress)


def _value(case: Case, solved: dict[str, Solution], refined: Refined) -> LowerBound:
    """Give every solution its value on the tuning data and the bound on it."""
    problem, stop = case.problem, case.problem.stop
    cost = PlacementCost(problem)
    layers = {name: cost.layer_values(s.placement) for name, s in solved.items()}
    bound = lower_bound(
        problem,
        layer_values=layers[refined.chosen],
        lp_layers=LP_LAYERS if case.request.extras.proof and not stop() else 0,
        objective=cost,
    )
    found = solved[case.request.solver.name].layer_bounds
    if found is not None and (found > bound.layers).any():
        bound = LowerBound(np.maximum(bound.layers, found), f"{bound.kind}, integer program")
    for name, solution in solved.items():
        solved[name] = replace(
            solution, objective_value=float(layers[name].mean()), bound=bound.value
        )
    solved[refined.chosen] = _ended(case, solved[refined.chosen])
    return bound


def _of_layers_again(case: Case, solved: dict[str, Solution]) -> dict[str, Solution]:
    """Solutions with a row for each layer, where layers share experts and pools were placed."""
    size = case.meta.layers_per_pool
    return {
        name: replace(solution, placement=unfolded(solution.placement, size))
        for name, solution in solved.items()
    }


def _ended(case: Case, solution: Solution) -> Solution:
    """`solution` with its status, and a notice where the search was cut off."""
    name = case.request.solver.name
    if case.problem.stop() and solution.status != "optimal":
        case.notices.append(f"interrupted: this is the best plan that {name} had by then")
        return replace(solution, status="time_limit")
    if solution.status == "time_limit":
        limit = case.request.search.time_limit_s
        case.notices.append(
            f"{name} stopped at its time limit of {limit:g} s, with"
            + (" no bound" if solution.gap is None else f" a gap of {100 * solution.gap:.1f}%")
            + "; more time may give a better plan (`time_limit`)"
        )
    return solution


def _evaluate(
    case: Case, judge: Judge, solved: dict[str, Solution], refined: Refined
) -> list[Candidate]:
    """Every solution on held-out data; with home ranks to predict, the chosen one again."""
    request, sample = case.request, judge.sample
    candidates = []
    for name, solution in solved.items():
        measured = judge.measure(solution.placement)
        candidates.append(Candidate(name, solution, measured, figures(sample, measured)))
    by_name = {c.name: c for c in candidates}
    chosen = by_name[refined.chosen]
    if case.predictor is not None:
        assert case.data is not None
        ways = predicted_homes(request, case.data, chosen.solution, case.predictor)
        for label, homes in ways.items():
            measured = judge.measure(chosen.solution.placement, homes)
            found = figures(sample, measured)
            candidates.append(Candidate(label, chosen.solution, measured, found))
        refined.evaluation["home_ranks"] = {
            "predictor": case.predictor,
            "placement": chosen.name,
        }
    if request.extras.robust is not None:
        _price_of_robustness(case, judge, by_name, refined)
    return candidates


def _unseen(case: Case, refined: Refined) -> None:
    """Say what plans are worth on traffic that tuning lacks, where the trace can tell."""
    problem = of_holders(case.problem) if case.request.workload.attention_gpus else case.problem
    pools = case.meta.layers_per_pool > 1
    if pools or not case.request.extras.proof or problem.stop() or problem.num_gpus == 1:
        return
    data = case.data
    if data is None:
        loads = case.request.workload.trace
        assert isinstance(loads, LoadTrace)
        found = worth_by_step(problem, np.asarray(loads.expert_load))
    else:
        found = worth_by_domain(
            problem,
            data.trace,
            data.tune,
            data.held_out,
            data.phase,
            data.batch_tokens,
            "lp" if case.request.workload.replica_policy == "lp" else "split",
        )
    if found is not None:
        refined.lines += found.lines()
        refined.evaluation["unseen"] = found.to_json()
        case.notices.extend(found.notices())


def _price_of_robustness(
    case: Case, judge: Judge, by_name: dict[str, Candidate], refined: Refined
) -> None:
    request, robust = case.request, case.request.extras.robust
    assert robust is not None
    assert case.data is not None
    solved = {name: c.solution for name, c in by_name.items()}
    robust_figures(refined, request, case.problem, solved, case.data)
    plain = by_name[request.solver.name]
    hardened = by_name[f"{request.solver.name}, robust"]
    figure = "imbalance" if case.objective == "balance" else "step_us"
    price = difference(judge.sample, hardened.measured, plain.measured, figure)
    if price is not None:
        what = {"imbalance": "imbalance", "step_us": "MoE time"}[figure]
        refined.lines.append(price_line(robust, price, plain.figures[figure].value, what))
        refined.evaluation["robust"]["price"] = {"figure": figure, **price.to_json()}


def _assemble(
    case: Case,
    judge: Judge,
    candidates: list[Candidate],
    refined: Refined,
    bound: LowerBound,
    seconds: dict[str, float],
) -> PlanResult:
    by_name = {c.name: c for c in candidates}
    chosen, reference = by_name[refined.chosen], by_name[_baseline(case)]
    notices = list(case.notices)
    own = case.request.solver.name
    placements = {c.name: c.solution.placement for c in candidates}
    lines, judged = own_schedule(case, judge.sample, placements)
    refined.lines += lines
    if judged:
        refined.evaluation["own_schedule"] = judged
    notices += [f"{own}: {note}" for note in by_name[own].solution.notes]
    improvement: dict[str, Interval] = {}
    for name in chosen.figures:
        delta = difference(judge.sample, chosen.measured, reference.measured, name)
        if delta is not None:
            improvement[name] = delta
    plan = Plan(
        model=case.meta.model,
        layer_ids=case.meta.layer_ids,
        placement=_held(case, chosen.solution.placement),
        replica_policy=case.request.workload.replica_policy,
        objective=case.objective,
        solver=case.request.solver.name,
        status=chosen.solution.status,
        objective_value=chosen.solution.objective_value,
        bound=chosen.solution.bound,
        gap=chosen.solution.gap,
        evaluation={
            **judge.header,
            "plans": {c.name: {n: f.to_json() for n, f in c.figures.items()} for c in candidates},
            **refined.evaluation,
        },
        provenance=_provenance(case, seconds),
        attention_gpus=case.request.workload.attention_gpus,
    )
    return PlanResult(
        plan=plan,
        candidates=tuple(candidates),
        chosen=chosen,
        reference=reference,
        sample=judge.sample,
        step=case.step,
        defaults=case.defaults,
        notices=tuple(notices),
        improvement=improvement,
        judged_on=judge.said,
        bound_kind=bound.kind,
        rows=tuple(refined.rows),
        lines=tuple(refined.lines),
    )


def _held(case: Case, placement: Placement) -> Placement:
    """The placement of the GPUs that hold experts."""
    first, gpus = case.request.workload.attention_gpus, placement.num_gpus
    if gpus != case.request.workload.cluster.num_gpus or not first:
        return placement
    table = placement.physical_to_logical[:, first * placement.slots_per_gpu :]
    nodes = of_holders(case.problem).num_nodes
    return Placement(table, gpus - first, nodes, placement.num_experts)


def _provenance(case: Case, seconds: dict[str, float]) -> dict[str, Any]:
    """What a plan file says of how it was made."""
    from importlib.metadata import version

    work, step = case.request.workload, case.step
    options = case.request.options()
    return {
        "trace": case.trace_hash,
        "cluster": work.cluster.name,
        "cluster_hash": work.cluster.cluster_hash(),
        "model": work.model.name if work.model is not None else None,
        "options": options,
        "options_hash": hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16],
        "predictions": list(step.notes) if step is not None else [],
        "moesim": version("moesim"),
        "run": {
            "command": " ".join(sys.argv),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        },
    }


@contextmanager
def _timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Notes how long the block took, in seconds."""
    begin = time.monotonic()
    yield
    into[name] = time.monotonic() - begin


def _offload(result: PlanResult, request: PlanRequest, hbm: float | None) -> GroupPlan:
    """A cache plan for every GPU of the placement, decoding one request per GPU."""
    from moesim.caching.group import plan_group
    from moesim.caching.rates import torch_kernels
    from moesim.caching.workload import Request
    from moesim.offloading.rates import filled_gb

    work = request.workload
    gpus = tuple(work.cluster.gpus)
    if work.model is None:
        raise InputError(
            "`offload` needs the model's sizes, and the trace names no known model",
            "give `model`: moesim model list",
        )
    machine = work.cluster.machine
    memory: Sequence[float] = [gpu.hbm_gb for gpu in gpus]
    if machine is not None and not torch_kernels(machine):
        memory = filled_gb(machine)
    asked = Request(
        hbm_gb=min(memory) if hbm is None else hbm,
        batch_size=len(gpus),
        prefetch="auto" if len(gpus) == 1 else "none",
        seed=request.search.seed,
    )
    tokens = require_tokens(work.trace, "`offload`")
    return plan_group(tokens, result.plan.placement, work.model, gpus, asked, machine)
