"""The picture of each job's result: what `--plot` writes and a notebook shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moesim.draw import Picture

if TYPE_CHECKING:
    from moesim.jobs.balance_result import BalanceResult
    from moesim.jobs.cache_result import CacheJob
    from moesim.jobs.plan_result import PlanResult
    from moesim.jobs.simulate_result import SimReport
    from moesim.replay.compare import Comparison


def plan_picture(result: PlanResult) -> Picture:
    """Load and predicted time of every layer of the plan and of what it is compared with."""
    from moesim.draw.plan import plan_poster

    plan, found = result.plan, {c.name: c.measured for c in result.candidates}
    evaluation = plan.evaluation
    if "phase" in evaluation:
        about = f"held-out {evaluation['phase']} batches of {evaluation['batch_tokens']} tokens"
    else:
        about = f"{evaluation['num_steps']} recorded steps"
        about += ", held-out" if evaluation["held_out"] else ", tuned on"
    parts = {n: m.layer_parts_us for n, m in found.items() if m.layer_parts_us is not None}
    if result.step is not None:
        about += f"; times are predicted, from {result.step.basis} figures"
    return plan_poster(
        f"{plan.model or 'model'} on {plan.placement.num_gpus} GPUs",
        about,
        {name: measured.gpu_load for name, measured in found.items()},
        {n: result.sample.groups(m.values["imbalance"])[0].ravel() for n, m in found.items()},
        plan.layer_ids,
        parts if len(parts) == len(found) else {},
    )


def simulation_picture(report: SimReport) -> Picture:
    """Where the time of simulated steps goes, and how it varies."""
    from moesim.draw.simulate import simulation_poster

    results, request = report.results, report.request
    title = f"{request.model.name}, {request.cluster.num_gpus} GPUs of {request.cluster.name}"
    settings = "; ".join(f"{name} {text}" for name, text in request.settings().items())
    return simulation_poster(
        f"{title}: {settings}" if settings else title,
        f"predicted, from {report.basis} figures",
        {name: found.breakdown_us() for name, found in results.items()},
        {name: found.step_us for name, found in results.items()},
        {name: found.gpu_busy.mean(axis=0).tolist() for name, found in results.items()},
    )


def balance_picture(result: BalanceResult) -> Picture:
    """What every scheme is worth against doing nothing, best first."""
    from moesim.draw.balance import worth_of_schemes

    found = {
        row.name: (row.charged.value, row.charged.low, row.charged.high)
        for row in sorted(result.rows[1:], key=lambda row: row.charged.value)
    }
    return worth_of_schemes(
        f"{result.model} on {result.num_gpus} GPUs, {result.phase} steps of"
        f" {result.batch_tokens:,} tokens",
        found,
        f"predicted, from {result.step.basis} figures",
    )


def cache_picture(job: CacheJob) -> Picture:
    """Tokens per second against memory of a caching plan that was swept over memory."""
    from moesim.draw.cache import speed_by_memory

    assert job.sweep is not None
    asked, plan = job.request, job.plan
    title = (
        f"{plan.model}, {plan.gpu}, batch {asked.batch_size}, {asked.context_tokens} tokens of"
        " context"
    )
    speed = {name: values.tolist() for name, values in job.sweep.speed.items()}
    return speed_by_memory(job.sweep.hbm_gb.tolist(), speed, asked.hbm_gb, title)


def validation_picture(comparisons: Sequence[Comparison]) -> Picture:
    """Every layer of every case, predicted against measured; a colour per model and mode."""
    from moesim.draw.validate import layer_scatter

    cases = {}
    for found in comparisons:
        for mode in found.modes:
            own = [c for c in found.cases if c.mode == mode]
            measured, predicted = (
                np.concatenate([getattr(c, name) for c in own]).tolist()
                for name in ("measured_us", "predicted_us")
            )
            cases[f"{found.model}, {mode}"] = (measured, predicted, [""] * len(measured))
    return layer_scatter(cases)
