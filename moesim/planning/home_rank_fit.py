"""Home ranks: which data-parallel rank takes which request, by where its experts are expected.

A token whose home GPU holds one of its experts sends one message less, and one whose home node does
crosses the network less. Speculative MoE (arXiv 2503.04398) predicts the experts of tokens and
shuffles tokens to the devices that hold them; NetMoE (ICLR 2025) places training samples by an
integer program that is an assignment. Here requests are given to ranks by a transportation problem:
every rank gets as many tokens as it would have, and the messages that are expected to be saved are
most.
"""

from __future__ import annotations

import numpy as np

from moesim.errors import InfeasibleError, InputError
from moesim.kernels import kernel
from moesim.placement import Placement
from moesim.types import Array, FloatArray, IntArray


def messages_saved(
    expert_ids: Array, placement: Placement, *, dedup: int, nearest: bool, far: float
) -> FloatArray:
    """[T, G]: what each token saves, summed over layers, if its home is GPU g.

    expert_ids: [T, L, K], -1 for none; dedup: 0 none, 1 per GPU, 2 per node (C2); nearest: whether
    a replica on the home GPU serves the token for certain, else by its share; far: what a message
    between nodes counts relative to one within. Ignores that replicas are then chosen by another
    home, and the relays of dedup per node.
    """
    out = np.zeros((len(expert_ids), placement.num_gpus))
    _saved(
        np.asarray(expert_ids),
        placement.logical_to_physical(),
        placement.replica_count,
        placement.gpu_of_slot,
        placement.node_of_gpu,
        dedup,
        nearest,
        far if placement.num_nodes > 1 else 0.0,
        out,
    )
    return out


@kernel
def _saved(
    ids: Array,
    logical_to_physical: Array,
    replica_count: Array,
    gpu_of_slot: Array,
    node_of_gpu: Array,
    dedup: int,
    nearest: bool,
    far: float,
    out: Array,
) -> None:
    """Body of `messages_saved`. A place is reached with the probability that some choice is served
    there; choices with replicas are taken as independent."""
    num_tokens, num_layers, top_k = ids.shape
    num_gpus = out.shape[1]
    num_nodes = node_of_gpu[num_gpus - 1] + 1
    missed, missed_node = np.empty(num_gpus), np.empty(num_nodes)
    served, on_node = np.empty(num_gpus), np.empty(num_nodes)
    for t in range(num_tokens):
        for layer in range(num_layers):
            missed[:], served[:] = 1.0, 0.0
            missed_node[:], on_node[:] = 1.0, 0.0
            for k in range(top_k):
                expert = np.int64(ids[t, layer, k])
                if expert < 0:
                    continue
                count = replica_count[layer, expert]
                share = 1.0 if nearest else 1.0 / count
                on_node[:] = 0.0
                for r in range(count):
                    gpu = gpu_of_slot[logical_to_physical[layer, expert, r]]
                    missed[gpu] *= 1.0 - share
                    served[gpu] += share
                    on_node[node_of_gpu[gpu]] += share
                for n in range(num_nodes):
                    missed_node[n] *= max(0.0, 1.0 - on_node[n])
            on_node[:] = 0.0
            for g in range(num_gpus):
                near = served[g] if dedup == 0 else 1.0 - missed[g]
                served[g] = near
                on_node[node_of_gpu[g]] += near
            for g in range(num_gpus):
                node = node_of_gpu[g]
                reach = 1.0 - missed_node[node] if dedup == 2 else on_node[node]
                out[t, g] += served[g] + far * reach


def assign_homes(saved: FloatArray, size: IntArray, room: IntArray) -> IntArray:
    """[R, G] tokens of each request that each rank takes, so that most is saved in all.

    saved: [R, G] saved by all of a request's tokens if they live on rank g; size: [R] tokens; room:
    [G] tokens that each rank takes, as many in all. Where every request is one token this is the
    assignment problem; else the transportation problem (a request may be cut between ranks, at most
    G - 1 times in all), whose basic solutions are whole numbers. Raises InputError for shapes that
    do not go together, InfeasibleError where room and tokens differ.
    """
    requests, gpus = saved.shape
    if size.shape != (requests,) or room.shape != (gpus,) or (size < 0).any() or (room < 0).any():
        raise InputError(
            f"{size.shape} sizes and {room.shape} rooms for {requests} requests on {gpus} ranks",
            "give one size a request and one room a rank, 0 or more",
        )
    if int(size.sum()) != int(room.sum()):
        raise InfeasibleError(
            f"{int(size.sum())} tokens for room for {int(room.sum())}", "make them equal"
        )
    if (size == 1).all():
        return _assign_single(saved, room)
    return _transport(saved / np.maximum(size, 1)[:, None], size, room)


def _assign_single(saved: FloatArray, room: IntArray) -> IntArray:
    from scipy.optimize import linear_sum_assignment

    seats = np.repeat(np.arange(len(room)), room)
    row, column = linear_sum_assignment(-saved[:, seats])
    out = np.zeros(saved.shape, np.int64)
    out[row, seats[column]] = 1
    return out


def _transport(each: FloatArray, size: IntArray, room: IntArray) -> IntArray:
    """each: [R, G] saved by one token."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    requests, gpus = each.shape
    cell = np.arange(requests * gpus)
    incidence = coo_matrix(
        (
            np.ones(2 * len(cell)),
            (np.concatenate((cell // gpus, requests + cell % gpus)), np.tile(cell, 2)),
        )
    ).tocsr()
    found = linprog(  # type: ignore[call-overload]
        -each.ravel(), A_eq=incidence, b_eq=np.concatenate((size, room)), method="highs-ds"
    )
    flow = np.rint(found.x).astype(np.int64).reshape(requests, gpus)
    if (flow.sum(axis=1) != size).any() or (flow.sum(axis=0) != room).any():
        raise InfeasibleError(
            "the transportation program gave no whole solution", "report the case"
        )
    return flow
