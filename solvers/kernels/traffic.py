"""Compiled message counts of a placement: one layer, a sample of tuning tokens, exactly.

Tokens are numbered such that those of one batch and home fill whole words of 64 bits (a run). Who
is served where is kept as bits, so that what a swap changes is counted 64 tokens at a time.
`moesim.solvers.kernels.messages` searches on it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.kernels import kernel
from moesim.types import Array


class Tokens(NamedTuple):
    """Sampled choices of one layer, grouped by expert. T counts numbers, those of no token too.

    indptr [E + 1]; token [n] and turn [n]: the i-th choice of an expert in its batch goes to
    replica i mod r. together [E, E] float32: tokens that chose both. Run u, the tokens of batch
    run_batch[u] and home run_home[u], has the words run_words[u] to run_words[u + 1]; run_of:
    [T / 64] the run of each word.
    """

    indptr: Array
    token: Array
    turn: Array
    together: Array
    run_words: Array
    run_home: Array
    run_batch: Array
    run_of: Array


def number_tokens(home: Array, batch: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Number of every token [T], then run_words, run_home, run_batch and run_of of `Tokens`."""
    order = np.lexsort((home, batch))
    home, batch = home[order], batch[order]
    starts = np.ones(len(order), np.bool_)
    starts[1:] = (home[1:] != home[:-1]) | (batch[1:] != batch[:-1])
    first = np.flatnonzero(starts)
    words = -(-np.diff(np.append(first, len(order))) // 64)
    run_words = np.append(0, np.cumsum(words))
    run = np.cumsum(starts) - 1
    number = np.empty(len(order), np.int64)
    number[order] = 64 * run_words[run] + np.arange(len(order)) - first[run]
    run_of = np.repeat(np.arange(len(first)), words)
    return number, run_words, home[first].astype(np.int64), batch[first].astype(np.int64), run_of


@kernel
def group_choices(
    ids: Array, batch: Array, number: Array, num_experts: int
) -> tuple[Array, Array, Array, Array]:
    """indptr, token, turn and together of `Tokens` from the choices ids [T, K], -1 for none, of
    tokens in ascending batches, and their numbers."""
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
            token[filled[e]], turn[filled[e]] = number[t], filled[e] - first[e]
            filled[e] += 1
    return indptr, token, turn, together


class Net(NamedTuple):
    """Routes and what their links cost.

    indptr, link: CSR over pairs s * G + d, the links of a message and, counted on from the number
    of links, those of its way back. group, scale: [links]. time_us: [2, 3, M]. node_of: [G]; dedup:
    0 none, 1 GPU, 2 node. pair_us: [G, G] link time of one message, dispatch and combine together.
    relay: [G, N] GPU that sends a hidden state of one GPU on to those of a node: with deduplication
    per node that of the same rank there, else itself. reach_us: [G, G] link time of the message
    that brings it to another GPU from there; enter_us: [G, N] of the message to the relay.
    use_time: whether the objective is time on the busiest link (1) or summed link time (0).
    """

    indptr: Array
    link: Array
    group: Array
    scale: Array
    time_us: Array
    node_of: Array
    dedup: int
    pair_us: Array
    relay: Array
    reach_us: Array
    enter_us: Array
    use_time: int


class Held(NamedTuple):
    """Choices of each token at each of P places: number [P, T]; bits [P, T / 64] uint64 of the
    tokens with exactly one there (`one`) and with any (`some`)."""

    number: Array
    one: Array
    some: Array


class Flow(NamedTuple):
    """Mutable message state: what GPUs and nodes serve; load: [B, 2 links] int32 messages over each
    link, dispatch and combine; total: [1] summed link time in us."""

    on_gpu: Held
    on_node: Held
    load: Array
    total: Array


@kernel
def set_bits(held: Held) -> None:
    """Bring `one` and `some` in step with `number`."""
    num_places, num_words = held.one.shape
    for p in range(num_places):
        for w in range(num_words):
            one, some = np.uint64(0), np.uint64(0)
            for i in range(64):
                count = held.number[p, 64 * w + i]
                one |= np.uint64(count == 1) << np.uint64(i)
                some |= np.uint64(count > 0) << np.uint64(i)
            held.one[p, w], held.some[p, w] = one, some


@kernel(inline="always")
def add_message(net: Net, flow: Flow, batch: int, src: int, dst: int, number: int) -> None:
    """Add `number` hidden states from src to dst (remove, where negative), and their way back."""
    if number != 0 and src != dst:
        flow.total[0] += number * net.pair_us[src, dst]
        if net.use_time == 1:
            row = src * len(net.node_of) + dst
            for i in range(net.indptr[row], net.indptr[row + 1]):
                flow.load[batch, net.link[i]] += number


@kernel
def message_us(net: Net, flow: Flow) -> float:
    """Mean over sampled batches: time of dispatch and combine, or summed link time.

    Slow links can count for more messages than the table has; it is then continued in line.
    """
    num_batches, num_links = len(flow.load), len(net.group)
    if net.use_time == 0:
        return flow.total[0] / num_batches
    last = net.time_us.shape[2] - 1
    total = 0.0
    for b in range(num_batches):
        for way in range(2):
            load = flow.load[b, way * num_links : (way + 1) * num_links]
            worst = 0.0
            most = np.zeros(3)
            for link in range(num_links):
                g = net.group[link]
                if g >= 0:
                    most[g] = max(most[g], load[link] * net.scale[link])
            for g in range(3):
                count = int(most[g] + 0.5)
                us = net.time_us[way, g, min(last, count)]
                if count > last:
                    us += (count - last) * (us - net.time_us[way, g, last - 1])
                worst = max(worst, us)
            total += worst
    return total / num_batches


@kernel
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


@kernel
def fill_flow(tokens: Tokens, net: Net, flow: Flow, gpus: Array, count: Array) -> None:
    """Set the message state from scratch."""
    num_gpus = len(net.node_of)
    on_gpu, on_node = flow.on_gpu.number, flow.on_node.number
    on_gpu[:] = 0
    on_node[:] = 0
    number = np.zeros((len(flow.load), num_gpus, num_gpus), np.int32)
    for e in range(len(count)):
        for i in range(tokens.indptr[e], tokens.indptr[e + 1]):
            t = tokens.token[i]
            gpu = gpus[e, tokens.turn[i] % count[e]]
            run, node = tokens.run_of[t >> 6], net.node_of[gpu]
            home, batch = tokens.run_home[run], tokens.run_batch[run]
            if net.dedup == 0:
                number[batch, home, gpu] += 1
            elif on_gpu[gpu, t] == 0:
                relay = net.relay[home, node]
                number[batch, relay, gpu] += 1
                if on_node[node, t] == 0:
                    number[batch, home, relay] += 1
            on_gpu[gpu, t] += 1
            on_node[node, t] += 1
    set_bits(flow.on_gpu)
    set_bits(flow.on_node)
    flow.load[:] = 0
    flow.total[0] = 0.0
    for batch in range(len(number)):
        for src in range(num_gpus):
            for dst in range(num_gpus):
                add_message(net, flow, batch, src, dst, number[batch, src, dst])
