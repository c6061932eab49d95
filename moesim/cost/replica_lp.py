"""Replica policy `lp`: the shares of replicas that make the most loaded GPU least loaded.

For one batch and layer let c[e] be the tokens of expert e and x[e, r] those that its replica r
serves. The linear program

    minimise M   subject to   sum over r of x[e, r] = c[e],   x >= 0,
                              sum over the replicas on GPU g of x[e, r] <= M   for every g

is the one of SGLang's `--ep-dispatch-algorithm lp` (sgl-project/sglang,
python/sglang/srt/eplb/lplb_solver.py, pull request 24515), which solves it by a few interior-point
steps and draws replicas at random by the shares. DeepSeek's LPLB (deepseek-ai/LPLB) is similar, on
fixed graphs of replicas. Here it is solved exactly and in whole tokens. For a given M it is a flow
from experts to GPUs with capacity M, so whole tokens reach M rounded up, and no shares do better
than M.

Tokens start where `nearest` sends them. While a GPU has more than the present lower bound M, tokens
go along a shortest path of replicas (breadth first) to a GPU below it. Where no path leads to one,
the GPUs reached have nothing that could leave them, so that their mean load bounds M from below,
and M is raised to it (Newton's method on the ratio, W. Dinkelbach, Management Science 13, 1967).
So the loop ends with the largest load equal to a lower bound: an optimum with its proof, and with
few tokens taken from their nearest replica.

Ignored: speeds of GPUs, that an expert with few tokens costs as much as its weights, messages
beyond nearness (that another of the token's experts may be on the same GPU).
"""

from __future__ import annotations

import numpy as np

from moesim.kernels import kernel
from moesim.types import Array


@kernel
def share_out(
    demand: Array,
    fixed: Array,
    slots: Array,
    count: Array,
    gpu_of_slot: Array,
    node_of_gpu: Array,
    share: Array,
) -> int:
    """Write into share [E, G, R] how many of the choices of expert e by tokens of home GPU h its
    replica r serves; returns the largest load of a GPU, the least possible.

    demand: [E, G] choices by expert and home, of experts with several replicas (others are not
    looked at); fixed: [G] tokens of the experts with one; slots: [E, R], count: [E], slots of the
    replicas and how many there are.
    """
    num_experts = len(demand)
    gpus = np.empty(slots.shape, np.int64)
    for e in range(num_experts):
        for r in range(count[e]):
            gpus[e, r] = gpu_of_slot[slots[e, r]]
    quota = np.zeros(slots.shape, np.int64)
    load = fixed.copy()
    for e in range(num_experts):
        if count[e] > 1:
            nearest_quota(demand[e], gpus[e], count[e], node_of_gpu, quota[e])
            for r in range(count[e]):
                load[gpus[e, r]] += quota[e, r]
    most = level(gpus, count, quota, load)
    for e in range(num_experts):
        if count[e] > 1:
            deal(demand[e], gpus[e], count[e], node_of_gpu, quota[e], share[e])
    return most


@kernel
def share_given(
    demand: Array,
    quota: Array,
    slots: Array,
    count: Array,
    gpu_of_slot: Array,
    node_of_gpu: Array,
    share: Array,
) -> None:
    """Fill share [E, G, R] so that every replica serves its `quota` [E, R]; the rest as in
    `share_out`."""
    gpus = np.empty(slots.shape[1], np.int64)
    for e in range(len(demand)):
        if count[e] > 1:
            for r in range(count[e]):
                gpus[r] = gpu_of_slot[slots[e, r]]
            deal(demand[e], gpus, count[e], node_of_gpu, quota[e], share[e])


@kernel
def nearest_quota(demand: Array, gpus: Array, count: int, node_of_gpu: Array, quota: Array) -> None:
    """Add `demand` [G] of one expert to the quotas [R] of the nearest replicas: on the home GPU,
    else evenly over those of its node, else evenly over all."""
    turn = 0
    for home in range(len(demand)):
        if demand[home] == 0:
            continue
        own, near = -1, 0
        for r in range(count):
            if gpus[r] == home:
                own = r
            near += node_of_gpu[gpus[r]] == node_of_gpu[home]
        if own >= 0:
            quota[own] += demand[home]
            continue
        size = near if near > 0 else count
        each, over = demand[home] // size, demand[home] % size
        i = 0
        for r in range(count):
            if near == 0 or node_of_gpu[gpus[r]] == node_of_gpu[home]:
                quota[r] += each + ((i - turn) % size < over)
                i += 1
        turn += over


@kernel
def level(gpus: Array, count: Array, quota: Array, load: Array) -> int:
    """Move tokens between replicas until the largest `load` [G] is as small as it can be.

    gpus: [E, R] GPU of each replica, count: [E]; quota [E, R] and load are kept in step. Returns
    the largest load.
    """
    num_gpus = len(load)
    num_experts, most_replicas = quota.shape
    indptr = np.zeros(num_gpus + 1, np.int64)
    for e in range(num_experts):
        if count[e] > 1:
            for r in range(count[e]):
                indptr[gpus[e, r] + 1] += 1
    for g in range(num_gpus):
        indptr[g + 1] += indptr[g]
    held = np.empty(indptr[num_gpus], np.int64)
    at = indptr[:num_gpus].copy()
    for e in range(num_experts):
        if count[e] > 1:
            for r in range(count[e]):
                held[at[gpus[e, r]]] = e * most_replicas + r
                at[gpus[e, r]] += 1
    bound = -(-load.sum() // num_gpus)
    came_from = np.empty(num_gpus, np.int64)
    came_to = np.empty(num_gpus, np.int64)
    seen = np.empty(num_gpus, np.bool_)
    queue = np.empty(num_gpus, np.int64)
    while True:
        start = 0
        for g in range(num_gpus):
            if load[g] > load[start]:
                start = g
        if load[start] <= bound:
            return load[start]
        seen[:] = False
        seen[start] = True
        queue[0] = start
        head, tail, end = 0, 1, -1
        while head < tail and end < 0:
            g = queue[head]
            head += 1
            for i in range(indptr[g], indptr[g + 1]):
                e, r = held[i] // most_replicas, held[i] % most_replicas
                if quota[e, r] == 0:
                    continue
                for other in range(count[e]):
                    h = gpus[e, other]
                    if seen[h]:
                        continue
                    seen[h] = True
                    came_from[h] = held[i]
                    came_to[h] = e * most_replicas + other
                    queue[tail] = h
                    tail += 1
                    if load[h] < bound and (end < 0 or load[h] < load[end]):
                        end = h
        if end < 0:
            total = 0
            for i in range(tail):
                total += load[queue[i]]
            bound = -(-total // tail)
            continue
        amount = min(load[start] - bound, bound - load[end])
        h = end
        while h != start:
            e, r = came_from[h] // most_replicas, came_from[h] % most_replicas
            amount = min(amount, quota[e, r])
            h = gpus[e, r]
        h = end
        while h != start:
            e, r = came_from[h] // most_replicas, came_from[h] % most_replicas
            quota[e, r] -= amount
            quota[e, came_to[h] % most_replicas] += amount
            h = gpus[e, r]
        load[start] -= amount
        load[end] += amount


@kernel
def deal(
    demand: Array, gpus: Array, count: int, node_of_gpu: Array, quota: Array, share: Array
) -> None:
    """Fill share [G, R] of one expert from its quotas [R]: as many choices as possible on their
    home GPU, of the rest as many as possible on their home node, which together is the best."""
    left = quota.copy()
    want = demand.copy()
    for r in range(count):
        taken = min(left[r], want[gpus[r]])
        share[gpus[r], r] = taken
        left[r] -= taken
        want[gpus[r]] -= taken
    for far in range(2):
        for home in range(len(demand)):
            for r in range(count):
                if want[home] == 0:
                    break
                if far == 0 and node_of_gpu[gpus[r]] != node_of_gpu[home]:
                    continue
                taken = min(left[r], want[home])
                share[home, r] += taken
                left[r] -= taken
                want[home] -= taken


@kernel
def least_loads(
    counts: Array, slots: Array, count: Array, gpu_of_slot: Array, node_of_gpu: Array, out: Array
) -> None:
    """Fill out [B] with the largest GPU load, as small as replicas allow, of every batch of one
    layer; counts: [B, E] tokens, slots: [E, R] and count: [E] as in `share_out`."""
    num_experts, num_gpus = counts.shape[1], node_of_gpu.shape[0]
    gpus = np.zeros(slots.shape, np.int64)
    for e in range(num_experts):
        for r in range(count[e]):
            gpus[e, r] = gpu_of_slot[slots[e, r]]
    for b in range(len(counts)):
        quota = np.zeros(slots.shape, np.int64)
        load = np.zeros(num_gpus, np.int64)
        for e in range(num_experts):
            tokens = np.int64(counts[b, e])
            for r in range(count[e]):
                quota[e, r] = tokens // count[e] + (r < tokens % count[e])
                load[gpus[e, r]] += quota[e, r]
        out[b] = level(gpus, count, quota, load)
