"""`make_plan`: the main job, from a trace and a number of GPUs to an evaluated plan."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.cost.routing import POLICY_CODES, Dedup, other_ranks
from moesim.cost.scaled import faster_step
from moesim.cost.step import StepModel, build_step_model
from moesim.errors import InfeasibleError, InputError, MismatchError, UnknownNameError
from moesim.placement import Plan, ReplicaPolicy
from moesim.planning.empty_layers import plan_of_layers, whole_plan
from moesim.planning.evaluate import (
    Figure,
    Measured,
    Sample,
    difference,
    draw_sample,
    figures,
    measure,
)
from moesim.planning.migrate import slots_in_use
from moesim.planning.migration import DEFAULT_STEPS
from moesim.planning.refine import (
    Data,
    check_request,
    predicted_homes,
    price_line,
    refine,
    robust_figures,
)
from moesim.planning.robust import Robust
from moesim.planning.traffic import sample_traffic
from moesim.planning.tuning import tuning_counts
from moesim.solvers.base import OBJECTIVES, Objective, Problem, Progress, Solution, Stop, never
from moesim.solvers.bounds.load import LP_LAYERS, Bound, lower_bound
from moesim.solvers.objective import PlacementCost
from moesim.solvers.registry import get_solver
from moesim.trace.batches import Phase, index_requests, split_requests
from moesim.trace.empty import loaded_layers, only_layers, require_load
from moesim.trace.format import DECODE, PREFILL, LoadTrace, Trace, TraceMeta, require_tokens

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec

DEFAULT_CLUSTER = "h100-sxm-ib"
DEFAULT_BATCH_TOKENS: dict[str, int] = {"prefill": 4096, "decode": 256}
DEFAULT_TIME_LIMIT_S = 60.0
HBM_USABLE = 0.95
MIN_FILL = 0.8
"""Share of the asked batch below which a notice says that requests are too few."""


@dataclass(frozen=True, slots=True, eq=False)
class PlanRequest:
    """What is asked for; None means the stated default.

    trace: counts alone are for `moesim.jobs.plan_loads`. slots: per GPU slot counts, or None for
    (experts + redundant) / GPUs each. network_scale: all links are taken as so many times faster,
    for what-if studies. robust: make the worst small instead of the mean. old_plan: what runs now,
    to be moved away from where that is worth it over steps_between_moves. home_ranks: contiguous
    (None), or how to predict them (see `moesim.planning.home_ranks`), in further rows of the
    evaluation.
    """

    trace: Trace | LoadTrace
    cluster: Cluster
    model: ModelSpec | None
    objective: Objective | None = None
    solver: str = "local_search"
    redundant_experts: int = 0
    slots: tuple[int, ...] | None = None
    phase: Phase | None = None
    batch_tokens: int | None = None
    domain: str | None = None
    replica_policy: ReplicaPolicy = "split"
    dedup: Dedup | None = None
    all_to_all: str | None = None
    seed: int = 0
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    check_memory: bool = True
    robust: Robust | None = None
    old_plan: Plan | None = None
    steps_between_moves: float = DEFAULT_STEPS
    home_ranks: str | None = None
    network_scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A solved and evaluated placement."""

    name: str
    solution: Solution
    measured: Measured
    figures: dict[str, Figure]


@dataclass(frozen=True, slots=True, eq=False)
class PlanResult:
    """The plan, its baselines, and what was assumed on the way.

    defaults: what was left out of the request, by name, as text. notices: what the user should
    know. improvement: chosen minus EPLB of each figure, paired. rows: further rows of text, by
    label and candidate; lines: what robustness or a move is worth. judged_on: what the figures
    were measured on, where that is not held-out requests.
    """

    plan: Plan
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    sample: Sample
    step: StepModel | None
    defaults: dict[str, str]
    notices: tuple[str, ...]
    improvement: dict[str, Figure]
    seconds: dict[str, float] = field(default_factory=dict)
    bound_kind: str = ""
    rows: tuple[tuple[str, dict[str, str]], ...] = ()
    lines: tuple[str, ...] = ()
    judged_on: str = ""


def make_plan(
    request: PlanRequest, *, progress: Progress | None = None, stop: Stop = never
) -> PlanResult:
    """Solve, evaluate on held-out requests beside linear and EPLB placement, and make the plan.

    Once `stop` is true the search ends with the best it has; the plan is evaluated all the same,
    and its status says time_limit.

    Raises MismatchError when trace and model differ, InfeasibleError when the experts do not fit
    the slots or the memory, UnknownNameError for an unknown solver or domain, InputError for
    unusable numbers.
    """
    check_options(request)
    trace, cluster = require_tokens(request.trace, "moesim plan"), request.cluster
    keep = require_load(loaded_layers(trace))
    if not keep.all():
        old = request.old_plan
        part = replace(
            request,
            trace=only_layers(trace, keep),
            old_plan=None if old is None else plan_of_layers(old, keep),
        )
        result = make_plan(part, progress=progress, stop=stop)
        whole, notice = whole_plan(result.plan, trace.meta.layer_ids, keep, trace.content_hash())
        return replace(result, plan=whole, notices=(notice, *result.notices))
    defaults: dict[str, str] = {}
    notices: list[str] = []
    trace = _one_domain(trace, request.domain)
    phase, batch_tokens = _workload(request, trace, defaults)
    step, objective = _step_model(request, phase, defaults, notices)
    capacity = _capacity(request, trace, defaults)
    if request.check_memory and request.model is not None:
        check_memory(request.model, cluster, capacity)
    index, notice = index_requests(trace, phase)
    notices += filter(None, (notice, other_ranks(trace, cluster.num_gpus)))
    tune, held_out = split_requests(index)
    dedup = step.dedup if step is not None else (request.dedup or "gpu")
    data = Data(trace, tune, held_out, phase, batch_tokens, step, dedup)
    predictor = check_request(request, data, objective)
    seconds = {}
    clock = time.monotonic()
    counts = tuning_counts(trace, tune, phase, batch_tokens, request.seed)
    traffic = None
    if step is not None and objective != "balance":
        traffic = sample_traffic(trace, tune, phase, batch_tokens, step, request.seed)
    problem = Problem(
        counts=counts,
        capacity=capacity,
        num_nodes=cluster.num_nodes,
        objective=objective,
        speed=np.asarray(cluster.speed_factor, np.float64),
        gpu_type=step.gpu_type if step is not None else np.zeros(0, np.int64),
        expert_us=step.expert_tables_us(int(counts.max()) + 1) if step is not None else None,
        num_groups=request.model.n_group if request.model is not None else 1,
        traffic=traffic,
        seed=request.seed,
        time_limit_s=request.time_limit_s,
        stop=stop,
    )
    seconds["tuning data"] = time.monotonic() - clock
    clock = time.monotonic()
    baseline = "eplb" if len(np.unique(capacity)) == 1 else "greedy"
    names = list(dict.fromkeys(("linear", baseline, request.solver)))
    solved = {
        name: get_solver(name).solve(problem, progress=progress if name == request.solver else None)
        for name in names
    }
    refined = refine(request, problem, solved, data, progress)
    seconds["solving"] = time.monotonic() - clock
    clock = time.monotonic()
    evaluate = PlacementCost(problem)
    layer_values = {n: evaluate.layer_values(s.placement) for n, s in solved.items()}
    bound = lower_bound(
        problem,
        layer_values=layer_values[refined.chosen],
        lp_layers=0 if stop() else LP_LAYERS,
        objective=evaluate,
    )
    bound = joined(bound, solved[request.solver])
    solved = {
        n: replace(s, objective_value=float(layer_values[n].mean()), bound=bound.value)
        for n, s in solved.items()
    }
    solved[refined.chosen] = ended(solved[refined.chosen], request, stop(), notices)
    seconds["bound"] = time.monotonic() - clock
    clock = time.monotonic()
    sample = draw_sample(trace, held_out, phase, batch_tokens, request.seed)
    filled = float(np.diff(sample.batches.indptr[: sample.num_main + 1]).mean())
    if filled < MIN_FILL * batch_tokens:
        notices.append(
            f"the held-out requests fill batches of {filled:.0f} tokens only, {batch_tokens} asked"
        )
    candidates = []
    for name, solution in solved.items():
        measured = measure(
            trace,
            sample,
            solution.placement,
            policy=request.replica_policy,
            dedup=dedup,
            step=step,
            speed=problem.speed,
        )
        candidates.append(Candidate(name, solution, measured, figures(sample, measured)))
    by_name = {c.name: c for c in candidates}
    chosen, reference = by_name[refined.chosen], by_name[baseline]
    if predictor is not None:
        for label, homes in predicted_homes(request, data, chosen.solution, predictor).items():
            measured = measure(
                trace,
                sample,
                chosen.solution.placement,
                policy=request.replica_policy,
                dedup=dedup,
                step=step,
                speed=problem.speed,
                homes=homes,
            )
            found = figures(sample, measured)
            candidates.append(Candidate(label, chosen.solution, measured, found))
        refined.evaluation["home_ranks"] = {"predictor": predictor, "placement": chosen.name}
    if request.robust is not None:
        robust_figures(refined, request, problem, solved, data)
        plain = by_name[request.solver]
        figure = "imbalance" if objective == "balance" else "step_us"
        price = difference(
            sample, by_name[f"{request.solver}, robust"].measured, plain.measured, figure
        )
        if price is not None:
            what = {"imbalance": "imbalance", "step_us": "MoE time"}[figure]
            base = plain.figures[figure].value
            refined.lines.append(price_line(request.robust, price, base, what))
            refined.evaluation["robust"]["price"] = {"figure": figure, **price.to_json()}
    seconds["evaluation"] = time.monotonic() - clock
    notices += [f"{request.solver}: {note}" for note in by_name[request.solver].solution.notes]
    improvement = {
        name: delta
        for name in chosen.figures
        if (delta := difference(sample, chosen.measured, reference.measured, name)) is not None
    }
    plan = Plan(
        model=trace.meta.model,
        layer_ids=trace.meta.layer_ids,
        placement=chosen.solution.placement,
        replica_policy=request.replica_policy,
        objective=objective,
        solver=request.solver,
        status=chosen.solution.status,
        objective_value=chosen.solution.objective_value,
        bound=chosen.solution.bound,
        gap=chosen.solution.gap,
        evaluation={
            "held_out": True,
            "phase": phase,
            "batch_tokens": batch_tokens,
            "num_requests": sample.num_requests,
            "num_batches": sample.num_main,
            "basis": step.basis if step is not None else None,
            **({"all_to_all": step.all_to_all} if step is not None else {}),
            "plans": {c.name: {n: f.to_json() for n, f in c.figures.items()} for c in candidates},
            **refined.evaluation,
        },
        provenance=provenance(request, trace.content_hash(), step, seconds),
    )
    return PlanResult(
        plan,
        tuple(candidates),
        chosen,
        sample,
        step,
        defaults,
        tuple(notices),
        improvement,
        seconds,
        bound.kind,
        tuple(refined.rows),
        tuple(refined.lines),
    )


def check_options(request: PlanRequest) -> None:
    """Raise InputError for names and numbers that are wrong whatever the trace is."""
    get_solver(request.solver)
    if request.replica_policy not in POLICY_CODES:
        raise UnknownNameError("replica policy", request.replica_policy, POLICY_CODES)
    if request.seed < 0:
        raise InputError(f"seed {request.seed} is negative", "give a seed of 0 or more")
    if not (math.isfinite(request.time_limit_s) and request.time_limit_s >= 0):
        raise InputError(
            f"a time limit of {request.time_limit_s} seconds", "give seconds, such as 60"
        )


def joined(bound: Bound, solution: Solution) -> Bound:
    """The better of the two bounds in every layer."""
    found = solution.layer_bounds
    if found is None or not (found > bound.layers).any():
        return bound
    return Bound(np.maximum(bound.layers, found), f"{bound.kind}, integer program")


def ended(
    solution: Solution, request: PlanRequest, interrupted: bool, notices: list[str]
) -> Solution:
    """`solution` with its status, and a notice where the search was cut off."""
    if interrupted and solution.status != "optimal":
        solution = replace(solution, status="time_limit")
        notices.append(f"interrupted: this is the best plan that {request.solver} had by then")
    elif solution.status == "time_limit":
        notices.append(
            f"{request.solver} stopped at its time limit of {request.time_limit_s:g} s, with"
            + (" no bound" if solution.gap is None else f" a gap of {100 * solution.gap:.1f}%")
            + "; more time may give a better plan (--time-limit)"
        )
    return solution


def _capacity(
    request: PlanRequest, trace: Trace, defaults: dict[str, str]
) -> npt.NDArray[np.int64]:
    """[G] slots: those asked for, else those of the plan in use, else one an expert."""
    old, asked = request.old_plan, request.slots is not None or request.redundant_experts
    if old is not None and not asked and old.placement.num_gpus == request.cluster.num_gpus:
        capacity = slots_in_use(old.placement)
        defaults["slots"] = f"{int(capacity.sum())} a layer, as the plan in use has"
        return capacity
    return slots_of(trace.num_experts, request.cluster.num_gpus, request)


def slots_of(num_experts: int, num_gpus: int, request: PlanRequest) -> npt.NDArray[np.int64]:
    """[G] slots of each GPU in a layer. Raises InputError when they do not come out even."""
    if request.slots is not None:
        given = request.slots
        if len(given) == 1 and num_gpus > 1:
            total = given[0]
            if total % num_gpus:
                raise InputError(
                    f"{total} slots do not divide over {num_gpus} GPUs",
                    f"use --slots {total - total % num_gpus + num_gpus}, or name every GPU's"
                    " slots: --slots 5,5,4,...",
                )
            return np.full(num_gpus, total // num_gpus, np.int64)
        if len(given) != num_gpus:
            raise InputError(
                f"--slots names {len(given)} GPUs, there are {num_gpus}",
                "give one total, or one number for every GPU",
            )
        return np.array(given, np.int64)
    if request.redundant_experts < 0:
        raise InputError("the number of redundant experts is negative", "give 0 or more")
    total = num_experts + request.redundant_experts
    if total % num_gpus:
        more = request.redundant_experts + num_gpus - total % num_gpus
        if total < num_gpus:
            raise InputError(
                f"{num_gpus} GPUs for {total} experts a layer: some would hold none",
                f"use at most {total} GPUs, or --redundant-experts {more}",
            )
        raise InputError(
            f"{num_experts} experts + {request.redundant_experts} redundant = {total} slots do not"
            f" divide over {num_gpus} GPUs",
            f"use --redundant-experts {more}, or another number of GPUs",
        )
    return np.full(num_gpus, total // num_gpus, np.int64)


def check_memory(model: ModelSpec, cluster: Cluster, capacity: npt.NDArray[np.int64]) -> None:
    """Raise InfeasibleError when a GPU's experts and its copy of all other weights exceed 95 % of
    its memory (attention data-parallel, so that every GPU holds the other weights whole)."""
    expert = model.expert_bytes() * model.num_moe_layers
    for gpu, slots in enumerate(capacity):
        need = int(slots) * expert + model.non_expert_bytes()
        have = cluster.gpus[gpu].hbm_gb * 1e9 * HBM_USABLE
        if need > have:
            raise InfeasibleError(
                f"{model.name} needs {need / 1e9:.1f} GB on GPU {gpu} ({int(slots)} experts a"
                f" layer x {model.num_moe_layers} layers x {model.expert_bytes() / 1e6:.1f} MB +"
                f" {model.non_expert_bytes() / 1e9:.1f} GB of other weights), it has"
                f" {have / 1e9:.1f} GB usable",
                "use more GPUs or GPUs with more memory, or --ignore-memory to plan all the same",
            )


def _one_domain(trace: Trace, domain: str | None) -> Trace:
    if domain is None:
        return trace
    if trace.domain_ids is None or not trace.meta.domains:
        raise MismatchError("the trace has no domains", "leave out --domain")
    if domain not in trace.meta.domains:
        raise UnknownNameError("domain", domain, trace.meta.domains)
    keep = np.flatnonzero(np.asarray(trace.domain_ids) == trace.meta.domains.index(domain))
    if not len(keep):
        raise InputError(f"no token of the trace is of domain {domain!r}", "choose another")
    return trace.take(keep)


def _workload(request: PlanRequest, trace: Trace, defaults: dict[str, str]) -> tuple[Phase, int]:
    phase = request.phase
    if phase is None:
        if not trace.num_tokens:
            raise InputError("the trace has no tokens", "use a trace with at least two requests")
        phase = "prefill" if (np.asarray(trace.phases) == PREFILL).any() else "decode"
        share = float((np.asarray(trace.phases) == DECODE).mean())
        defaults["phase"] = f"{phase} ({share:.0%} of the trace's tokens are decode)"
    batch_tokens = request.batch_tokens
    if batch_tokens is None:
        batch_tokens = DEFAULT_BATCH_TOKENS[phase]
        defaults["batch tokens"] = f"{batch_tokens} over all GPUs"
    if batch_tokens < 1:
        raise InputError("--batch-tokens must be at least 1", "give the tokens of one step")
    return phase, batch_tokens


def _step_model(
    request: PlanRequest, phase: Phase, defaults: dict[str, str], notices: list[str]
) -> tuple[StepModel | None, Objective]:
    objective = request.objective
    if objective is not None and objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    if request.model is None:
        if objective in ("time", "traffic"):
            raise InputError(
                f"objective {objective} needs the model's sizes, and"
                f" {request.trace.meta.model or 'the trace'} names no known model",
                "name one with --model (a preset or a Hugging Face config.json)",
            )
        notices.append("the model is not known: planned for balance, without predicted times")
        defaults.setdefault("objective", "balance (the model is not known)")
        return None, "balance"
    model = request.model
    check_model(model, request.trace.meta, notices)
    if objective is None:
        objective = "time"
        defaults["objective"] = "time (predicted step time)"
    step = build_step_model(
        request.cluster,
        model,
        phase=phase,
        all_to_all=request.all_to_all,  # type: ignore[arg-type]
        dedup=request.dedup,
    )
    if request.all_to_all is None:
        defaults["all-to-all"] = f"{step.all_to_all}, messages deduplicated per {step.dedup}"
    return faster_step(step, request.network_scale), objective


def check_model(model: ModelSpec, meta: TraceMeta, notices: list[str]) -> None:
    """Raise MismatchError where trace and model differ; say where the trace has fewer layers."""
    have = (meta.num_layers, meta.num_experts, meta.top_k)
    want = (model.num_moe_layers, model.num_experts, model.top_k)
    if have[1:] != want[1:] or have[0] > want[0]:
        raise MismatchError(
            f"the trace has {have[0]} MoE layers, {have[1]} experts, top-{have[2]};"
            f" {model.name} has {want[0]}, {want[1]}, top-{want[2]}",
            "name the model that the trace was captured from with --model",
        )
    if have[0] < want[0]:
        notices.append(f"the trace covers {have[0]} of {model.name}'s {want[0]} MoE layers")


def _asked_beyond(request: PlanRequest) -> dict[str, Any]:
    """Options of `moesim.planning.refine` that were given."""
    out: dict[str, Any] = {}
    if request.robust is not None:
        out["robust"] = str(request.robust)
    if request.home_ranks is not None:
        out["home_ranks"] = request.home_ranks
    if request.old_plan is not None:
        table = request.old_plan.placement.physical_to_logical
        out["from"] = hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()[:16]
        out["steps_between_moves"] = request.steps_between_moves
    return out


def provenance(
    request: PlanRequest, trace_hash: str, step: StepModel | None, seconds: dict[str, float]
) -> dict[str, Any]:
    """What a plan file says of how it was made."""
    from importlib.metadata import version

    options = {
        name: getattr(request, name)
        for name in (
            "objective",
            "solver",
            "redundant_experts",
            "slots",
            "phase",
            "batch_tokens",
            "domain",
            "replica_policy",
            "dedup",
            "all_to_all",
            "seed",
            "time_limit_s",
        )
    }
    options |= _asked_beyond(request)
    return {
        "trace": trace_hash,
        "cluster": request.cluster.name,
        "cluster_hash": request.cluster.cluster_hash(),
        "model": request.model.name if request.model is not None else None,
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
