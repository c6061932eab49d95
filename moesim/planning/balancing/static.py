"""Placements that stay: no balancing, EPLB from recorded loads, and moesim's own plans."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.choices import Objective, ReplicaPolicy
from moesim.planning.balancing.bench import Bench, Outcome
from moesim.sim.rebalance import slot_table


@dataclass(frozen=True, slots=True)
class InUse:
    """What a service does that does nothing: the placement in use, linear if none was given."""

    name: str
    about: str

    def run(self, bench: Bench) -> Outcome:
        slots = bench.in_use.slots_per_gpu - int(bench.capacity[0])
        return Outcome(bench.price([(0, bench.in_use)]), slots=slots)


@dataclass(frozen=True, slots=True)
class Static:
    """One solver's placement for the tuning requests of the whole log, from the first step on.

    grouped: let the solver see the model's expert groups (hierarchical EPLB). policy: how a replica
    is chosen, the bench's where None.
    """

    name: str
    about: str
    solver: str
    objective: Objective = "balance"
    redundant: int = 0
    grouped: bool = False
    policy: ReplicaPolicy | None = None
    enable: str = ""

    def run(self, bench: Bench) -> Outcome:
        placement = bench.placed(self.solver, self.objective, self.redundant, self.grouped)
        switch_us = 0.0
        if bench.start is not None:
            moves, costs = bench.moving(slot_table(bench.start), slot_table(placement)), bench.costs
            switch_us = int((moves.experts > 0).sum()) * costs.stopped.layer_us
            switch_us += moves.us(costs.stopped)
        return Outcome(
            bench.price([(0, placement)], self.policy),
            slots=self.redundant / bench.num_gpus,
            switch_us=switch_us,
            enable=self.enable,
        )
