"""From routing to load and messages: which slot serves each choice, and who sends to whom.

One compiled pass over a batch set gives, for every batch and layer, the tokens of each slot and
the messages between GPUs; everything that a step costs follows from these two.
`tests.reference.cost` holds the slow version.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim import compat
from moesim.choices import Dedup as Dedup
from moesim.cost.replica_lp import share_given, share_out
from moesim.errors import InputError, UnknownNameError
from moesim.kernels import kernel
from moesim.placement import Placement, ReplicaPolicy
from moesim.trace.batches import Batches
from moesim.trace.format import Trace
from moesim.types import Array

DEDUP_CODES: dict[str, int] = {"none": 0, "gpu": 1, "node": 2}
POLICY_CODES: dict[str, int] = {"split": 0, "hash": 1, "nearest": 2, "lp": 3}
BLOCK_TOKENS = 64
"""Tokens of which one layer after another is routed, so that a layer's tables stay in cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """What a placement makes of a batch set.

    slot_tokens: [B, L, P] int32, tokens that each slot serves.
    messages:    [B, L, G, G] int32, hidden states that GPU s sends to GPU d in dispatch
                 (zero diagonal); combine sends as many back.
    gpu_fan_out, node_fan_out: [B, L] int64, summed over tokens: distinct GPUs (nodes) that hold
                 the chosen experts, the token's own included.
    num_tokens:  [B] int64.
    """

    slot_tokens: Array
    messages: Array
    gpu_fan_out: Array
    node_fan_out: Array
    num_tokens: Array

    def gpu_tokens(self, num_gpus: int) -> Array:
        """[B, L, G] int64: token-choices that each GPU computes."""
        b, layers, slots = self.slot_tokens.shape
        return self.slot_tokens.reshape(b, layers, num_gpus, slots // num_gpus).sum(
            axis=3, dtype=np.int64
        )


def home_ranks(trace: Trace, batches: Batches, num_gpus: int) -> npt.NDArray[np.int32]:
    """[total tokens] int32: the GPU that computes each token's attention.

    `rank_ids` of the trace where they are of as many ranks as there are GPUs; otherwise every batch
    is cut into equal contiguous chunks in batch order, as a balanced data-parallel scheduler does.
    """
    if trace.rank_ids is not None and compat.other_ranks(trace, num_gpus) is None:
        return np.asarray(trace.rank_ids)[batches.token_idx].astype(np.int32)
    lengths = np.diff(batches.indptr)
    within = np.arange(len(batches.token_idx)) - np.repeat(batches.indptr[:-1], lengths)
    return (within * num_gpus // np.repeat(lengths, lengths)).astype(np.int32)


def route(
    trace: Trace,
    batches: Batches,
    placement: Placement,
    *,
    policy: ReplicaPolicy = "split",
    dedup: Dedup = "gpu",
    home: npt.NDArray[np.int32] | None = None,
    quota: npt.NDArray[np.int64] | None = None,
) -> Routed:
    """Route every token of every batch through the placement (C2, C6 of the design).

    split:   the i-th choice of an expert in a batch and layer goes to replica i mod r, so that
             shares differ by at most one.
    hash:    a hash of (token, expert) picks the replica.
    nearest: the home GPU if it holds the expert, else `split` over the replicas of the home node,
             else over all.
    lp:      the shares that make the largest GPU load of each batch and layer least, by exact
             linear program; choices on their home GPU first, then on its node (see `replica_lp`).
    quota: [L, E, R], for one batch, in place of a policy: the choices that each replica of an
    expert (in the order of `logical_to_physical`) serves; they add up to the expert's choices.
    Choices of -1 are skipped; ids are trusted, since `load_trace` has checked them. `home` defaults
    to `home_ranks`. Raises MismatchError when trace and placement differ in layers or experts,
    InputError for a home that is no GPU, UnknownNameError for an unknown `policy` or `dedup`.
    """
    compat.placement_fits_trace(placement, trace.num_layers, trace.num_experts)
    if policy not in POLICY_CODES:
        raise UnknownNameError("replica policy", policy, POLICY_CODES)
    if dedup not in DEDUP_CODES:
        raise UnknownNameError("deduplication", dedup, DEDUP_CODES)
    if home is None:
        home = home_ranks(trace, batches, placement.num_gpus)
    elif home.shape != batches.token_idx.shape or (
        home.size and not 0 <= home.min() <= home.max() < placement.num_gpus
    ):
        raise InputError(
            f"home ranks must name one of {placement.num_gpus} GPUs for every token of every batch",
            "leave them out, or take them from home_ranks",
        )
    num_batches, num_layers, num_gpus = len(batches), trace.num_layers, placement.num_gpus
    slot_tokens = np.zeros((num_batches, num_layers, placement.num_slots), np.int32)
    messages = np.zeros((num_batches, num_layers, num_gpus, num_gpus), np.int32)
    fan_out = np.zeros((2, num_batches, num_layers), np.int64)
    route_kernel(
        np.asarray(trace.expert_ids),
        batches.token_idx,
        batches.indptr,
        home,
        placement.logical_to_physical(),
        placement.replica_count,
        placement.gpu_of_slot,
        placement.node_of_gpu,
        POLICY_CODES[policy] if quota is None else POLICY_CODES["lp"],
        DEDUP_CODES[dedup],
        np.zeros((0, 0, 0), np.int64) if quota is None else quota,
        slot_tokens,
        messages,
        fan_out,
    )
    return Routed(slot_tokens, messages, fan_out[0], fan_out[1], np.diff(batches.indptr))


@kernel
def mix(a: np.uint64, b: np.uint64) -> np.uint64:
    """A 64-bit hash of two numbers (splitmix64's finaliser)."""
    x = a * np.uint64(0x9E3779B97F4A7C15) + b + np.uint64(0x632BE59BD9B4E019)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def pick_slot(
    slots: Array,
    count: int,
    home: int,
    token: int,
    expert: int,
    gpu_of_slot: Array,
    node_of_gpu: Array,
    policy: int,
    turn: Array,
    share: Array,
) -> int:
    """The slot that serves one choice of an expert with several replicas; advances
    `turn[expert]` where shares rotate, uses up `share` [E, G, R] where the policy is lp."""
    if policy == 3:
        for r in range(count):
            if share[expert, home, r] > 0:
                share[expert, home, r] -= 1
                return slots[r]
    if policy == 1:
        return slots[mix(np.uint64(token), np.uint64(expert)) % np.uint64(count)]
    if policy == 2:
        home_node = node_of_gpu[home]
        near = 0
        for r in range(count):
            gpu = gpu_of_slot[slots[r]]
            if gpu == home:
                return slots[r]
            near += node_of_gpu[gpu] == home_node
        if near > 0:
            want = turn[expert] % near
            turn[expert] += 1
            for r in range(count):
                if node_of_gpu[gpu_of_slot[slots[r]]] == home_node:
                    if want == 0:
                        return slots[r]
                    want -= 1
    chosen = slots[turn[expert] % count]
    turn[expert] += 1
    return chosen


@kernel
def share_batch(
    expert_ids: Array,
    tokens: Array,
    home: Array,
    logical_to_physical: Array,
    replica_count: Array,
    gpu_of_slot: Array,
    node_of_gpu: Array,
    quota: Array,
    share: Array,
) -> None:
    """Fill share [L, E, G, R] for the `tokens` of one batch, whose homes are `home`: as `quota`
    [L, E, R] says, by linear program where it is empty (policy lp)."""
    num_layers, top_k = expert_ids.shape[1], expert_ids.shape[2]
    num_experts, num_gpus = share.shape[1], share.shape[2]
    demand = np.zeros((num_layers, num_experts, num_gpus), np.int64)
    for i in range(len(tokens)):
        for layer in range(num_layers):
            for k in range(top_k):
                expert = np.int64(expert_ids[tokens[i], layer, k])
                if expert >= 0:
                    demand[layer, expert, home[i]] += 1
    fixed = np.empty(num_gpus, np.int64)
    for layer in range(num_layers):
        if len(quota) > 0:
            share_given(
                demand[layer],
                quota[layer],
                logical_to_physical[layer],
                replica_count[layer],
                gpu_of_slot,
                node_of_gpu,
                share[layer],
            )
            continue
        fixed[:] = 0
        for e in range(num_experts):
            if replica_count[layer, e] == 1:
                fixed[gpu_of_slot[logical_to_physical[layer, e, 0]]] += demand[layer, e].sum()
        share_out(
            demand[layer],
            fixed,
            logical_to_physical[layer],
            replica_count[layer],
            gpu_of_slot,
            node_of_gpu,
            share[layer],
        )


@kernel
def route_kernel(
    expert_ids: Array,
    token_idx: Array,
    indptr: Array,
    home: Array,
    logical_to_physical: Array,
    replica_count: Array,
    gpu_of_slot: Array,
    node_of_gpu: Array,
    policy: int,
    dedup: int,
    quota: Array,
    slot_tokens: Array,
    messages: Array,
    fan_out: Array,
) -> None:
    """Compiled body of `route`; adds into `slot_tokens`, `messages` and `fan_out` [2, B, L]."""
    num_layers, top_k = expert_ids.shape[1], expert_ids.shape[2]
    num_gpus = messages.shape[2]
    num_experts = replica_count.shape[1]
    num_nodes = node_of_gpu[num_gpus - 1] + 1
    per_node = num_gpus // num_nodes
    gpu_seen = np.full(num_gpus, -1, np.int64)
    node_seen = np.full(num_nodes, -1, np.int64)
    turn = np.zeros((num_layers, num_experts), np.int64)
    share = np.zeros(
        (num_layers, num_experts if policy == 3 else 0, num_gpus, logical_to_physical.shape[2]),
        np.int32,
    )
    relay = np.empty((num_gpus, num_nodes), np.int64)
    for g in range(num_gpus):
        for node in range(num_nodes):
            across = dedup == 2 and node != node_of_gpu[g]
            relay[g, node] = node * per_node + g % per_node if across else g
    stamp = np.int64(0)
    for b in range(len(indptr) - 1):
        turn[:] = 0
        if policy == 3:
            span = slice(indptr[b], indptr[b + 1])
            share_batch(
                expert_ids,
                token_idx[span],
                home[span],
                logical_to_physical,
                replica_count,
                gpu_of_slot,
                node_of_gpu,
                quota,
                share,
            )
        for first in range(indptr[b], indptr[b + 1], BLOCK_TOKENS):
            last = min(first + BLOCK_TOKENS, indptr[b + 1])
            for layer in range(num_layers):
                sent, served, turns = messages[b, layer], slot_tokens[b, layer], turn[layer]
                slots_of, count_of = logical_to_physical[layer], replica_count[layer]
                for i in range(first, last):
                    token = token_idx[i]
                    h = np.int64(home[i])
                    stamp += 1
                    num_seen, num_nodes_seen = 0, 0
                    for k in range(top_k):
                        expert = np.int64(expert_ids[token, layer, k])
                        if expert < 0:
                            continue
                        slot = np.int64(slots_of[expert, 0])
                        count = count_of[expert]
                        if count > 1 and policy == 0:
                            now = turns[expert]
                            slot = np.int64(slots_of[expert, now])
                            turns[expert] = now + 1 if now + 1 < count else 0
                        elif count > 1:
                            slot = np.int64(
                                pick_slot(
                                    slots_of[expert],
                                    count,
                                    h,
                                    token,
                                    expert,
                                    gpu_of_slot,
                                    node_of_gpu,
                                    policy,
                                    turns,
                                    share[layer],
                                )
                            )
                        served[slot] += 1
                        gpu = np.int64(gpu_of_slot[slot])
                        node = node_of_gpu[gpu]
                        fresh = gpu_seen[gpu] != stamp
                        fresh_node = node_seen[node] != stamp
                        gpu_seen[gpu] = stamp
                        node_seen[node] = stamp
                        num_seen += fresh
                        num_nodes_seen += fresh_node
                        via = relay[h, node]
                        sent[h, via] += fresh_node & (via != h)
                        sent[via, gpu] += (fresh | (dedup == 0)) & (gpu != via)
                    fan_out[0, b, layer] += num_seen
                    fan_out[1, b, layer] += num_nodes_seen
