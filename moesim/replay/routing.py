"""Who sends which rows where: index tables of one layer and batch, worked out on the host.

Routing is known from the trace, so every split and every gather index is known before the clock
starts. Nothing here touches a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moesim.errors import MismatchError, UnknownNameError
from moesim.types import IntArray

FloatArray = npt.NDArray[np.float32]
Dedup = Literal["gpu", "none"]
POLICIES = ("split", "nearest", "hash")


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Which slot serves each choice of a batch in one layer.

    slots: [T, K] physical slot, -1 where the token chose fewer experts.
    home:  [T] rank that computes the token's attention.
    weights: [T, K] gate weights, 0 where no expert was chosen.
    """

    slots: IntArray
    home: IntArray
    weights: FloatArray
    num_ranks: int
    slots_per_rank: int

    @property
    def slot_rows(self) -> IntArray:
        """[P]: rows that each slot serves."""
        valid = self.slots[self.slots >= 0]
        return np.bincount(valid, minlength=self.num_ranks * self.slots_per_rank)


@dataclass(frozen=True, slots=True, eq=False)
class RankWork:
    """One rank's tables for one layer and batch.

    A row is a hidden state that travels: one for each (token, destination) with `dedup` "gpu",
    one for each (token, choice) with "none". Rows whose destination is their home skip the
    collective.

    pack_idx: [own + sent] home token of every row, own rows first, then sent rows by destination.
    send_splits, recv_splits: [G] rows to and from each rank; the rank's own entry is 0.
    expand_idx: [M] received row (remote rows by source, then own rows) of each local GEMM row;
        GEMM rows are sorted by local slot.
    slot_offsets: [slots_per_rank] cumulative GEMM rows, int32, as grouped GEMMs take them.
    reduce_idx, reduce_ptr, reduce_weights: CSR over received rows of the GEMM rows to sum.
    return_idx, return_ptr, return_weights: CSR over home tokens of the returned rows to sum; rows
        are own rows first, then the sent ones. `return_weights` is None where the weights were
        applied before the rows came back.
    """

    pack_idx: IntArray
    num_own: int
    send_splits: IntArray
    recv_splits: IntArray
    expand_idx: IntArray
    slot_offsets: npt.NDArray[np.int32]
    reduce_idx: IntArray
    reduce_ptr: IntArray
    reduce_weights: FloatArray
    return_idx: IntArray
    return_ptr: IntArray
    return_weights: FloatArray | None

    @property
    def num_sent(self) -> int:
        return int(self.send_splits.sum())

    @property
    def num_received(self) -> int:
        return int(self.recv_splits.sum())

    @property
    def num_gemm_rows(self) -> int:
        return len(self.expand_idx)

    @property
    def slot_rows(self) -> IntArray:
        """[slots_per_rank]: GEMM rows of each local slot."""
        return np.diff(self.slot_offsets, prepend=0).astype(np.int64)


def company_rows(rows: int, top_k: int, num_ranks: int) -> tuple[int, int]:
    """Home tokens of a rank, and rows that it sends to the others, in the synthetic layer that
    serves `rows` expert rows a rank, every rank alike."""
    own = max(1, rows // top_k)
    others = max(num_ranks - 1, 1)
    return own, own * (min(top_k, num_ranks) - 1) // others * (num_ranks - 1)


def home_ranks(num_tokens: int, num_ranks: int) -> IntArray:
    """[T]: equal contiguous chunks in token order, cut as `moesim.cost.routing` cuts them."""
    return np.arange(num_tokens) * num_ranks // max(num_tokens, 1)


def assign_replicas(
    expert_ids: npt.NDArray[np.integer],
    gate_weights: npt.NDArray[np.floating] | None,
    placement: npt.NDArray[np.integer],
    home: IntArray,
    num_ranks: int,
    policy: str = "split",
    *,
    token_ids: IntArray | None = None,
    num_nodes: int = 1,
) -> Assignment:
    """Choose a slot for every (token, choice) of one layer, as `moesim.cost.routing.route` does.

    expert_ids: [T, K] logical ids, -1 where none. placement: [P] logical expert of each slot, -1
    where empty. gate_weights: [T, K] or None (then 1/K each). token_ids: [T] index of each token in
    its trace (default 0 .. T - 1), which "hash" hashes.
    policy: "split" takes an expert's replicas in turn, in token order. "hash" picks by a hash of
    token and expert. "nearest" takes the replica on the home rank where there is one, else those of
    the home node in turn, else all in turn.

    Raises UnknownNameError for another policy, MismatchError for an expert without a slot.
    """
    if policy not in POLICIES:
        raise UnknownNameError(
            "replica policy",
            policy,
            POLICIES,
            f"the replay knows {', '.join(POLICIES)}; choose one with `replica_policy`",
        )
    ids = np.asarray(expert_ids, np.int64)
    num_tokens, top_k = ids.shape
    slots_per_rank = len(placement) // num_ranks
    flat = ids.reshape(-1)
    valid = np.flatnonzero(flat >= 0)
    chosen = flat[valid]
    table, count = _replica_table(np.asarray(placement, np.int64), int(flat.max(initial=0)) + 1)
    if valid.size and (count[chosen] == 0).any():
        missing = int(chosen[count[chosen] == 0][0])
        raise MismatchError(
            f"a token chose expert {missing}, which has no slot in the plan",
            "give the plan that was made for this trace's model",
        )
    token = valid // top_k
    if policy == "hash":
        names = np.arange(num_tokens) if token_ids is None else np.asarray(token_ids)
        turn = _mix(names[token], chosen) % count[chosen].astype(np.uint64)
        slot = table[chosen, turn.astype(np.int64)]
    elif policy == "nearest":
        slot = _nearest(table, chosen, home[token], slots_per_rank, num_ranks // num_nodes)
    else:
        slot = table[chosen, _occurrence(chosen) % count[chosen]]
    slots = np.full(num_tokens * top_k, -1, np.int64)
    slots[valid] = slot
    weights = np.zeros(num_tokens * top_k, np.float32)
    if gate_weights is None:
        weights[valid] = 1.0 / top_k
    else:
        weights[valid] = np.asarray(gate_weights, np.float32).reshape(-1)[valid]
    shape = (num_tokens, top_k)
    return Assignment(slots.reshape(shape), home, weights.reshape(shape), num_ranks, slots_per_rank)


def send_matrix(assignment: Assignment, dedup: Dedup = "gpu") -> IntArray:
    """[G, G] rows from home rank (first axis) to destination, the diagonal included."""
    home, destination, _, _, _ = _rows(assignment, dedup)
    size = assignment.num_ranks
    return np.bincount(home * size + destination, minlength=size * size).reshape(size, size)


def rank_work(assignment: Assignment, rank: int, dedup: Dedup = "gpu") -> RankWork:
    """The tables of `rank`; every rank derives its own from the same assignment.

    dedup: "gpu" sends a token once to each destination, where its rows are expanded and summed
    with their weights; "none" sends one row a choice and sums at home.
    """
    home, destination, token, choice_row, choice = _rows(assignment, dedup)
    size, spr = assignment.num_ranks, assignment.slots_per_rank
    home_tokens = np.flatnonzero(assignment.home == rank)
    local_token = np.full(len(assignment.home), -1, np.int64)
    local_token[home_tokens] = np.arange(len(home_tokens))

    out_rows = np.flatnonzero((home == rank) & (destination != rank))
    own_rows = np.flatnonzero((home == rank) & (destination == rank))
    in_rows = np.flatnonzero((home != rank) & (destination == rank))
    send_splits = np.bincount(destination[out_rows], minlength=size)
    recv_splits = np.bincount(home[in_rows], minlength=size)

    received = np.concatenate([in_rows, own_rows])
    position = np.full(len(home), -1, np.int64)
    position[received] = np.arange(len(received))
    here = np.flatnonzero(destination[choice_row] == rank)
    slot = assignment.slots.reshape(-1)[choice[here]] - rank * spr
    row = position[choice_row[here]]
    order = np.lexsort((row, slot))
    expand_idx, gemm_choice = row[order], choice[here][order]
    slot_offsets = np.cumsum(np.bincount(slot, minlength=spr)).astype(np.int32)
    reduce_idx = np.argsort(expand_idx, kind="stable")
    reduce_ptr = _pointers(expand_idx, len(received))
    weights = assignment.weights.reshape(-1)
    reduce_weights = weights[gemm_choice[reduce_idx]]

    sent = np.concatenate([own_rows, out_rows])
    owner = local_token[token[sent]]
    return_idx = np.argsort(owner, kind="stable")
    return_ptr = _pointers(owner, len(home_tokens))
    return_weights = None
    if dedup == "none":
        reduce_weights = np.ones_like(reduce_weights)
        row_choice = np.empty(len(home), np.int64)
        row_choice[choice_row] = choice
        return_weights = weights[row_choice[sent[return_idx]]]
    return RankWork(
        owner,
        len(own_rows),
        send_splits,
        recv_splits,
        expand_idx,
        slot_offsets,
        reduce_idx,
        reduce_ptr,
        reduce_weights,
        return_idx,
        return_ptr,
        return_weights,
    )


def _rows(
    assignment: Assignment, dedup: Dedup
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Travelling rows in the order (home, destination, token[, choice]): their home, destination
    and token; and, for every valid choice, its row and its flat index."""
    flat = assignment.slots.reshape(-1)
    choice = np.flatnonzero(flat >= 0)
    top_k = assignment.slots.shape[1]
    token = choice // top_k
    destination = flat[choice] // assignment.slots_per_rank
    home = assignment.home[token]
    num_tokens = len(assignment.home)
    key = (home * assignment.num_ranks + destination) * num_tokens + token
    if dedup == "gpu":
        unique, choice_row = np.unique(key, return_inverse=True)
    else:
        order = np.argsort(key, kind="stable")
        unique = key[order]
        choice_row = np.empty(len(key), np.int64)
        choice_row[order] = np.arange(len(key))
    pair, row_token = np.divmod(unique, max(num_tokens, 1))
    row_home, row_destination = np.divmod(pair, assignment.num_ranks)
    return row_home, row_destination, row_token, choice_row.reshape(-1), choice


def _replica_table(placement: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    """[E, R] slots of each expert in ascending order, and [E] how many there are."""
    slots = np.flatnonzero(placement >= 0)
    experts = placement[slots]
    size = max(num_experts, int(experts.max(initial=-1)) + 1)
    count = np.bincount(experts, minlength=size)
    table = np.full((size, max(int(count.max(initial=1)), 1)), -1, np.int64)
    order = np.argsort(experts, kind="stable")
    table[experts[order], _occurrence(experts[order])] = slots[order]
    return table, count


def _occurrence(values: IntArray) -> IntArray:
    """How often each value occurred before, in order."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    rank = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    out = np.empty(len(values), np.int64)
    out[order] = rank
    return out


def _nearest(
    table: IntArray, chosen: IntArray, home: IntArray, slots_per_rank: int, ranks_per_node: int
) -> IntArray:
    """[n] slot of each choice: on the home rank, else in turn on the home node, else in turn."""
    slots = table[chosen]
    there = slots >= 0
    rank = slots // slots_per_rank
    on_home = there & (rank == home[:, None])
    local = on_home.any(axis=1)
    on_node = there & (rank // ranks_per_node == (home // ranks_per_node)[:, None])
    eligible = np.where(on_node.any(axis=1)[:, None], on_node, there)
    turn = np.zeros(len(chosen), np.int64)
    turn[~local] = _occurrence(chosen[~local])
    wanted = turn % np.maximum(eligible.sum(axis=1), 1)
    nth = eligible & (np.cumsum(eligible, axis=1) - 1 == wanted[:, None])
    column = np.where(local, on_home.argmax(axis=1), nth.argmax(axis=1))
    return slots[np.arange(len(chosen)), column]


def _mix(a: IntArray, b: IntArray) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of two numbers, splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = a.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = x + b.astype(np.uint64) + np.uint64(0x632BE59BD9B4E019)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _pointers(values: IntArray, num_groups: int) -> IntArray:
    return np.concatenate(([0], np.cumsum(np.bincount(values, minlength=num_groups))))
