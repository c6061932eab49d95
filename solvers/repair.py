"""Moving replicas apart, so that no GPU holds an expert twice (INV-2)."""

from __future__ import annotations

import numpy as np

from moesim.placement import EMPTY
from moesim.types import Array


def separate_replicas(slots: Array, load: Array) -> int:
    """Remove doubled replicas, in place; returns how many there were.

    slots: [L, G, S] experts, -1 beyond a GPU's capacity; load: [L, E]. Each doubled replica is
    swapped with the slot whose load per replica is nearest, among those that leave both GPUs
    without doubles. Where there is none, as when an expert has more replicas than there are GPUs,
    its slot goes to the expert with the most load a replica among those that the GPU lacks; a GPU
    with at most E slots always lacks one.
    """
    moved = 0
    for layer in range(slots.shape[0]):
        table = slots[layer]
        count = np.bincount(table[table != EMPTY], minlength=load.shape[1])
        for gpu in range(len(table)):
            for slot in range(table.shape[1]):
                expert = table[gpu, slot]
                if expert == EMPTY or expert not in table[gpu, :slot]:
                    continue
                share = load[layer] / np.maximum(count, 1)
                other = _partner(table, gpu, slot, share)
                if other is not None:
                    table[gpu, slot], table[other] = table[other], expert
                else:
                    share[table[gpu][table[gpu] != EMPTY]] = -np.inf
                    table[gpu, slot] = np.argmax(share)
                    count[expert] -= 1
                    count[table[gpu, slot]] += 1
                moved += 1
    return moved


def moved_note(count: int) -> str:
    """What a solver says of the replicas that `separate_replicas` moved."""
    return (
        f"{count} replicas moved to another GPU: the rule put them beside a copy of their expert,"
        " where they spread no load"
    )


def _partner(table: Array, gpu: int, slot: int, share: Array) -> tuple[int, int] | None:
    """The slot to swap with, or None."""
    expert = table[gpu, slot]
    best, best_distance = None, np.inf
    for g in range(len(table)):
        if expert in table[g]:
            continue
        for s, candidate in enumerate(table[g]):
            if candidate == EMPTY or candidate in table[gpu]:
                continue
            distance = abs(share[candidate] - share[expert])
            if distance < best_distance:
                best, best_distance = (g, s), distance
    return best
