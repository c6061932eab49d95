"""Integer programs beside what a caching plan's own methods found, each with its bound."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.caching.bits import BITS, bit_budget, choose_bits
from moesim.caching.planner import tier_costs
from moesim.caching.slots import allocate_slots, allocate_tiers
from moesim.errors import InputError
from moesim.solvers.ilp.cache import solve_bits, solve_slots, solve_tiers
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.jobs.cache_result import CacheJob

log = logging.getLogger("moesim")


def solve_exactly(job: CacheJob) -> list[dict[str, Any]]:
    """One row: slots, or slots and tiers. Sizes that a program cannot hold get a dual bound, and a
    warning says so."""
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
            dual["in_plan"] = False
            rows.append({"what": "slots and tiers", "unit": "s of misses per token"} | dual)
    else:
        rows.append(_row("slots", "s of misses per token", own, solve_slots(curves.cost, slots)))
    return rows


def exact_bits(
    loss: FloatArray, average_bits: float
) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
    """[L, E] bits of each expert, and a row as those of `solve_exactly`: layer by layer the integer
    program's choice, or the greedy one where a time limit left the program with a worse."""
    greedy = choose_bits(loss, average_bits)
    budget = bit_budget(loss.shape[1], average_bits)
    own = _losses(loss, greedy)
    found = [solve_bits(layer, budget) for layer in loss]
    better = np.array([f.objective for f in found]) < own
    picked = np.where(better[:, None], [np.array(BITS)[f.pick] for f in found], greedy)
    return picked, {
        "what": "bits",
        "unit": "weighted error",
        "own": float(own.sum()),
        "integer_program": float(_losses(loss, picked).sum()),
        "bound": sum(f.bound for f in found),
        "status": "optimal" if all(f.status == "optimal" for f in found) else "time_limit",
        "in_plan": True,
    }


def _losses(loss: FloatArray, bits: npt.NDArray[np.int64]) -> FloatArray:
    """[L]: loss of the layers' experts at `bits` [L, E]."""
    return np.take_along_axis(loss, bits[:, :, None] - BITS[0], axis=2).sum(axis=(1, 2))


def _row(what: str, unit: str, own: float, found: Any) -> dict[str, Any]:
    return {
        "what": what,
        "unit": unit,
        "own": own,
        "integer_program": found.objective,
        "bound": found.bound,
        "status": found.status,
        "in_plan": False,
    }
