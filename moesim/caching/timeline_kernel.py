"""The compiled part of `timeline.run_timeline`: its docstring says what happens when."""

from __future__ import annotations

import numpy as np

from moesim.caching.kernels import (
    ACTIVATION,
    LOOKAHEAD,
    LRU,
    OPTIMUM,
    STATIC,
    better,
    observe,
    observe_requests,
)
from moesim.kernels import kernel

TIE_S = 1e-9
"""Times closer than this are one instant, so that rounding decides nothing: a prefetch that could
begin at a gate has not begun, and the CPU takes a miss only if that ends the layer sooner."""


@kernel
def admit(e, slots, forced, resident, held, num_held, mark, stamp, prio, last):  # type: ignore[no-untyped-def]
    """Put e into the layer's slots if the policy wants it there; returns the slots in use."""
    if num_held < slots:
        held[num_held] = e
        resident[e] = True
        return num_held + 1
    worst = -1
    if forced:
        for j in range(num_held):
            if mark[held[j]] != stamp and (worst < 0 or better(held[worst], held[j], prio, last)):
                worst = j
    if worst < 0:
        for j in range(num_held):
            if worst < 0 or better(held[worst], held[j], prio, last):
                worst = j
        if worst < 0 or better(held[worst], e, prio, last):
            return num_held
    resident[held[worst]] = False
    held[worst] = e
    resident[e] = True
    return num_held


@kernel
def split_misses(gate, link, busy, miss, count, gpu_s, cpu_s, host, cpu_start, load):  # type: ignore[no-untyped-def]
    """How many of the misses, fewest tokens first, the CPU should take so that the layer ends
    soonest. `busy`: when the GPU is done with what it has."""
    best, best_end = 0, np.inf
    for j in range(len(miss) + 1):
        cpu = gate + cpu_start if j > 0 else gate
        for i in range(j):
            cpu += host[miss[i]] + cpu_s[count[miss[i]]]
        arrive, gpu = max(link, gate), busy
        for i in range(len(miss) - 1, j - 1, -1):
            arrive += load[miss[i]]
            gpu = max(gpu, arrive) + gpu_s[count[miss[i]]]
        end = max(cpu, gpu)
        if end < best_end - TIE_S:
            best, best_end = j, end
    return best


@kernel
def run_kernel(  # type: ignore[no-untyped-def]
    policy,
    indptr,
    item,
    count,
    gate_weight,
    tokens,
    num_experts,
    slots,
    pinned,
    cpu_layers,
    cpu_auto,
    ahead,
    send,
    alpha,
    lookahead,
    order,
    start_prio,
    next_use,
    predicted,
    prior,
    ids,
    token_ptr,
    lane,
    starts,
    num_lanes,
    gate_s,
    gpu_s,
    cpu_s,
    load_s,
    host_s,
    tail_s,
    cpu_start,
):
    num_steps, num_layers = len(tokens), len(slots)
    shape = (num_steps, num_layers)
    hits, staged, fetched = (
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
    )
    on_cpu, wasted, wait = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape)
    step_s = np.zeros(num_steps)
    layers = (num_layers, num_experts)
    resident, held = pinned.copy(), np.full(layers, -1, np.int32)
    num_held = np.zeros(num_layers, np.int64)
    prio, last = start_prio.copy(), np.full(layers, -1 - num_experts, np.int64)
    uses, used = np.zeros(layers), np.zeros(layers, np.int64)
    clock = np.zeros(num_layers, np.int64)
    mark = np.full(layers, -1, np.int64)
    arrival = np.full(layers, np.inf)  # of staged experts; inf: not staged or not started
    queued = np.zeros(layers, np.bool_)
    tokens_of = np.zeros(num_experts, np.int64)
    keep_rows = num_lanes if policy == ACTIVATION else 0
    rows = np.zeros((num_layers, keep_rows, num_experts))
    row_size = np.zeros((num_layers, keep_rows))
    even = np.ones(num_experts)
    for layer in range(num_layers):
        for rank in range(num_experts):
            e = order[layer, rank]
            if e < 0:
                break
            last[layer, e] = -1 - rank
            if policy == LRU:
                prio[layer, e] = -1 - rank
            if not pinned[layer, e] and num_held[layer] < slots[layer]:
                held[layer, num_held[layer]] = e
                num_held[layer] += 1
                resident[layer, e] = True
    if policy == LOOKAHEAD:
        for n in range(min(lookahead, num_steps) * num_layers):
            for i in range(indptr[n], indptr[n + 1]):
                prio[n % num_layers, item[i]] += 1.0
    width = predicted.shape[2]
    room = max(1, send * (ahead + 1))
    wait_layer, wait_expert = np.empty(room, np.int64), np.empty(room, np.int64)
    issued = np.empty(room)
    head, tail = 0, 0
    now, link, link_busy = 0.0, 0.0, 0.0
    miss = np.empty(num_experts, np.int64)
    early = np.empty(num_experts, np.int64)
    for s in range(num_steps):
        begin = now
        for layer in range(num_layers):
            n = s * num_layers + layer
            lo, hi = indptr[n], indptr[n + 1]
            gate = now + gate_s[layer, tokens[s]]
            # Prefetches that the link gets to before the gate.
            while head < tail and max(link, issued[head]) < gate - TIE_S:
                first = max(link, issued[head])
                took = load_s[wait_layer[head], wait_expert[head]]
                link = first + took
                link_busy += took
                arrival[wait_layer[head], wait_expert[head]] = link
                queued[wait_layer[head], wait_expert[head]] = False
                head += 1
            kept = head
            for q in range(head, tail):
                if wait_layer[q] == layer:
                    queued[layer, wait_expert[q]] = False
                else:
                    wait_layer[kept], wait_expert[kept] = wait_layer[q], wait_expert[q]
                    issued[kept] = issued[q]
                    kept += 1
            for q in range(head, kept):
                wait_layer[q - head], wait_expert[q - head] = wait_layer[q], wait_expert[q]
                issued[q - head] = issued[q]
            head, tail = 0, kept - head
            # Who has what.
            busy, num_miss, num_early = gate, 0, 0
            for i in range(lo, hi):
                e = item[i]
                mark[layer, e] = n
                tokens_of[e] = count[i]
                if cpu_layers[layer]:
                    miss[num_miss] = e
                    num_miss += 1
                elif resident[layer, e]:
                    hits[s, layer] += 1
                    busy += gpu_s[count[i]]
                elif arrival[layer, e] < np.inf:
                    early[num_early] = e
                    num_early += 1
                else:
                    miss[num_miss] = e
                    num_miss += 1
            working = busy - gate
            for a in range(num_early):
                b = a
                while b > 0 and arrival[layer, early[b]] < arrival[layer, early[b - 1]]:
                    early[b], early[b - 1] = early[b - 1], early[b]
                    b -= 1
            for a in range(num_early):
                e = early[a]
                busy = max(busy, arrival[layer, e]) + gpu_s[tokens_of[e]]
                working += gpu_s[tokens_of[e]]
            staged[s, layer] = num_early
            for a in range(num_miss):
                b = a
                while b > 0 and tokens_of[miss[b]] < tokens_of[miss[b - 1]]:
                    miss[b], miss[b - 1] = miss[b - 1], miss[b]
                    b -= 1
            cpu_share = 0
            if cpu_layers[layer]:
                cpu_share = num_miss
            elif cpu_auto and num_miss > 0:
                cpu_share = split_misses(
                    gate,
                    link,
                    busy,
                    miss[:num_miss],
                    tokens_of,
                    gpu_s,
                    cpu_s,
                    host_s[layer],
                    cpu_start,
                    load_s[layer],
                )
            cpu_end = gate + cpu_start if cpu_share > 0 else gate
            for a in range(cpu_share):
                cpu_end += host_s[layer, miss[a]] + cpu_s[tokens_of[miss[a]]]
            for a in range(num_miss - 1, cpu_share - 1, -1):
                e = miss[a]
                link = max(link, gate) + load_s[layer, e]
                link_busy += load_s[layer, e]
                busy = max(busy, link) + gpu_s[tokens_of[e]]
                working += gpu_s[tokens_of[e]]
            on_cpu[s, layer] = cpu_share
            fetched[s, layer] = num_miss - cpu_share
            end = max(busy, cpu_end)
            wait[s, layer] = end - gate - working
            # Predictions for a later layer leave now, behind the fetches.
            for target in range(layer, layer + ahead + 1):
                if target >= num_layers or not (
                    target == layer + ahead or (layer == 0 and target > 0)
                ):
                    continue
                sent = 0
                for w in range(width):
                    e = predicted[s, target, w]
                    if sent == send or tail == room or cpu_layers[target]:
                        break
                    if e < 0 or resident[target, e] or queued[target, e]:
                        continue
                    if arrival[target, e] < np.inf:
                        continue
                    wait_layer[tail], wait_expert[tail], issued[tail] = target, e, gate
                    queued[target, e] = True
                    tail += 1
                    sent += 1
            # The policy learns of the event, then of what is now in HBM.
            if policy == ACTIVATION:
                observe_requests(
                    ids[:, layer],
                    token_ptr[s],
                    token_ptr[s + 1],
                    lane,
                    starts,
                    prior[layer],
                    even,
                    rows[layer],
                    row_size[layer],
                    prio[layer],
                )
            if policy != STATIC and hi > lo:
                clock[layer] = observe(
                    policy,
                    s,
                    lo,
                    hi,
                    item,
                    gate_weight,
                    tokens[s],
                    alpha,
                    next_use,
                    prio[layer],
                    last[layer],
                    clock[layer],
                    uses[layer],
                    used[layer],
                )
                forced = policy != OPTIMUM
                for a in range(num_early):
                    num_held[layer] = admit(
                        early[a],
                        slots[layer],
                        forced,
                        resident[layer],
                        held[layer],
                        num_held[layer],
                        mark[layer],
                        n,
                        prio[layer],
                        last[layer],
                    )
                for a in range(num_miss - 1, cpu_share - 1, -1):
                    num_held[layer] = admit(
                        miss[a],
                        slots[layer],
                        forced,
                        resident[layer],
                        held[layer],
                        num_held[layer],
                        mark[layer],
                        n,
                        prio[layer],
                        last[layer],
                    )
            for w in range(width):
                e = predicted[s, layer, w]
                if e >= 0 and arrival[layer, e] < np.inf:
                    if mark[layer, e] != n:
                        wasted[s, layer] += 1
                    arrival[layer, e] = np.inf
            if policy == LOOKAHEAD and s + lookahead < num_steps:
                m = n + lookahead * num_layers
                for i in range(indptr[m], indptr[m + 1]):
                    prio[layer, item[i]] += 1.0
            now = end
        now += tail_s[tokens[s]]
        step_s[s] = now - begin
    return (hits, staged, fetched, on_cpu, wasted), wait, step_s, link_busy
