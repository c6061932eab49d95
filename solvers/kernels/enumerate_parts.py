"""All ways to deal the contents of a few GPUs among them: compiled, with pruning, exact.

The sub-problem of `moesim.solvers.ilp.neighbourhood`, on a sample of the batches and without
groups of them. With some ten thousand ways this is faster than an integer program, whose
relaxation (every item spread evenly) prunes next to nothing.
"""

from __future__ import annotations

import numpy as np

from moesim.kernels import kernel
from moesim.types import Array


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
def value_of(mean: float, messages: float, ceiling: float, weight: float) -> float:
    """The objective: messages plus load, or for traffic plus load above the ceiling."""
    if ceiling > 0:
        return messages + weight * max(0.0, mean - ceiling)
    return mean + messages


@kernel
def best_parts(
    item: Array,
    work: Array,
    base: Array,
    fixed: Array,
    room: Array,
    unit: Array,
    alone: Array,
    apart: Array,
    between: Array,
    ceiling: float,
    weight: float,
    start: Array,
    empty: int,
    node_limit: int,
    grains: float,
) -> tuple[Array, float, int]:
    """(GPU of every item, value, nodes looked at): the least value over all ways, unless
    `node_limit` comes first; ties keep `start`.

    item: [n] expert of each item, `empty` for an empty slot; two of one expert never share a GPU.
    work: [U, n, B] their cost on each kind of GPU, in grains; base: [G, B] what the GPUs keep;
    fixed: [B] the costliest GPU elsewhere; room: [G] items that each takes; unit: [G] kinds.
    alone [n, G], apart [n, n]: microseconds of messages, see `LayerState.message_terms`; between
    [G, G]: the part of `apart` that two items pay by where they are. start: [n] where the items
    come from.
    Costs O(G B + n G) a node.
    """
    num, num_gpus = len(item), len(room)
    num_batches = len(fixed)
    order = np.argsort(-work[unit[0]].sum(axis=1))
    rest = np.zeros((num + 1, num_batches), np.int64)
    for depth in range(num - 1, -1, -1):
        rest[depth] = rest[depth + 1] + work[0, order[depth]]
    shared = num_gpus if work.shape[0] == 1 else 0
    loads = np.empty((num + 1, num_gpus, num_batches), np.int32)
    loads[0] = base
    for i in range(num):
        loads[0, start[i]] += work[unit[start[i]], i]
    best = start.copy()
    messages = 0.0
    for i in range(num):
        messages += alone[i, start[i]]
        for j in range(i):
            messages += apart[i, j] * between[start[i], start[j]]
    best_value = value_of(
        mean_largest(fixed, loads[0], rest[num], 0, grains), messages, ceiling, weight
    ) * (1 - 1e-6)
    loads[0] = base
    left = room.copy()
    on = np.full(num, -1, np.int64)
    paid = np.zeros(num + 1)
    pay = np.zeros((num + 1, num, num_gpus))
    pay[0] = alone
    tried = np.zeros(num + 1, np.int64)
    first = np.zeros(num + 1, np.int64)
    depth, nodes = 0, 0
    first[0] = start[order[0]]
    while depth >= 0 and nodes < node_limit:
        if depth == num or tried[depth] == num_gpus:
            tried[depth] = 0
            depth -= 1
            if depth >= 0:
                i = order[depth]
                left[on[i]] += 1
                on[i] = -1
            continue
        i = order[depth]
        g = (first[depth] + tried[depth]) % num_gpus
        tried[depth] += 1
        if left[g] == 0:
            continue
        clash = False
        for d in range(depth):
            j = order[d]
            if item[i] < empty and item[j] == item[i] and on[j] == g:
                clash = True
        if clash:
            continue
        nodes += 1
        loads[depth + 1] = loads[depth]
        loads[depth + 1, g] += work[unit[g], i]
        paid[depth + 1] = paid[depth] + pay[depth, i, g]
        least = paid[depth + 1]
        left[g] -= 1
        for d in range(depth + 1, num):
            j = order[d]
            cheapest = np.inf
            for h in range(num_gpus):
                pay[depth + 1, j, h] = pay[depth, j, h] + apart[i, j] * between[g, h]
                if left[h] > 0:
                    cheapest = min(cheapest, pay[depth + 1, j, h])
            least += cheapest
        mean = mean_largest(fixed, loads[depth + 1], rest[depth + 1], shared, grains)
        value = value_of(mean, least, ceiling, weight)
        if value >= best_value:
            left[g] += 1
            continue
        on[i] = g
        depth += 1
        if depth == num:
            best_value = value
            best[:] = on
        else:
            first[depth] = start[order[depth]]
            tried[depth] = 0
    return best, best_value, nodes
