"""Compiled local search from a placement that is in use: every expert that moves has a price.

The objective of one layer is what `moesim.solvers.kernels.load` minimises, the mean over batches of
the costliest GPU, plus `price` in grains for every expert that a GPU holds and did not before.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.kernels.load import MAX_ROUNDS, has_spare
from moesim.solvers.kernels.placed import (
    MARGIN,
    Costs,
    Placed,
    apply_swap,
    fill_row,
    may_swap,
    mean_max,
    rebuild,
)
from moesim.solvers.kernels.replace import (
    REPLACE_CANDIDATES,
    Rows,
    load_after,
    make_rows,
    take_slot,
)
from moesim.types import Array


class Move(NamedTuple):
    """What is in use. before: [G, E + 1] whether a GPU held an expert, true in the last column;
    price: of one expert moved, in grains."""

    before: Array
    price: float


@kernel
def others_max(load: Array, g1: int, g2: int, out: Array) -> None:
    """out[b]: the largest of `load` over GPUs other than g1 and g2."""
    out[:] = 0
    for g in range(load.shape[0]):
        if g != g1 and g != g2:
            for b in range(len(out)):
                out[b] = max(out[b], load[g, b])


@kernel(allocates=False)
def swap_value(placed: Placed, others: Array, g1: int, e1: int, g2: int, e2: int) -> int:
    """Sum over batches of the largest cost after g1 gives `e1` for `e2` and g2 the other way."""
    u1, u2 = placed.unit[g1], placed.unit[g2]
    load1, out1, in1 = placed.load[g1], placed.work[u1, e1], placed.work[u1, e2]
    load2, out2, in2 = placed.load[g2], placed.work[u2, e2], placed.work[u2, e1]
    total = 0
    for b in range(len(others)):
        a = load1[b] - out1[b] + in1[b]
        c = load2[b] - out2[b] + in2[b]
        total += max(others[b], max(a, c))
    return total


@kernel(allocates=False)
def is_new(move: Move, gpu: int, expert: int) -> int:
    """1 if `gpu` must fetch `expert`; empty slots are held."""
    return 0 if move.before[gpu, expert] else 1


@kernel
def best_move(placed: Placed, move: Move, others: Array, g1: int, g2: int) -> tuple[int, int]:
    """Slots of GPUs g1 and g2 whose exchange lowers load and price together most, or (-1, -1)."""
    slots, empty = placed.slots, len(placed.replicas)
    others_max(placed.load, g1, g2, others)
    now = swap_value(placed, others, g1, empty, g2, empty)
    best, best1, best2 = now - now * MARGIN, -1, -1
    for s1 in range(placed.capacity[g1]):
        for s2 in range(placed.capacity[g2]):
            e1, e2 = slots[g1, s1], slots[g2, s2]
            if not may_swap(placed, g1, e1, g2, e2):
                continue
            value = swap_value(placed, others, g1, e1, g2, e2)
            moves = is_new(move, g1, e2) + is_new(move, g2, e1)
            moves -= is_new(move, g1, e1) + is_new(move, g2, e2)
            priced = value + moves * move.price * len(others)
            if priced < best:
                best, best1, best2 = priced, s1, s2
    return best1, best2


@kernel
def replace_by_price(placed: Placed, costs: Costs, move: Move, rows: Rows) -> int:
    """Give slots of experts with several replicas (and empty slots) to other experts wherever load
    and price together fall; returns how many changed."""
    empty = len(placed.replicas)
    share = np.zeros(empty, np.float64)
    changed = 0
    for g in range(len(placed.capacity)):
        for s in range(placed.capacity[g]):
            old = placed.slots[g, s]
            if old != empty and placed.replicas[old] < 2:
                continue
            for e in range(empty):
                held = 2.0 if move.before[g, e] else 1.0
                share[e] = placed.work[placed.unit[g], e].sum() * held
            if old != empty:
                fill_row(costs, old, placed.replicas[old] - 1, rows.less)
            new = best_by_price(placed, costs, move, rows, g, old, np.argsort(-share))
            if new >= 0:
                after_move(placed, costs, rows, g, old, new)
                take_slot(placed, g, s, new, rows.less, rows.more[:, new], rows.after)
                changed += 1
    return changed


@kernel
def best_by_price(
    placed: Placed, costs: Costs, move: Move, rows: Rows, gpu: int, old: int, order: Array
) -> int:
    """The expert to which a slot of `old` on `gpu` is best given, -1 if none lowers load and price
    together. order: experts to try, first ones first."""
    now = mean_max(placed.load)
    best, best_expert, tried = now - now * MARGIN, -1, 0
    for new in order:
        held = placed.holds[gpu, new]
        if new == old or held or placed.replicas[new] >= len(placed.capacity):
            continue
        tried += 1
        if tried > REPLACE_CANDIDATES:
            break
        after_move(placed, costs, rows, gpu, old, new)
        moves = is_new(move, gpu, new) - is_new(move, gpu, old)
        value = mean_max(rows.after) + moves * move.price
        if value < best:
            best, best_expert = value, new
    return int(best_expert)


@kernel
def after_move(placed: Placed, costs: Costs, rows: Rows, gpu: int, old: int, new: int) -> None:
    """Set the row `more` of `new`, and `after` to all loads once it has a slot of `old`."""
    more = rows.more[:, new]
    fill_row(costs, new, placed.replicas[new] + 1, more)
    rows.after[:] = placed.load
    load_after(placed, gpu, old, new, rows.less, more, rows.after)


@kernel
def search_moves(placed: Placed, costs: Costs, move: Move) -> None:
    """Descend from the slots of `placed` in place, over swaps and replica moves.

    Every accepted step lowers load plus price, so that the result is never worse than the start.
    """
    num_gpus, num_batches = placed.load.shape
    spare, rows = has_spare(placed), make_rows(placed)
    others = np.empty(num_batches, np.int32)
    for _ in range(MAX_ROUNDS):
        changed = 0
        for g1 in range(num_gpus):
            for g2 in range(g1 + 1, num_gpus):
                s1, s2 = best_move(placed, move, others, g1, g2)
                if s1 >= 0:
                    apply_swap(placed, g1, s1, g2, s2)
                    changed += 1
        if spare:
            changed += replace_by_price(placed, costs, move, rows)
        rebuild(placed)
        if changed == 0:
            return
