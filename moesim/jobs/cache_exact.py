"""Integer programs beside what a caching plan's own methods found, each with its bound."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.caching.bits import BITS, bit_budget
from moesim.caching.planner import tier_costs
from moesim.caching.slots import allocate_slots, allocate_tiers
from moesim.errors import InputError
from moesim.solvers.ilp.cache import solve_bits, solve_slots, solve_tiers

if TYPE_CHECKING:
    from moesim.jobs.cache_result import CacheJob

log = logging.getLogger("moesim")


def solve_exactly(job: CacheJob) -> list[dict[str, Any]]:
    """One row per question: slots or tiers, and bits. Sizes that a program cannot hold get a dual
    bound, and a warning says so."""
    curves, slots = job.planned.curves, job.planned.memory.num_slots
    _, own = allocate_slots(curves.cost, slots)
    rows = []
    if job.plan.nvme:
        in_dram = curves.expert_misses.shape[0] * job.plan.num_experts
        in_dram -= sum(map(len, job.plan.nvme))
        near, far = tier_costs(job.rates, job.request)
        misses = curves.expert_misses
        try:
            tiers = solve_tiers(misses, near, far, slots, in_dram)
            rows.append(_row("slots and tiers", "s of misses per token", own, tiers))
        except InputError as error:
            log.warning("%s: a dual bound is given instead", error.cause)
            *_, bound = allocate_tiers(misses, near, far, slots, in_dram)
            dual = {"own": own, "integer_program": None, "bound": bound, "status": "feasible"}
            rows.append({"what": "slots and tiers", "unit": "s of misses per token"} | dual)
    else:
        rows.append(_row("slots", "s of misses per token", own, solve_slots(curves.cost, slots)))
    if job.loss is not None and job.plan.bits is not None:
        bits = np.array(job.plan.bits)
        own = float(np.take_along_axis(job.loss, bits[:, :, None] - BITS[0], axis=2).sum())
        budget = bit_budget(job.plan.num_experts, job.average_bits)
        found = [solve_bits(layer, budget) for layer in job.loss]
        row = _row("bits", "weighted error", own, found[0])
        row["integer_program"] = sum(f.objective for f in found)
        row["bound"] = sum(f.bound for f in found)
        if any(f.status != "optimal" for f in found):
            row["status"] = "time_limit"
        rows.append(row)
    return rows


def _row(what: str, unit: str, own: float, found: Any) -> dict[str, Any]:
    return {
        "what": what,
        "unit": unit,
        "own": own,
        "integer_program": found.objective,
        "bound": found.bound,
        "status": found.status,
    }
