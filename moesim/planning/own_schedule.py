"""Placements judged under the schedule that their method is made for.

ExFlow and MoETuner gain where a token stays on the GPU of its last expert. In the sequential
schedule, by which plans are evaluated, it goes home after every layer and they gain nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesim.placement import Placement
from moesim.sim.collectives.registry import build_exchange
from moesim.sim.event import run_event
from moesim.sim.prepare import Models
from moesim.sim.schedules.registry import get_schedule
from moesim.solvers.registry import find_solver
from moesim.trace.batches import Batches

if TYPE_CHECKING:
    from moesim.planning.case import Case
    from moesim.planning.evaluate import Sample

NUM_STEPS = 16


def schedule_of(solver: object) -> str:
    """The schedule that a solver is made for."""
    return str(getattr(solver, "schedule", "sequential"))


def other_schedule(names: Sequence[str], schedule: str) -> list[str]:
    """A notice for each named solver that is made for another schedule than `schedule`."""
    made_for = {name: schedule_of(find_solver(name)) for name in dict.fromkeys(names)}
    return [
        f"{name} is made for `schedule` {own}, this is {schedule}"
        for name, own in made_for.items()
        if own not in ("sequential", schedule)
    ]


def own_schedule(
    case: Case, sample: Sample, placements: Mapping[str, Placement]
) -> tuple[list[str], dict[str, Any]]:
    """Lines and JSON: the MoE part of held-out steps of every placement under the schedule of the
    case's solver; ({}, []) where that is the sequential one or no model is known.

    Over the plain all-to-all, since tokens go straight from expert to expert. Prompts are not
    judged so: the schedule moves decode tokens.
    """
    solver, data = case.request.solver, case.data
    name = schedule_of(solver)
    if name == "sequential" or data is None or data.step is None:
        return [], {}
    if data.phase != "decode":
        return [
            f"{solver.name} is made for schedule {name}, which moves decode tokens only: of prefill"
            " steps it is judged by the sequential schedule alone, where it has nothing to gain"
        ], {}
    work = case.request.workload
    assert work.model is not None
    library = data.step.all_to_all if data.step.all_to_all == "nvlink" else "nccl"
    step, links, exchange = build_exchange(
        library, work.cluster, work.model, network_scale=work.network_scale, phase=data.phase
    )
    models = Models(work.cluster, step, links, exchange, None, work.replica_policy)
    count = min(NUM_STEPS, sample.num_main)
    batches = Batches(
        sample.batches.token_idx[: sample.batches.indptr[count]],
        sample.batches.indptr[: count + 1],
        data.phase,
        data.batch_tokens,
    )
    found = {
        label: float(
            run_event(models, get_schedule(name), data.trace, batches, placement).step_us.mean()
        )
        for label, placement in placements.items()
    }
    shown = ", ".join(f"{label} {us / 1e3:.3f}" for label, us in found.items())
    line = (
        f"{solver.name} is made for schedule {name}; under it, over {library}, the MoE part of"
        f" {count} held-out steps takes (ms): {shown}. The table above is of the sequential one"
    )
    out = {"schedule": name, "all_to_all": library, "num_steps": count, "step_us": found}
    return [line], out
