"""What `moesim plan` does beyond solving once: robust plans, plans to move to, home ranks.

Each adds placements (or the same placement with other home ranks) to those that are evaluated, and
lines that say what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.compat import other_ranks
from moesim.cost.routing import Dedup
from moesim.cost.step import StepModel
from moesim.errors import InputError
from moesim.planning.evaluate import Interval
from moesim.planning.home_ranks import HomeRule, choose_predictor, predict_homes
from moesim.planning.migration import check_old_plan, movers, plan_migration
from moesim.planning.robust import (
    MIN_DOMAIN_SHARE,
    Losses,
    Robust,
    RobustSolution,
    cvar,
    domain_counts,
    domain_requests,
    solve_robust,
)
from moesim.planning.tuning import batch_counts
from moesim.planning.unseen import UnseenSolution, solve_unseen
from moesim.solvers.base import Problem, Solution
from moesim.trace.batches import Batches, Phase, RequestIndex, draw_batches
from moesim.trace.format import Trace
from moesim.types import Progress

if TYPE_CHECKING:
    from moesim.planning.request import PlanRequest

IN_USE = "in use"
DOMAIN_BATCHES = 32
CVAR_BATCHES = 256
Homes = Callable[[Batches], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """What a plan is made from, once the request's defaults are known."""

    trace: Trace
    tune: RequestIndex
    held_out: RequestIndex
    phase: Phase
    batch_tokens: int
    step: StepModel | None
    dedup: Dedup


@dataclass(slots=True, eq=False)
class Refined:
    """The name of the chosen solution, and what to say: rows of text by candidate, lines, and JSON
    for the plan's evaluation."""

    chosen: str
    rows: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)


def check_request(request: PlanRequest, data: Data, objective: str) -> HomeRule | None:
    """Refuse before the search what could not be done after it; returns the predictor of home
    ranks, None for contiguous ones."""
    if request.extras.old_plan is not None:
        check_old_plan(request.extras.old_plan, data.trace, request.workload.cluster)
        if objective != "time":
            raise InputError(
                f"`old_plan` weighs microseconds of steps against those of moving, not {objective}",
                "use `objective` time, with `model` if the trace's model is not known",
            )
        if request.extras.old_plan.placement.double_replicas:
            raise InputError(
                "the plan in use has GPUs that hold an expert twice, for which moves are not worked"
                " out",
                "plan without `old_plan`, and compare the two with moesim simulate",
            )
        steps = request.extras.steps_between_moves
        if not (np.isfinite(steps) and steps > 0):
            raise InputError(f"{steps} steps between moves", "give a number above 0, as 1000")
    if request.extras.robust is not None and objective == "traffic":
        raise InputError(
            "`robust` evens out load, and objective traffic is about messages",
            "use `objective` balance or time",
        )
    if request.extras.home_ranks in (None, "contiguous"):
        return None
    gpus = request.workload.cluster.num_gpus
    if data.trace.rank_ids is not None and other_ranks(data.trace, gpus) is None:
        raise InputError(
            "the trace says which rank each token was on, so that there is nothing to predict",
            "leave out `home_ranks`",
        )
    return choose_predictor(str(request.extras.home_ranks), data.trace, data.phase)


def refine(
    request: PlanRequest,
    problem: Problem,
    solved: dict[str, Solution],
    data: Data,
    progress: Progress | None,
) -> Refined:
    """Add to `solved` the robust solution and the one to move to, where they are asked for."""
    out = Refined(request.solver.name)
    if request.extras.robust is not None:
        name = f"{request.solver.name}, robust"
        domains = None
        if request.extras.robust.kind == "worst-domain":
            domains = domain_counts(
                data.trace, data.tune, data.phase, data.batch_tokens, request.search.seed
            )
        found: RobustSolution | UnseenSolution
        if request.extras.robust.kind == "unseen":
            found = solve_unseen(
                request.solver,
                problem,
                solved[request.solver.name],
                data.trace,
                data.tune,
                data.phase,
                data.batch_tokens,
                request.workload.replica_policy,
            )
            out.lines.append(found.line())
        else:
            found = solve_robust(
                request.solver,
                problem,
                solved[request.solver.name],
                request.extras.robust,
                domains,
                progress=progress,
            )
        solved[name] = found.solution
        out.chosen = name
        out.evaluation["robust"] = {
            "objective": str(request.extras.robust),
            "tuning": found.to_json(),
        }
    if request.extras.old_plan is not None:
        assert request.workload.model is not None
        assert data.step is not None
        old = request.extras.old_plan.placement
        away = movers(old, request.workload.cluster, request.workload.model, data.step)
        free = solved[out.chosen]
        moved = plan_migration(
            problem,
            old,
            free.placement,
            away,
            request.extras.steps_between_moves,
            progress=progress,
        )
        name = f"{out.chosen}, moved"
        solved[IN_USE] = Solution(old, "feasible")
        solved[name] = Solution(moved.placement, free.status, seconds=free.seconds)
        out.chosen = name
        moving, freely = away.plan(moved.placement), away.plan(free.placement)
        out.evaluation["migration"] = {
            "from": request.extras.old_plan.provenance.get("options_hash"),
            "steps_between_moves": moved.steps,
            "step_us": moved.step_us,
            "step_us_in_use": moved.stay_us,
            "changed_layers": moved.changed_layers,
            **moving.to_json(),
            "without_weighing": freely.to_json(),
        }
        if moved.unsearched:
            out.lines.append(
                f"{moved.unsearched} of {problem.num_layers} layers move wholly or not at all: no"
                " time was left to look for fewer moves (`time_limit`)"
            )
        total = problem.num_slots * problem.num_layers
        if moving.num_moves == 0:
            out.lines.append(
                f"move: 0 experts, the plan in use stays (nothing gains more than it costs in"
                f" {moved.steps:g} steps)"
            )
        else:
            gain = moved.stay_us - moved.step_us
            out.lines.append(
                f"move: {moving.num_moves} of {total} expert slots ({moved.changed_layers} layers),"
                f" {moving.bytes_from_gpus / 1e9:.2f} GB, {moving.us / 1e3:.2f} ms on the links;"
                f" saves {gain:.1f} us per step (tuning data), paid back after"
                f" {moving.us / gain:,.0f} of {moved.steps:g} steps"
            )
            out.lines.append(
                f"without weighing moves: {freely.num_moves} experts,"
                f" {freely.bytes_from_gpus / 1e9:.2f} GB, {freely.us / 1e3:.2f} ms"
            )
    return out


def robust_figures(
    refined: Refined,
    request: PlanRequest,
    problem: Problem,
    solved: Mapping[str, Solution],
    data: Data,
) -> None:
    """Add held-out losses of all solutions: by domain where there are domains, and of the worst
    batches."""
    robust = request.extras.robust
    assert robust is not None
    level = robust.level if robust.kind == "cvar" else 0.9
    table: dict[str, dict[str, Any]] = {name: {} for name in solved}
    batches = draw_batches(
        data.held_out, data.phase, data.batch_tokens, CVAR_BATCHES, request.search.seed + 3
    )
    losses = Losses(problem, batch_counts(data.trace, batches))
    for name, solution in solved.items():
        values = losses.of(solution.placement)
        table[name] |= {"mean": float(values.mean()), "cvar": cvar(values, level)}
    if data.trace.domain_ids is not None:
        groups = domain_requests(data.trace, data.held_out, MIN_DOMAIN_SHARE * data.batch_tokens)
        for domain, requests in groups.items():
            some = draw_batches(
                requests, data.phase, data.batch_tokens, DOMAIN_BATCHES, request.search.seed + 5
            )
            losses = Losses(problem, batch_counts(data.trace, some))
            for name, solution in solved.items():
                by_domain = table[name].setdefault("domains", {})
                by_domain[domain] = float(losses.of(solution.placement).mean())
    rows: list[tuple[str, dict[str, str]]] = [
        ("max/even work, mean of batches", {n: f"{t['mean']:.3f}" for n, t in table.items()}),
        (
            f"max/even work, worst {1 - level:.0%} of batches",
            {n: f"{t['cvar']:.3f}" for n, t in table.items()},
        ),
    ]
    if all(t.get("domains") for t in table.values()):
        worst = {n: max(t["domains"].items(), key=lambda kv: kv[1]) for n, t in table.items()}
        rows.append(
            (
                "max/even work, worst domain",
                {n: f"{value:.3f} ({domain[:24]})" for n, (domain, value) in worst.items()},
            )
        )
    refined.rows += rows
    refined.evaluation["robust"]["held_out"] = {"level": level, "plans": table}


def price_line(robust: Robust, delta: Interval, base: float, what: str) -> str:
    """What the robust plan costs on average against the plain one."""
    low, value, high = (100 * x / base for x in (delta.low, delta.value, delta.high))
    return f"price of {robust}: {what} {value:+.2f}% on average ({low:+.2f}% to {high:+.2f}%)"


def predicted_homes(
    request: PlanRequest, data: Data, solution: Solution, predictor: HomeRule
) -> dict[str, Homes]:
    """Ways to give home ranks by name: by the predictor, and by an oracle for comparison."""
    far = _far(request)
    out: dict[str, Homes] = {}
    names: tuple[HomeRule, ...] = (predictor,) if predictor == "oracle" else (predictor, "oracle")
    for name in names:
        homes = predict_homes(
            data.trace,
            data.tune,
            solution.placement,
            name,
            policy=request.workload.replica_policy,
            dedup=data.dedup,
            far=far,
        )
        label = "homes by oracle" if name == "oracle" else f"homes by {name}"
        out[label] = homes.homes
    return out


def _far(request: PlanRequest) -> float:
    """Time of a message between nodes relative to one within, by the links' line rates."""
    gpu = request.workload.cluster.gpus[0]
    routes = request.workload.cluster.routes()
    nics = routes.link_gb_per_s[routes.link_class == routes.link_class_names.index("nic")]
    if not len(nics):
        return 1.0
    return float(max(1.0, max(gpu.nvlink_gb_per_s, gpu.pcie_gb_per_s) / nics.min()))
