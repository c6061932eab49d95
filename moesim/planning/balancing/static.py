"""Placements that stay: no balancing, EPLB from recorded loads, and moesim's own plans."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.choices import Objective, ReplicaPolicy
from moesim.planning.balancing.bench import Bench, Outcome


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
        return Outcome(
            bench.price([(0, placement)], self.policy),
            slots=self.redundant / bench.num_gpus,
            enable=self.enable,
        )
