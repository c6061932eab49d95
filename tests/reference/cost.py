"""Slow, readable versions of the compiled cost kernels; tests hold each against the other."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.routing import Dedup, Routed
from moesim.placement import EMPTY, Placement, ReplicaPolicy
from moesim.trace.batches import Batches
from moesim.trace.format import Trace


def route_reference(
    trace: Trace,
    batches: Batches,
    placement: Placement,
    home: npt.NDArray[Any],
    *,
    policy: ReplicaPolicy,
    dedup: Dedup,
) -> Routed:
    """`moesim.cost.routing.route`, for policies split and nearest, one token at a time."""
    num_batches, num_layers, num_gpus = len(batches), trace.num_layers, placement.num_gpus
    per_node = num_gpus // placement.num_nodes
    per_gpu = placement.slots_per_gpu
    slot_tokens = np.zeros((num_batches, num_layers, placement.num_slots), np.int32)
    messages = np.zeros((num_batches, num_layers, num_gpus, num_gpus), np.int32)
    gpu_fan_out = np.zeros((num_batches, num_layers), np.int64)
    node_fan_out = np.zeros((num_batches, num_layers), np.int64)
    for b in range(num_batches):
        served: dict[tuple[int, int], int] = defaultdict(int)
        for token, h in zip(batches[b], home[batches.indptr[b] :], strict=False):
            for layer in range(num_layers):
                row = placement.physical_to_logical[layer]
                gpus = []
                for expert in trace.expert_ids[token, layer]:
                    if expert == EMPTY:
                        continue
                    slots = [int(p) for p in np.flatnonzero(row == expert)]
                    if policy == "nearest" and len(slots) > 1:
                        here = [p for p in slots if p // per_gpu == h]
                        near = [p for p in slots if p // per_gpu // per_node == h // per_node]
                        slots = here or near or slots
                        if here:
                            slot = here[0]
                        else:
                            slot = slots[served[layer, expert] % len(slots)]
                            served[layer, expert] += 1
                    else:
                        slot = slots[served[layer, expert] % len(slots)]
                        served[layer, expert] += 1
                    slot_tokens[b, layer, slot] += 1
                    gpus.append(slot // per_gpu)
                nodes = {g // per_node for g in gpus}
                gpu_fan_out[b, layer] += len(set(gpus))
                node_fan_out[b, layer] += len(nodes)
                for s, d in _messages(gpus, int(h), per_node, dedup):
                    messages[b, layer, s, d] += 1
    return Routed(slot_tokens, messages, gpu_fan_out, node_fan_out, np.diff(batches.indptr))


def least_largest_load(counts: npt.NDArray[Any], row: npt.NDArray[Any], num_gpus: int) -> float:
    """Optimum of the linear program of `moesim.cost.replica_lp` for one batch and layer, by HiGHS.

    counts: [E] tokens of each expert; row: [P] expert of each slot, -1 for empty.
    """
    from scipy.optimize import linprog

    slots = np.flatnonzero(row != EMPTY)
    serves = np.zeros((len(counts), len(slots) + 1))
    serves[row[slots], np.arange(len(slots))] = 1
    over = np.zeros((num_gpus, len(slots) + 1))
    over[slots // (len(row) // num_gpus), np.arange(len(slots))] = 1
    over[:, -1] = -1
    cost = np.append(np.zeros(len(slots)), 1.0)
    found = linprog(cost, A_ub=over, b_ub=np.zeros(num_gpus), A_eq=serves, b_eq=counts)
    return float(found.fun or 0.0)


def _messages(gpus: list[int], home: int, per_node: int, dedup: Dedup) -> list[tuple[int, int]]:
    if dedup == "none":
        return [(home, g) for g in gpus if g != home]
    if dedup == "gpu":
        return [(home, g) for g in set(gpus) if g != home]
    out = []
    for node in {g // per_node for g in gpus}:
        relay = home if node == home // per_node else node * per_node + home % per_node
        if relay != home:
            out.append((home, relay))
        out += [(relay, g) for g in set(gpus) if g // per_node == node and g != relay]
    return out
