"""Expert capacity: dropping choices that overloaded experts cannot take.

Capacity-aware inference (He et al., 2025, arXiv:2503.05066): an expert takes at most
C = ceil(gamma k T / E) of the T tokens' choices in a layer; those beyond are dropped, by gating
score, at random, by order in the batch, or by position in the request (OpenMoE, arXiv:2402.01739:
models that fill experts in order drop towards the end of sequences). Expanded drop lets an
overflowing token use experts of its own GPU that have room instead.

A substitute is the local expert with most room, and only for a choice that overflowed; the paper
takes further local experts as candidates of every token before it enforces the capacity. The rule
`expanded-drop` of `moesim.routing` picks substitutes by score, from traces with candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from moesim.choices import Keep as Keep
from moesim.choices import Scope as Scope
from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.kernels import kernel
from moesim.placement import EMPTY, Placement
from moesim.routing.limits import beyond, capacity
from moesim.trace.batches import Batches
from moesim.trace.format import Trace
from moesim.types import Array, stream


@dataclass(frozen=True, slots=True)
class DropPolicy:
    """Capacity factor gamma, and which choices of an overfull expert stay.

    keep: `score` the highest gate weights, `first` or `last` in batch order, `random` any, those
    at the earliest `position` in their request. scope: the tokens that C counts, all of a `step`
    or each home GPU's by themselves (as the paper does to save a round of communication). expand:
    expanded drop.
    Raises UnknownNameError or InputError for values that cannot be used.
    """

    gamma: float
    keep: Keep = "score"
    scope: Scope = "step"
    expand: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise InputError(f"capacity factor {self.gamma}", "give a factor above 0, as 1.5")
        if self.keep not in get_args(Keep):
            raise UnknownNameError("way to drop", self.keep, get_args(Keep))
        if self.scope not in get_args(Scope):
            raise UnknownNameError("scope of the capacity", self.scope, get_args(Scope))


@dataclass(frozen=True, slots=True)
class Drops:
    """Counts over all batches and layers: choices the tokens made, of which some were dropped and
    some went to a substitute; tokens (token-layer pairs) that lost every choice."""

    choices: int = 0
    dropped: int = 0
    substituted: int = 0
    emptied: int = 0

    def __add__(self, other: Drops) -> Drops:
        return Drops(
            self.choices + other.choices,
            self.dropped + other.dropped,
            self.substituted + other.substituted,
            self.emptied + other.emptied,
        )

    def to_json(self) -> dict[str, float]:
        share = self.dropped / self.choices if self.choices else 0.0
        return {
            "choices": self.choices,
            "dropped": self.dropped,
            "dropped_share": share,
            "substituted": self.substituted,
            "token_layers_left_empty": self.emptied,
        }


def apply_capacity(
    policy: DropPolicy,
    trace: Trace,
    batches: Batches,
    home: npt.NDArray[np.int32],
    placement: Placement,
) -> tuple[Trace, Batches, Drops]:
    """The same batches with overflowing choices replaced by -1 (or a substitute).

    The trace that is returned holds the batches' tokens one after the other, so that a token in two
    batches can lose different choices. Raises MismatchError where `keep` is score and the trace has
    no gate weights.
    """
    if policy.keep == "score" and trace.gate_weights is None:
        raise MismatchError(
            "the trace has no gate weights to drop by score",
            "drop by random, first or last, or capture gate weights",
        )
    ids = np.asarray(trace.expert_ids)[batches.token_idx].astype(np.int16)
    total = Drops()
    for b in range(len(batches)):
        span = slice(int(batches.indptr[b]), int(batches.indptr[b + 1]))
        tokens = batches.token_idx[span]
        positions = np.asarray(trace.positions)[tokens]
        gates = None
        if trace.gate_weights is not None:
            gates = np.asarray(trace.gate_weights)[tokens]
        mark = int(tokens[0]) if len(tokens) else 0
        rng = stream(policy.seed, 0xD0, mark, len(tokens))
        total = total + _drop_batch(
            policy, ids[span], gates, positions, home[span], placement, trace, rng
        )
    picked = trace.take(batches.token_idx)
    moved = Batches(
        np.arange(len(batches.token_idx)), batches.indptr, batches.phase, batches.batch_tokens
    )
    return replace(picked, expert_ids=ids), moved, total


def _drop_batch(
    policy: DropPolicy,
    ids: Array,
    gates: Array | None,
    positions: Array,
    home: Array,
    placement: Placement,
    trace: Trace,
    rng: np.random.Generator,
) -> Drops:
    """Drop within one batch, writing into `ids` [T, L, K]."""
    num_tokens, num_layers, top_k = ids.shape
    num_experts = trace.num_experts
    group = home.astype(np.int64) if policy.scope == "gpu" else np.zeros(num_tokens, np.int64)
    size = np.bincount(group)
    limit = np.array([capacity(policy.gamma, int(n), top_k, num_experts) for n in size], np.int64)
    place = np.repeat(np.arange(num_tokens), top_k)
    total = Drops()
    for layer in range(num_layers):
        chosen = ids[:, layer].ravel().astype(np.int64)
        valid = np.flatnonzero(chosen >= 0)
        cell = group[place[valid]] * num_experts + chosen[valid]
        rank_key: npt.NDArray[Any]
        if policy.keep == "score" and gates is not None:
            rank_key = -gates[:, layer].ravel()[valid].astype(np.float64)
        elif policy.keep == "random":
            rank_key = rng.random(len(valid))
        elif policy.keep == "position":
            rank_key = positions[place[valid]]
        else:
            rank_key = place[valid] if policy.keep == "first" else -place[valid]
        over = valid[beyond(cell, rank_key, limit[cell // num_experts])]
        substituted = 0
        kept = ids[:, layer].copy()
        kept.reshape(-1)[over] = -1
        if policy.expand and len(over):
            held = placement.physical_to_logical[layer].reshape(placement.num_gpus, -1)
            room = limit[:, None] - _count(kept, group, len(size), num_experts)
            substituted = _substitute(
                ids[:, layer].copy(), kept, np.sort(over), home, group, held, room
            )
        emptied = int(((kept < 0).all(axis=1) & (ids[:, layer] >= 0).any(axis=1)).sum())
        ids[:, layer] = kept
        total = total + Drops(len(valid), len(over) - substituted, substituted, emptied)
    return total


def _count(ids: Array, group: Array, num_groups: int, num_experts: int) -> Array:
    """[groups, E] choices of each expert."""
    cell = (group[:, None] * num_experts + ids)[ids >= 0]
    return np.bincount(cell, minlength=num_groups * num_experts).reshape(num_groups, -1)


@kernel
def _substitute(
    original: Array, kept: Array, over: Array, home: Array, group: Array, held: Array, room: Array
) -> int:
    """Give each overflowing choice, in batch order, the expert with most room among those of the
    token's home GPU that it did not choose; returns how many got one. `room` [groups, E]."""
    top_k = kept.shape[1]
    count = 0
    for flat in over:
        token, k = flat // top_k, flat % top_k
        best, most = EMPTY, 0
        for slot in range(held.shape[1]):
            expert = held[home[token], slot]
            if expert == EMPTY or room[group[token], expert] <= most:
                continue
            taken = False
            for j in range(top_k):
                if original[token, j] == expert or kept[token, j] == expert:
                    taken = True
            if not taken:
                best, most = expert, room[group[token], expert]
        if best != EMPTY:
            kept[token, k] = best
            room[group[token], best] -= 1
            count += 1
    return count
