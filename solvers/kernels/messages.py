"""Compiled local search on load and messages together: one layer.

Candidates of a pair of GPUs are screened by their load (see `search_pairs`) and by what they save
in messages by themselves (see `search_gains`); the few best are tried exactly.
"""

from __future__ import annotations

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.kernels.gains import (
    Serving,
    make_serving,
    move_rows,
    move_us,
    replica_row,
    replicas,
    try_swap,
)
from moesim.solvers.kernels.load import MARGIN, apply_swap, kick, mean_max, rebuild
from moesim.solvers.kernels.pairs import (
    Peaks,
    Scratch,
    gather_pair,
    make_peaks,
    make_scratch,
    mark_rest,
    rank_peaks,
    rest_delta,
    swap_delta,
)
from moesim.solvers.kernels.traffic import (
    Flow,
    Net,
    Tokens,
    fill_flow,
    message_us,
    objective,
    replica_gpus,
)
from moesim.types import Array

TRIES_PER_PAIR = 2
KICK_SWAPS = 4
MAX_PASSES = 30
STEP = 1e-5
"""Least relative gain of a swap that is made; smaller ones take long to add up to anything."""


@kernel
def pair_pass(
    tokens: Tokens,
    net: Net,
    flow: Flow,
    trial: Flow,
    serving: Serving,
    work: Array,
    load: Array,
    peaks: Peaks,
    slots: Array,
    capacity: Array,
    unit: Array,
    holds: Array,
    ceiling: float,
    weight: float,
    changed: Array,
    scanned: Array,
    clock: int,
    scratch: Scratch,
    grains: float,
) -> int:
    """One round over all pairs of GPUs; returns the advanced clock."""
    num_gpus = load.shape[0]
    unit_grains = grains * load.shape[1]
    empty = work.shape[1] - 1
    score = np.empty(TRIES_PER_PAIR)
    pick = np.empty((TRIES_PER_PAIR, 2), np.int64)
    value = np.empty(TRIES_PER_PAIR)
    pair = np.empty(2, np.int64)
    row1 = np.empty(slots.shape[1], np.int64)
    row2 = np.empty(slots.shape[1], np.int64)
    moved2 = np.empty(slots.shape[1])
    shared2 = np.empty(slots.shape[1])
    count2 = np.empty(slots.shape[1])
    load_sum = peaks.value[0].sum()
    messages_now = message_us(net, flow)
    for g1 in range(num_gpus):
        for g2 in range(g1 + 1, num_gpus):
            if scanned[g1, g2] > max(changed[g1], changed[g2]):
                continue
            clock += 1
            scanned[g1, g2] = clock
            now = objective(load_sum / unit_grains, messages_now, ceiling, weight)
            per_us = messages_now / max(flow.total[0], 1e-12)
            u1, u2 = unit[g1], unit[g2]
            for s in range(capacity[g1]):
                row1[s] = replica_row(serving, slots[g1, s], g1)
            for s in range(capacity[g2]):
                row2[s] = replica_row(serving, slots[g2, s], g2)
                moved2[s], shared2[s], count2[s] = 0.0, 0.0, 1.0
                if row2[s] >= 0:
                    moved2[s], shared2[s] = move_us(tokens, net, flow, serving, row2[s], g1)
                    count2[s] = replicas(serving, slots[g2, s])
            hot = gather_pair(work, load, peaks, slots, capacity, unit, g1, g2, scratch)
            mark_rest(peaks, g1, g2, scratch.rest)
            least = (scratch.hot_others[:hot] - scratch.hot_most[:hot]).sum()
            score[:] = now * (1 - STEP)
            pick[:] = -1
            for s1 in range(capacity[g1]):
                e1, r1 = slots[g1, s1], row1[s1]
                if e1 != empty and holds[g2, e1]:
                    continue
                us1, shared1, count1 = 0.0, 0.0, 1.0
                if e1 < empty:
                    us1, shared1 = move_us(tokens, net, flow, serving, r1, g2)
                    count1 = replicas(serving, e1)
                for s2 in range(capacity[g2]):
                    e2 = slots[g2, s2]
                    if e1 == e2 or (e2 != empty and holds[g1, e2]):
                        continue
                    us = us1 + moved2[s2]
                    if e1 < empty and e2 < empty and net.dedup > 0:
                        both = tokens.together[e1, e2] / (count1 * count2[s2])
                        us += both * (shared1 + shared2[s2])
                    messages = messages_now + per_us * us
                    worst = np.argmax(score)
                    floor = objective((load_sum + least) / unit_grains, messages, ceiling, weight)
                    if floor >= score[worst]:
                        continue
                    delta = swap_delta(
                        scratch.hot_others[:hot],
                        scratch.hot_most[:hot],
                        scratch.hot_base1[s1, :hot],
                        scratch.hot_more1[s2, :hot],
                        scratch.hot_base2[s2, :hot],
                        scratch.hot_more2[s1, :hot],
                    )
                    after = (load_sum + delta) / unit_grains
                    if objective(after, messages, ceiling, weight) >= score[worst]:
                        continue
                    delta = rest_delta(
                        scratch.rest,
                        load[g1],
                        work[u1, e1],
                        work[u1, e2],
                        load[g2],
                        work[u2, e2],
                        work[u2, e1],
                        delta,
                        (score[worst] - messages) * unit_grains - load_sum
                        if ceiling == 0.0
                        else np.inf,
                    )
                    after = (load_sum + delta) / unit_grains
                    estimate = objective(after, messages, ceiling, weight)
                    if estimate < score[worst]:
                        score[worst] = estimate
                        pick[worst, 0], pick[worst, 1] = s1, s2
                        value[worst] = after
            best, best_i = now * (1 - STEP), -1
            for i in range(TRIES_PER_PAIR):
                if pick[i, 0] < 0:
                    continue
                r1, r2 = row1[pick[i, 0]], row2[pick[i, 1]]
                try_swap(tokens, net, flow, trial, serving, r1, g1, r2, g2)
                exact = objective(value[i], message_us(net, trial), ceiling, weight)
                if exact < best:
                    best, best_i = exact, i
            if best_i >= 0:
                s1, s2 = pick[best_i]
                try_swap(tokens, net, flow, trial, serving, row1[s1], g1, row2[s2], g2)
                move_rows(net, flow, trial, serving, row1[s1], g1, row2[s2], g2)
                apply_swap(work, load, slots, unit, holds, g1, s1, g2, s2)
                pair[0], pair[1] = g1, g2
                load_sum = rank_peaks(load, peaks, pair)
                messages_now = message_us(net, flow)
                clock += 1
                changed[g1] = clock
                changed[g2] = clock
    return clock


@kernel
def search_messages(
    tokens: Tokens,
    net: Net,
    flow: Flow,
    work: Array,
    slots: Array,
    capacity: Array,
    unit: Array,
    ceiling: float,
    weight: float,
    num_kicks: int,
    seed: int,
    grains: float,
) -> float:
    """Iterated local search over swaps; improves `slots` [G, S] in place, returns the objective.

    work: [U, E + 1, B] int32, of which `grains` are a unit of cost (see search_load); the numbers
    of replicas do not change.
    ceiling, weight: objective traffic's limit on the mean largest load, and what a unit above it
    costs; ceiling 0 for objective time. A kick is `KICK_SWAPS` random swaps, kept with what was
    descended to from there if that is better; only pairs with a GPU that it changed are looked at.
    """
    np.random.seed(seed)
    num_gpus, num_experts = len(capacity), work.shape[1] - 1
    num_batches = work.shape[2]
    load = np.zeros((num_gpus, num_batches), np.int32)
    holds = np.zeros((num_gpus, num_experts + 1), np.bool_)
    every = np.arange(num_gpus)
    peaks = make_peaks(num_gpus, num_batches)
    scratch = make_scratch(slots.shape[1], num_batches)
    trial = Flow(flow.on_gpu, flow.on_node, flow.load.copy(), flow.total.copy())
    best_value = np.inf
    best_slots = slots.copy()
    changed = np.zeros(num_gpus, np.int64)
    scanned = np.full((num_gpus, num_gpus), -1, np.int64)
    for attempt in range(num_kicks + 1):
        holds[:] = False
        for g in range(num_gpus):
            for s in range(capacity[g]):
                holds[g, slots[g, s]] = True
        rebuild(work, slots, capacity, unit, load)
        changed[:] = 0
        clock = 1
        if attempt > 0:
            changed[kick(work, load, slots, capacity, unit, holds, KICK_SWAPS)] = clock
        rank_peaks(load, peaks, every)
        gpus, count = replica_gpus(slots, capacity, num_experts)
        fill_flow(tokens, net, flow, gpus, count)
        serving = make_serving(tokens, gpus, count)
        for _ in range(MAX_PASSES):
            before = clock
            clock = pair_pass(
                tokens,
                net,
                flow,
                trial,
                serving,
                work,
                load,
                peaks,
                slots,
                capacity,
                unit,
                holds,
                ceiling,
                weight,
                changed,
                scanned,
                clock,
                scratch,
                grains,
            )
            if changed.max() <= before:
                break
        rebuild(work, slots, capacity, unit, load)
        value = objective(mean_max(load) / grains, message_us(net, flow), ceiling, weight)
        if value < best_value * (1 - MARGIN):
            best_value = value
            best_slots[:] = slots
        else:
            slots[:] = best_slots
        scanned[:] = 1
    slots[:] = best_slots
    return float(best_value)
