"""Compiled replica moves: a slot of one expert given to another, one layer.

Cost rows and loads are those of `moesim.solvers.kernels.placed.Placed`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.kernels.pairs import Peaks, rank_peaks
from moesim.solvers.kernels.placed import MARGIN, Costs, Placed, Scan, fill_row
from moesim.types import Array

REPLACE_CANDIDATES = 12


class Rows(NamedTuple):
    """What replica moves keep. less [U, B]: row of the expert that gives a replica, with one less;
    more [U, E, B]: rows of `work` with one replica more than `made_for` [E] says; share [U, E]:
    sums over batches of `work`; after [G, B]: work space."""

    less: Array
    more: Array
    made_for: Array
    share: Array
    after: Array


@kernel
def make_rows(placed: Placed) -> Rows:
    """Rows to go with the costs of `placed`."""
    num_units, num_rows, num_batches = placed.work.shape
    return Rows(
        np.zeros((num_units, num_batches), np.int32),
        np.empty((num_units, num_rows - 1, num_batches), np.int32),
        np.full(num_rows - 1, -1, np.int64),
        np.zeros((num_units, num_rows - 1)),
        np.empty((len(placed.capacity), num_batches), np.int32),
    )


@kernel
def replace_pass(placed: Placed, costs: Costs, peaks: Peaks, scan: Scan, rows: Rows) -> bool:
    """Give the slot of one replica to another expert wherever that improves; whether one did.

    Tried are the slots of experts with several replicas (and empty slots) against the experts
    with the most work a replica.
    """
    num_units, num_rows, _ = placed.work.shape
    for u in range(num_units):
        for e in range(num_rows - 1):
            rows.share[u, e] = row_sum(placed.work[u, e])
    least = int(MARGIN * peaks.value[0].sum())
    improved = False
    for g in range(len(placed.capacity)):
        order = np.argsort(-rows.share[placed.unit[g]])
        for s in range(placed.capacity[g]):
            old = placed.slots[g, s]
            new = best_replacement(placed, costs, peaks, rows, g, old, order, least)
            if new < 0:
                continue
            moved = take_slot(placed, g, s, new, rows.less, rows.more[:, new], rows.after)
            rank_peaks(placed.load, peaks, moved)
            for u in range(num_units):
                rows.share[u, new] = row_sum(placed.work[u, new])
                if old != num_rows - 1:
                    rows.share[u, old] = row_sum(placed.work[u, old])
            order = np.argsort(-rows.share[placed.unit[g]])
            scan.clock[0] += 1
            scan.changed[:] = scan.clock[0]
            improved = True
    return improved


@kernel
def best_replacement(
    placed: Placed,
    costs: Costs,
    peaks: Peaks,
    rows: Rows,
    gpu: int,
    old: int,
    order: Array,
    least: int,
) -> int:
    """The expert to which a slot of `old` on `gpu` is best given, -1 if none gains more than
    `least`; for it `rows` has the rows and loads after. order: experts by work, most first."""
    replicas, num_gpus = placed.replicas, len(placed.capacity)
    empty = len(replicas)
    if old != empty:
        if replicas[old] < 2:
            return -1
        fill_row(costs, old, replicas[old] - 1, rows.less)
    best, best_expert, tried = -least, -1, 0
    for new in order:
        if new == old or placed.holds[gpu, new] or replicas[new] >= num_gpus:
            continue
        tried += 1
        if tried > REPLACE_CANDIDATES:
            break
        if rows.made_for[new] != replicas[new]:
            fill_row(costs, new, replicas[new] + 1, rows.more[:, new])
            rows.made_for[new] = replicas[new]
        load_after(placed, gpu, old, new, rows.less, rows.more[:, new], rows.after)
        delta = replace_delta(placed, peaks, gpu, old, new, rows.after, best)
        if delta < best:
            best, best_expert = delta, new
    if best_expert >= 0:
        load_after(placed, gpu, old, best_expert, rows.less, rows.more[:, best_expert], rows.after)
    return int(best_expert)


@kernel
def take_slot(
    placed: Placed, gpu: int, slot: int, new: int, less: Array, more: Array, after: Array
) -> Array:
    """Give a slot to `new`, whose row becomes `more`, and that of the expert that had it `less`;
    loads become those of `after`. Returns the GPUs whose load changes."""
    old, empty = placed.slots[gpu, slot], len(placed.replicas)
    moved = affected(placed.holds, old, new, gpu)
    for g in moved:
        placed.load[g] = after[g]
    placed.slots[gpu, slot] = new
    placed.holds[gpu, new] = True
    placed.holds[gpu, old] = False
    placed.work[:, new] = more
    placed.replicas[new] += 1
    if old != empty:
        placed.work[:, old] = less
        placed.replicas[old] -= 1
    return moved


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


@kernel(allocates=False)
def load_after(
    placed: Placed, gpu: int, old: int, new: int, less: Array, more: Array, out: Array
) -> None:
    """out [G, B], for the affected GPUs only: `load` after GPU `gpu` gives a replica of `old` for
    one of `new`, whose rows become `less` and `more`."""
    work, load, holds = placed.work, placed.load, placed.holds
    empty = work.shape[1] - 1
    num_batches = load.shape[1]
    for g in range(load.shape[0]):
        u = placed.unit[g]
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
            for b in range(num_batches):
                out[g, b] = load[g, b]
        if loses:
            for b in range(num_batches):
                out[g, b] += less[u, b] - work[u, old, b]


@kernel
def replace_delta(
    placed: Placed, peaks: Peaks, gpu: int, old: int, new: int, after: Array, best: int
) -> int:
    """Change of the summed objective by a replacement, or 0 where that is not below `best`.

    after: [G, B] from `load_after`. It can only gain in batches whose costliest GPU is `gpu` or
    holds `new`, so these are looked at first.
    """
    num_gpus = len(placed.capacity)
    moved = affected(placed.holds, old, new, gpu)
    touched = np.zeros(num_gpus, np.bool_)
    touched[moved] = True
    total = 0
    for stage in range(2):
        for hot in range(num_gpus):
            gains = hot == gpu or placed.holds[hot, new]
            if gains != (stage == 0):
                continue
            for i in range(peaks.start[hot], peaks.start[hot + 1]):
                b = peaks.order[i]
                most = untouched_max(placed.load, peaks, touched, b)
                for g in moved:
                    most = max(most, after[g, b])
                total += most - peaks.value[0, b]
        if total >= best:
            return 0
    return total


@kernel(allocates=False)
def untouched_max(load: Array, peaks: Peaks, touched: Array, batch: int) -> int:
    """The largest load of a batch over the GPUs that are not `touched`; -1 without one."""
    for k in range(3):
        g = peaks.gpu[k, batch]
        if g < 0 or not touched[g]:
            return int(peaks.value[k, batch])
    most = -1
    for g in range(load.shape[0]):
        if not touched[g]:
            most = max(most, load[g, batch])
    return most
