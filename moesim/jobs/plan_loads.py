"""`make_load_plan`: a plan from expert counts alone, as engines record them.

Counts say how much every expert got in a step, not which experts a token chose together, so there
is balance to plan for and nothing else: no fan-out, bytes or predicted time. Replicas share
equally. Every step counts alike, however many tokens it had.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError, UnknownNameError
from moesim.jobs.plan import (
    Candidate,
    PlanResult,
    check_memory,
    check_model,
    check_options,
    ended,
    joined,
    provenance,
    slots_of,
)
from moesim.metrics import balancedness, imbalance
from moesim.placement import EMPTY, Placement, Plan
from moesim.planning.empty_layers import whole_plan
from moesim.planning.evaluate import NUM_RESAMPLES, Measured, Sample, difference, figures
from moesim.solvers.base import OBJECTIVES, Problem, Progress, Stop, never
from moesim.solvers.bounds.load import LP_LAYERS, lower_bound
from moesim.solvers.objective import PlacementCost
from moesim.solvers.registry import get_solver
from moesim.trace.batches import Batches
from moesim.trace.empty import only_layers

if TYPE_CHECKING:
    from moesim.jobs.plan import PlanRequest
    from moesim.trace.format import LoadTrace

FloatArray = npt.NDArray[np.float64]
NEEDS_TOKENS = {
    "phase": None,
    "batch_tokens": None,
    "domain": None,
    "all_to_all": None,
    "robust": None,
    "old_plan": None,
    "home_ranks": None,
    "replica_policy": "split",
}
"""Fields of a request that counts cannot serve, with the value that asks for nothing."""

CHUNK_CELLS = 20_000_000
UNEQUAL = 4.0
"""How far apart the 10th and 90th percentile of tokens a step may be before a notice says so."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadSplit:
    """tune, held_out: [S, L, E] counts of steps; held-out is what is shown. `apart` is false where
    one step is all there is, which then serves for both."""

    tune: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    apart: bool


def split_steps(expert_load: npt.NDArray[np.int64]) -> LoadSplit:
    """The first half of the steps tunes, the second half evaluates, so that a load that drifts
    counts against a plan. Steps without any load are left out.

    Raises InputError when no step has load.
    """
    steps = np.asarray(expert_load)
    steps = steps[steps.any(axis=(1, 2))]
    if not len(steps):
        raise InputError("every step of the load trace is empty", "record some traffic")
    if len(steps) == 1:
        return LoadSplit(steps, steps, False)
    half = len(steps) // 2
    return LoadSplit(steps[:half], steps[half:], True)


def measure_loads(
    steps: npt.NDArray[np.int64],
    placement: Placement,
    order: npt.NDArray[np.int64],
    main: int,
    speed: FloatArray,
) -> Measured:
    """Balance of every step (steps[order], of which the first `main` are the point figures) over
    GPUs of relative speed [G]."""
    table = placement.physical_to_logical
    safe = np.where(table == EMPTY, 0, table)
    share = np.where(table == EMPTY, 0.0, 1.0)
    share /= np.take_along_axis(placement.replica_count, safe, axis=1)
    num_layers, num_slots = table.shape
    gpus = np.empty((len(steps), num_layers, placement.num_gpus))
    chunk = max(1, CHUNK_CELLS // (num_layers * num_slots))
    for start in range(0, len(steps), chunk):
        part = steps[start : start + chunk].astype(np.float64)
        slots = np.take_along_axis(part, safe[None], axis=2) * share
        gpus[start : start + chunk] = slots.reshape(*slots.shape[:2], placement.num_gpus, -1).sum(
            axis=3
        )
    values = {
        "imbalance": imbalance(gpus, speed)[order],
        "balancedness": balancedness(gpus, speed)[order],
    }
    return Measured(values, gpus[order[:main]].mean(axis=0))


def make_load_plan(
    loads: LoadTrace,
    request: PlanRequest,
    *,
    progress: Progress | None = None,
    stop: Stop = never,
) -> PlanResult:
    """Solve for balance on the first half of the steps, evaluate on the second.

    request: as for `make_plan`; its trace is not looked at. Raises InputError for what counts
    cannot tell, and what `make_plan` raises.
    """
    check_options(request)
    if request.objective is not None and request.objective not in OBJECTIVES:
        raise UnknownNameError("objective", request.objective, OBJECTIVES)
    _refuse(request)
    keep = np.asarray(split_steps(loads.expert_load).tune.any(axis=(0, 2)))
    if not keep.all():
        part = only_layers(loads, keep)
        result = make_load_plan(part, replace(request, trace=part), progress=progress, stop=stop)
        whole, notice = whole_plan(result.plan, loads.meta.layer_ids, keep, loads.content_hash())
        return replace(result, plan=whole, notices=(notice, *result.notices))
    cluster = request.cluster
    split = split_steps(loads.expert_load)
    defaults = {"objective": "balance (counts say nothing of messages)"}
    if request.objective is not None:
        defaults = {}
    notices = unequal_steps(loads.expert_load)
    if request.model is not None:
        check_model(request.model, loads.meta, notices)
    capacity = slots_of(loads.expert_load.shape[2], cluster.num_gpus, request)
    if request.check_memory and request.model is not None:
        check_memory(request.model, cluster, capacity)
    problem = Problem(
        counts=split.tune.astype(np.float32),
        capacity=capacity,
        num_nodes=cluster.num_nodes,
        speed=np.asarray(cluster.speed_factor, np.float64),
        num_groups=request.model.n_group if request.model is not None else 1,
        seed=request.seed,
        time_limit_s=request.time_limit_s,
        stop=stop,
    )
    clock = time.monotonic()
    baseline = "eplb" if len(np.unique(capacity)) == 1 else "greedy"
    solved = {
        name: get_solver(name).solve(problem, progress=progress if name == request.solver else None)
        for name in dict.fromkeys(("linear", baseline, request.solver))
    }
    cost = PlacementCost(problem)
    layers = {name: cost.layer_values(s.placement) for name, s in solved.items()}
    bound = lower_bound(
        problem,
        layer_values=layers[request.solver],
        lp_layers=0 if stop() else LP_LAYERS,
        objective=cost,
    )
    bound = joined(bound, solved[request.solver])
    sample, order = _sample(len(split.held_out), request.seed)
    candidates = []
    for name, solution in solved.items():
        valued = replace(solution, objective_value=float(layers[name].mean()), bound=bound.value)
        if name == request.solver:
            valued = ended(valued, request, stop(), notices)
        measured = measure_loads(
            split.held_out, solution.placement, order, sample.num_main, problem.speed
        )
        candidates.append(Candidate(name, valued, measured, figures(sample, measured)))
    by_name = {c.name: c for c in candidates}
    chosen, reference = by_name[request.solver], by_name[baseline]
    improvement = {
        name: delta
        for name in chosen.figures
        if (delta := difference(sample, chosen.measured, reference.measured, name)) is not None
    }
    plan = Plan(
        model=loads.meta.model,
        layer_ids=loads.meta.layer_ids,
        placement=chosen.solution.placement,
        objective="balance",
        solver=request.solver,
        status=chosen.solution.status,
        objective_value=chosen.solution.objective_value,
        bound=chosen.solution.bound,
        gap=chosen.solution.gap,
        evaluation={
            "held_out": split.apart,
            "num_steps": sample.num_main,
            "basis": None,
            "plans": {c.name: {n: f.to_json() for n, f in c.figures.items()} for c in candidates},
        },
        provenance=provenance(
            request, loads.content_hash(), None, {"solving": time.monotonic() - clock}
        ),
    )
    steps = f"{sample.num_main} step{'s' * (sample.num_main != 1)}"
    said = f"held-out: {steps} after those tuned on; 95% bootstrap intervals over runs of steps"
    if not split.apart:
        said = "NOT held out: the trace has one step, which the plan was also tuned on"
    notices += [f"{request.solver}: {note}" for note in chosen.solution.notes]
    return PlanResult(
        plan,
        tuple(candidates),
        chosen,
        sample,
        None,
        defaults,
        tuple(notices),
        improvement,
        bound_kind=bound.kind,
        judged_on=said,
    )


def _refuse(request: PlanRequest) -> None:
    asked: Mapping[str, object] = {
        name: getattr(request, name)
        for name, nothing in NEEDS_TOKENS.items()
        if getattr(request, name) != nothing
    }
    if request.objective not in (None, "balance"):
        asked = {"objective": request.objective, **asked}
    if asked:
        name, value = next(iter(asked.items()))
        option = "--from" if name == "old_plan" else f"--{name.replace('_', '-')}"
        shown = f" {value}" if isinstance(value, (str, int)) else ""
        raise InputError(
            f"{option}{shown} needs token-level routing, and the trace has expert counts only",
            "leave it out, or give a trace with expert_ids (moesim trace capture)",
        )


def unequal_steps(expert_load: npt.NDArray[np.int64]) -> list[str]:
    """A notice where steps differ much in size: a balanced step is a matter of its size too."""
    sizes = expert_load.sum(axis=2, dtype=np.float64).max(axis=1)
    low, high = np.percentile(sizes[sizes > 0], (10, 90)) if sizes.any() else (1.0, 1.0)
    if high < UNEQUAL * low:
        return []
    return [
        f"steps differ in size ({low:.0f} to {high:.0f} choices a layer, 10th and 90th percentile)"
        " and count alike: small ones are never even"
    ]


def _sample(num_steps: int, seed: int) -> tuple[Sample, npt.NDArray[np.int64]]:
    """The held-out steps, then resamples of them: what each row of the measures is.

    Steps that follow each other serve the same requests, so runs of steps are drawn, about as long
    as there are many of them, going round at the end.
    """
    length = math.isqrt(num_steps)
    runs = -(-num_steps // length)
    rng = np.random.default_rng([seed, 0x10AD])
    starts = rng.integers(0, num_steps, (NUM_RESAMPLES, runs, 1))
    drawn = (starts + np.arange(length)) % num_steps
    drawn = drawn.reshape(NUM_RESAMPLES, -1)[:, :num_steps]
    order = np.concatenate([np.arange(num_steps), drawn.ravel()]).astype(np.int64)
    nothing = Batches(np.zeros(0, np.int64), np.zeros(len(order) + 1, np.int64), "decode", 0)
    return Sample(nothing, num_steps, NUM_RESAMPLES, num_steps), order
