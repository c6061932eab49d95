"""Placements to compare with, from expert counts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.plan import EMPTY, Placement
from moesim.solvers.base import Problem
from moesim.solvers.registry import get_solver

if TYPE_CHECKING:
    from moesim.cluster import Cluster

IntArray = npt.NDArray[np.int64]


def place_by_counts(
    solver: str,
    counts: npt.NDArray[Any],
    capacity: IntArray,
    cluster: Cluster,
    *,
    num_groups: int = 1,
    seed: int = 0,
) -> Placement:
    """The placement of a named solver with the objective of balance.

    counts: [B, L, E] tokens of each expert; capacity: [G] slots of each GPU in a layer.
    """
    problem = Problem(
        counts=np.asarray(counts, np.float32),
        capacity=capacity,
        num_nodes=cluster.num_nodes,
        speed=np.asarray(cluster.speed_factor, np.float64),
        num_groups=num_groups,
        seed=seed,
    )
    return get_solver(solver).solve(problem).placement


def capacity_of(placement: Placement) -> IntArray:
    """[G] slots of each GPU that hold an expert in some layer."""
    filled = (placement.physical_to_logical != EMPTY).reshape(
        placement.num_layers, placement.num_gpus, -1
    )
    return filled.sum(axis=2).max(axis=0).astype(np.int64)
