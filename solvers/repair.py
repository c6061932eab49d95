"""Moving replicas apart, so that no GPU holds an expert twice (INV-2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import InfeasibleError
from moesim.plan import EMPTY

Array = npt.NDArray[Any]


def separate_replicas(slots: Array, load: Array) -> int:
    """Swap doubled replicas with slots of other GPUs, in place; returns the number of swaps.

    slots: [L, G, S] experts, -1 empty; load: [L, E]. Each doubled replica is swapped with the
    slot whose load per replica is nearest, among those that leave both GPUs without doubles.
    Raises InfeasibleError where no such slot exists.
    """
    moved = 0
    for layer in range(slots.shape[0]):
        table = slots[layer]
        count = np.bincount(table[table != EMPTY], minlength=load.shape[1])
        share = load[layer] / np.maximum(count, 1)
        for gpu in range(len(table)):
            for slot in range(table.shape[1]):
                expert = table[gpu, slot]
                if expert == EMPTY or expert not in table[gpu, :slot]:
                    continue
                other = _partner(table, gpu, slot, share)
                if other is None:
                    raise InfeasibleError(
                        f"expert {expert} cannot have {count[expert]} replicas on"
                        f" {len(table)} GPUs without one GPU holding it twice",
                        "use fewer redundant experts",
                    )
                table[gpu, slot], table[other] = table[other], expert
                moved += 1
    return moved


def _partner(table: Array, gpu: int, slot: int, share: Array) -> tuple[int, int] | None:
    """The slot to swap with, or None."""
    expert = table[gpu, slot]
    best, best_distance = None, np.inf
    for g in range(len(table)):
        if g == gpu or expert in table[g]:
            continue
        for s in range(table.shape[1]):
            candidate = table[g, s]
            if candidate != EMPTY and candidate in table[gpu]:
                continue
            weight = 0.0 if candidate == EMPTY else share[candidate]
            distance = abs(weight - share[expert])
            if distance < best_distance:
                best, best_distance = (g, s), distance
    return best
