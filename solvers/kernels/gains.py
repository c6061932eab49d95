"""What moving one replica saves and costs in messages, counted on its tokens: one layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.kernels.traffic import (
    Flow,
    Held,
    Net,
    Tokens,
    add_message,
    fill_flow,
    replica_gpus,
)
from moesim.types import Array


class Serving(NamedTuple):
    """Which replica serves which of the sampled tokens.

    Replica r of expert e is row first[e] + r. place: [R] its GPU, which changes; bits: [R, T / 64]
    uint64 the tokens that it serves, and number [R] how many, which do not.
    """

    first: Array
    place: Array
    bits: Array
    number: Array


class Messages(NamedTuple):
    """Messages of a placement under search. trial: the state after a swap that is only tried; it
    shares the bits of `flow`."""

    tokens: Tokens
    net: Net
    flow: Flow
    trial: Flow
    serving: Serving


@kernel
def make_serving(tokens: Tokens, gpus: Array, count: Array) -> Serving:
    """Serving of a placement (see `traffic.replica_gpus`)."""
    num_experts = len(count)
    first = np.zeros(num_experts + 1, np.int64)
    first[1:] = np.cumsum(count)
    num_rows = first[num_experts]
    place, number = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
    bits = np.zeros((num_rows, len(tokens.run_of)), np.uint64)
    for e in range(num_experts):
        place[first[e] : first[e + 1]] = gpus[e, : count[e]]
        for i in range(tokens.indptr[e], tokens.indptr[e + 1]):
            row, t = first[e] + tokens.turn[i] % count[e], tokens.token[i]
            bits[row, t >> 6] |= np.uint64(1) << np.uint64(t & 63)
            number[row] += 1
    return Serving(first, place, bits, number)


@kernel(inline="always")
def ones(word: Any) -> Any:
    """Bits set in a uint64 (H. S. Warren, Hacker's Delight, 5-1)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    word = (word & pairs) + ((word >> np.uint64(2)) & pairs)
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel
def make_messages(tokens: Tokens, net: Net, flow: Flow, slots: Array, capacity: Array) -> Messages:
    """Messages of `slots` [G, S], for which `flow` is filled."""
    gpus, count = replica_gpus(slots, capacity, len(tokens.indptr) - 1)
    fill_flow(tokens, net, flow, gpus, count)
    trial = Flow(flow.on_gpu, flow.on_node, flow.load.copy(), flow.total.copy())
    return Messages(tokens, net, flow, trial, make_serving(tokens, gpus, count))


@kernel(allocates=False)
def move_us(messages: Messages, row: int, dst: int) -> tuple[float, float]:
    """(change of the summed link time when one replica moves to `dst` and nothing else does, link
    time a token that its place alone accounts for: what the move does not save for tokens that
    also chose the expert that comes in)."""
    tokens, net, flow, serving = messages.tokens, messages.net, messages.flow, messages.serving
    src = serving.place[row]
    from_node, to_node = net.node_of[src], net.node_of[dst]
    across = net.dedup == 2 and from_node != to_node
    served = serving.bits[row]
    on_src, on_dst = flow.on_gpu.one[src], flow.on_gpu.some[dst]
    near_src, near_dst = flow.on_node.one[from_node], flow.on_node.some[to_node]
    less, more = 0.0, 0.0
    for u in range(len(tokens.run_home)):
        left, came, left_node, came_node = 0, 0, 0, 0
        for w in range(tokens.run_words[u], tokens.run_words[u + 1]):
            if net.dedup == 0:
                left += ones(served[w])
                continue
            left += ones(served[w] & on_src[w])
            came += ones(served[w] & ~on_dst[w])
            if across:
                left_node += ones(served[w] & near_src[w])
                came_node += ones(served[w] & ~near_dst[w])
        if net.dedup == 0:
            came = left
        home = tokens.run_home[u]
        less += left * net.reach_us[home, src] + left_node * net.enter_us[home, from_node]
        more += came * net.reach_us[home, dst] + came_node * net.enter_us[home, to_node]
    return more - less, less / max(1, serving.number[row])


@kernel
def try_swap(messages: Messages, row1: int, g1: int, row2: int, g2: int) -> None:
    """Set `trial` to the messages after the replicas `row1` on g1 and `row2` on g2 (-1 for an empty
    slot) change places. Tokens that chose both are served as before."""
    flow, trial = messages.flow, messages.trial
    trial.load[:] = flow.load
    trial.total[0] = flow.total[0]
    move_messages(messages, row1, g1, g2, row2)
    move_messages(messages, row2, g2, g1, row1)


@kernel
def move_messages(messages: Messages, row: int, src: int, dst: int, other: int) -> None:
    """Move what `row` is sent from `src` to `dst` in `trial`, but for tokens of the row `other`."""
    if row < 0:
        return
    tokens, net, flow, serving = messages.tokens, messages.net, messages.flow, messages.serving
    trial, num_gpus = messages.trial, len(net.node_of)
    from_node, to_node = net.node_of[src], net.node_of[dst]
    across = net.dedup == 2 and from_node != to_node
    served = serving.bits[row]
    both = serving.bits[max(other, 0)]
    on_src, on_dst = flow.on_gpu.one[src], flow.on_gpu.some[dst]
    near_src, near_dst = flow.on_node.one[from_node], flow.on_node.some[to_node]
    # Messages by the GPU that sends them: to src and dst, and to their relays.
    left, came = np.zeros(num_gpus, np.int64), np.zeros(num_gpus, np.int64)
    left_node, came_node = np.zeros(num_gpus, np.int64), np.zeros(num_gpus, np.int64)
    num_runs = len(tokens.run_home)
    for u in range(num_runs):
        home, batch = tokens.run_home[u], tokens.run_batch[u]
        from_relay, to_relay = net.relay[home, from_node], net.relay[home, to_node]
        for w in range(tokens.run_words[u], tokens.run_words[u + 1]):
            if net.dedup == 0:
                left[home] += ones(served[w])
                continue
            moving = served[w] if other < 0 else served[w] & ~both[w]
            left[from_relay] += ones(moving & on_src[w])
            came[to_relay] += ones(moving & ~on_dst[w])
            if across:
                left_node[home] += ones(moving & near_src[w])
                came_node[home] += ones(moving & ~near_dst[w])
        if u + 1 < num_runs and tokens.run_batch[u + 1] == batch:
            continue
        for g in range(num_gpus):
            add_message(net, trial, batch, g, src, -left[g])
            add_message(net, trial, batch, g, dst, left[g] if net.dedup == 0 else came[g])
            if across:
                add_message(net, trial, batch, g, net.relay[g, from_node], -left_node[g])
                add_message(net, trial, batch, g, net.relay[g, to_node], came_node[g])
        left[:] = 0
        came[:] = 0
        left_node[:] = 0
        came_node[:] = 0


@kernel
def move_rows(messages: Messages, row1: int, g1: int, row2: int, g2: int) -> None:
    """Make the swap that `try_swap` last tried."""
    messages.flow.load[:] = messages.trial.load
    messages.flow.total[0] = messages.trial.total[0]
    move_row(messages, row1, g1, g2)
    move_row(messages, row2, g2, g1)


@kernel
def move_row(messages: Messages, row: int, src: int, dst: int) -> None:
    """Serve one replica's tokens on another GPU; nothing for -1. Messages stay as they are."""
    if row < 0:
        return
    net, flow, serving = messages.net, messages.flow, messages.serving
    serving.place[row] = dst
    from_node, to_node = net.node_of[src], net.node_of[dst]
    add_bits(flow.on_gpu, src, serving.bits[row], -1)
    add_bits(flow.on_gpu, dst, serving.bits[row], 1)
    if from_node != to_node:
        add_bits(flow.on_node, from_node, serving.bits[row], -1)
        add_bits(flow.on_node, to_node, serving.bits[row], 1)


@kernel
def add_bits(held: Held, place: int, bits: Array, number: int) -> None:
    """`number` more choices, at a place, of every token in `bits`."""
    count = held.number[place]
    for w in range(len(bits)):
        word, one, some = bits[w], held.one[place, w], held.some[place, w]
        while word != 0:
            rest = word & (word - np.uint64(1))
            bit = word ^ rest
            t = 64 * w + ones(bit - np.uint64(1))
            word = rest
            count[t] += number
            one = one | bit if count[t] == 1 else one & ~bit
            some = some | bit if count[t] > 0 else some & ~bit
        held.one[place, w], held.some[place, w] = one, some


@kernel
def replicas(serving: Serving, expert: int) -> int:
    """Replicas of an expert."""
    return int(serving.first[expert + 1] - serving.first[expert])


@kernel
def replica_row(serving: Serving, expert: int, gpu: int) -> int:
    """Row of the replica of `expert` on `gpu`; -1 for the empty slot."""
    if expert >= len(serving.first) - 1:
        return -1
    for r in range(serving.first[expert], serving.first[expert + 1]):
        if serving.place[r] == gpu:
            return int(r)
    return -1
