"""One layer's placement and what its slots cost, kept in step: what all compiled searches change.

All costs of one expert at its present number of replicas form a row of `work`, so that a swap
changes two rows of `load`. Costs are whole numbers of grains (see `objective.grains`), int32, so
that sums are exact and the same in any order, on any CPU (INV-6). Index E is the empty slot, whose
row is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.kernels import kernel
from moesim.types import Array

MARGIN = 1e-6
"""Least relative gain that counts as one."""


class Costs(NamedTuple):
    """What tokens cost. counts: [E, B] float32 tokens of each expert in each batch; scale: [U]
    grains a unit of cost on each kind of GPU; table: [U, N + 1] cost by tokens with linear
    interpolation (linear continuation past N), or [U, 1] for tokens as they are."""

    counts: Array
    scale: Array
    table: Array


class Placed(NamedTuple):
    """slots: [G, S] int64, E for empty; capacity: [G] slots that each GPU has; unit: [G] its kind.
    holds: [G, E + 1] whether a GPU has an expert; replicas: [E]. work: [U, E + 1, B] int32 what a
    replica costs on each kind of GPU; load: [G, B] int32 what each GPU pays."""

    slots: Array
    capacity: Array
    unit: Array
    holds: Array
    replicas: Array
    work: Array
    load: Array


class Goal(NamedTuple):
    """What is minimised, beside load: see `objective`. ceiling: objective traffic's limit on the
    mean largest load, 0 for objective time; weight: what a unit of load above it costs; grains:
    how many of them are a unit of load."""

    ceiling: float
    weight: float
    grains: float


@kernel
def objective(load: float, messages: float, ceiling: float, weight: float) -> float:
    """Time: load plus messages. Traffic (ceiling > 0): messages, and load above the ceiling."""
    if ceiling > 0:
        return messages + weight * max(0.0, load - ceiling)
    return load + messages


@kernel
def fill_row(costs: Costs, expert: int, replicas: int, out: Array) -> None:
    """out[u, b]: what one of `replicas` replicas of `expert` costs a GPU of unit u in batch b, in
    whole grains."""
    counts, scale, table = costs.counts, costs.scale, costs.table
    last = table.shape[1] - 1
    for u in range(len(scale)):
        for b in range(counts.shape[1]):
            tokens = counts[expert, b] / replicas
            if last == 0:
                out[u, b] = np.int32(tokens * scale[u] + 0.5)
                continue
            low = min(int(tokens), last - 1)
            step = table[u, low + 1] - table[u, low]
            out[u, b] = np.int32((table[u, low] + step * (tokens - low)) * scale[u] + 0.5)


@kernel
def make_work(costs: Costs, slots: Array) -> Array:
    """The `work` of `slots`: every expert's cost shared among its replicas there."""
    num_experts, num_batches = costs.counts.shape
    replicas = np.zeros(num_experts + 1, np.int64)
    for e in slots.ravel():
        replicas[e] += 1
    work = np.zeros((len(costs.scale), num_experts + 1, num_batches), np.int32)
    for e in range(num_experts):
        fill_row(costs, e, replicas[e], work[:, e])
    return work


@kernel
def make_placed(work: Array, slots: Array, capacity: Array, unit: Array) -> Placed:
    """State of `slots`, which it goes on to change in place, with their costs `work`."""
    num_gpus, num_experts = len(capacity), work.shape[1] - 1
    placed = Placed(
        slots,
        capacity,
        unit,
        np.zeros((num_gpus, num_experts + 1), np.bool_),
        np.zeros(num_experts, np.int64),
        work,
        np.zeros((num_gpus, work.shape[2]), np.int32),
    )
    rebuild(placed)
    return placed


@kernel
def rebuild(placed: Placed) -> None:
    """Set `load`, `holds` and `replicas` from `slots` and `work`."""
    empty = len(placed.replicas)
    placed.load[:] = 0
    placed.holds[:] = False
    placed.replicas[:] = 0
    for g in range(len(placed.capacity)):
        for s in range(placed.capacity[g]):
            e = placed.slots[g, s]
            placed.load[g] += placed.work[placed.unit[g], e]
            placed.holds[g, e] = True
            if e != empty:
                placed.replicas[e] += 1


@kernel
def mean_max(load: Array) -> float:
    """Mean over batches of the largest of `load` [G, B] over GPUs."""
    total = 0
    for b in range(load.shape[1]):
        most = load[0, b]
        for g in range(1, load.shape[0]):
            most = max(most, load[g, b])
        total += most
    return total / load.shape[1]


@kernel(allocates=False)
def may_swap(placed: Placed, g1: int, e1: int, g2: int, e2: int) -> bool:
    """Whether two GPUs can exchange two experts: neither has what it would get."""
    empty = len(placed.replicas)
    if e1 == e2 or (e1 != empty and placed.holds[g2, e1]):
        return False
    return e2 == empty or not placed.holds[g1, e2]


@kernel(allocates=False)
def apply_swap(placed: Placed, g1: int, s1: int, g2: int, s2: int) -> None:
    """Exchange two slots and keep `load` and `holds` in step."""
    slots, holds, load = placed.slots, placed.holds, placed.load
    work, u1, u2 = placed.work, placed.unit[g1], placed.unit[g2]
    e1, e2 = slots[g1, s1], slots[g2, s2]
    for b in range(load.shape[1]):
        load[g1, b] += work[u1, e2, b] - work[u1, e1, b]
        load[g2, b] += work[u2, e1, b] - work[u2, e2, b]
    slots[g1, s1], slots[g2, s2] = e2, e1
    holds[g1, e1] = False
    holds[g2, e2] = False
    holds[g1, e2] = True
    holds[g2, e1] = True


@kernel
def kick(placed: Placed, swaps: int) -> Array:
    """`swaps` random valid swaps; returns the GPUs that they changed."""
    slots, capacity = placed.slots, placed.capacity
    num_gpus = len(capacity)
    touched = np.zeros(num_gpus, np.bool_)
    done, tries = 0, 0
    while done < swaps and tries < 50 * swaps:
        tries += 1
        g1, g2 = np.random.randint(num_gpus), np.random.randint(num_gpus)
        if g1 == g2 or capacity[g1] == 0 or capacity[g2] == 0:
            continue
        s1, s2 = np.random.randint(capacity[g1]), np.random.randint(capacity[g2])
        if not may_swap(placed, g1, slots[g1, s1], g2, slots[g2, s2]):
            continue
        apply_swap(placed, g1, s1, g2, s2)
        touched[g1] = True
        touched[g2] = True
        done += 1
    return np.flatnonzero(touched)


class Scan(NamedTuple):
    """Which pairs of GPUs a search has looked at, in ticks of a clock. changed: [G] when each GPU
    last changed; scanned: [G, G] when each pair was last looked at; clock: [1] now."""

    changed: Array
    scanned: Array
    clock: Array


@kernel
def make_scan(num_gpus: int) -> Scan:
    """Nothing looked at yet."""
    return Scan(
        np.zeros(num_gpus, np.int64),
        np.full((num_gpus, num_gpus), -1, np.int64),
        np.zeros(1, np.int64),
    )


@kernel(allocates=False)
def begin_pair(scan: Scan, g1: int, g2: int) -> bool:
    """Whether a GPU of the pair changed since it was last looked at; if so it now is."""
    if scan.scanned[g1, g2] > max(scan.changed[g1], scan.changed[g2]):
        return False
    scan.clock[0] += 1
    scan.scanned[g1, g2] = scan.clock[0]
    return True


@kernel(allocates=False)
def note_swap(scan: Scan, g1: int, g2: int) -> None:
    """Both GPUs of a pair changed."""
    scan.clock[0] += 1
    scan.changed[g1] = scan.clock[0]
    scan.changed[g2] = scan.clock[0]
