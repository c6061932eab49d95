"""Integer programs for caching plans: slots per layer, memory tiers, bits per expert.

Each is a multiple-choice knapsack: every layer (or expert) takes exactly one option, budgets
couple them. moesim.caching has fast methods for the same questions; these give the optimum, or a
bound on how far from it a time limit left them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import InfeasibleError, InputError
from moesim.placement import Status
from moesim.solvers.ilp.engine import take_banner
from moesim.types import FloatArray, IntArray

MAX_OPTIONS = 150_000
"""Binary variables that `choose` accepts."""


@dataclass(frozen=True, slots=True, eq=False)
class IlpResult:
    """pick: [groups] option taken by each group. bound <= optimum <= objective; `status` is
    `optimal` where the two meet and `time_limit` where the search was cut off."""

    pick: IntArray
    objective: float
    bound: float
    status: Status

    @property
    def gap(self) -> float:
        """(objective - bound) / objective, 0 where both are 0."""
        if self.objective <= 0:
            return 0.0
        return max(0.0, (self.objective - self.bound) / self.objective)


@dataclass(frozen=True, slots=True, eq=False)
class TierResult:
    """slots: [L] slots in HBM; in_dram: [L] experts of the layer in DRAM, those with the most
    misses first, the others on NVMe. objective, bound, status as in IlpResult."""

    slots: IntArray
    in_dram: IntArray
    objective: float
    bound: float
    status: Status


def solve_slots(cost: FloatArray, budget: int, time_limit_s: float = 60.0) -> IlpResult:
    """Slots of each layer at the least total cost: cost [L, C + 1], at most `budget` in all.

    The same question as moesim.caching.slots.allocate_slots answers by dynamic programming.
    """
    width = np.broadcast_to(np.arange(cost.shape[1]), cost.shape)
    return choose(list(cost), [(list(width), float(budget))], time_limit_s=time_limit_s)


def solve_tiers(
    expert_misses: FloatArray,
    dram_cost: FloatArray,
    nvme_cost: FloatArray,
    budget_slots: int,
    budget_dram: int,
    time_limit_s: float = 60.0,
) -> TierResult:
    """Slots in HBM and experts in DRAM, jointly, at the least cost of misses.

    expert_misses: [L, C + 1, E] misses of each expert with c slots (LayerCurves); dram_cost,
    nvme_cost: [L, E] cost of a miss by where the expert lives. With c slots and h experts in DRAM
    a layer costs least when DRAM has the h experts whose misses cost most to serve from NVMe, so
    its options are the pairs (c, h), without those where the h-th expert saves nothing.
    """
    num_layers, num_options, _ = expert_misses.shape
    groups, slots, held = [], [], []
    for layer in range(num_layers):
        extra = expert_misses[layer] * (nvme_cost[layer] - dram_cost[layer])
        order = -np.sort(-extra, axis=1)
        saved = np.concatenate((np.zeros((num_options, 1)), np.cumsum(order, axis=1)), axis=1)
        useful = np.concatenate((np.ones((num_options, 1), bool), order > 0), axis=1)
        slot, host = np.nonzero(useful)
        groups.append((expert_misses[layer] @ nvme_cost[layer])[slot] - saved[slot, host])
        slots.append(slot)
        held.append(host)
    found = choose(
        groups,
        [(slots, float(budget_slots)), (held, float(budget_dram))],
        time_limit_s=time_limit_s,
    )
    pick = found.pick
    return TierResult(
        np.array([slots[i][p] for i, p in enumerate(pick)]),
        np.array([held[i][p] for i, p in enumerate(pick)]),
        found.objective,
        found.bound,
        found.status,
    )


def solve_bits(
    loss: FloatArray, budget: int, bits: tuple[int, ...] = (1, 2, 3), time_limit_s: float = 60.0
) -> IlpResult:
    """Bits of each expert of one layer (MC-MoE, arXiv:2410.06270, section 3.2): loss
    [E, len(bits)], at most `budget` bits in all, at least one expert at every width but the
    narrowest. `pick` indexes `bits`."""
    width = np.broadcast_to(np.array(bits), loss.shape)
    least = [(option, 1) for option in range(1, len(bits))]
    return choose(list(loss), [(list(width), float(budget))], least, time_limit_s)


def choose(
    cost: list[FloatArray],
    budgets: list[tuple[list[npt.NDArray[Any]], float]],
    at_least: list[tuple[int, int]] | None = None,
    time_limit_s: float = 60.0,
) -> IlpResult:
    """One option of every group at the least total cost.

    cost: per group an array over its options. budgets: (per group the use of each option, limit).
    at_least: (option, how many groups must take it). Raises InputError for costs that are not
    finite, InfeasibleError where no choice meets the budgets.
    """
    import highspy
    import pulp

    if not cost or any(len(c) == 0 or not np.isfinite(c).all() for c in cost):
        raise InputError("every group needs options of finite cost", "check the cost tables")
    if sum(map(len, cost)) > MAX_OPTIONS:
        raise InputError(
            f"{sum(map(len, cost))} options are more than the {MAX_OPTIONS} that an integer program"
            " takes",
            "leave the integer program out: dynamic programming has no such limit",
        )
    scale = max(float(np.abs(c).max()) for c in cost) or 1.0
    problem = pulp.LpProblem("choose", pulp.LpMinimize)
    take = [
        [pulp.LpVariable(f"x_{g}_{o}", cat="Binary") for o in range(len(c))]
        for g, c in enumerate(cost)
    ]
    problem += pulp.LpAffineExpression(
        [
            (x, float(v) / scale)
            for row, c in zip(take, cost, strict=True)
            for x, v in zip(row, c, strict=True)
        ]
    )
    for row in take:
        problem += pulp.lpSum(row) == 1
    for uses, limit in budgets:
        problem += (
            pulp.LpAffineExpression(
                [
                    (x, float(u))
                    for row, use in zip(take, uses, strict=True)
                    for x, u in zip(row, use, strict=True)
                ]
            )
            <= limit
        )
    for option, count in at_least or []:
        problem += pulp.lpSum(row[option] for row in take) >= count
    take_banner(highspy)
    solver = pulp.HiGHS(msg=False, timeLimit=time_limit_s, gapRel=1e-9, threads=1)
    problem.solve(solver)
    if problem.status == pulp.LpStatusInfeasible:
        raise InfeasibleError("no choice meets the budgets", "raise a budget")
    values = [[x.value() for x in row] for row in take]
    if any(v is None for row in values for v in row):
        raise InfeasibleError(
            f"no choice was found within {time_limit_s:g} s", "raise the time limit"
        )
    pick = np.array([int(np.argmax(row)) for row in values])
    objective = float(sum(c[p] for c, p in zip(cost, pick, strict=True)))
    bound = min(objective, float(problem.solverModel.getInfo().mip_dual_bound) * scale)
    done = objective - bound <= 1e-6 * max(1e-300, abs(objective))
    return IlpResult(pick, objective, bound, "optimal" if done else "time_limit")
