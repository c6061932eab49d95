"""Compiled search for the best swap of a pair of GPUs, looking at few of the batches.

The objective is the sum over batches of the largest load. A swap of two GPUs can lower it only in
batches where one of the two is the costliest, some 2 / G of them; what it does there bounds what it
does at all, and most swaps are ruled out by it. For that the three costliest GPUs of every batch
are kept (`Peaks`): whatever pair is looked at, one of them is outside it.

Loads and slots are those of `moesim.solvers.kernels.placed.Placed`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.kernels.placed import Placed, may_swap
from moesim.types import Array

BLOCK = 128
NEVER = np.int32(2**31 - 1)


class Peaks(NamedTuple):
    """The three costliest GPUs of every batch.

    value [3, B] int32, descending, 0 where there are fewer GPUs; gpu [3, B], -1 there.
    order [B]: batches sorted by their costliest GPU; start [G + 1]: where each GPU's begin.
    """

    value: Array
    gpu: Array
    order: Array
    start: Array


@kernel
def make_peaks(num_gpus: int, num_batches: int) -> Peaks:
    """Peaks of the right size, not yet ranked."""
    return Peaks(
        np.zeros((3, num_batches), np.int32),
        np.full((3, num_batches), -1, np.int32),
        np.zeros(num_batches, np.int32),
        np.zeros(num_gpus + 1, np.int64),
    )


@kernel
def rank_peaks(load: Array, peaks: Peaks, moved: Array) -> int:
    """Bring `peaks` in step with `load` after the GPUs in `moved` (all of them, or what changed
    since the last call) changed; returns the sum over batches of the largest load."""
    num_gpus, num_batches = load.shape
    value, gpu, start = peaks.value, peaks.gpu, peaks.start
    touched = np.zeros(num_gpus + 1, np.bool_)
    for g in moved:
        touched[g] = True
    everything = len(moved) == num_gpus
    start[:] = 0
    total = 0
    for b in range(num_batches):
        i0, i1, i2 = gpu[0, b], gpu[1, b], gpu[2, b]
        v0, v1, v2 = value[0, b], value[1, b], value[2, b]
        again = everything or touched[i0] or touched[i1] or touched[i2]
        if again:
            i0, i1, i2 = np.int32(-1), np.int32(-1), np.int32(-1)
            v0, v1, v2 = np.int32(0), np.int32(0), np.int32(0)
        for i in range(num_gpus if again else len(moved)):
            g = np.int32(i if again else moved[i])
            x = load[g, b]
            if i2 >= 0 and x <= v2:
                continue
            if i1 >= 0 and x <= v1:
                v2, i2 = x, g
            elif i0 >= 0 and x <= v0:
                v2, i2, v1, i1 = v1, i1, x, g
            else:
                v2, i2, v1, i1, v0, i0 = v1, i1, v0, i0, x, g
        gpu[0, b], gpu[1, b], gpu[2, b] = i0, i1, i2
        value[0, b], value[1, b], value[2, b] = v0, v1, v2
        total += v0
        start[i0 + 1] += 1
    for g in range(num_gpus):
        start[g + 1] += start[g]
    filled = start[:num_gpus].copy()
    for b in range(num_batches):
        g = gpu[0, b]
        peaks.order[filled[g]] = b
        filled[g] += 1
    return total


class Scratch(NamedTuple):
    """Work space of a pair of GPUs, of which the first `hot` batches of hot_* are filled: those
    whose costliest GPU is one of the pair. hot_others, hot_most: [B] the largest load elsewhere,
    and of all; hot_base1, hot_base2: [S, B] what a GPU keeps without a slot; hot_more1, hot_more2:
    what it gets with a slot of the other. rest: [B] the largest load, and more than any load in
    the hot batches."""

    hot_others: Array
    hot_most: Array
    hot_base1: Array
    hot_more1: Array
    hot_base2: Array
    hot_more2: Array
    rest: Array


@kernel
def make_scratch(num_slots: int, num_batches: int) -> Scratch:
    """Scratch for GPUs of up to `num_slots` slots."""
    return Scratch(
        np.empty(num_batches, np.int32),
        np.empty(num_batches, np.int32),
        np.empty((num_slots, num_batches), np.int32),
        np.empty((num_slots, num_batches), np.int32),
        np.empty((num_slots, num_batches), np.int32),
        np.empty((num_slots, num_batches), np.int32),
        np.empty(num_batches, np.int32),
    )


@kernel(allocates=False)
def gather_pair(placed: Placed, peaks: Peaks, scratch: Scratch, g1: int, g2: int) -> int:
    """Fill the hot part of `scratch` for one pair of GPUs; returns how many batches are hot."""
    num_hot = 0
    value, gpu = peaks.value, peaks.gpu
    for side in range(2):
        g = g1 if side == 0 else g2
        other = g2 if side == 0 else g1
        for i in range(peaks.start[g], peaks.start[g + 1]):
            b = peaks.order[i]
            scratch.hot_most[num_hot] = value[0, b]
            scratch.hot_others[num_hot] = value[2, b] if gpu[1, b] == other else value[1, b]
            num_hot += 1
    u1, u2 = placed.unit[g1], placed.unit[g2]
    for side in range(2):
        g = g1 if side == 0 else g2
        base = scratch.hot_base1 if side == 0 else scratch.hot_base2
        more = scratch.hot_more2 if side == 0 else scratch.hot_more1
        here, there = (u1, u2) if side == 0 else (u2, u1)
        for s in range(placed.capacity[g]):
            own, away = (
                placed.work[here, placed.slots[g, s]],
                placed.work[there, placed.slots[g, s]],
            )
            at = 0
            for part in range(2):
                p = g1 if part == 0 else g2
                for i in range(peaks.start[p], peaks.start[p + 1]):
                    b = peaks.order[i]
                    base[s, at] = placed.load[g, b] - own[b]
                    more[s, at] = away[b]
                    at += 1
    return num_hot


@kernel(allocates=False)
def mark_rest(peaks: Peaks, g1: int, g2: int, out: Array) -> None:
    """out [B]: the largest load, and more than any load in the hot batches."""
    for b in range(len(out)):
        out[b] = peaks.value[0, b]
    for g in (g1, g2):
        for i in range(peaks.start[g], peaks.start[g + 1]):
            out[peaks.order[i]] = NEVER


@kernel(allocates=False)
def hot_delta(scratch: Scratch, hot: int, s1: int, s2: int) -> int:
    """By how much a swap of two slots changes the sum over the hot batches of the largest load."""
    base1, more1 = scratch.hot_base1[s1], scratch.hot_more1[s2]
    base2, more2 = scratch.hot_base2[s2], scratch.hot_more2[s1]
    others, most = scratch.hot_others, scratch.hot_most
    total = 0
    for b in range(hot):
        one, two, three = base1[b] + more1[b], base2[b] + more2[b], others[b]
        one = one if one > two else two
        total += (one if one > three else three) - most[b]
    return total


@kernel(allocates=False)
def rest_delta(
    placed: Placed, rest: Array, g1: int, e1: int, g2: int, e2: int, delta: int, best: float
) -> int:
    """`delta` plus the same sum over the batches of `rest`, where a swap can only lose; stops as
    soon as the total is not below `best`."""
    u1, u2 = placed.unit[g1], placed.unit[g2]
    load1, less1, more1 = placed.load[g1], placed.work[u1, e1], placed.work[u1, e2]
    load2, less2, more2 = placed.load[g2], placed.work[u2, e2], placed.work[u2, e1]
    num_batches = len(rest)
    for first in range(0, num_batches, BLOCK):
        total = 0
        for b in range(first, min(first + BLOCK, num_batches)):
            one = load1[b] - less1[b] + more1[b]
            two = load2[b] - less2[b] + more2[b]
            above = (one if one > two else two) - rest[b]
            total += above if above > 0 else 0
        delta += total
        if delta >= best:
            break
    return delta


@kernel(allocates=False)
def best_swap(
    placed: Placed, peaks: Peaks, scratch: Scratch, g1: int, g2: int, least: int
) -> tuple[int, int, int]:
    """(change of the summed objective, slot of g1, slot of g2) of the best swap of a pair of GPUs
    that gains more than `least`; slots are -1 if there is none.

    Only in batches where one of the pair is the costliest GPU can a swap gain, so that what it does
    there bounds what it does at all: the other batches are looked at only for swaps that pass.
    """
    hot = gather_pair(placed, peaks, scratch, g1, g2)
    best, best1, best2 = -least, -1, -1
    if hot == 0:
        return best, best1, best2
    ready = False
    for s1 in range(placed.capacity[g1]):
        for s2 in range(placed.capacity[g2]):
            e1, e2 = placed.slots[g1, s1], placed.slots[g2, s2]
            if not may_swap(placed, g1, e1, g2, e2):
                continue
            delta = hot_delta(scratch, hot, s1, s2)
            if delta >= best:
                continue
            if not ready:
                mark_rest(peaks, g1, g2, scratch.rest)
                ready = True
            delta = rest_delta(placed, scratch.rest, g1, e1, g2, e2, delta, best)
            if delta < best:
                best, best1, best2 = delta, s1, s2
    return best, best1, best2
