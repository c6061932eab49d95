"""Placements to compare with, from expert counts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.placement import EMPTY, Placement
from moesim.solvers.base import Problem, Solver, Traffic, run_solver
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
) -> Placement:
    """The placement of a named solver with the objective of balance.

    counts: [B, L, E] tokens of each expert; capacity: [G] slots of each GPU in a layer. traffic:
    sampled tokens, for methods that need them, which then have objective traffic. Raises InputError
    for a method that needs what there is not.
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
    return _placed(method, problem)


def _placed(method: Solver, problem: Problem) -> Placement:
    """Raises InputError with a remedy that does not depend on which option named the method."""
    try:
        return run_solver(method, problem).placement
    except InputError as error:
        raise InputError(error.cause, "name greedy or local_search, which place any") from None


def place_on_survivors(
    solver: str,
    counts: npt.NDArray[Any],
    capacity: IntArray,
    cluster: Cluster,
    *,
    num_groups: int = 1,
    seed: int = 0,
) -> Placement:
    """`place_by_counts` on the GPUs with slots alone, those of the others left empty.

    Methods that want nodes and GPUs alike can so be used while GPUs are down; nodes that have lost
    unequal numbers of GPUs count as one.
    """
    up = np.flatnonzero(capacity > 0)
    if len(up) == len(capacity):
        return place_by_counts(solver, counts, capacity, cluster, num_groups=num_groups, seed=seed)
    left = np.unique(np.asarray(cluster.node_of_gpu)[up], return_counts=True)[1]
    same = len(set(left.tolist())) == 1
    problem = Problem(
        counts=np.asarray(counts, np.float32),
        capacity=capacity[up],
        num_nodes=len(left) if same else 1,
        speed=np.asarray(cluster.speed_factor, np.float64)[up],
        num_groups=num_groups if same else 1,
        seed=seed,
    )
    found = _placed(find_solver(solver), problem)
    own = found.physical_to_logical.reshape(found.num_layers, len(up), -1)
    table = np.full((found.num_layers, len(capacity), own.shape[2]), EMPTY, np.int32)
    table[:, up] = own
    return Placement(
        table.reshape(found.num_layers, -1), len(capacity), cluster.num_nodes, found.num_experts
    )


def capacity_of(placement: Placement) -> IntArray:
    """[G] slots of each GPU that hold an expert in some layer."""
    filled = (placement.physical_to_logical != EMPTY).reshape(
        placement.num_layers, placement.num_gpus, -1
    )
    return filled.sum(axis=2).max(axis=0).astype(np.int64)
