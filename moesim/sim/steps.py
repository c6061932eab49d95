"""One step as a schedule cuts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moesim.cost.routing import Routed, home_ranks
from moesim.placement import Placement
from moesim.sim.capacity import Drops
from moesim.sim.coherent import coherent_work
from moesim.sim.schedules.base import Schedule
from moesim.sim.work import HomeWork, StepWork
from moesim.trace.batches import Batches

if TYPE_CHECKING:
    from moesim.trace.format import Trace
from moesim.sim.prepare import (
    Homes,
    Models,
    Step,
    home_times,
    limited,
    routed_by,
    split_batch,
    timed,
)


def step_work(
    models: Models,
    trace: Trace,
    batch: Batches,
    placement: Placement,
    schedule: Schedule,
    home: Homes | None = None,
) -> Step:
    """One step (`batch` holds one batch) as `schedule` cuts it."""
    if home is None:
        home = home_ranks(trace, batch, models.num_homes)
    trace, batch, drops = limited(models, trace, batch, home, placement)
    if schedule.coherent:
        work, routed = coherent_work(models, trace, batch, placement, home)
        return Step(work, routed, drops)

    def routing(some: Batches, homes: Homes) -> Routed:
        return routed_by(models, trace, some, placement, homes)

    return timed_step(models, trace, batch, home, schedule.num_chunks, routing, drops)


def timed_step(
    models: Models,
    trace: Trace,
    batch: Batches,
    home: Homes,
    num_chunks: int,
    routing: Callable[[Batches, Homes], Routed],
    drops: Drops,
) -> Step:
    """`step_work` with a routing of its own, for tokens that capacity has been applied to."""
    if num_chunks == 1:
        ready = timed(models, trace, batch, home, routing(batch, home))
        whole = HomeWork.of(ready.home, 0)
    else:
        cut, cut_home = split_batch(batch, home, num_chunks)
        ready = timed(models, trace, cut, cut_home, routing(cut, cut_home))
        whole = HomeWork.of(home_times(models, trace, batch, home), 0)
    chunks = tuple(ready.chunk(i) for i in range(num_chunks))
    work = StepWork(trace.num_layers, models.num_gpus, len(batch.token_idx), whole, chunks)
    return Step(work, ready.routed, drops)
