"""Compiled message counts of a placement: one layer, a sample of tuning tokens, exactly.

Every token's set of GPUs is kept, and a swap changes the link loads of just the tokens that chose
one of the two experts. `moesim.solvers.search_messages` searches on it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]


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


@njit(cache=True, nogil=True)
def group_choices(ids: Array, batch: Array, num_experts: int) -> tuple[Array, Array, Array, Array]:
    """indptr, token, turn and together of `Tokens` from the choices ids [T, K], -1 for none, of
    tokens in ascending batches."""
    num_tokens, top_k = ids.shape
    indptr = np.zeros(num_experts + 1, np.int64)
    together = np.zeros((num_experts, num_experts), np.float32)
    for t in range(num_tokens):
        for j in range(top_k):
            e = ids[t, j]
            if e < 0:
                continue
            indptr[e + 1] += 1
            for i in range(top_k):
                if ids[t, i] >= 0:
                    together[e, ids[t, i]] += 1
    indptr[:] = np.cumsum(indptr)
    token, turn = np.empty(indptr[-1], np.int64), np.empty(indptr[-1], np.int64)
    filled, first = indptr[:-1].copy(), indptr[:-1].copy()
    last = np.full(num_experts, -1, np.int64)
    for t in range(num_tokens):
        for j in range(top_k):
            e = ids[t, j]
            if e < 0:
                continue
            if last[e] != batch[t]:
                last[e], first[e] = batch[t], filled[e]
            token[filled[e]], turn[filled[e]] = t, filled[e] - first[e]
            filled[e] += 1
    return indptr, token, turn, together


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
def add_message(net: Net, flow: Flow, batch: int, src: int, dst: int, number: int) -> None:
    """Add `number` hidden states from src to dst (remove, where negative), and their way back."""
    if src == dst:
        return
    num_gpus = len(net.node_of)
    flow.total[0] += number * net.pair_us[src, dst]
    if net.use_time == 0:
        return
    row = src * num_gpus + dst
    for i in range(net.route_indptr[row], net.route_indptr[row + 1]):
        flow.out[batch, net.route_links[i]] += number
    row = dst * num_gpus + src
    for i in range(net.route_indptr[row], net.route_indptr[row + 1]):
        flow.back[batch, net.route_links[i]] += number


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
def objective(load_value: float, messages: float, ceiling: float, weight: float) -> float:
    """Time: load plus messages. Traffic (ceiling > 0): messages, and load above the ceiling."""
    if ceiling > 0:
        return messages + weight * max(0.0, load_value - ceiling)
    return load_value + messages
