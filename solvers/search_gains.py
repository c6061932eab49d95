"""What moving one replica saves and costs in messages, kept up to date swap by swap: one layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from moesim.solvers.search_traffic import Flow, Net, Tokens, add_message

Array = npt.NDArray[Any]


class Gains(NamedTuple):
    """What moving one replica saves and costs in link time, summed over the sampled tokens.

    Replica r of expert e is row first[e] + r. place: [R] its GPU.
    add_gpu: [G, R], add_node: [N, R] link time of messages that it would add on a GPU, on a node;
    drop_gpu, drop_node: [R] of those that nothing else needs where it is. Nodes count only for
    deduplication per node. token_indptr [T + 1], token_row: replicas that serve each token's
    choices; row_indptr [R + 1], row_token: tokens that each replica serves.
    """

    first: Array
    place: Array
    add_gpu: Array
    add_node: Array
    drop_gpu: Array
    drop_node: Array
    token_indptr: Array
    token_row: Array
    row_indptr: Array
    row_token: Array


@njit(cache=True, nogil=True)
def make_gains(tokens: Tokens, net: Net, flow: Flow, gpus: Array, count: Array) -> Gains:
    """Gains of a placement from scratch; `flow` holds its messages."""
    num_experts, num_gpus = len(count), len(net.node_of)
    num_tokens, num_nodes = flow.on_node.shape
    first = np.zeros(num_experts + 1, np.int64)
    first[1:] = np.cumsum(count)
    num_rows = first[num_experts]
    place = np.zeros(num_rows, np.int64)
    row = np.zeros(len(tokens.token), np.int64)
    token_indptr = np.zeros(num_tokens + 1, np.int64)
    row_indptr = np.zeros(num_rows + 1, np.int64)
    for e in range(num_experts):
        for r in range(count[e]):
            place[first[e] + r] = gpus[e, r]
        for i in range(tokens.indptr[e], tokens.indptr[e + 1]):
            row[i] = first[e] + tokens.turn[i] % count[e]
            row_indptr[row[i] + 1] += 1
            token_indptr[tokens.token[i] + 1] += 1
    token_indptr[:] = np.cumsum(token_indptr)
    row_indptr[:] = np.cumsum(row_indptr)
    token_row, row_token = np.zeros(len(row), np.int32), np.zeros(len(row), np.int32)
    next_row, next_token = token_indptr.copy(), row_indptr.copy()
    for i in range(len(row)):
        t = tokens.token[i]
        token_row[next_row[t]] = row[i]
        next_row[t] += 1
        row_token[next_token[row[i]]] = t
        next_token[row[i]] += 1
    gains = Gains(
        first,
        place,
        np.zeros((num_gpus, num_rows)),
        np.zeros((num_nodes, num_rows)),
        np.zeros(num_rows),
        np.zeros(num_rows),
        token_indptr,
        token_row,
        row_indptr,
        row_token,
    )
    on_gpu, on_node = np.zeros(num_gpus), np.zeros(num_nodes)
    add_gpu, add_node = np.zeros((num_rows, num_gpus)), np.zeros((num_rows, num_nodes))
    reach, enter = np.zeros((num_gpus, num_gpus)), np.zeros((num_gpus, num_nodes))
    for home in range(num_gpus):
        for g in range(num_gpus):
            reach[home, g] = reach_us(net, home, g)
        for n in range(num_nodes):
            if net.dedup == 2 and n != net.node_of[home]:
                enter[home, n] = enter_us(net, home, n)
    for t in range(num_tokens):
        home = tokens.home[t]
        for g in range(num_gpus):
            missing = flow.on_gpu[t, g] == 0 or net.dedup == 0
            on_gpu[g] = reach[home, g] if missing else 0.0
        for n in range(num_nodes):
            on_node[n] = enter[home, n] if flow.on_node[t, n] == 0 else 0.0
        for j in range(token_indptr[t], token_indptr[t + 1]):
            r = token_row[j]
            g = place[r]
            n = net.node_of[g]
            add_gpu[r] += on_gpu
            add_node[r] += on_node
            if flow.on_gpu[t, g] == 1 or net.dedup == 0:
                gains.drop_gpu[r] += reach[home, g]
            if flow.on_node[t, n] == 1:
                gains.drop_node[r] += enter[home, n]
    gains.add_gpu[:] = add_gpu.T
    gains.add_node[:] = add_node.T
    return gains


@njit(cache=True, nogil=True)
def reach_us(net: Net, home: int, gpu: int) -> float:
    """Link time of the message that brings a hidden state of `home` to `gpu`."""
    return float(net.pair_us[relay_of(net, home, gpu), gpu])


@njit(cache=True, nogil=True)
def enter_us(net: Net, home: int, node: int) -> float:
    """Link time of the message that brings a hidden state of `home` to another node."""
    return float(net.pair_us[home, node * net.per_node + home % net.per_node])


@njit(cache=True, nogil=True)
def move_gains(tokens: Tokens, net: Net, flow: Flow, gains: Gains, row: int, dst: int) -> None:
    """Serve one replica on GPU `dst`: who is served where, and the gains; not the messages."""
    src = gains.place[row]
    gains.place[row] = dst
    from_node, to_node = net.node_of[src], net.node_of[dst]
    for i in range(gains.row_indptr[row], gains.row_indptr[row + 1]):
        t = gains.row_token[i]
        home = tokens.home[t]
        if net.dedup == 0:
            gains.drop_gpu[row] += net.pair_us[home, dst] - net.pair_us[home, src]
        else:
            gpu_step(gains, net, flow, t, home, row, src, -1)
            gpu_step(gains, net, flow, t, home, row, dst, 1)
            if net.dedup == 2 and from_node != to_node:
                node_step(gains, net, flow, t, home, row, from_node, -1)
                node_step(gains, net, flow, t, home, row, to_node, 1)
        flow.on_gpu[t, src] -= 1
        flow.on_gpu[t, dst] += 1
        flow.on_node[t, from_node] -= 1
        flow.on_node[t, to_node] += 1


@njit(cache=True, nogil=True)
def gpu_step(
    gains: Gains, net: Net, flow: Flow, token: int, home: int, row: int, gpu: int, sign: int
) -> None:
    """Gains of `gpu` as the replica `row` comes to it (sign 1) or leaves it (-1) for `token`."""
    others = flow.on_gpu[token, gpu] - (1 if sign < 0 else 0)
    if others > 1:
        return
    us = sign * reach_us(net, home, gpu)
    if others == 0:
        gains.drop_gpu[row] += us
    for j in range(gains.token_indptr[token], gains.token_indptr[token + 1]):
        r = gains.token_row[j]
        if others == 0:
            gains.add_gpu[gpu, r] -= us
        elif r != row and gains.place[r] == gpu:
            gains.drop_gpu[r] -= us


@njit(cache=True, nogil=True)
def node_step(
    gains: Gains, net: Net, flow: Flow, token: int, home: int, row: int, node: int, sign: int
) -> None:
    """The same for the message between nodes that serves all of the token's choices on `node`."""
    others = flow.on_node[token, node] - (1 if sign < 0 else 0)
    if others > 1 or node == net.node_of[home]:
        return
    us = sign * enter_us(net, home, node)
    if others == 0:
        gains.drop_node[row] += us
    for j in range(gains.token_indptr[token], gains.token_indptr[token + 1]):
        r = gains.token_row[j]
        if others == 0:
            gains.add_node[node, r] -= us
        elif r != row and net.node_of[gains.place[r]] == node:
            gains.drop_node[r] -= us


@njit(cache=True, nogil=True)
def try_swap(
    tokens: Tokens,
    net: Net,
    flow: Flow,
    trial: Flow,
    gains: Gains,
    row1: int,
    g1: int,
    row2: int,
    g2: int,
) -> None:
    """Set the messages of `trial` to those of `flow` after the replicas `row1` on g1 and `row2` on
    g2 (-1 for an empty slot) change places. Tokens that chose both are served as before."""
    trial.out[:] = flow.out
    trial.back[:] = flow.back
    trial.total[0] = flow.total[0]
    for side in range(2):
        row, other = (row1, row2) if side == 0 else (row2, row1)
        src, dst = (g1, g2) if side == 0 else (g2, g1)
        if row < 0:
            continue
        from_node, to_node = net.node_of[src], net.node_of[dst]
        across = net.dedup == 2 and from_node != to_node
        home, batch = -1, -1
        left, came, left_node, came_node = 0, 0, 0, 0
        for i in range(gains.row_indptr[row], gains.row_indptr[row + 1]):
            t = gains.row_token[i]
            if tokens.home[t] != home or tokens.batch[t] != batch:
                if home >= 0:
                    send(net, trial, batch, home, src, dst, left, came, left_node, came_node)
                home, batch = tokens.home[t], tokens.batch[t]
                left, came, left_node, came_node = 0, 0, 0, 0
            if net.dedup == 0:
                left += 1
                came += 1
                continue
            comes = flow.on_gpu[t, dst] == 0
            if not comes and other >= 0 and chose(gains, t, other):
                continue
            left += flow.on_gpu[t, src] == 1
            came += comes
            if across:
                left_node += flow.on_node[t, from_node] == 1 and net.node_of[home] != from_node
                came_node += flow.on_node[t, to_node] == 0 and net.node_of[home] != to_node
        if home >= 0:
            send(net, trial, batch, home, src, dst, left, came, left_node, came_node)


@njit(cache=True, nogil=True)
def send(
    net: Net,
    trial: Flow,
    batch: int,
    home: int,
    src: int,
    dst: int,
    left: int,
    came: int,
    left_node: int,
    came_node: int,
) -> None:
    """Hidden states of one home that GPU `src` no longer needs (`left`) and GPU `dst` now does
    (`came`), and their nodes."""
    from_relay, to_relay = relay_of(net, home, src), relay_of(net, home, dst)
    if left > 0:
        add_message(net, trial, batch, from_relay, src, -left)
    if came > 0:
        add_message(net, trial, batch, to_relay, dst, came)
    if left_node > 0:
        add_message(net, trial, batch, home, from_relay, -left_node)
    if came_node > 0:
        add_message(net, trial, batch, home, to_relay, came_node)


@njit(cache=True, nogil=True)
def chose(gains: Gains, token: int, row: int) -> bool:
    """Whether the replica `row` serves one of the token's choices."""
    for j in range(gains.token_indptr[token], gains.token_indptr[token + 1]):
        if gains.token_row[j] == row:
            return True
    return False


@njit(cache=True, nogil=True)
def relay_of(net: Net, home: int, gpu: int) -> int:
    """The GPU that sends a hidden state of `home` on to `gpu`: with deduplication per node that of
    the same rank on the node of `gpu`."""
    node = net.node_of[gpu]
    if net.dedup < 2 or node == net.node_of[home]:
        return home
    return int(node * net.per_node + home % net.per_node)


@njit(cache=True, nogil=True)
def move_rows(
    tokens: Tokens,
    net: Net,
    flow: Flow,
    trial: Flow,
    gains: Gains,
    row1: int,
    g1: int,
    row2: int,
    g2: int,
) -> None:
    """Make the swap that `try_swap` last tried."""
    flow.out[:] = trial.out
    flow.back[:] = trial.back
    flow.total[0] = trial.total[0]
    if row1 >= 0:
        move_gains(tokens, net, flow, gains, row1, g2)
    if row2 >= 0:
        move_gains(tokens, net, flow, gains, row2, g1)


@njit(cache=True, nogil=True)
def replicas(gains: Gains, expert: int) -> int:
    """Replicas of an expert."""
    return int(gains.first[expert + 1] - gains.first[expert])


@njit(cache=True, nogil=True)
def moved_us(gains: Gains, net: Net, row: int, dst: int) -> float:
    """Change of the summed link time when one replica moves to `dst` and nothing else does."""
    us = gains.add_gpu[dst, row] - gains.drop_gpu[row]
    src_node, dst_node = net.node_of[gains.place[row]], net.node_of[dst]
    if src_node != dst_node:
        us += gains.add_node[dst_node, row] - gains.drop_node[row]
    return us


@njit(cache=True, nogil=True)
def shared_us(gains: Gains, net: Net, row: int, far: bool) -> float:
    """Link time a choice that the row's place alone accounts for: what a move does not save for
    tokens that also chose the expert that comes in."""
    us = gains.drop_gpu[row] + (gains.drop_node[row] if far else 0.0)
    return us / max(1, gains.row_indptr[row + 1] - gains.row_indptr[row])


@njit(cache=True, nogil=True)
def replica_row(gains: Gains, expert: int, gpu: int) -> int:
    """Row of `gains` of the replica of `expert` on `gpu`; -1 for the empty slot."""
    if expert >= len(gains.first) - 1:
        return -1
    for r in range(gains.first[expert], gains.first[expert + 1]):
        if gains.place[r] == gpu:
            return int(r)
    return -1
