"""Placement problems of traces whose adjacent layers share experts: one decision per pool."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import InputError
from moesim.placement import Placement
from moesim.solvers.base import Problem, Solver, Traffic
from moesim.trace.empty import loaded_layers
from moesim.trace.format import require_tokens

if TYPE_CHECKING:
    from moesim.planning.request import PlanRequest


def check_pools(request: PlanRequest) -> None:
    """Raise InputError for what is not worked out for pools of layers."""
    trace = request.workload.trace
    if trace.meta.layers_per_pool == 1:
        return
    require_tokens(trace, "a plan where adjacent layers share experts")
    if not loaded_layers(trace).all():
        raise InputError(
            "layers without any load where adjacent layers share experts", "use a whole trace"
        )
    extras = request.extras
    asked = {
        "`old_plan`": extras.old_plan is not None,
        "`home_ranks`": extras.home_ranks is not None,
        "`robust`": extras.robust is not None,
        "`mtp`": request.workload.mtp,
    }
    for name, given in asked.items():
        if given:
            raise InputError(f"{name} where adjacent layers share experts", "leave it out")
    check_solver(request.solver)


def check_solver(solver: Solver) -> None:
    """Raise InputError for a method that follows tokens from layer to layer, which go back to the
    same experts within a pool."""
    if getattr(solver, "schedule", "sequential") != "sequential":
        raise InputError(
            f"{solver.name}, which follows tokens from layer to layer, where adjacent layers share"
            " experts",
            "use another solver, such as local_search",
        )


def folded(problem: Problem, layers_per_pool: int) -> Problem:
    """The same problem with a pool in the place of its layers: each batch becomes as many as the
    pool has layers, one of each layer's load and tokens, [B * r, L / r, E]. A layer's cost is its
    batches' mean and layers do not depend on each other (C5), so that the mean over pools is the
    mean over layers of a placement that is the same in all layers of a pool."""
    size, traffic = layers_per_pool, problem.traffic
    batches, layers, experts = problem.counts.shape
    counts = problem.counts.reshape(batches, layers // size, size, experts)
    return replace(
        problem,
        counts=np.ascontiguousarray(counts.swapaxes(1, 2).reshape(-1, layers // size, experts)),
        traffic=None if traffic is None else _folded_traffic(traffic, size),
    )


def _folded_traffic(traffic: Traffic, size: int) -> Traffic:
    ids, batches = np.asarray(traffic.expert_ids), traffic.num_batches
    return replace(
        traffic,
        expert_ids=np.concatenate([ids[:, layer::size] for layer in range(size)]),
        home=np.tile(traffic.home, size),
        batch_idx=np.concatenate(
            [traffic.batch_idx + np.int32(layer * batches) for layer in range(size)]
        ),
    )


def unfolded(placement: Placement, layers_per_pool: int) -> Placement:
    """The placement of pools as one of layers: the same row for each of a pool's."""
    if layers_per_pool == 1:
        return placement
    table = np.repeat(placement.physical_to_logical, layers_per_pool, axis=0)
    return Placement(table, placement.num_gpus, placement.num_nodes, placement.num_experts)
