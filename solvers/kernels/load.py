"""Compiled local search on load alone: one layer, all tuning batches at once.

The objective is the mean over batches of the largest GPU cost, where a GPU's cost is the sum of
its slots' costs. `moesim.solvers.kernels.pairs` finds the best swap of a pair of GPUs,
`moesim.solvers.kernels.replace` replicas that are better of another expert.
"""

from __future__ import annotations

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
from moesim.solvers.kernels.placed import (
    MARGIN,
    Costs,
    Placed,
    Scan,
    apply_swap,
    begin_pair,
    fill_row,
    kick,
    make_placed,
    make_scan,
    note_swap,
    rebuild,
)
from moesim.solvers.kernels.replace import make_rows, replace_pass

MAX_ROUNDS = 100
REPLACE_EVERY = 8
"""Kicks from one round of replica moves to the next."""


@kernel
def swap_pass(placed: Placed, peaks: Peaks, scratch: Scratch, scan: Scan) -> bool:
    """Apply the best improving swap of every pair of GPUs in turn; whether a pair was looked at.

    Pairs of which neither GPU changed since they were last scanned are skipped. `peaks` is that of
    the loads, before and after.
    """
    num_gpus = len(placed.capacity)
    least = int(MARGIN * peaks.value[0].sum())
    pair = np.empty(2, np.int64)
    before = scan.clock[0]
    for g1 in range(num_gpus):
        for g2 in range(g1 + 1, num_gpus):
            if not begin_pair(scan, g1, g2):
                continue
            _, s1, s2 = best_swap(placed, peaks, scratch, g1, g2, least)
            if s1 >= 0:
                note_swap(scan, g1, g2)
                apply_swap(placed, g1, s1, g2, s2)
                pair[0], pair[1] = g1, g2
                rank_peaks(placed.load, peaks, pair)
    return bool(scan.clock[0] > before)


@kernel
def has_spare(placed: Placed) -> bool:
    """Whether a slot is empty or an expert has several replicas."""
    for g in range(len(placed.capacity)):
        for s in range(placed.capacity[g]):
            e = placed.slots[g, s]
            if e == len(placed.replicas) or placed.replicas[e] > 1:
                return True
    return False


@kernel
def restore(placed: Placed, best: Placed, costs: Costs) -> None:
    """Bring `placed` back to what `best` says, the costs of experts with other replicas too."""
    for e in range(len(placed.replicas)):
        if placed.replicas[e] != best.replicas[e]:
            fill_row(costs, e, best.replicas[e], placed.work[:, e])
    keep(best, placed)


@kernel
def keep(placed: Placed, best: Placed) -> None:
    """Set `best` to `placed`, but for its costs."""
    best.slots[:], best.load[:], best.holds[:] = placed.slots, placed.load, placed.holds
    best.replicas[:] = placed.replicas


@kernel
def search_layer(placed: Placed, costs: Costs, num_kicks: int, seed: int) -> float:
    """Iterated local search on one layer; improves the slots in place; returns the objective, in
    grains.

    After descending over swaps and replica moves, `num_kicks` times a random swap is made and
    descended from, and kept if better (H. R. Lourenco, O. Martin, T. Stuetzle, Iterated Local
    Search, 2003). After a kick only pairs with a GPU that it changed are looked at, and all of
    them again once it was kept.
    """
    np.random.seed(seed)
    num_gpus, num_batches = placed.load.shape
    spare = has_spare(placed)
    every = np.arange(num_gpus)
    peaks = make_peaks(num_gpus, num_batches)
    total = rank_peaks(placed.load, peaks, every)
    scratch = make_scratch(placed.slots.shape[1], num_batches)
    rows, scan = make_rows(placed), make_scan(num_gpus)
    best_value = np.inf
    best = make_placed(placed.work, placed.slots.copy(), placed.capacity, placed.unit)
    for attempt in range(num_kicks + 1):
        if attempt > 0:
            kicked = kick(placed, 1)
            scan.clock[0] += 1
            scan.changed[kicked] = scan.clock[0]
            total = rank_peaks(placed.load, peaks, kicked)
        for _ in range(MAX_ROUNDS):
            start = total
            looked = swap_pass(placed, peaks, scratch, scan)
            total = peaks.value[0].sum()
            if looked and total < start * (1 - MARGIN):
                continue
            if not spare or attempt % REPLACE_EVERY > 0:
                break
            improved = replace_pass(placed, costs, peaks, scan, rows)
            total = peaks.value[0].sum()
            if not improved:
                break
        if total < best_value * (1 - MARGIN):
            rebuild(placed)
            total = rank_peaks(placed.load, peaks, every)
            best_value = total
            keep(placed, best)
            scan.scanned[:] = -1
        else:
            moved = np.flatnonzero(scan.changed)
            restore(placed, best, costs)
            total = rank_peaks(placed.load, peaks, moved)
            scan.scanned[:] = scan.clock[0]
        scan.changed[:] = 0
    placed.slots[:] = best.slots
    return best_value / num_batches
