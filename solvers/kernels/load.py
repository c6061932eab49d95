"""Compiled local search on load alone: one layer, all tuning batches at once.

The objective is the mean over batches of the largest GPU cost, where a GPU's cost is the sum of
its slots' costs. All costs of one expert at its present number of replicas form a row of `work`,
so that a swap changes two rows of `load`; `search_pairs` finds the best one of a pair of GPUs.

Costs are whole numbers of grains (see `objective.grains`), int32, so that sums are exact and the
same in any order, on any CPU (INV-6). Index E is the empty slot, whose row is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.kernels.pairs import (
    Peaks,
    Scratch,
    best_swap,
    make_peaks,
    make_scratch,
    rank_peaks,
)
from moesim.types import Array

MARGIN = 1e-6
MAX_ROUNDS = 100
REPLACE_CANDIDATES = 12
REPLACE_EVERY = 8
"""Kicks from one round of replica moves to the next."""


@kernel
def fill_row(
    counts: Array, expert: int, replicas: int, scale: Array, table: Array, out: Array
) -> None:
    """out[u, b]: what one of `replicas` replicas of `expert` costs a GPU of unit u in batch b, in
    whole grains.

    counts: [E, B] tokens; scale: [U] grains a unit of cost on each kind of GPU; table: [U, N + 1]
    cost by tokens with linear interpolation (linear continuation past N), or [U, 1] for tokens as
    they are.
    """
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
def mean_max(load: Array) -> float:
    """Mean over batches of the largest of `load` [G, B] over GPUs."""
    total = 0
    for b in range(load.shape[1]):
        most = load[0, b]
        for g in range(1, load.shape[0]):
            most = max(most, load[g, b])
        total += most
    return total / load.shape[1]


@kernel
def swap_pass(
    work: Array,
    load: Array,
    peaks: Peaks,
    slots: Array,
    capacity: Array,
    unit: Array,
    holds: Array,
    changed: Array,
    scanned: Array,
    clock: int,
    scratch: Scratch,
) -> int:
    """Apply the best improving swap of every pair of GPUs in turn; returns the advanced clock.

    Pairs of which neither GPU changed since they were last scanned are skipped. `peaks` is that of
    `load`, before and after.
    """
    num_gpus = load.shape[0]
    least = int(MARGIN * peaks.value[0].sum())
    pair = np.empty(2, np.int64)
    for g1 in range(num_gpus):
        for g2 in range(g1 + 1, num_gpus):
            if scanned[g1, g2] > max(changed[g1], changed[g2]):
                continue
            _, s1, s2 = best_swap(
                work, load, peaks, slots, capacity, unit, holds, g1, g2, least, scratch
            )
            clock += 1
            scanned[g1, g2] = clock
            if s1 >= 0:
                clock += 1
                changed[g1] = clock
                changed[g2] = clock
                apply_swap(work, load, slots, unit, holds, g1, s1, g2, s2)
                pair[0], pair[1] = g1, g2
                rank_peaks(load, peaks, pair)
    return clock


@kernel
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


@kernel
def rebuild(work: Array, slots: Array, capacity: Array, unit: Array, load: Array) -> None:
    """Set `load` from scratch."""
    load[:] = 0
    for g in range(load.shape[0]):
        for s in range(capacity[g]):
            load[g] += work[unit[g], slots[g, s]]


class Rows(NamedTuple):
    """What replica moves keep. more [U, E, B]: rows of `work` with one replica more than
    `made_for` [E] says; share [U, E]: sums over batches of `work`; after [G, B]: work space."""

    more: Array
    made_for: Array
    share: Array
    after: Array


@kernel
def make_rows(work: Array, num_gpus: int) -> Rows:
    """Rows to go with `work`."""
    num_units, num_rows, num_batches = work.shape
    return Rows(
        np.empty((num_units, num_rows - 1, num_batches), np.int32),
        np.full(num_rows - 1, -1, np.int64),
        np.zeros((num_units, num_rows - 1)),
        np.empty((num_gpus, num_batches), np.int32),
    )


@kernel
def replace_pass(
    counts: Array,
    scale: Array,
    table: Array,
    work: Array,
    load: Array,
    peaks: Peaks,
    slots: Array,
    capacity: Array,
    unit: Array,
    holds: Array,
    replicas: Array,
    changed: Array,
    clock: int,
    rows: Rows,
) -> int:
    """Give the slot of one replica to another expert wherever that improves; returns the clock.

    Tried are the slots of experts with several replicas (and empty slots) against the experts
    with the most work a replica.
    """
    num_gpus, num_batches = load.shape
    empty = work.shape[1] - 1
    less = np.zeros((work.shape[0], num_batches), np.int32)
    for u in range(work.shape[0]):
        for e in range(empty):
            rows.share[u, e] = row_sum(work[u, e])
    least = int(MARGIN * peaks.value[0].sum())
    for g in range(num_gpus):
        order = np.argsort(-rows.share[unit[g]])
        for s in range(capacity[g]):
            old = slots[g, s]
            if old != empty and replicas[old] < 2:
                continue
            if old != empty:
                fill_row(counts, old, replicas[old] - 1, scale, table, less)
            best, best_expert = -least, -1
            tried = 0
            for new in order:
                if new == old or holds[g, new] or replicas[new] >= num_gpus:
                    continue
                tried += 1
                if tried > REPLACE_CANDIDATES:
                    break
                if rows.made_for[new] != replicas[new]:
                    fill_row(counts, new, replicas[new] + 1, scale, table, rows.more[:, new])
                    rows.made_for[new] = replicas[new]
                more = rows.more[:, new]
                after_replace(work, load, unit, holds, old, new, g, less, more, rows.after)
                delta = replace_delta(load, peaks, holds, old, new, g, rows.after, best)
                if delta < best:
                    best, best_expert = delta, new
            if best_expert >= 0:
                more = rows.more[:, best_expert]
                after_replace(work, load, unit, holds, old, best_expert, g, less, more, rows.after)
                moved = affected(holds, old, best_expert, g)
                for j in moved:
                    load[j] = rows.after[j]
                rank_peaks(load, peaks, moved)
                slots[g, s] = best_expert
                holds[g, best_expert] = True
                holds[g, old] = False
                work[:, best_expert] = more
                replicas[best_expert] += 1
                if old != empty:
                    work[:, old] = less
                    replicas[old] -= 1
                for u in range(work.shape[0]):
                    rows.share[u, best_expert] = row_sum(work[u, best_expert])
                    if old != empty:
                        rows.share[u, old] = row_sum(work[u, old])
                order = np.argsort(-rows.share[unit[g]])
                clock += 1
                changed[:] = clock
    return clock


@kernel
def row_sum(row: Array) -> int:
    """Sum of a row of `work`."""
    total = 0
    for b in range(len(row)):
        total += row[b]
    return total


@kernel
def affected(holds: Array, old: int, new: int, gpu: int) -> Array:
    """GPUs whose load changes when `gpu` gives a replica of `old` for one of `new`."""
    out = holds[:, new].copy()
    if old < holds.shape[1] - 1:
        out |= holds[:, old]
    out[gpu] = True
    return np.flatnonzero(out)


@kernel
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
    """out [G, B], for the affected GPUs only: `load` after GPU `gpu` gives a replica of `old` for
    one of `new`, whose rows become `less` and `more`."""
    empty = work.shape[1] - 1
    num_batches = load.shape[1]
    for g in range(load.shape[0]):
        u = unit[g]
        loses = old != empty and holds[g, old]
        if g == gpu:
            for b in range(num_batches):
                out[g, b] = load[g, b] + more[u, b]
            if loses:
                for b in range(num_batches):
                    out[g, b] -= work[u, old, b]
            continue
        if holds[g, new]:
            for b in range(num_batches):
                out[g, b] = load[g, b] + (more[u, b] - work[u, new, b])
        elif loses:
            out[g] = load[g]
        if loses:
            for b in range(num_batches):
                out[g, b] += less[u, b] - work[u, old, b]


@kernel
def replace_delta(
    load: Array,
    peaks: Peaks,
    holds: Array,
    old: int,
    new: int,
    gpu: int,
    after: Array,
    best: int,
) -> int:
    """Change of the summed objective by a replacement, or 0 where that is not below `best`.

    after: [G, B] from `after_replace`. It can only gain in batches whose costliest GPU is `gpu` or
    holds `new`, so these are looked at first.
    """
    moved = affected(holds, old, new, gpu)
    touched = np.zeros(load.shape[0], np.bool_)
    touched[moved] = True
    total = 0
    for stage in range(2):
        for hot in range(load.shape[0]):
            gains = hot == gpu or holds[hot, new]
            if gains != (stage == 0):
                continue
            for i in range(peaks.start[hot], peaks.start[hot + 1]):
                b = peaks.order[i]
                most = -1
                for k in range(3):
                    g = peaks.gpu[k, b]
                    if g < 0 or not touched[g]:
                        most = peaks.value[k, b]
                        break
                if most < 0:
                    for g in range(load.shape[0]):
                        if not touched[g]:
                            most = max(most, load[g, b])
                for g in moved:
                    most = max(most, after[g, b])
                total += most - peaks.value[0, b]
        if total >= best:
            return 0
    return total


@kernel
def kick(
    work: Array, load: Array, slots: Array, capacity: Array, unit: Array, holds: Array, swaps: int
) -> Array:
    """`swaps` random valid swaps; returns the GPUs that they changed."""
    num_gpus = load.shape[0]
    touched = np.zeros(num_gpus, np.bool_)
    empty = work.shape[1] - 1
    done, tries = 0, 0
    while done < swaps and tries < 50 * swaps:
        tries += 1
        g1, g2 = np.random.randint(num_gpus), np.random.randint(num_gpus)
        if g1 == g2 or capacity[g1] == 0 or capacity[g2] == 0:
            continue
        s1, s2 = np.random.randint(capacity[g1]), np.random.randint(capacity[g2])
        e1, e2 = slots[g1, s1], slots[g2, s2]
        if e1 == e2 or (e1 != empty and holds[g2, e1]) or (e2 != empty and holds[g1, e2]):
            continue
        apply_swap(work, load, slots, unit, holds, g1, s1, g2, s2)
        touched[g1] = True
        touched[g2] = True
        done += 1
    return np.flatnonzero(touched)


@kernel
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
    """Iterated local search on one layer; improves `slots` in place; returns the objective,
    in grains.

    counts: [E, B] float32; slots: [G, S] int64, E for empty; capacity: [G]; unit: [G], index of
    each GPU's kind; scale, table: see `fill_row`. After descending over swaps and replica moves,
    `num_kicks` times a random swap is made and descended from, and kept if better (H. R.
    Lourenco, O. Martin, T. Stuetzle, Iterated Local Search, 2003). After a kick only pairs with a
    GPU that it changed are looked at, and all of them again once it was kept.
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
    work = np.zeros((len(scale), num_experts + 1, num_batches), np.int32)
    for e in range(num_experts):
        fill_row(counts, e, replicas[e], scale, table, work[:, e])
    spare = False
    for g in range(num_gpus):
        for s in range(capacity[g]):
            e = slots[g, s]
            spare = spare or e == num_experts or replicas[e] > 1
    load = np.zeros((num_gpus, num_batches), np.int32)
    rebuild(work, slots, capacity, unit, load)
    every = np.arange(num_gpus)
    peaks = make_peaks(num_gpus, num_batches)
    total = rank_peaks(load, peaks, every)
    scratch = make_scratch(slots.shape[1], num_batches)
    rows = make_rows(work, num_gpus)
    best_value = np.inf
    best_slots, best_load, best_holds = slots.copy(), load.copy(), holds.copy()
    best_replicas = replicas.copy()
    changed = np.zeros(num_gpus, np.int64)
    scanned = np.full((num_gpus, num_gpus), -1, np.int64)
    clock = 0
    for attempt in range(num_kicks + 1):
        if attempt > 0:
            kicked = kick(work, load, slots, capacity, unit, holds, 1)
            clock += 1
            changed[kicked] = clock
            total = rank_peaks(load, peaks, kicked)
        for _ in range(MAX_ROUNDS):
            before, start = clock, total
            clock = swap_pass(
                work, load, peaks, slots, capacity, unit, holds, changed, scanned, clock, scratch
            )
            total = peaks.value[0].sum()
            if clock > before and total < start * (1 - MARGIN):
                continue
            if not spare or attempt % REPLACE_EVERY > 0:
                break
            before = clock
            clock = replace_pass(
                counts,
                scale,
                table,
                work,
                load,
                peaks,
                slots,
                capacity,
                unit,
                holds,
                replicas,
                changed,
                clock,
                rows,
            )
            total = peaks.value[0].sum()
            if clock == before:
                break
        if total < best_value * (1 - MARGIN):
            rebuild(work, slots, capacity, unit, load)
            total = rank_peaks(load, peaks, every)
            best_value = total
            best_slots[:], best_load[:], best_holds[:] = slots, load, holds
            best_replicas[:] = replicas
            scanned[:] = -1
        else:
            moved = np.flatnonzero(changed)
            for e in range(num_experts):
                if replicas[e] != best_replicas[e]:
                    fill_row(counts, e, best_replicas[e], scale, table, work[:, e])
            slots[:], load[:], holds[:] = best_slots, best_load, best_holds
            replicas[:] = best_replicas
            total = rank_peaks(load, peaks, moved)
            scanned[:] = clock
        changed[:] = 0
    slots[:] = best_slots
    return best_value / num_batches
