"""Ours while serving: the placement in use is improved every so many steps, moves priced.

At each turn the loads of the window are weighed with what the cluster's links make of moves
(`moesim.planning.migrate`): a layer changes only where what it saves until the next turn is more
than the moves cost. Where nothing gains, nothing moves, and serving does not stop for weights. The
expert time is searched, messages are those of a few recent batches. Runs beside the steps or
stops them, as EPLB does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesim.placement import Placement
from moesim.planning.balancing.bench import Bench, Outcome, Table
from moesim.planning.balancing.eplb import Rhythm, periodic
from moesim.planning.migrate import migrate
from moesim.planning.traffic import sample_traffic
from moesim.sim.rebalance import slot_table
from moesim.solvers.base import Problem, run_solver
from moesim.solvers.registry import find_solver
from moesim.types import Array

SEARCH_S = 1e4
"""Moves are searched to their end: how many there are bounds the time, not a clock."""


@dataclass(frozen=True, slots=True)
class Online:
    """Re-planned by greedy placement and local search of moves, with `redundant` slots.

    planned: begin with our plan for time from the tuning requests, instead of what is in use.
    """

    name: str
    about: str
    rhythm: Rhythm
    redundant: int = 0
    planned: bool = False
    enable: str = ""

    def run(self, bench: Bench) -> Outcome:
        start = bench.begin(self.redundant)
        if self.planned:
            start = bench.placed("local_search", "time", self.redundant)
        return periodic(bench, self.rhythm, self.redundant, self._target, self.enable, start)

    def _target(self, bench: Bench, seen: Array, held: Table, step: int) -> Table:
        course = bench.course
        problem = Problem(
            counts=seen,
            capacity=bench.room(self.redundant),
            num_nodes=bench.cluster.num_nodes,
            objective="time",
            speed=bench.problem.speed,
            gpu_type=bench.problem.gpu_type,
            expert_us=bench.problem.expert_us,
            traffic=sample_traffic(
                course.trace,
                course.recent(step, self.rhythm.window),
                course.batches.phase,
                course.batch_tokens,
                bench.step,
                course.seed + step,
            ),
            seed=course.seed,
            time_limit_s=SEARCH_S,
        )
        fresh = run_solver(
            find_solver("greedy"), replace(problem, objective="balance", traffic=None)
        ).placement
        old = Placement(
            held.reshape(len(held), -1), fresh.num_gpus, fresh.num_nodes, fresh.num_experts
        )

        def moving_us(placement: Placement) -> float:
            return bench.moving(held, slot_table(placement)).us(bench.costs.beside)

        found = migrate(
            problem,
            old,
            fresh,
            moving_us=moving_us,
            price_us=bench.price_us,
            steps=float(self.rhythm.every),
        )
        return np.ascontiguousarray(slot_table(found.placement), np.int32)
