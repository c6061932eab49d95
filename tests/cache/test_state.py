"""The policy state, one step at a time from Python, against the plain reference."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.caching.events import decode_stream
from moesim.caching.policies import POLICIES
from moesim.caching.simulate import expert_frequency
from moesim.caching.state import ABSENT, PINNED, admit, learn, look_ahead, lookup, update
from moesim.caching.timeline import Setup, all_events, policy_state


def states(toys: ModuleType, seed: int, policy: str, slots: int, pinned: list[int]):  # type: ignore[no-untyped-def]
    """(trace, stream, setup, rule, asked, state) of one layer of 7 experts, cold."""
    trace = toys.random_trace(seed, num_requests=3, tokens=10, layers=1, experts=7)
    requests = toys.all_requests(trace)
    stream = decode_stream(requests, seed=seed)
    fixed = np.zeros((1, 7), bool)
    fixed[0, pinned] = True
    setup = Setup(
        np.array([slots]), fixed, np.zeros(1, bool), expert_frequency(trace, requests), policy,
        warm=False, lookahead=3,
    )  # fmt: skip
    ids = np.asarray(trace.expert_ids)[stream.token_idx]
    return trace, stream, setup, *policy_state(setup, all_events(trace, stream), stream, ids)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "static"])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_step_by_step_equals_the_reference(
    toys: ModuleType, reference: ModuleType, policy: str, slots: int
) -> None:
    trace, stream, setup, rule, asked, state = states(toys, 3, policy, slots, [])
    events = np.asarray(trace.expert_ids)[stream.token_idx, 0].tolist()
    misses = []
    for now, event in enumerate(events):
        absent = [e for e in event if lookup(state, 0, e) == ABSENT]
        misses.append(len(absent))
        update(rule, asked, state, 0, now, np.array(absent, np.int64))
    assert misses == reference.simulate(
        events,
        slots,
        policy,
        lookahead=3,
        gates=np.asarray(trace.gate_weights)[stream.token_idx, 0].tolist(),
        start_at=np.flatnonzero(stream.starts).tolist(),
        prior=setup.frequency[0].tolist(),
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(list(POLICIES)),
    slots=st.integers(0, 5),
    pinned=st.lists(st.integers(0, 6), max_size=2, unique=True),
    skip=st.integers(1, 3),
)
def test_slots_and_places_agree(
    toys: ModuleType, seed: int, policy: str, slots: int, pinned: list[int], skip: int
) -> None:
    """Whatever is admitted (here only every `skip`-th miss): no more items than slots, each slot's
    item has that slot for its place, all others are absent or pinned, and `admit` says where."""
    _, stream, _, rule, asked, state = states(toys, seed, policy, slots, pinned)
    for now in range(stream.num_steps):
        items = asked.item[asked.indptr[now] : asked.indptr[now + 1]].tolist()
        absent = [e for e in items if lookup(state, 0, e) == ABSENT]
        learn(rule, asked, state, 0, now)
        for e in absent[::skip]:
            slot = admit(rule, state, 0, e, now)
            assert lookup(state, 0, e) == slot < slots
            assert slot == ABSENT or state.held[0, slot] == e
        look_ahead(rule, asked, state, 0, now)
        held = state.held[0, : state.num_held[0]].tolist()
        assert len(held) <= slots
        assert [int(lookup(state, 0, e)) for e in held] == list(range(len(held)))
        rest = set(range(7)) - set(held)
        assert {e for e in rest if lookup(state, 0, e) == PINNED} == set(pinned)
        assert all(lookup(state, 0, e) == ABSENT for e in rest - set(pinned))
    if policy == "static":
        assert state.num_held[0] == min(slots, 7 - len(pinned))
