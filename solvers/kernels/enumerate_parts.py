"""All ways to deal the contents of a few GPUs among them: compiled, with pruning, exact.

The sub-problem of `moesim.solvers.ilp.neighbourhood`, on a sample of the batches and without
groups of them. With some ten thousand ways this is faster than an integer program, whose
relaxation (every item spread evenly) prunes next to nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.kernels.placed import Goal, objective
from moesim.types import Array


class Parts(NamedTuple):
    """What is dealt. item: [n] expert of each, `empty` for an empty slot; two of one expert never
    share a GPU. work: [U, n, B] their cost on each kind of GPU, in grains; base: [G, B] what the
    GPUs keep; fixed: [B] the costliest GPU elsewhere. start: [n] where items come from; unit: [G]
    kinds of GPU. order: [n] items as they are dealt; rest: [n + 1, B] cost of those from there on.
    """

    item: Array
    work: Array
    base: Array
    fixed: Array
    start: Array
    unit: Array
    empty: int
    order: Array
    rest: Array


class Terms(NamedTuple):
    """Messages in microseconds, see `LayerState.message_terms`. alone: [n, G]; apart: [n, n];
    between: [G, G] the part of `apart` that two items pay by where they are."""

    alone: Array
    apart: Array
    between: Array


@kernel
def mean_largest(fixed: Array, loads: Array, rest: Array, shared: int, grains: float) -> float:
    """Mean over batches of the largest of `fixed` [B], `loads` [G, B] and, where `shared` > 0, a
    `shared`-th of their sum with `rest` [B], which no way of dealing `rest` can be below. The
    first three in grains, of which `grains` are a unit of the result."""
    num_gpus, num_batches = loads.shape
    total = 0
    for b in range(num_batches):
        most = fixed[b]
        both = rest[b]
        for g in range(num_gpus):
            most = max(most, loads[g, b])
            both += loads[g, b]
        if shared > 0:
            most = max(most, both // shared)
        total += most
    return total / (num_batches * grains)


@kernel
def value_of(parts: Parts, goal: Goal, loads: Array, depth: int, messages: float) -> float:
    """The objective, or a bound on it where items from `depth` on are still to be dealt."""
    shared = loads.shape[0] if parts.work.shape[0] == 1 and depth < len(parts.item) else 0
    mean = mean_largest(parts.fixed, loads, parts.rest[depth], shared, goal.grains)
    return float(objective(mean, messages, goal.ceiling, goal.weight))


@kernel
def make_parts(
    item: Array, work: Array, base: Array, fixed: Array, start: Array, unit: Array, empty: int
) -> Parts:
    """Parts, the costliest items first. All as in `Parts`, but items in any order."""
    order = np.argsort(-work[unit[0]].sum(axis=1))
    num, num_batches = len(item), len(fixed)
    rest = np.zeros((num + 1, num_batches), np.int64)
    for depth in range(num - 1, -1, -1):
        rest[depth] = rest[depth + 1] + work[0, order[depth]]
    return Parts(item, work, base, fixed, start, unit, empty, order, rest)


@kernel
def start_value(parts: Parts, terms: Terms, goal: Goal) -> float:
    """The objective of leaving every item where it is."""
    loads, messages = parts.base.copy(), 0.0
    start = parts.start
    for i in range(len(parts.item)):
        loads[start[i]] += parts.work[parts.unit[start[i]], i]
        messages += terms.alone[i, start[i]]
        for j in range(i):
            messages += terms.apart[i, j] * terms.between[start[i], start[j]]
    return float(value_of(parts, goal, loads, len(parts.item), messages))


@kernel
def clashes(parts: Parts, on: Array, depth: int, gpu: int) -> bool:
    """Whether the item dealt at `depth` has its expert on `gpu` already."""
    i = parts.order[depth]
    if parts.item[i] >= parts.empty:
        return False
    for d in range(depth):
        j = parts.order[d]
        if parts.item[j] == parts.item[i] and on[j] == gpu:
            return True
    return False


@kernel
def least_paid(
    parts: Parts, terms: Terms, pay: Array, left: Array, paid: float, depth: int, gpu: int
) -> float:
    """What all items pay in messages at least, once those up to `depth` have `paid` and the item
    there is on `gpu`; sets pay [depth + 1] from pay [depth], each [n, G] what an item would pay.
    left: [G] items that a GPU still takes."""
    i, least = parts.order[depth], paid
    for d in range(depth + 1, len(parts.item)):
        j = parts.order[d]
        cheapest = np.inf
        for h in range(len(left)):
            pay[depth + 1, j, h] = pay[depth, j, h] + terms.apart[i, j] * terms.between[gpu, h]
            if left[h] > 0:
                cheapest = min(cheapest, pay[depth + 1, j, h])
        least += cheapest
    return least


@kernel
def best_parts(
    parts: Parts, terms: Terms, goal: Goal, room: Array, node_limit: int
) -> tuple[Array, float, int]:
    """(GPU of every item, value, nodes looked at): the least value over all ways, unless
    `node_limit` comes first; ties keep where items come from. room: [G] items that each GPU takes.
    Costs O(G B + n G) a node.
    """
    num, num_gpus, start = len(parts.item), len(room), parts.start
    order, unit = parts.order, parts.unit
    best, best_value = start.copy(), start_value(parts, terms, goal) * (1 - 1e-6)
    loads = np.empty((num + 1, num_gpus, len(parts.fixed)), np.int32)
    loads[0] = parts.base
    left = room.copy()
    on = np.full(num, -1, np.int64)
    paid = np.zeros(num + 1)
    pay = np.zeros((num + 1, num, num_gpus))
    pay[0] = terms.alone
    tried = np.zeros(num + 1, np.int64)
    depth, nodes = 0, 0
    while depth >= 0 and nodes < node_limit:
        if depth == num or tried[depth] == num_gpus:
            tried[depth] = 0
            depth -= 1
            if depth >= 0:
                left[on[order[depth]]] += 1
                on[order[depth]] = -1
            continue
        i = order[depth]
        g = (start[i] + tried[depth]) % num_gpus
        tried[depth] += 1
        if left[g] == 0 or clashes(parts, on, depth, g):
            continue
        nodes += 1
        loads[depth + 1] = loads[depth]
        loads[depth + 1, g] += parts.work[unit[g], i]
        paid[depth + 1] = paid[depth] + pay[depth, i, g]
        left[g] -= 1
        least = least_paid(parts, terms, pay, left, paid[depth + 1], depth, g)
        value = value_of(parts, goal, loads[depth + 1], depth + 1, least)
        if value >= best_value:
            left[g] += 1
            continue
        on[i] = g
        depth += 1
        tried[depth] = 0
        if depth == num:
            best_value = value
            best[:] = on
    return best, best_value, nodes
