"""Placements to compare with, from expert counts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.placement import EMPTY, Placement
from moesim.planning.pools import check_solver, folded, unfolded
from moesim.solvers.base import Problem, Traffic, among_holders, run_solver
from moesim.solvers.registry import find_solver
from moesim.types import IntArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster


def place_by_counts(
    solver: str,
    counts: npt.NDArray[Any],
    capacity: IntArray,
    cluster: Cluster,
    *,
    num_groups: int = 1,
    seed: int = 0,
    traffic: Traffic | None = None,
    layers_per_pool: int = 1,
    notices: list[str] | None = None,
) -> Placement:
    """The placement of a named solver with the objective of balance, on the GPUs with slots.

    counts: [B, L, E] tokens of each expert; capacity: [G] slots of each GPU in a layer, 0 for GPUs
    that are down or hold no experts. traffic: sampled tokens, for methods that need them, which
    then have objective traffic. layers_per_pool: so many adjacent layers share their experts, and
    are placed alike. notices: told where the clock ended the search. Raises InputError for a method
    that needs what there is not, with a remedy that does not depend on which option named it.
    """
    method = find_solver(solver)
    needs_tokens = traffic is not None and "tokens" in getattr(method, "needs", ())
    problem = Problem(
        counts=np.asarray(counts, np.float32),
        capacity=capacity,
        num_nodes=cluster.num_nodes,
        speed=np.asarray(cluster.speed_factor, np.float64),
        num_groups=num_groups,
        seed=seed,
        objective="traffic" if needs_tokens else "balance",
        traffic=traffic if needs_tokens else None,
    )
    if layers_per_pool > 1:
        check_solver(method)
        problem = folded(problem, layers_per_pool)
    try:
        if needs_tokens:
            solved = run_solver(method, problem)
        else:
            solved = among_holders(method, problem)
    except InputError as error:
        raise InputError(error.cause, "name greedy or local_search, which place any") from None
    if notices is not None and solved.status == "time_limit":
        notices.append(
            f"{solver} stopped at its time limit of {problem.time_limit_s:g} s: on another or"
            " busier machine it may place otherwise"
        )
    return unfolded(solved.placement, layers_per_pool)


def capacity_of(placement: Placement) -> IntArray:
    """[G] slots of each GPU that hold an expert in some layer."""
    filled = (placement.physical_to_logical != EMPTY).reshape(
        placement.num_layers, placement.num_gpus, -1
    )
    return filled.sum(axis=2).max(axis=0).astype(np.int64)
