"""Cache schedules out of what tokens chose: the policy state of `caching.state`, step by step.

Runs inside an engine's container too, where the state's functions are not compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesim.caching.events import Events, Stream, build_events
from moesim.caching.start import asked_of, new_state
from moesim.caching.state import (
    ABSENT,
    LRU,
    PINNED,
    Asked,
    CacheState,
    Rule,
    admit,
    learn,
    look_ahead,
    lookup,
)
from moesim.errors import InputError
from moesim.replay.schedule import Schedule
from moesim.types import IntArray


def lru_schedule(
    experts: npt.NDArray[np.integer],
    num_experts: int,
    slots_per_layer: int | Sequence[int],
    *,
    lookahead: int = 0,
    pinned: Sequence[Sequence[int]] | None = None,
) -> Schedule:
    """Least recently used, a cache a layer; experts [T, L, K], -1 where none.

    slots_per_layer: of every layer, or of each. pinned: experts of each layer that stay in slots of
    their own. The caches start as `lowest_first` says; see `follow` for the rest.

    Raises InputError for a layer whose slots, pinned ones included, are fewer than top-k or more
    than the experts.
    """
    num_layers, top_k = experts.shape[1:]
    if isinstance(slots_per_layer, int):
        slots_per_layer = [slots_per_layer] * num_layers
    fixed = [tuple(row) for row in pinned or [()] * num_layers]
    for layer, (size, mine) in enumerate(zip(slots_per_layer, fixed, strict=True)):
        if size > num_experts - len(mine) or size + len(mine) < top_k:
            raise InputError(
                f"layer {layer}: a cache of {size + len(mine)} experts, {len(mine)} of them pinned,"
                f" top-k {top_k}, {num_experts} experts",
                f"give {top_k} to {num_experts} slots per layer",
            )
    slots = np.array(slots_per_layer, np.int64)
    mask = np.zeros((num_layers, num_experts), bool)
    for layer, mine in enumerate(fixed):
        mask[layer, list(mine)] = True
    rule = Rule(LRU, 0.5, 1)
    stream = token_stream(len(experts))
    asked = asked_of(rule, token_events(experts, num_experts), stream, experts, num_layers)
    order = lowest_first(slots, mask)
    unknown = np.zeros(mask.shape)
    state, _ = new_state(rule, asked, slots, mask, unknown, 1, warm=False, order=order)
    return follow("lru", rule, asked, state, experts, fixed, lookahead)


def token_stream(num_tokens: int, starts: npt.NDArray[np.bool_] | None = None) -> Stream:
    """One token a step in one lane; starts [T]: the first token of each request, default: one."""
    at = np.arange(num_tokens + 1)
    first = at[:-1] == 0 if starts is None else starts
    return Stream(at[:-1], at, np.zeros(num_tokens, np.int32), first, 1)


def token_events(
    experts: npt.NDArray[np.integer],
    num_experts: int,
    gates: npt.NDArray[np.floating] | None = None,
) -> Events:
    """What one token after another asks each layer for: event t x L + l; experts, gates
    [T, L, K], gates 1/K each where there are none."""
    top_k = experts.shape[2]
    ids = np.ascontiguousarray(experts.reshape(-1, top_k), np.int32)
    shares = np.full(ids.shape, 1 / top_k, np.float32)
    if gates is not None:
        shares = np.ascontiguousarray(gates.reshape(ids.shape), np.float32)
    return build_events(ids, shares, np.arange(len(ids) + 1), num_experts)


def lowest_first(slots: IntArray, pinned: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """[L, E] preload order of caches that hold their lowest experts that are not pinned, of which
    the lowest counts as the least recently used."""
    order = np.full(pinned.shape, -1, np.int32)
    for layer, size in enumerate(slots.tolist()):
        lowest = np.flatnonzero(~pinned[layer])[:size]
        order[layer, : len(lowest)] = lowest[::-1]
    return order


def follow(
    policy: str,
    rule: Rule,
    asked: Asked,
    state: CacheState,
    experts: npt.NDArray[np.integer],
    pinned: Sequence[Sequence[int]],
    lookahead: int,
) -> Schedule:
    """The schedule of a cache a layer whose policy state is `state`; experts [T, L, K].

    lookahead: a missing expert's copy is issued that many steps before its step, as a perfect
    predictor of the next layers would (0: on demand). Copies never start before the slot's last
    reader. What the policy does not keep passes through staging slots, of which there are as many
    as any step needs.
    """
    num_layers, top_k = experts.shape[1:]
    ids = np.asarray(experts, np.int64).reshape(-1, top_k)
    slots = state.slots.tolist()
    layers = [_Layer(rule, asked, state, layer, pinned[layer]) for layer in range(num_layers)]
    first = [dict(layer.content) for layer in layers]
    places = [
        layers[step % num_layers].serve(step, num_layers, row, lookahead)
        for step, row in enumerate(ids.tolist())
    ]
    staging = max(layer.staging for layer in layers)
    stride = staging + max(n + len(row) for n, row in zip(slots, pinned, strict=True))
    num_experts = state.place.shape[1]

    def slot(layer: int, place: int) -> int:
        return place % stride + layer * stride

    initial = np.full(num_layers * stride, -1, np.int64)
    for layer, content in enumerate(first):
        for place, expert in content.items():
            initial[slot(layer, place)] = layer * num_experts + expert
    read = np.full(ids.shape, -1, np.int64)
    for step, row in enumerate(places):
        for k, place in row.items():
            read[step, k] = slot(step % num_layers, place)
    copies = sorted(
        (
            (issue, need, layer.cache * num_experts + expert, slot(layer.cache, place))
            for layer in layers
            for issue, need, expert, place in layer.copies
        ),
        key=lambda copy: copy[:2],
    )
    issued, needed, items, into = np.array(copies, np.int64).reshape(-1, 4).T
    sizes = "-".join(map(str, sorted({min(slots), max(slots)})))
    beside = f" and {sum(map(len, pinned)) / num_layers:.3g} pinned" if any(pinned) else ""
    label = f"{policy}, {sizes}{beside} of {num_experts} experts per layer, lookahead {lookahead}"
    return Schedule(
        label, num_layers, num_experts, stride, ids, read, issued, needed, items, into, initial
    )


@dataclass(slots=True, eq=False)
class _Layer:
    """One layer's cache on the device. Places are counted from 0: pinned experts, then the
    policy's slots; staging places are -1, -2, ... from the end.

    place_of: of each of the policy's slots, which change place with a staging place when a step
    reads the old expert and the new one. copies: (issue, need, expert, place).
    """

    rule: Rule
    asked: Asked
    state: CacheState
    cache: int
    pinned: Sequence[int]
    place_of: list[int] = field(init=False)
    content: dict[int, int] = field(init=False)
    copies: list[tuple[int, int, int, int]] = field(default_factory=list)
    staging: int = 0
    _spare: list[int] = field(default_factory=list)
    _last_read: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        held = self.state.held[self.cache, : self.state.num_held[self.cache]].tolist()
        size, fixed = int(self.state.slots[self.cache]), len(self.pinned)
        rank = {expert: i for i, expert in enumerate(sorted(held))}
        self.place_of = [fixed + (rank[held[j]] if j < len(held) else j) for j in range(size)]
        self.content = dict(enumerate(self.pinned))
        self.content |= {fixed + i: expert for expert, i in rank.items()}

    def serve(self, step: int, num_layers: int, row: list[int], lookahead: int) -> dict[int, int]:
        """Places from which a step reads its experts, by position in `row`."""
        now, state, cache = step // num_layers, self.state, self.cache
        at: dict[int, int] = {}
        for e in row:
            slot = lookup(state, cache, e) if e >= 0 else ABSENT
            if slot != ABSENT:
                at[e] = self.pinned.index(e) if slot == PINNED else self.place_of[slot]
        learn(self.rule, self.asked, state, cache, now)
        free_after: list[int] = []
        for e in row:
            if e >= 0 and e not in at:
                at[e] = place = self._admit(e, now, free_after)
                begin = max(step - lookahead, self._last_read.get(place, -1) + 1, 0)
                self.copies.append((begin, step, e, place))
        look_ahead(self.rule, self.asked, state, cache, now)
        self._spare += reversed(free_after)
        self._last_read |= dict.fromkeys(at.values(), step)
        return {k: at[e] for k, e in enumerate(row) if e >= 0}

    def _admit(self, expert: int, now: int, free_after: list[int]) -> int:
        """The place to copy a missing expert to."""
        state, cache = self.state, self.cache
        held = state.held[cache].copy()
        slot = int(admit(self.rule, state, cache, expert, now))
        if slot != ABSENT and (held[slot] < 0 or state.mark[cache, held[slot]] != now):
            return self.place_of[slot]
        if not self._spare:
            self.staging += 1
            self._spare.append(-self.staging)
        place = self._spare.pop()
        if slot == ABSENT:
            free_after.append(place)
        else:
            free_after.append(self.place_of[slot])
            self.place_of[slot] = place
        return place
