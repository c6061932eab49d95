"""Compiled local search from a placement that is in use: every expert that moves has a price.

The objective of one layer is what `search_load` minimises, the mean over batches of the costliest
GPU, plus `price` for every expert that a GPU holds and did not hold before; all in grains.
"""

from __future__ import annotations

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.kernels.load import (
    MARGIN,
    MAX_ROUNDS,
    REPLACE_CANDIDATES,
    after_replace,
    apply_swap,
    fill_row,
    mean_max,
    rebuild,
)
from moesim.types import Array


@kernel
def others_max(load: Array, g1: int, g2: int, out: Array) -> None:
    """out[b]: the largest of `load` over GPUs other than g1 and g2."""
    out[:] = 0
    for g in range(load.shape[0]):
        if g != g1 and g != g2:
            for b in range(len(out)):
                out[b] = max(out[b], load[g, b])


@kernel
def swap_value(
    others: Array, load1: Array, load2: Array, out1: Array, in1: Array, out2: Array, in2: Array
) -> int:
    """Sum over batches of the largest cost after GPU 1 gives `out1` for `in1` and GPU 2 gives
    `out2` for `in2`."""
    total = 0
    for b in range(len(others)):
        a = load1[b] - out1[b] + in1[b]
        c = load2[b] - out2[b] + in2[b]
        total += max(others[b], max(a, c))
    return total


@kernel
def is_new(before: Array, gpu: int, expert: int) -> int:
    """1 if `gpu` must fetch `expert`. before: [G, E + 1], what GPUs held; empty slots are held."""
    return 0 if before[gpu, expert] else 1


@kernel
def best_swap(
    work: Array,
    load: Array,
    slots: Array,
    capacity: Array,
    unit: Array,
    holds: Array,
    before: Array,
    price: float,
    others: Array,
    g1: int,
    g2: int,
) -> tuple[int, int]:
    """Slots of GPUs g1 and g2 whose exchange lowers load and price together most, or (-1, -1)."""
    empty = work.shape[1] - 1
    num_batches = load.shape[1]
    others_max(load, g1, g2, others)
    u1, u2 = unit[g1], unit[g2]
    zero = work[u1, empty]
    now = swap_value(others, load[g1], load[g2], zero, zero, zero, zero)
    best, best1, best2 = now - now * MARGIN, -1, -1
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
            moves = is_new(before, g1, e2) + is_new(before, g2, e1)
            moves -= is_new(before, g1, e1) + is_new(before, g2, e2)
            priced = value + moves * price * num_batches
            if priced < best:
                best, best1, best2 = priced, s1, s2
    return best1, best2


@kernel
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
    before: Array,
    price: float,
) -> int:
    """Give slots of experts with several replicas (and empty slots) to other experts wherever load
    and price together fall; returns how many changed."""
    num_gpus, num_batches = load.shape
    empty = work.shape[1] - 1
    trial = np.empty_like(load)
    less = np.zeros((work.shape[0], num_batches), np.int32)
    more = np.empty((work.shape[0], num_batches), np.int32)
    share = np.zeros(empty, np.float64)
    changed = 0
    for g in range(num_gpus):
        for s in range(capacity[g]):
            old = slots[g, s]
            if old != empty and replicas[old] < 2:
                continue
            now = mean_max(load)
            for e in range(empty):
                share[e] = work[unit[g], e].sum() * (2.0 if before[g, e] else 1.0)
            order = np.argsort(-share)
            if old != empty:
                fill_row(counts, old, replicas[old] - 1, scale, table, less)
            best, best_expert, tried = now - now * MARGIN, -1, 0
            for new in order:
                if new == old or holds[g, new] or replicas[new] >= num_gpus:
                    continue
                tried += 1
                if tried > REPLACE_CANDIDATES:
                    break
                fill_row(counts, new, replicas[new] + 1, scale, table, more)
                trial[:] = load
                after_replace(work, load, unit, holds, old, new, g, less, more, trial)
                moves = is_new(before, g, new) - is_new(before, g, old)
                value = mean_max(trial) + moves * price
                if value < best:
                    best, best_expert = value, new
            if best_expert >= 0:
                fill_row(counts, best_expert, replicas[best_expert] + 1, scale, table, more)
                trial[:] = load
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
                changed += 1
    return changed


@kernel
def search_moves(
    counts: Array,
    slots: Array,
    capacity: Array,
    unit: Array,
    scale: Array,
    table: Array,
    before: Array,
    price: float,
) -> None:
    """Descend from `slots` [G, S] in place, over swaps and replica moves.

    counts: [E, B]; unit, scale, table: see `search_load.search_layer`; before: [G, E + 1], whether
    a GPU held an expert, true in the last column; price: of one expert moved, in grains.
    Every accepted step lowers load plus price, so that the result is never worse than the start.
    """
    num_experts, num_batches = counts.shape
    num_gpus = len(capacity)
    replicas = np.zeros(num_experts, np.int64)
    holds = np.zeros((num_gpus, num_experts + 1), np.bool_)
    spare = False
    for g in range(num_gpus):
        for s in range(capacity[g]):
            holds[g, slots[g, s]] = True
            if slots[g, s] < num_experts:
                replicas[slots[g, s]] += 1
            else:
                spare = True
    spare = spare or replicas.max() > 1
    work = np.zeros((len(scale), num_experts + 1, num_batches), np.int32)
    for e in range(num_experts):
        fill_row(counts, e, replicas[e], scale, table, work[:, e])
    load = np.zeros((num_gpus, num_batches), np.int32)
    rebuild(work, slots, capacity, unit, load)
    others = np.empty(num_batches, np.int32)
    for _ in range(MAX_ROUNDS):
        changed = 0
        for g1 in range(num_gpus):
            for g2 in range(g1 + 1, num_gpus):
                s1, s2 = best_swap(
                    work, load, slots, capacity, unit, holds, before, price, others, g1, g2
                )
                if s1 >= 0:
                    apply_swap(work, load, slots, unit, holds, g1, s1, g2, s2)
                    changed += 1
        if spare:
            changed += replace_pass(
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
                before,
                price,
            )
        rebuild(work, slots, capacity, unit, load)
        if changed == 0:
            return
