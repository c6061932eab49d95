"""How many slots each layer gets: dynamic programming over per-layer miss curves.

AdapMoE (arXiv:2408.10284, section 4.3) minimises the expected on-demand loads of all layers under
a total number of cached experts; the same recurrence here takes any curves. Curves need not be
convex.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.errors import InfeasibleError, InputError
from moesim.kernels import kernel
from moesim.types import FloatArray, IntArray


def allocate_slots(cost: FloatArray, budget: int, least: int = 0) -> tuple[IntArray, float]:
    """Slots of each layer that minimise the total cost with at most `budget` slots in all.

    cost: [L, C + 1] finite cost of each layer with 0 .. C slots. least: slots that every layer
    gets at least. Returns ([L] slots, total cost); of equal costs the one with fewer slots in
    later layers. Raises InputError for a cost that is not a finite [L, C + 1], InfeasibleError
    where L x least is above the budget.
    """
    table = np.ascontiguousarray(cost, np.float64)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise InputError(
            f"cost has shape {table.shape} or is not finite",
            "give finite costs [layers, slots + 1]",
        )
    num_layers, most = table.shape[0], table.shape[1] - 1
    if least < 0 or least > most:
        raise InputError(f"{least} slots a layer are outside 0..{most}", "ask for fewer")
    if num_layers * least > budget:
        raise InfeasibleError(
            f"{budget} slots are fewer than {least} for each of {num_layers} layers",
            "give more memory or ask for fewer slots per layer",
        )
    return _solve(table, min(budget, num_layers * most), least)


def allocate_tiers(
    expert_misses: FloatArray,
    near: FloatArray,
    far: FloatArray,
    budget: int,
    in_dram: int,
) -> tuple[IntArray, npt.NDArray[np.bool_], float, float]:
    """Slots of each layer and the experts that live on NVMe, when DRAM holds only `in_dram`.

    expert_misses: [L, C + 1, E] misses of each expert with 0 .. C slots; near, far: [L, E] cost of
    one miss from DRAM and from NVMe. Returns ([L] slots, [L, E] whether on NVMe, total cost, a
    bound below which no choice goes).

    A price for a place in DRAM, found by bisection, makes the layers separate: with it, a layer
    with c slots keeps those experts in DRAM whose misses it saves more on. The places that remain
    go to the largest savings. The bound is the best of the Lagrangian duals seen on the way. Not
    exact; solvers.ilp.cache.solve_tiers is.
    """
    saved = expert_misses * (far - near)[:, None, :]
    alone = np.einsum("lce,le->lc", expert_misses, far)
    low, high = 0.0, float(saved.max(initial=0.0))
    bound = 0.0
    best = (np.inf, np.zeros(len(near), np.int64), np.ones(near.shape, bool))
    for _ in range(40):
        price = (low + high) / 2
        cost = alone - np.maximum(saved - price, 0.0).sum(axis=2)
        slots, value = allocate_slots(cost, budget)
        bound = max(bound, value - price * in_dram)
        gain = np.take_along_axis(saved, slots[:, None, None], axis=1)[:, 0]
        on_nvme = np.ones(gain.shape, bool)
        on_nvme.ravel()[np.argsort(-gain, axis=None, kind="stable")[:in_dram]] = False
        misses = np.take_along_axis(expert_misses, slots[:, None, None], axis=1)[:, 0]
        total = float((misses * np.where(on_nvme, far, near)).sum())
        if total < best[0]:
            best = (total, slots, on_nvme)
        if (gain > price).sum() > in_dram:
            low = price
        else:
            high = price
    return best[1], best[2], best[0], min(bound, best[0])


@kernel
def _solve(cost, budget, least):  # type: ignore[no-untyped-def]
    num_layers, width = cost.shape
    best = np.zeros(budget + 1)
    pick = np.zeros((num_layers, budget + 1), np.int32)
    for layer in range(num_layers):
        after = np.full(budget + 1, np.inf)
        for total in range(least * (layer + 1), budget + 1):
            for slots in range(least, min(width - 1, total - least * layer) + 1):
                value = best[total - slots] + cost[layer, slots]
                if value < after[total]:
                    after[total] = value
                    pick[layer, total] = slots
        best = after
    out = np.zeros(num_layers, np.int64)
    left = budget
    for layer in range(num_layers - 1, -1, -1):
        out[layer] = pick[layer, left]
        left -= out[layer]
    return out, best[budget]
