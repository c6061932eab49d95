"""EPLB, the expert-parallelism load balancer, hierarchical and global policies.

An own implementation of the algorithm published at github.com/deepseek-ai/EPLB (`eplb.py` and the
README's description): groups are packed to nodes, experts replicated within a node where load per
replica is highest, replicas packed to GPUs, always the heaviest first to the lightest pack with
room. Compiled, so that a 58-layer model takes milliseconds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.kernels import kernel
from moesim.solvers.base import Need, Problem, Solution, pack_table
from moesim.solvers.repair import moved_note, separate_replicas
from moesim.types import Array, Progress


class Eplb:
    """Balances the average load; ignores batches, traffic between layers and GPU speeds.

    The hierarchical policy is used where the nodes divide the model's expert groups, the global
    policy otherwise. Where the published algorithm puts two replicas of an expert on one GPU,
    they are separated afterwards (see `separate_replicas`), and the solution's notes say how many.
    """

    name = "eplb"
    needs: tuple[Need, ...] = ("equal slots",)

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        load = problem.mean_load
        table = rebalance_experts(
            load, problem.num_slots, problem.num_groups, problem.num_nodes, problem.num_gpus
        )
        slots = table.reshape(problem.num_layers, problem.num_gpus, -1)
        moved = separate_replicas(slots, load)
        notes = (moved_note(moved),) if moved else ()
        return Solution(pack_table(problem, slots), "feasible", notes=notes)


def rebalance_experts(
    weight: Array, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> npt.NDArray[np.int32]:
    """Physical-to-logical map [L, num_replicas] for `weight` [L, E], the load of each expert.

    As `eplb.rebalance_experts` of the published code, whose other two results follow from this
    one. Loads are rounded to float32, as there. Raises InputError unless `num_groups` divides E,
    `num_nodes` divides `num_gpus`, and `num_replicas` is a multiple of `num_gpus` and at least E.
    """
    load = np.asarray(weight, np.float32).astype(np.float64)
    experts = load.shape[1]
    if (
        min(num_groups, num_nodes, num_gpus) < 1
        or experts % num_groups
        or num_gpus % num_nodes
        or num_replicas % num_gpus
        or num_replicas < experts
    ):
        raise InputError(
            f"{num_replicas} replicas of {experts} experts in {num_groups} groups do not go on"
            f" {num_gpus} GPUs of {num_nodes} nodes",
            "choose sizes that divide, and at least one replica an expert",
        )
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    table = np.empty((load.shape[0], num_replicas), np.int32)
    for layer in range(load.shape[0]):
        _rebalance_layer(load[layer], num_groups, num_nodes, num_gpus, table[layer])
    return table


@kernel
def _rebalance_layer(
    load: Array, num_groups: int, num_nodes: int, num_gpus: int, out: Array
) -> None:
    """One layer: groups to nodes, replicas within nodes, replicas to GPUs."""
    num_experts = len(load)
    group_size = num_experts // num_groups
    group_load = np.zeros(num_groups)
    for expert in range(num_experts):
        group_load[expert // group_size] += load[expert]
    node_of_group, rank_of_group = pack(group_load, num_nodes)
    experts_per_node = num_experts // num_nodes
    slots_per_node = len(out) // num_nodes
    gpus_per_node = num_gpus // num_nodes
    slots_per_gpu = slots_per_node // gpus_per_node
    members = np.empty((num_nodes, experts_per_node), np.int64)
    for group in range(num_groups):
        for i in range(group_size):
            members[node_of_group[group], rank_of_group[group] * group_size + i] = (
                group * group_size + i
            )
    for node in range(num_nodes):
        local = load[members[node]]
        copy_of, count = replicate(local, slots_per_node)
        share = np.empty(slots_per_node)
        for p in range(slots_per_node):
            share[p] = local[copy_of[p]] / count[copy_of[p]]
        gpu, rank = pack(share, gpus_per_node)
        for p in range(slots_per_node):
            slot = node * slots_per_node + gpu[p] * slots_per_gpu + rank[p]
            out[slot] = members[node, copy_of[p]]


@kernel
def pack(weight: Array, num_packs: int) -> tuple[Array, Array]:
    """Pack n items into packs of n / num_packs each, heaviest first to the lightest pack with
    room; returns the pack of each item and its rank in the pack."""
    n = len(weight)
    size = n // num_packs
    pack_of, rank = np.empty(n, np.int64), np.empty(n, np.int64)
    if size == 1:
        return np.arange(n), np.zeros(n, np.int64)
    total = np.zeros(num_packs)
    count = np.zeros(num_packs, np.int64)
    for item in np.argsort(-weight, kind="mergesort"):
        best = -1
        for p in range(num_packs):
            if count[p] < size and (best < 0 or total[p] < total[best]):
                best = p
        pack_of[item], rank[item] = best, count[best]
        total[best] += weight[item]
        count[best] += 1
    return pack_of, rank


@kernel
def replicate(weight: Array, num_copies: int) -> tuple[Array, Array]:
    """Give each of n items one copy, and each further copy to the item with the most weight a
    copy; returns the item of each copy [num_copies] and the copies of each item [n]."""
    n = len(weight)
    copy_of = np.empty(num_copies, np.int64)
    count = np.ones(n, np.int64)
    for i in range(n):
        copy_of[i] = i
    for i in range(n, num_copies):
        best = 0
        for item in range(1, n):
            if weight[item] / count[item] > weight[best] / count[best]:
                best = item
        copy_of[i] = best
        count[best] += 1
    return copy_of, count
