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
from moesim.errors import InputError
from moesim.jobs.simulate_request import SimRequest
from moesim.jobs.simulate_result import SimReport
from moesim.jobs.simulate_workload import (
    check_apart,
    check_plan,
    placements_of,
    steps_of,
    with_mtp_layers,
    workload_of,
)
from moesim.placement import Placement
from moesim.planning.baselines import place_by_counts
from moesim.planning.empty_layers import plan_of_layers
from moesim.sim.analytic import run_analytic
from moesim.sim.collectives.registry import build_exchange
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
from moesim.sim.schedules.registry import CHUNKED, check_exchange, get_schedule
from moesim.sim.stragglers import GpuSpeeds
from moesim.sim.timeline import StepTimeline
from moesim.trace.batches import (
    Batches,
    Phase,
)
from moesim.trace.empty import layers_text, loaded_layers, only_layers, require_load
from moesim.types import Progress, shifted

if TYPE_CHECKING:
    pass

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
    request = with_mtp_layers(request, notices)
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
    phase, batch_tokens = workload_of(request, defaults)
    models, notes = build_models(request, phase, defaults)
    placements, counts, held_out = placements_of(
        request, models.step, phase, batch_tokens, defaults, notices
    )
    batches = steps_of(request, held_out, phase, batch_tokens, notices)
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
