"""How many slots each layer gets: dynamic programming over per-layer miss curves.

AdapMoE (arXiv:2408.10284, section 4.3) minimises the expected on-demand loads of all layers under
a total number of cached experts; the same recurrence here takes any curves. Curves need not be
convex.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from moesim.errors import InfeasibleError, InputError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


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
            "give more memory or ask for fewer slots a layer",
        )
    return _solve(table, min(budget, num_layers * most), least)


@njit(cache=True)
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
