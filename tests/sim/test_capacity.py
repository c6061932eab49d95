"""Capacity of experts: what is dropped, kept and substituted, and that nothing else is lost."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.routing import route
from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.placement import Placement
from moesim.routing.api import reroute
from moesim.routing.limits import capacity
from moesim.sim.analytic import run_analytic
from moesim.sim.capacity import DropPolicy, apply_capacity
from moesim.sim.event import run_event
from moesim.sim.prepare import Models
from moesim.sim.schedules.sequential import Sequential
from moesim.trace.batches import Batches
from moesim.trace.format import Trace, TraceMeta


def toy(ids: list[list[int]], gates: list[list[float]] | None, num_experts: int = 4) -> Trace:
    """One layer, one request."""
    table = np.array(ids, np.uint8)[:, None, :]
    count = len(ids)
    weights = None if gates is None else np.array(gates, np.float32)[:, None, :]
    return Trace(
        expert_ids=table,
        request_ids=np.zeros(count, np.int32),
        positions=np.arange(count, dtype=np.int32),
        phases=np.ones(count, np.uint8),
        meta=TraceMeta("toy", num_experts, table.shape[2], (0,)),
        gate_weights=weights,
    )


def one(trace: Trace) -> Batches:
    count = trace.num_tokens
    return Batches(np.arange(count), np.array([0, count]), "decode", count)


PLACEMENT = Placement(np.arange(4, dtype=np.int32)[None], 2, 1, 4)
IDS = [[0, 1], [0, 2], [0, 1], [0, 3]]
GATES = [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]]
HOME = np.array([0, 0, 1, 1], np.int32)


def drop(policy: DropPolicy, gates: list[list[float]] | None = GATES):
    trace = toy(IDS, gates)
    out, batches, drops = apply_capacity(policy, trace, one(trace), HOME, PLACEMENT)
    return out.expert_ids[:, 0].tolist(), batches, drops


def test_capacity_formula() -> None:
    """C = ceil(gamma k T / E): 1.0 x 2 x 4 / 4 = 2; 1.25 gives 2.5, so 3; 0.1 gives 1 of 0.2."""
    assert capacity(1.0, 4, 2, 4) == 2
    assert capacity(1.25, 4, 2, 4) == 3
    assert capacity(0.1, 4, 2, 4) == 1


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("score", {0, 3}), ("first", {0, 1}), ("last", {2, 3}), ("position", {0, 1})],
)
def test_who_stays(keep: str, kept: set[int]) -> None:
    """C = 2, expert 0 is chosen by all four tokens: two lose it. By score, 0.9 and 0.8 stay."""
    ids, _, drops = drop(DropPolicy(1.0, keep))  # type: ignore[arg-type]
    assert {t for t in range(4) if ids[t][0] == 0} == kept
    assert [row[1] for row in ids] == [1, 2, 1, 3]
    assert (drops.choices, drops.dropped, drops.substituted, drops.emptied) == (8, 2, 0, 0)


def test_position_is_of_the_request_and_not_of_the_batch() -> None:
    """C = 2 and expert 0 chosen by all four: the batch holds tokens 2 and 3 of one request before
    0 and 1 of another, and these two keep it, as with the rule `drop`."""
    trace = toy(IDS, GATES)
    moved = replace(
        trace,
        request_ids=np.array([0, 0, 1, 1], np.int32),
        positions=np.array([2, 3, 0, 1], np.int32),
    )
    policy = DropPolicy(1.0, "position")
    out, _, _ = apply_capacity(policy, moved, one(moved), HOME, PLACEMENT)
    assert [row[0] for row in out.expert_ids[:, 0].tolist()] == [-1, -1, 0, 0]
    one_step = replace(moved, step_ids=np.zeros(4, np.int32))
    ruled = reroute(one_step, "drop:factor=1,keep=position").trace.expert_ids
    assert np.sort(ruled[:, 0]).tolist() == np.sort(out.expert_ids[:, 0]).tolist()


def test_random_keeps_as_many_and_is_seeded() -> None:
    first, _, drops = drop(DropPolicy(1.0, "random", seed=4))
    again, _, _ = drop(DropPolicy(1.0, "random", seed=4))
    assert first == again
    assert sum(row[0] == 0 for row in first) == 2
    assert drops.dropped == 2
    others = {str(drop(DropPolicy(1.0, "random", seed=s))[0]) for s in range(20)}
    assert len(others) > 1


def test_capacity_of_each_gpu() -> None:
    """Two tokens per GPU: C = ceil(2 x 2 / 4) = 1, so one of each pair keeps expert 0, the one with
    the higher score; and on GPU 1 no other expert is over."""
    ids, _, drops = drop(DropPolicy(1.0, "score", "gpu"))
    assert {t for t in range(4) if ids[t][0] == 0} == {0, 3}
    assert drops.dropped == 2


def test_expanded_drop() -> None:
    """Tokens 1 (home GPU 0: experts 0, 1) and 2 (GPU 1: experts 2, 3) lose expert 0. With C = 2,
    expert 1 is full with tokens 0 and 2, so token 1 finds nothing at home; experts 2 and 3 have
    room 1 each, token 2 takes the first of them."""
    ids, _, drops = drop(DropPolicy(1.0, "score", expand=True))
    assert ids[1] == [-1, 2]
    assert ids[2] == [2, 1]
    assert (drops.dropped, drops.substituted) == (1, 1)


def test_a_token_can_lose_everything() -> None:
    trace = toy([[0], [0], [0], [0]], None)
    policy = DropPolicy(1.0, "first")
    _, _, drops = apply_capacity(policy, trace, one(trace), HOME, PLACEMENT)
    assert (drops.dropped, drops.emptied) == (3, 3)


@given(
    st.floats(0.05, 3.0),
    st.sampled_from(["score", "random", "first", "last", "position"]),
    st.sampled_from(["step", "gpu"]),
    st.booleans(),
    st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_every_choice_is_served_or_counted(gamma, keep, scope, expand, seed) -> None:
    """INV-1: slots serve choices less drops; no expert takes more than its capacity; no token has
    an expert twice."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((40, 8)) * np.arange(1, 9), axis=1)[:, :3]
    trace = toy(ids.tolist(), rng.random((40, 3)).tolist(), 8)
    placement = Placement(np.arange(8, dtype=np.int32)[None], 4, 2, 8)
    home = rng.integers(0, 4, 40).astype(np.int32)
    policy = DropPolicy(gamma, keep, scope, expand, seed)
    out, batches, drops = apply_capacity(policy, trace, one(trace), home, placement)
    routed = route(out, batches, placement, home=home)
    assert routed.slot_tokens.sum() == drops.choices - drops.dropped
    assert drops.choices == 120
    kept = out.expert_ids[:, 0]
    for group in range(4) if scope == "gpu" else (None,):
        tokens = home == group if scope == "gpu" else np.ones(40, bool)
        count = np.bincount(kept[tokens][kept[tokens] >= 0], minlength=8)
        assert count.max() <= math.ceil(gamma * 3 * int(tokens.sum()) / 8 - 1e-9)
    for row in kept:
        chosen = row[row >= 0]
        assert len(set(chosen.tolist())) == len(chosen)


def test_no_limit_changes_nothing() -> None:
    ids, _, drops = drop(DropPolicy(100.0))
    assert ids == IDS
    assert drops.dropped == 0


def test_drops_in_a_simulation(trace, batches, models_of, linear_of) -> None:
    """INV-8 and INV-9 with drops: both fidelities agree, and fewer tokens are never slower."""
    plain = models_of(8)
    full = run_analytic(plain, trace, batches, linear_of(plain))
    for keep in ("score", "random"):
        policy = DropPolicy(1.0, keep, seed=2)  # type: ignore[arg-type]
        models = Models(
            plain.cluster, plain.step, plain.links, plain.exchange, plain.home, drop=policy
        )
        closed = run_analytic(models, trace, batches, linear_of(models))
        event = run_event(models, Sequential(), trace, batches, linear_of(models))
        np.testing.assert_allclose(event.step_us, closed.step_us, rtol=1e-12)
        assert event.extra["drops"] == closed.extra["drops"]
        assert 0.05 < closed.extra["drops"]["dropped_share"] < 0.6
        assert (closed.step_us < full.step_us).all()


def test_score_needs_gate_weights() -> None:
    with pytest.raises(MismatchError, match="gate weights"):
        drop(DropPolicy(1.0, "score"), None)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
def test_refused_factors(gamma: float) -> None:
    with pytest.raises(InputError):
        DropPolicy(gamma)


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError):
        DropPolicy(1.0, "scores")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError):
        DropPolicy(1.0, scope="node")  # type: ignore[arg-type]
