"""Cache simulation: hits of a policy at every cache size, in one pass over the events.

Semantics, stated once for the whole package:

- `atomic` (the default): an event's set of experts is classified against the cache before it,
  then the cache is updated once. After it, the cache holds the whole set if that fits (experts of
  the event are never evicted by the same event), and of the rest those with the highest priority;
  a set larger than the cache leaves the set's best. An expert that several tokens of a step chose
  is one access.
- `sequential`: every (token, choice) is an access of its own, classified and admitted one after
  another in the order of tokens and choices, so that a later choice may find that an earlier one
  of the same token has just evicted it, and repeated choices within a step hit.

Every miss is one fetch of one expert, whether it is then kept or not. Ties in priority go to the
more recently used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moesim.caching import stack
from moesim.caching.events import (
    Events,
    Stream,
    build_events,
    layer_gates,
    layer_ids,
    split_accesses,
    without,
)
from moesim.caching.policies import SEMANTICS, get_policy
from moesim.caching.start import asked_of, new_state
from moesim.caching.state import LRU, Rule
from moesim.errors import InputError, UnknownNameError
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace
from moesim.types import FloatArray, IntArray

Semantics = Literal["atomic", "sequential"]
Scope = Literal["layer", "model"]


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """How a cache behaves.

    policy: a name of `policies.POLICIES`. scope: `layer` (every layer has its own slots) or
    `model` (all layers compete for one pool). warm: start with the most frequent experts of the
    tuning requests instead of empty (offline policies then start with the best content there is).
    lookahead: steps that `lookahead` sees, the current one included. alpha: weight of the newest
    step in `score`.
    """

    policy: str = "lru"
    semantics: Semantics = "atomic"
    scope: Scope = "layer"
    warm: bool = False
    lookahead: int = 16
    alpha: float = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """What one cache sees: token-level choices ids, gates [N, K]; event n holds tokens
    indptr[n]:indptr[n + 1]; lane_idx, starts [N] as in Stream; `num_items` items, `weight` and
    `frequency` [num_items] (share of tuning tokens that chose the item, zeros if unknown)."""

    ids: npt.NDArray[np.int32]
    gates: npt.NDArray[np.float32]
    indptr: IntArray
    lane_idx: npt.NDArray[np.int32]
    starts: npt.NDArray[np.bool_]
    num_lanes: int
    num_items: int
    weight: FloatArray
    frequency: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Depths:
    """One cache's events with the depth of every access (see `stack.stack_depths`)."""

    events: Events
    depth: npt.NDArray[np.int32]

    def hits(self) -> IntArray:
        """[num_items + 1]: hits with 0, 1, .., num_items slots."""
        known = self.depth[self.depth >= 0]
        count = np.bincount(known, minlength=self.events.num_items)
        return np.concatenate(([0], np.cumsum(count))).astype(np.int64)

    def misses_per_event(self, capacity: int) -> IntArray:
        """[events]: misses of each event with `capacity` slots."""
        miss = (self.depth < 0) | (self.depth >= capacity)
        total = np.concatenate(([0], np.cumsum(miss)))
        return total[self.events.indptr[1:]] - total[self.events.indptr[:-1]]


@dataclass(frozen=True, slots=True, eq=False)
class HitCurves:
    """Hits and accesses of each cache: hits [C, num_items + 1] by number of slots, accesses [C];
    C is the number of layers, or 1 where one pool serves the model."""

    settings: CacheSettings
    hits: IntArray
    accesses: IntArray
    num_tokens: int = 0

    def hit_rate(self, capacity: int | IntArray) -> float:
        """Overall hit rate with `capacity` slots in every cache, or `capacity[i]` in cache i."""
        slots = np.broadcast_to(np.asarray(capacity), self.accesses.shape)
        picked = np.take_along_axis(self.hits, slots[:, None], axis=1)
        return float(picked.sum() / max(1, self.accesses.sum()))


def expert_frequency(trace: Trace, requests: RequestIndex) -> FloatArray:
    """[L, E]: share of the requests' tokens that chose each expert."""
    out = np.zeros((trace.num_layers, trace.num_experts))
    for layer in range(trace.num_layers):
        ids = np.asarray(trace.expert_ids[:, layer])[requests.token_idx].astype(np.int64)
        out[layer] = np.bincount(ids[ids >= 0], minlength=trace.num_experts)
    return out / max(1, len(requests.token_idx))


def layer_choices(
    trace: Trace, stream: Stream, layer_idx: int, frequency: FloatArray | None = None
) -> Choices:
    """The choices of one layer; `frequency` [L, E] from `expert_frequency`."""
    num = trace.num_experts
    return Choices(
        layer_ids(trace, stream, layer_idx),
        layer_gates(trace, stream, layer_idx),
        stream.indptr,
        stream.lane_idx,
        stream.starts,
        stream.num_lanes,
        num,
        np.ones(num),
        np.zeros(num) if frequency is None else frequency[layer_idx],
    )


def model_choices(trace: Trace, stream: Stream, frequency: FloatArray | None = None) -> Choices:
    """All layers' choices in order of execution for one shared pool: item layer x E + expert.

    MoE-Infinity's layer weight (1 - layer / L) applies: experts of early layers are kept, since
    there is least time to fetch them ahead.
    """
    num_layers, num = trace.num_layers, trace.num_experts
    steps = np.repeat(np.arange(stream.num_steps), np.diff(stream.indptr))
    position = np.arange(stream.num_tokens) - stream.indptr[steps]
    width = np.diff(stream.indptr)
    base = stream.indptr[steps] * num_layers + position
    total = stream.num_tokens * num_layers
    ids = np.empty((total, trace.top_k), np.int32)
    gates = np.empty((total, trace.top_k), np.float32)
    lane = np.empty(total, np.int32)
    starts = np.zeros(total, bool)
    for layer in range(num_layers):
        at = base + layer * width[steps]
        chosen = layer_ids(trace, stream, layer)
        ids[at] = np.where(chosen >= 0, chosen + layer * num, chosen)
        gates[at] = layer_gates(trace, stream, layer)
        lane[at] = stream.lane_idx
        if layer == 0:
            starts[at] = stream.starts
    indptr = np.concatenate(([0], np.cumsum(np.repeat(width, num_layers)))).astype(np.int64)
    weight = np.repeat(1 - np.arange(num_layers) / num_layers, num)
    known = np.zeros(num_layers * num) if frequency is None else frequency.ravel()
    return Choices(
        ids, gates, indptr, lane, starts, stream.num_lanes, num_layers * num, weight, known
    )


def run_policy(
    choices: Choices, settings: CacheSettings, pinned: npt.NDArray[np.integer] | None = None
) -> Depths:
    """Depths of all accesses of one cache under `settings`.

    Accesses to `pinned` items are left out: they always hit, in slots of their own.
    """
    policy = get_policy(settings.policy)
    if settings.semantics not in SEMANTICS:
        raise UnknownNameError("cache semantics", settings.semantics, SEMANTICS)
    if settings.lookahead < 1 or not 0 < settings.alpha <= 1:
        raise InputError(
            f"lookahead {settings.lookahead} and alpha {settings.alpha} are out of range",
            "give a lookahead of at least 1 and an alpha above 0, at most 1",
        )
    ids = choices.ids if pinned is None else without(choices.ids, pinned)
    gates, indptr, lookahead, alpha = (
        choices.gates,
        choices.indptr,
        settings.lookahead,
        settings.alpha,
    )
    lane, starts = choices.lane_idx, choices.starts
    if settings.semantics == "sequential":
        per_token = max(1, ids.shape[1])
        gates = gates[ids >= 0][:, None]
        ids, indptr, token = split_accesses(ids)
        lane, starts = lane[token], starts[token] & (np.diff(token, prepend=-1) > 0)
        lookahead *= per_token
        alpha = 1 - (1 - alpha) ** (1 / per_token)
    events = build_events(ids, gates, indptr, choices.num_items)
    stream = Stream(np.arange(len(lane)), indptr, lane, starts, choices.num_lanes)
    rule = Rule(policy.code, alpha, lookahead)
    depth = one_pass(
        rule,
        events,
        stream,
        ids,
        semantics=SEMANTICS[settings.semantics],
        warm=settings.warm,
        frequency=choices.frequency,
        weight=choices.weight,
    )
    return Depths(events, depth)


def hit_curves(
    trace: Trace,
    stream: Stream,
    settings: CacheSettings,
    frequency: FloatArray | None = None,
) -> HitCurves:
    """Hits of `settings` at every cache size, one pass a layer (or one over the whole model)."""
    if settings.scope == "model":
        runs = iter([run_policy(model_choices(trace, stream, frequency), settings)])
    else:
        runs = (
            run_policy(layer_choices(trace, stream, layer, frequency), settings)
            for layer in range(trace.num_layers)
        )
    hits, accesses = [], []
    for run in runs:
        hits.append(run.hits())
        accesses.append(run.events.num_accesses)
    return HitCurves(settings, np.stack(hits), np.array(accesses), stream.num_tokens)


def one_pass(
    rule: Rule,
    events: Events,
    stream: Stream,
    ids: npt.NDArray[np.int32],
    *,
    semantics: int,
    warm: bool,
    frequency: FloatArray,
    weight: FloatArray | None = None,
) -> npt.NDArray[np.int32]:
    """[A]: `stack.stack_depths` of one cache; ids: [N, K] items that the stream's tokens chose,
    frequency, weight: [E] of `Choices`."""
    num = events.num_items
    if rule.policy == LRU and not warm:
        return stack.lru_depths(events.indptr, events.item, num)
    asked = asked_of(rule, events, stream, ids[:, None])
    state, order = new_state(
        rule,
        asked,
        np.zeros(1, np.int64),
        np.zeros((1, num), bool),
        frequency[None],
        stream.num_lanes,
        warm=warm,
        weight=weight,
    )
    return stack.stack_depths(rule, asked, state, order[0], semantics)
