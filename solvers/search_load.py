"""Compiled local search on load alone: one layer, all tuning batches at once.

The objective is the mean over batches of the largest GPU cost, where a GPU's cost is the sum of
its slots' costs. All costs of one expert at its present number of replicas form a row of `work`,
so that a swap changes two rows of `load` and is evaluated in one pass over the batches.

Rows are float32; index E is the empty slot, whose row is zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

MARGIN = 1e-6
MAX_ROUNDS = 100
REPLACE_CANDIDATES = 12
KICK_SWAPS = 3


@njit(cache=True, nogil=True)
def fill_row(
    counts: Array, expert: int, replicas: int, scale: Array, table: Array, out: Array
) -> None:
    """out[u, b]: what one of `replicas` replicas of `expert` costs a GPU of unit u in batch b.

    counts: [E, B] tokens; scale: [U] factor of each kind of GPU; table: [U, N + 1] cost by tokens
    with linear interpolation (linear continuation past N), or [U, 1] for tokens as they are.
    """
    last = table.shape[1] - 1
    for u in range(len(scale)):
        for b in range(counts.shape[1]):
            tokens = counts[expert, b] / replicas
            if last == 0:
                out[u, b] = tokens * scale[u]
                continue
            low = min(int(tokens), last - 1)
            step = table[u, low + 1] - table[u, low]
            out[u, b] = (table[u, low] + step * (tokens - low)) * scale[u]


@njit(cache=True, nogil=True, fastmath=True)
def mean_max(load: Array) -> float:
    """Mean over batches of the largest of `load` [G, B] over GPUs."""
    total = 0.0
    for b in range(load.shape[1]):
        most = load[0, b]
        for g in range(1, load.shape[0]):
            most = max(most, load[g, b])
        total += most
    return total / load.shape[1]


@njit(cache=True, nogil=True, fastmath=True)
def others_max(load: Array, g1: int, g2: int, out: Array) -> None:
    """out[b]: the largest of `load` over GPUs other than g1 and g2."""
    out[:] = 0
    for g in range(load.shape[0]):
        if g != g1 and g != g2:
            row = load[g]
            for b in range(len(out)):
                out[b] = max(out[b], row[b])


@njit(cache=True, nogil=True, fastmath=True)
def swap_value(
    others: Array, load1: Array, load2: Array, out1: Array, in1: Array, out2: Array, in2: Array
) -> float:
    """Sum over batches of the largest cost after GPU 1 gives `out1` for `in1` and GPU 2 gives
    `out2` for `in2`."""
    total = np.float32(0)
    for b in range(len(others)):
        a = load1[b] - out1[b] + in1[b]
        c = load2[b] - out2[b] + in2[b]
        total += max(others[b], max(a, c))
    return float(total)


@njit(cache=True, nogil=True)
def swap_pass(
    work: Array,
    load: Array,
    slots: Array,
    capacity: Array,
    unit: Array,
    holds: Array,
    changed: Array,
    scanned: Array,
    clock: int,
    others: Array,
) -> int:
    """Apply the best improving swap of every pair of GPUs in turn; returns the advanced clock.

    Pairs of which neither GPU changed since they were last scanned are skipped.
    """
    num_gpus = load.shape[0]
    empty = work.shape[1] - 1
    for g1 in range(num_gpus):
        for g2 in range(g1 + 1, num_gpus):
            if scanned[g1, g2] > max(changed[g1], changed[g2]):
                continue
            others_max(load, g1, g2, others)
            u1, u2 = unit[g1], unit[g2]
            zero = work[u1, empty]
            now = swap_value(others, load[g1], load[g2], zero, zero, zero, zero)
            best, best1, best2 = now * (1 - MARGIN), -1, -1
            for s1 in range(capacity[g1]):
                e1 = slots[g1, s1]
                if e1 != empty and holds[g2, e1]:
                    continue
                for s2 in range(capacity[g2]):
                    e2 = slots[g2, s2]
                    if e1 == e2 or (e2 != empty and holds[g1, e2]):
                        continue
                    value = swap_value(
                        others,
                        load[g1],
                        load[g2],
                        work[u1, e1],
                        work[u1, e2],
                        work[u2, e2],
                        work[u2, e1],
                    )
                    if value < best:
                        best, best1, best2 = value, s1, s2
            clock += 1
            scanned[g1, g2] = clock
            if best1 >= 0:
                clock += 1
                changed[g1] = clock
                changed[g2] = clock
                apply_swap(work, load, slots, unit, holds, g1, best1, g2, best2)
    return clock


@njit(cache=True, nogil=True)
def apply_swap(
    work: Array,
    load: Array,
    slots: Array,
    unit: Array,
    holds: Array,
    g1: int,
    s1: int,
    g2: int,
    s2: int,
) -> None:
    """Exchange two slots and keep `load` and `holds` in step."""
    e1, e2 = slots[g1, s1], slots[g2, s2]
    for b in range(load.shape[1]):
        load[g1, b] += work[unit[g1], e2, b] - work[unit[g1], e1, b]
        load[g2, b] += work[unit[g2], e1, b] - work[unit[g2], e2, b]
    slots[g1, s1], slots[g2, s2] = e2, e1
    holds[g1, e1] = False
    holds[g2, e2] = False
    holds[g1, e2] = True
    holds[g2, e1] = True


@njit(cache=True, nogil=True)
def rebuild(work: Array, slots: Array, capacity: Array, unit: Array, load: Array) -> None:
    """Set `load` from scratch, which also clears rounding drift."""
    load[:] = 0
    for g in range(load.shape[0]):
        for s in range(capacity[g]):
            load[g] += work[unit[g], slots[g, s]]


@njit(cache=True, nogil=True)
def replace_pass(
    counts: Array,
    scale: Array,
    table: Array,
    work: Array,
    load: Array,
    slots: Array,
    capacity: Array,
    unit: Array,
    holds: Array,
    replicas: Array,
    changed: Array,
    clock: int,
) -> int:
    """Give the slot of one replica to another expert wherever that improves; returns the clock.

    Tried are the slots of experts with several replicas (and empty slots) against the experts
    with the most work a replica.
    """
    num_gpus, num_batches = load.shape
    empty = work.shape[1] - 1
    trial = np.empty_like(load)
    less = np.zeros((work.shape[0], num_batches), np.float32)
    more = np.empty((work.shape[0], num_batches), np.float32)
    share = np.zeros(empty, np.float64)
    for g in range(num_gpus):
        for s in range(capacity[g]):
            old = slots[g, s]
            if old != empty and replicas[old] < 2:
                continue
            now = mean_max(load)
            for e in range(empty):
                share[e] = work[unit[g], e].sum()
            order = np.argsort(-share)
            if old != empty:
                fill_row(counts, old, replicas[old] - 1, scale, table, less)
            best, best_expert = now * (1 - MARGIN), -1
            tried = 0
            for new in order:
                if new == old or holds[g, new] or replicas[new] >= num_gpus:
                    continue
                tried += 1
                if tried > REPLACE_CANDIDATES:
                    break
                fill_row(counts, new, replicas[new] + 1, scale, table, more)
                after_replace(work, load, unit, holds, old, new, g, less, more, trial)
                value = mean_max(trial)
                if value < best:
                    best, best_expert = value, new
            if best_expert >= 0:
                fill_row(counts, best_expert, replicas[best_expert] + 1, scale, table, more)
                after_replace(work, load, unit, holds, old, best_expert, g, less, more, trial)
                load[:] = trial
                slots[g, s] = best_expert
                holds[g, best_expert] = True
                holds[g, old] = False
                work[:, best_expert] = more
                replicas[best_expert] += 1
                if old != empty:
                    work[:, old] = less
                    replicas[old] -= 1
                clock += 1
                changed[:] = clock
    return clock


@njit(cache=True, nogil=True, fastmath=True)
def after_replace(
    work: Array,
    load: Array,
    unit: Array,
    holds: Array,
    old: int,
    new: int,
    gpu: int,
    less: Array,
    more: Array,
    out: Array,
) -> None:
    """out: `load` after GPU `gpu` gives a replica of `old` for one of `new`, whose rows become
    `less` and `more`."""
    empty = work.shape[1] - 1
    for g in range(load.shape[0]):
        u = unit[g]
        out[g] = load[g]
        if old != empty and holds[g, old]:
            if g == gpu:
                out[g] -= work[u, old]
            else:
                out[g] += less[u] - work[u, old]
        if g == gpu:
            out[g] += more[u]
        elif holds[g, new]:
            out[g] += more[u] - work[u, new]


@njit(cache=True, nogil=True)
def kick(
    work: Array, load: Array, slots: Array, capacity: Array, unit: Array, holds: Array
) -> None:
    """A few random valid swaps."""
    num_gpus = load.shape[0]
    empty = work.shape[1] - 1
    done, tries = 0, 0
    while done < KICK_SWAPS and tries < 50 * KICK_SWAPS:
        tries += 1
        g1, g2 = np.random.randint(num_gpus), np.random.randint(num_gpus)
        if g1 == g2 or capacity[g1] == 0 or capacity[g2] == 0:
            continue
        s1, s2 = np.random.randint(capacity[g1]), np.random.randint(capacity[g2])
        e1, e2 = slots[g1, s1], slots[g2, s2]
        if e1 == e2 or (e1 != empty and holds[g2, e1]) or (e2 != empty and holds[g1, e2]):
            continue
        apply_swap(work, load, slots, unit, holds, g1, s1, g2, s2)
        done += 1


@njit(cache=True, nogil=True)
def search_layer(
    counts: Array,
    slots: Array,
    capacity: Array,
    unit: Array,
    scale: Array,
    table: Array,
    num_kicks: int,
    seed: int,
) -> float:
    """Iterated local search on one layer; improves `slots` in place, returns the objective.

    counts: [E, B] float32; slots: [G, S] int64, E for empty; capacity: [G]; unit: [G], index of
    each GPU's kind; scale, table: see `fill_row`. After descending over swaps and replica moves,
    `num_kicks` times a few random swaps are made and descended from, and kept if better (H. R.
    Lourenco, O. Martin, T. Stuetzle, Iterated Local Search, 2003).
    """
    np.random.seed(seed)
    num_experts, num_batches = counts.shape
    num_gpus = len(capacity)
    replicas = np.zeros(num_experts, np.int64)
    holds = np.zeros((num_gpus, num_experts + 1), np.bool_)
    for g in range(num_gpus):
        for s in range(capacity[g]):
            holds[g, slots[g, s]] = True
            if slots[g, s] < num_experts:
                replicas[slots[g, s]] += 1
    work = np.zeros((len(scale), num_experts + 1, num_batches), np.float32)
    for e in range(num_experts):
        fill_row(counts, e, replicas[e], scale, table, work[:, e])
    spare = False
    for g in range(num_gpus):
        for s in range(capacity[g]):
            e = slots[g, s]
            spare = spare or e == num_experts or replicas[e] > 1
    load = np.zeros((num_gpus, num_batches), np.float32)
    rebuild(work, slots, capacity, unit, load)
    others = np.empty(num_batches, np.float32)
    best_value = np.inf
    best_slots = slots.copy()
    for attempt in range(num_kicks + 1):
        if attempt > 0:
            kick(work, load, slots, capacity, unit, holds)
        changed = np.zeros(num_gpus, np.int64)
        scanned = np.full((num_gpus, num_gpus), -1, np.int64)
        clock = 0
        for _ in range(MAX_ROUNDS):
            before = clock
            start = mean_max(load)
            clock = swap_pass(
                work, load, slots, capacity, unit, holds, changed, scanned, clock, others
            )
            if spare and (attempt == 0 or attempt % 8 == 0):
                clock = replace_pass(
                    counts,
                    scale,
                    table,
                    work,
                    load,
                    slots,
                    capacity,
                    unit,
                    holds,
                    replicas,
                    changed,
                    clock,
                )
            if clock == before or mean_max(load) >= start * (1 - MARGIN):
                break
        rebuild(work, slots, capacity, unit, load)
        value = mean_max(load)
        if value < best_value * (1 - MARGIN):
            best_value = value
            best_slots[:] = slots
        else:
            slots[:] = best_slots
            holds[:] = False
            replicas[:] = 0
            for g in range(num_gpus):
                for s in range(capacity[g]):
                    holds[g, slots[g, s]] = True
                    if slots[g, s] < num_experts:
                        replicas[slots[g, s]] += 1
            if spare:
                for e in range(num_experts):
                    fill_row(counts, e, replicas[e], scale, table, work[:, e])
            rebuild(work, slots, capacity, unit, load)
    slots[:] = best_slots
    return best_value
