"""How long moving from one placement to another takes on a cluster's links, and planning it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim import compat
from moesim.cost.step import StepModel
from moesim.errors import InputError
from moesim.placement import Placement, Plan
from moesim.planning.migrate import Migration, migrate
from moesim.sim.links import link_table
from moesim.sim.migrate import Mover, build_mover, holdings, plan_moves
from moesim.solvers.base import Problem
from moesim.types import Progress

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec
    from moesim.trace.format import Trace

DEFAULT_STEPS = 1000.0
"""Steps between two moves where none are given: SGLang's `--eplb-rebalance-num-iterations`."""


@dataclass(frozen=True, slots=True, eq=False)
class MovingPlan:
    """Moves from one placement to another. bytes_from_host: experts that no GPU holds (none, where
    both placements are whole). us: the busiest link, if it is never idle, and one latency; serving
    is taken to stop for that long."""

    num_moves: int
    bytes_from_gpus: float
    bytes_from_host: float
    us: float

    def to_json(self) -> dict[str, float]:
        return {
            "moved_experts": self.num_moves,
            "bytes_from_gpus": self.bytes_from_gpus,
            "bytes_from_host": self.bytes_from_host,
            "time_us": self.us,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Movers:
    """Moves away from the placement `old` on one cluster."""

    old: Placement
    mover: Mover
    num_links: int

    def plan(self, new: Placement) -> MovingPlan:
        """What getting to `new` takes."""
        moves = plan_moves(holdings(_table(self.old)), _table(new), new.node_of_gpu)
        if not moves:
            return MovingPlan(0, 0.0, 0.0, 0.0)
        busy, latency = np.zeros(self.num_links), 0.0
        for flow in self.mover.flows(moves):
            np.add.at(busy, flow.link_idx, flow.busy_us)
            latency = max(latency, flow.latency_us)
        from_gpus, from_host = self.mover.bytes(moves)
        count = sum(move.num_experts for move in moves)
        return MovingPlan(count, from_gpus, from_host, float(busy.max()) + latency)

    def price_us(self) -> float:
        """Time of one expert where many move, evenly spread: over the slowest kind of link that
        experts cross into a GPU, G of them at once."""
        gpus = self.old.num_gpus
        if gpus == 1:
            return 0.0
        routes = self.mover.cluster.routes()
        far = routes.links(gpus - 1, 0)
        return float(self.mover.us_per_byte[far].max() * self.mover.expert_bytes / gpus)


def movers(old: Placement, cluster: Cluster, model: ModelSpec, step: StepModel) -> Movers:
    """Moves of `model`'s experts away from `old` at the rates of `moesim.sim.migrate`."""
    links = link_table(cluster, step)
    return Movers(old, build_mover(cluster, links, float(model.expert_bytes())), links.num_links)


def check_old_plan(old: Plan, trace: Trace, cluster: Cluster) -> None:
    """Raise MismatchError unless `old` can be what runs the trace's model on the cluster now."""
    compat.plan_fits_trace(old, trace.meta, called="the plan in use")
    compat.placement_fits_cluster(old.placement, cluster, called="the plan in use")


def plan_migration(
    problem: Problem,
    old: Placement,
    new: Placement,
    away: Movers,
    steps: float,
    *,
    progress: Progress | None = None,
) -> Migration:
    """`moesim.planning.migrate.migrate` with times of the cluster's links. Raises InputError
    unless the objective is time and `steps` is a positive number."""
    if problem.objective != "time":
        raise InputError(
            "`old_plan` weighs microseconds of steps against those of moving, not"
            f" {problem.objective}",
            "use `objective` time",
        )
    if not (np.isfinite(steps) and steps > 0):
        raise InputError(f"{steps} steps between moves", "give a number above 0, such as 1000")
    return migrate(
        problem,
        old,
        new,
        moving_us=lambda placement: away.plan(placement).us,
        price_us=away.price_us(),
        steps=steps,
        progress=progress,
    )


def _table(placement: Placement) -> npt.NDArray[np.int32]:
    table: npt.NDArray[Any] = placement.physical_to_logical
    return table.reshape(placement.num_layers, placement.num_gpus, -1)
