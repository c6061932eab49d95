"""Compiled local search on load and messages together: one layer.

Load is judged on all tuning batches (see search_load), messages on a sample of tuning tokens,
exactly: every token's set of GPUs is kept, and a swap changes the link loads of just the tokens
that chose one of the two experts. Candidates are screened by load and co-activation, and the few
best of a pair of GPUs are tried, evaluated and undone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from moesim.solvers.search_load import (
    MARGIN,
    apply_swap,
    kick,
    mean_max,
    others_max,
    rebuild,
    swap_value,
)

Array = npt.NDArray[Any]
TRIES_PER_PAIR = 2
MAX_PASSES = 30


class Tokens(NamedTuple):
    """Sampled choices of one layer, grouped by expert.

    indptr [E + 1]; token [n] and turn [n]: the i-th choice of an expert in its batch goes to
    replica i mod r. home [T], batch [T]. together [E, E] float32: tokens that chose both.
    """

    indptr: Array
    token: Array
    turn: Array
    home: Array
    batch: Array
    together: Array


class Net(NamedTuple):
    """Routes and what their links cost.

    route_indptr, route_links: CSR over pairs s * G + d. group, scale: [links]. time_us: [2, 3, M].
    node_of: [G]; per_node: GPUs a node; dedup: 0 none, 1 GPU, 2 node. pair_us: [G, G] link time
    of one message, dispatch and combine together. use_time: whether the objective is time on
    the busiest link (1) or summed link time (0).
    """

    route_indptr: Array
    route_links: Array
    group: Array
    scale: Array
    time_us: Array
    node_of: Array
    per_node: int
    dedup: int
    pair_us: Array
    use_time: int


class Flow(NamedTuple):
    """Mutable message state: on_gpu [T, G], on_node [T, N] uint16 counts of a token's choices;
    out, back: [B, links] int32 messages over each link; total: [1] summed link time in us."""

    on_gpu: Array
    on_node: Array
    out: Array
    back: Array
    total: Array


@njit(cache=True, nogil=True)
def add_message(net: Net, flow: Flow, batch: int, src: int, dst: int, sign: int) -> None:
    """Add (sign 1) or remove (-1) one hidden state from src to dst, and its way back."""
    if src == dst:
        return
    num_gpus = len(net.node_of)
    flow.total[0] += sign * net.pair_us[src, dst]
    if net.use_time == 0:
        return
    row = src * num_gpus + dst
    for i in range(net.route_indptr[row], net.route_indptr[row + 1]):
        flow.out[batch, net.route_links[i]] += sign
    row = dst * num_gpus + src
    for i in range(net.route_indptr[row], net.route_indptr[row + 1]):
        flow.back[batch, net.route_links[i]] += sign


@njit(cache=True, nogil=True)
def add_choice(net: Net, flow: Flow, token: int, home: int, batch: int, gpu: int) -> None:
    """One more choice of `token` is served on `gpu`."""
    node = net.node_of[gpu]
    if net.dedup == 0:
        add_message(net, flow, batch, home, gpu, 1)
    elif flow.on_gpu[token, gpu] == 0:
        if net.dedup == 1 or node == net.node_of[home]:
            add_message(net, flow, batch, home, gpu, 1)
        else:
            relay = node * net.per_node + home % net.per_node
            add_message(net, flow, batch, relay, gpu, 1)
            if flow.on_node[token, node] == 0:
                add_message(net, flow, batch, home, relay, 1)
    flow.on_gpu[token, gpu] += 1
    flow.on_node[token, node] += 1


@njit(cache=True, nogil=True)
def drop_choice(net: Net, flow: Flow, token: int, home: int, batch: int, gpu: int) -> None:
    """One choice less of `token` is served on `gpu`."""
    node = net.node_of[gpu]
    flow.on_gpu[token, gpu] -= 1
    flow.on_node[token, node] -= 1
    if net.dedup == 0:
        add_message(net, flow, batch, home, gpu, -1)
    elif flow.on_gpu[token, gpu] == 0:
        if net.dedup == 1 or node == net.node_of[home]:
            add_message(net, flow, batch, home, gpu, -1)
        else:
            relay = node * net.per_node + home % net.per_node
            add_message(net, flow, batch, relay, gpu, -1)
            if flow.on_node[token, node] == 0:
                add_message(net, flow, batch, home, relay, -1)


@njit(cache=True, nogil=True)
def move_replica(
    tokens: Tokens, net: Net, flow: Flow, expert: int, replica: int, count: int, src: int, dst: int
) -> None:
    """Serve the choices of one replica of `expert` on GPU `dst` instead of `src`."""
    for i in range(tokens.indptr[expert], tokens.indptr[expert + 1]):
        if count == 1 or tokens.turn[i] % count == replica:
            t = tokens.token[i]
            drop_choice(net, flow, t, tokens.home[t], tokens.batch[t], src)
            add_choice(net, flow, t, tokens.home[t], tokens.batch[t], dst)


@njit(cache=True, nogil=True)
def message_us(net: Net, flow: Flow) -> float:
    """Mean over sampled batches: time of dispatch and combine, or summed link time.

    Slow links can count for more messages than the table has; it is then continued in line.
    """
    num_batches = flow.out.shape[0]
    if net.use_time == 0:
        return flow.total[0] / num_batches
    last = net.time_us.shape[2] - 1
    total = 0.0
    for b in range(num_batches):
        for way in range(2):
            load = flow.out if way == 0 else flow.back
            worst = 0.0
            most = np.zeros(3)
            for link in range(len(net.group)):
                g = net.group[link]
                if g >= 0:
                    most[g] = max(most[g], load[b, link] * net.scale[link])
            for g in range(3):
                count = int(most[g] + 0.5)
                us = net.time_us[way, g, min(last, count)]
                if count > last:
                    us += (count - last) * (us - net.time_us[way, g, last - 1])
                worst = max(worst, us)
            total += worst
    return total / num_batches


@njit(cache=True, nogil=True)
def replica_gpus(slots: Array, capacity: Array, num_experts: int) -> tuple[Array, Array]:
    """GPUs of each expert's replicas [E, G] in order, and how many there are [E]."""
    num_gpus = len(capacity)
    gpus = np.full((num_experts, num_gpus), -1, np.int64)
    count = np.zeros(num_experts, np.int64)
    for g in range(num_gpus):
        for s in range(capacity[g]):
            e = slots[g, s]
            if e < num_experts:
                gpus[e, count[e]] = g
                count[e] += 1
    return gpus, count


@njit(cache=True, nogil=True)
def fill_flow(tokens: Tokens, net: Net, flow: Flow, gpus: Array, count: Array) -> None:
    """Set the message state from scratch."""
    flow.on_gpu[:] = 0
    flow.on_node[:] = 0
    flow.out[:] = 0
    flow.back[:] = 0
    flow.total[0] = 0.0
    for e in range(len(count)):
        for i in range(tokens.indptr[e], tokens.indptr[e + 1]):
            t = tokens.token[i]
            gpu = gpus[e, tokens.turn[i] % count[e]]
            add_choice(net, flow, t, tokens.home[t], tokens.batch[t], gpu)


@njit(cache=True, nogil=True)
def replica_at(gpus: Array, count: Array, expert: int, gpu: int) -> int:
    """Which replica of `expert` sits on `gpu`."""
    for r in range(count[expert]):
        if gpus[expert, r] == gpu:
            return r
    return -1


@njit(cache=True, nogil=True)
def swap_messages(
    tokens: Tokens,
    net: Net,
    flow: Flow,
    gpus: Array,
    count: Array,
    e1: int,
    g1: int,
    e2: int,
    g2: int,
) -> None:
    """Exchange the replica of e1 on g1 with that of e2 on g2 (either may be the empty slot)."""
    num_experts = len(count)
    if e1 < num_experts:
        r = replica_at(gpus, count, e1, g1)
        move_replica(tokens, net, flow, e1, r, count[e1], g1, g2)
        gpus[e1, r] = g2
    if e2 < num_experts:
        r = replica_at(gpus, count, e2, g2)
        move_replica(tokens, net, flow, e2, r, count[e2], g2, g1)
        gpus[e2, r] = g1


@njit(cache=True, nogil=True)
def affinity(tokens: Tokens, slots: Array, capacity: Array, expert: int, gpu: int) -> float:
    """Sampled tokens that `expert` shares with the other experts of `gpu`."""
    total = 0.0
    num_experts = tokens.together.shape[0]
    if expert >= num_experts:
        return 0.0
    for s in range(capacity[gpu]):
        other = slots[gpu, s]
        if other < num_experts and other != expert:
            total += tokens.together[expert, other]
    return total


@njit(cache=True, nogil=True)
def objective(load_value: float, messages: float, ceiling: float, weight: float) -> float:
    """Time: load plus messages. Traffic (ceiling > 0): messages, and load above the ceiling."""
    if ceiling > 0:
        return messages + weight * max(0.0, load_value - ceiling)
    return load_value + messages


@njit(cache=True, nogil=True)
def pair_pass(
    tokens: Tokens,
    net: Net,
    flow: Flow,
    work: Array,
    load: Array,
    slots: Array,
    capacity: Array,
    unit: Array,
    holds: Array,
    gpus: Array,
    count: Array,
    ceiling: float,
    weight: float,
    per_message: float,
    changed: Array,
    scanned: Array,
    clock: int,
) -> int:
    """One round over all pairs of GPUs; returns the advanced clock."""
    num_gpus, num_batches = load.shape
    empty = work.shape[1] - 1
    others = np.empty(num_batches, np.float32)
    score = np.empty(TRIES_PER_PAIR)
    pick = np.empty((TRIES_PER_PAIR, 2), np.int64)
    value = np.empty(TRIES_PER_PAIR)
    for g1 in range(num_gpus):
        for g2 in range(g1 + 1, num_gpus):
            if scanned[g1, g2] > max(changed[g1], changed[g2]):
                continue
            others_max(load, g1, g2, others)
            u1, u2 = unit[g1], unit[g2]
            zero = work[u1, empty]
            load_now = swap_value(others, load[g1], load[g2], zero, zero, zero, zero) / num_batches
            messages_now = message_us(net, flow)
            now = objective(load_now, messages_now, ceiling, weight)
            score[:] = np.inf
            for s1 in range(capacity[g1]):
                e1 = slots[g1, s1]
                if e1 != empty and holds[g2, e1]:
                    continue
                stay1 = affinity(tokens, slots, capacity, e1, g1)
                go1 = affinity(tokens, slots, capacity, e1, g2)
                for s2 in range(capacity[g2]):
                    e2 = slots[g2, s2]
                    if e1 == e2 or (e2 != empty and holds[g1, e2]):
                        continue
                    after = (
                        swap_value(
                            others,
                            load[g1],
                            load[g2],
                            work[u1, e1],
                            work[u1, e2],
                            work[u2, e2],
                            work[u2, e1],
                        )
                        / num_batches
                    )
                    gain = go1 - stay1
                    gain += affinity(tokens, slots, capacity, e2, g1)
                    gain -= affinity(tokens, slots, capacity, e2, g2)
                    if e1 < empty and e2 < empty:
                        gain -= 2 * tokens.together[e1, e2]
                    estimate = objective(after, messages_now - per_message * gain, ceiling, weight)
                    worst = np.argmax(score)
                    if estimate < score[worst]:
                        score[worst] = estimate
                        pick[worst, 0], pick[worst, 1] = s1, s2
                        value[worst] = after
            clock += 1
            scanned[g1, g2] = clock
            best, best_i = now * (1 - MARGIN), -1
            for i in range(TRIES_PER_PAIR):
                if not np.isfinite(score[i]):
                    continue
                e1, e2 = slots[g1, pick[i, 0]], slots[g2, pick[i, 1]]
                swap_messages(tokens, net, flow, gpus, count, e1, g1, e2, g2)
                exact = objective(value[i], message_us(net, flow), ceiling, weight)
                swap_messages(tokens, net, flow, gpus, count, e2, g1, e1, g2)
                if exact < best:
                    best, best_i = exact, i
            if best_i >= 0:
                s1, s2 = pick[best_i]
                swap_messages(tokens, net, flow, gpus, count, slots[g1, s1], g1, slots[g2, s2], g2)
                apply_swap(work, load, slots, unit, holds, g1, s1, g2, s2)
                clock += 1
                changed[g1] = clock
                changed[g2] = clock
    return clock


@njit(cache=True, nogil=True)
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
) -> float:
    """Iterated local search over swaps; improves `slots` [G, S] in place, returns the objective.

    work: [U, E + 1, B] float32 (see search_load); the numbers of replicas do not change.
    ceiling, weight: objective traffic's limit on the mean largest load, and what a unit above it
    costs; ceiling 0 for objective time.
    """
    np.random.seed(seed)
    num_gpus, num_experts = len(capacity), work.shape[1] - 1
    num_batches = work.shape[2]
    load = np.zeros((num_gpus, num_batches), np.float32)
    holds = np.zeros((num_gpus, num_experts + 1), np.bool_)
    best_value = np.inf
    best_slots = slots.copy()
    for attempt in range(num_kicks + 1):
        holds[:] = False
        for g in range(num_gpus):
            for s in range(capacity[g]):
                holds[g, slots[g, s]] = True
        rebuild(work, slots, capacity, unit, load)
        if attempt > 0:
            kick(work, load, slots, capacity, unit, holds)
        gpus, count = replica_gpus(slots, capacity, num_experts)
        fill_flow(tokens, net, flow, gpus, count)
        num_choices = max(1, len(tokens.token))
        per_message = message_us(net, flow) / num_choices
        changed = np.zeros(num_gpus, np.int64)
        scanned = np.full((num_gpus, num_gpus), -1, np.int64)
        clock = 0
        for _ in range(MAX_PASSES):
            before = clock
            clock = pair_pass(
                tokens,
                net,
                flow,
                work,
                load,
                slots,
                capacity,
                unit,
                holds,
                gpus,
                count,
                ceiling,
                weight,
                per_message,
                changed,
                scanned,
                clock,
            )
            if clock == before or changed.max() <= before:
                break
        rebuild(work, slots, capacity, unit, load)
        value = objective(mean_max(load), message_us(net, flow), ceiling, weight)
        if value < best_value * (1 - MARGIN):
            best_value = value
            best_slots[:] = slots
        else:
            slots[:] = best_slots
    slots[:] = best_slots
    return best_value
