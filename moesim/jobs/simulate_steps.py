"""From a trace, a plan and a cluster to simulated steps of the plan and of its baselines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim import compat
from moesim.choices import Fidelity as Fidelity
from moesim.compat import other_ranks
from moesim.cost.curves import weakest
from moesim.cost.step import StepModel
from moesim.errors import InputError, MismatchError
from moesim.jobs.simulate_request import SimRequest
from moesim.jobs.simulate_result import SimReport
from moesim.placement import Placement, Plan
from moesim.planning.baselines import capacity_of, place_by_counts
from moesim.planning.empty_layers import plan_of_layers
from moesim.planning.mtp import mtp_ids, plan_with_mtp, with_mtp, without_mtp
from moesim.planning.own_schedule import other_schedule
from moesim.planning.request import DEFAULT_BATCH_TOKENS
from moesim.planning.traffic import sample_traffic
from moesim.planning.tuning import tuning_counts
from moesim.sim.analytic import run_analytic
from moesim.sim.collectives.registry import HIERARCHICAL, build_exchange
from moesim.sim.event import run_event
from moesim.sim.fault_run import FaultRun
from moesim.sim.faults import FaultClock
from moesim.sim.home import HomeModel
from moesim.sim.migrate import Mover, build_mover
from moesim.sim.prepare import Models, one_batch
from moesim.sim.rebalance import RebalanceRun
from moesim.sim.result import SimResult
from moesim.sim.schedules.base import Schedule
from moesim.sim.schedules.ping_pong import PingPong
from moesim.sim.schedules.registry import CHUNKED, MAX_CHUNKS, check_exchange, get_schedule
from moesim.sim.stragglers import GpuSpeeds
from moesim.sim.timeline import StepTimeline
from moesim.solvers.registry import find_solver
from moesim.trace.batches import (
    Batches,
    Phase,
    RequestIndex,
    draw_batches,
    index_requests,
    split_requests,
)
from moesim.trace.empty import layers_text, loaded_layers, only_layers, require_load
from moesim.trace.format import DECODE, PREFILL, Trace
from moesim.types import Progress, shifted

if TYPE_CHECKING:
    from moesim.cluster import Cluster

SENT_ONCE_A = {"gpu": "GPU", "node": "node", "none": "chosen expert"}
DEGREES = (1, 2, 4, 8)
"""Numbers of chunks that are tried where none is asked for."""


def simulate_steps(request: SimRequest, *, progress: Progress | None = None) -> SimReport:
    """Simulate steps of held-out requests through the plan and through what it is compared with.

    Raises MismatchError where trace, plan, model and cluster do not belong together,
    UnknownNameError for names and InputError for numbers that cannot be used.
    """
    if request.batching is not None:
        raise InputError(
            "requests are regrouped for the cache of a plan, and there is none",
            "give a plan of moesim cache, or one made with plan `offload`",
        )
    defaults: dict[str, str] = {}
    notices: list[str] = []
    request = _mtp_layers(request, notices)
    keep = require_load(loaded_layers(request.trace))
    if not keep.all():
        without = layers_text(request.trace.meta.layer_ids, keep)
        notices.append(f"layers {without} have no load in the trace: left out")
        planned = request.plan
        request = replace(
            request,
            trace=only_layers(request.trace, keep),
            plan=None if planned is None else plan_of_layers(planned, keep),
        )
    if request.expert_gpus is not None:
        check_apart(request)
    trace, model = request.trace, request.model
    homes = request.attention_gpus or request.cluster.num_gpus
    notices += filter(None, [other_ranks(trace, homes)])
    if request.plan is not None:
        check_plan(request.plan, trace, request.cluster, request.attention_gpus)
    notices += compat.trace_fits_model(trace.meta, model)
    phase, batch_tokens = _workload(request, defaults)
    models, notes = build_models(request, phase, defaults)
    placements, counts, held_out = _placements(
        request, models.step, phase, batch_tokens, defaults, notices
    )
    batches = _batches(request, held_out, phase, batch_tokens, notices)
    timeline = None
    if request.timeline_steps:
        timeline = StepTimeline(models.links, models.num_gpus, request.timeline_steps)
    details: dict[str, Any] = {}
    first = next(iter(placements.values()))
    schedule = _schedule(request, models, batches, first, defaults, details)
    runner = _Runner(request, models, batches, counts, schedule)
    jobs = [(name, placement, False) for name, placement in placements.items()]
    if request.rebalance is not None:
        name = next(iter(placements))
        jobs.insert(1, (f"{name}, rebalanced", first, True))
    results: dict[str, SimResult] = {}
    for i, (name, placement, anew) in enumerate(jobs):
        tick = shifted(progress, i * len(batches), len(jobs) * len(batches))
        results[name] = runner.run(placement, anew, timeline if i == 0 else None, tick)
    home = [models.home.basis] if models.home is not None else []
    return SimReport(
        request,
        results,
        models,
        phase,
        batch_tokens,
        len(held_out.ids),
        defaults,
        tuple(notices),
        weakest(models.step.basis, *home),
        notes,
        timeline,
        details,
    )


def _mtp_layers(request: SimRequest, notices: list[str]) -> SimRequest:
    """The request with the layers for multi-token prediction in trace and plan, or without."""
    model, plan = request.model, request.plan
    if not request.mtp:
        trace, notes = without_mtp(request.trace, model)
        plan = None if plan is None else plan.mtp_apart()[0]
    else:
        trace, notes = with_mtp(request.trace, model)
        if plan is not None:
            plan, _ = plan_with_mtp(plan, mtp_ids(model))
    notices += notes
    return replace(request, trace=trace, plan=plan)


@dataclass(frozen=True, slots=True, eq=False)
class _Runner:
    """One request's way to simulate a placement. counts: [B, L, E] of tuning requests."""

    request: SimRequest
    models: Models
    batches: Batches
    counts: npt.NDArray[np.float32]
    schedule: Schedule

    def run(
        self,
        placement: Placement,
        anew: bool,
        timeline: StepTimeline | None,
        progress: Progress | None,
    ) -> SimResult:
        request, models, trace = self.request, self.models, self.request.trace
        if request.fidelity == "analytic":
            return run_analytic(models, trace, self.batches, placement, progress=progress)
        schedule = self.schedule
        speeds = speeds_of(request)
        speed = None if speeds.nominal else speeds
        spec = request.faults
        if anew and request.rebalance is not None and spec.none:
            return RebalanceRun(
                models,
                schedule,
                trace,
                placement,
                request.rebalance,
                self._place_window,
                self._mover(),
                speed,
                timeline,
            ).run(self.batches, progress)
        if not spec.none:
            return FaultRun(
                models,
                schedule,
                trace,
                placement,
                FaultClock(
                    [f for f in spec.faults if f.gpus],
                    num_gpus=models.num_gpus,
                    mtbf_us=spec.mtbf_us,
                    repair_us=spec.repair_us,
                    seed=request.seed,
                ),
                spec.recovery,
                self._mover(),
                [f for f in spec.faults if f.links],
                lambda capacity: self._place("greedy", self.counts, capacity),
                speed,
                timeline,
                request.rebalance if anew else None,
                self._place_window,
            ).run(self.batches, progress)
        return run_event(
            models,
            schedule,
            trace,
            self.batches,
            placement,
            speed=speed,
            timeline=timeline,
            progress=progress,
        )

    def _mover(self) -> Mover:
        request = self.request
        return build_mover(request.cluster, self.models.links, float(request.model.expert_bytes()))

    def _place_window(self, counts: npt.NDArray[Any], capacity: npt.NDArray[np.int64]) -> Placement:
        """The rebalancing solver on the GPUs that have slots, as if there were no others."""
        return self._place(self.request.rebalance_solver, counts, capacity)

    def _place(
        self, solver: str, counts: npt.NDArray[Any], capacity: npt.NDArray[np.int64]
    ) -> Placement:
        request = self.request
        return place_by_counts(
            solver,
            counts,
            capacity,
            request.cluster,
            num_groups=request.model.n_group,
            seed=request.seed,
        )


def speeds_of(request: SimRequest) -> GpuSpeeds:
    """The speeds in time that `request` asks for."""
    return GpuSpeeds(
        request.cluster.num_gpus,
        request.slow,
        request.speed_sigma,
        request.speed_period_us,
        request.seed,
    )


def _schedule(
    request: SimRequest,
    models: Models,
    batches: Batches,
    placement: Placement,
    defaults: dict[str, str],
    details: dict[str, Any],
) -> Schedule:
    """The schedule asked for; where it cuts steps into chunks, with the number of them that makes
    the first step of `placement` shortest, unless one was asked for."""
    name = request.schedule
    if request.expert_gpus is not None and request.micro_batches > 1:
        return PingPong(request.micro_batches)
    if request.num_chunks is not None and name not in CHUNKED:
        raise InputError(f"`chunks` with schedule {name}", f"use it with {' or '.join(CHUNKED)}")
    schedule = get_schedule(name, 1 if request.num_chunks is None else request.num_chunks)
    check_exchange(schedule, models.exchange)
    if request.num_chunks is not None or name not in CHUNKED:
        return schedule
    tried = {
        degree: float(
            run_event(
                models, get_schedule(name, degree), request.trace, one_batch(batches, 0), placement
            ).step_us[0]
        )
        for degree in DEGREES
    }
    best = min(tried, key=lambda degree: (tried[degree], degree))
    details["chunks"] = {"best": best, "step_us": {str(d): us for d, us in tried.items()}}
    shown = ", ".join(f"{d}: {us:,.0f} us" for d, us in tried.items())
    defaults["chunks"] = f"{best} (first step by number of chunks: {shown})"
    return get_schedule(name, best)


def check_plan(plan: Plan, trace: Trace, cluster: Cluster, attention_gpus: int = 0) -> None:
    """Raise MismatchError unless `plan` fits the trace, and the GPUs of the cluster behind the
    first `attention_gpus`."""
    compat.plan_fits_trace(plan, trace.meta)
    if not attention_gpus:
        compat.placement_fits_cluster(plan.placement, cluster)
    elif plan.placement.num_gpus != cluster.num_gpus - attention_gpus:
        raise MismatchError(
            f"the plan places experts on {plan.placement.num_gpus} GPUs, `expert_gpus` is"
            f" {cluster.num_gpus - attention_gpus}",
            "give `expert_gpus` as many GPUs as the plan was made for",
        )


def check_apart(request: SimRequest) -> None:
    """Raise InputError for pools that cannot be, and for what is not simulated with two."""
    attention, experts = request.attention_gpus, request.expert_gpus or 0
    if min(experts, attention) < 1:
        raise InputError(
            f"`expert_gpus` {experts} of {request.cluster.num_gpus} GPUs",
            "leave at least one GPU to each of attention and experts",
        )
    if not 1 <= request.micro_batches <= MAX_CHUNKS:
        raise InputError(f"`micro_batches` {request.micro_batches}", f"give 1 to {MAX_CHUNKS}")
    refused = {
        f"schedule {request.schedule}": request.schedule != "sequential",
        "faults": not request.faults.none,
        f"{request.all_to_all} all-to-all": request.all_to_all in HIERARCHICAL,
    }
    for name, wanted in refused.items():
        if wanted:
            raise InputError(f"{name} with experts on GPUs of their own", "leave one of them out")


def _workload(request: SimRequest, defaults: dict[str, str]) -> tuple[Phase, int]:
    made_for = request.plan.evaluation if request.plan is not None else {}
    phases = np.asarray(request.trace.phases)
    phase = request.phase
    if phase is None:
        phase = made_for.get("phase")
        if phase not in ("prefill", "decode"):
            phase = "prefill" if (phases == PREFILL).any() else "decode"
        share = float((phases == DECODE).mean())
        defaults["phase"] = f"{phase} ({share:.0%} of the trace's tokens are decode)"
    batch_tokens = request.batch_tokens
    if batch_tokens is None:
        planned = made_for.get("batch_tokens") if made_for.get("phase") == phase else None
        batch_tokens = planned if isinstance(planned, int) else DEFAULT_BATCH_TOKENS[phase]
        defaults["batch tokens"] = f"{batch_tokens} over all GPUs"
    if not 1 <= batch_tokens <= 1 << 24:
        raise InputError(f"`batch_tokens` {batch_tokens}", "give the tokens of one step")
    if not 1 <= request.num_steps <= 1 << 20:
        raise InputError(f"`steps` {request.num_steps}", "give at least 1")
    if request.context_tokens is not None and not 1 <= request.context_tokens <= 1 << 30:
        raise InputError(f"`context_tokens` {request.context_tokens}", "give at least 1")
    if request.fidelity == "analytic":
        _check_closed_form(request)
    return phase, batch_tokens


def _check_closed_form(request: SimRequest) -> None:
    """Raise InputError for what only the event simulation can do."""
    asked = {
        f"schedule {request.schedule}": request.schedule != "sequential",
        f"{request.micro_batches} parts between two pools": request.expert_gpus is not None
        and request.micro_batches > 1,
        "a timeline": request.timeline_steps > 0,
        "GPUs that change speed": bool(request.slow) or request.speed_sigma > 0,
        "faults": not request.faults.none,
        "rebalancing": request.rebalance is not None,
    }
    for name, wanted in asked.items():
        if wanted:
            raise InputError(f"{name}: the analytic cost has no such thing", "use `fidelity` event")


def build_models(
    request: SimRequest, phase: Phase, defaults: dict[str, str]
) -> tuple[Models, tuple[str, ...]]:
    """Cost models of a run, and notes on what they rest on; choices made go to `defaults`."""
    cluster, model = request.cluster, request.model
    step, links, exchange = build_exchange(
        request.all_to_all,
        cluster,
        model,
        reduce=request.reduce,
        network_scale=request.network_scale,
        phase=phase,
    )
    notes = list(step.notes)
    home = None
    if request.home_ranks:
        layers = request.trace.meta.layer_ids
        home = HomeModel(cluster, model, layers, reduce=request.reduce)
        notes.append(f"attention, gate and dense layers: {home.basis}")
    policy = request.replica_policy
    if policy is None:
        policy = request.plan.replica_policy if request.plan is not None else "split"
    models = Models(
        cluster,
        step,
        links,
        exchange,
        home,
        policy,
        request.context_tokens,
        request.drop,
        request.attention_gpus,
    )
    if request.all_to_all is None:
        defaults["all-to-all"] = (
            f"{models.exchange_name}, one message per {SENT_ONCE_A[step.dedup]}"
        )
    return models, tuple(notes)


def _placements(
    request: SimRequest,
    step: StepModel,
    phase: Phase,
    batch_tokens: int,
    defaults: dict[str, str],
    notices: list[str],
) -> tuple[dict[str, Placement], npt.NDArray[np.float32], RequestIndex]:
    trace, cluster = request.trace, request.cluster
    index, notice = index_requests(trace, phase)
    if notice:
        notices.append(notice)
    tune, held_out = split_requests(index)
    names = list(request.compare)
    out: dict[str, Placement] = {}
    if request.plan is not None:
        made_from = request.plan.provenance.get("trace")
        if made_from is not None and made_from != trace.content_hash():
            notices.append("the plan was made from another trace than this one")
        placed = request.plan.placement.behind(request.attention_gpus, cluster.num_nodes)
        out["plan"] = placed
        capacity = capacity_of(placed)
    else:
        first, holders = request.attention_gpus, request.expert_gpus or cluster.num_gpus
        per_gpu, over = divmod(trace.num_experts, holders)
        if not per_gpu:
            raise InputError(
                f"{trace.num_experts} experts on {holders} GPUs: some would hold none",
                f"use at most {trace.num_experts} GPUs, or a plan with redundant experts",
            )
        capacity = np.full(cluster.num_gpus, per_gpu, np.int64)
        capacity[first : first + over] += 1
        capacity[:first] = 0
        names = ["linear", *(n for n in names if n != "linear")]
        defaults["placement"] = "linear (no `plan`)"
    counts = np.zeros((0, trace.num_layers, trace.num_experts), np.float32)
    if names or request.faults.recovery.on_loss == "replan":
        counts = tuning_counts(trace, tune, phase, batch_tokens, request.seed)
        needing = [n for n in names if "tokens" in getattr(find_solver(n), "needs", ())]
        traffic = None
        if needing:
            traffic = sample_traffic(
                trace, tune, phase, batch_tokens, step, request.seed, request.attention_gpus
            )
        notices += other_schedule(names, request.schedule)
        for name in dict.fromkeys(names):
            out[name] = place_by_counts(
                name,
                counts,
                capacity,
                cluster,
                num_groups=request.model.n_group,
                seed=request.seed,
                traffic=traffic,
            )
    return out, counts, held_out


def _batches(
    request: SimRequest,
    held_out: RequestIndex,
    phase: Phase,
    batch_tokens: int,
    notices: list[str],
) -> Batches:
    seed = request.seed + 1
    if request.drift:
        batches = _by_domain(request, held_out, phase, batch_tokens, seed)
    else:
        batches = draw_batches(held_out, phase, batch_tokens, request.num_steps, seed)
    filled = float(np.diff(batches.indptr).mean())
    if filled < 0.9 * batch_tokens:
        notices.append(
            f"the held-out requests fill steps of {filled:.0f} tokens only, {batch_tokens} asked"
        )
    return replace(batches, batch_tokens=batch_tokens)


def _by_domain(
    request: SimRequest, held_out: RequestIndex, phase: Phase, batch_tokens: int, seed: int
) -> Batches:
    """Steps from one domain after the other, in the order of the trace's meta, equally many."""
    trace = request.trace
    if trace.domain_ids is None:
        raise MismatchError("the trace has no domains to drift through", "leave out `drift`")
    domain = np.asarray(trace.domain_ids)[held_out.token_idx[held_out.indptr[:-1]]]
    present = np.unique(domain)
    cuts = np.linspace(0, request.num_steps, len(present) + 1).astype(int)
    parts = [
        draw_batches(held_out.select(domain == d), phase, batch_tokens, int(count), seed)
        for d, count in zip(present, np.diff(cuts), strict=True)
        if count
    ]
    lengths = np.concatenate([np.diff(p.indptr) for p in parts])
    return Batches(
        np.concatenate([p.token_idx for p in parts]),
        np.concatenate(([0], np.cumsum(lengths))),
        phase,
        batch_tokens,
    )
