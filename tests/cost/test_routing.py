"""Routing: by hand, the kernel against its slow reference, and what it refuses."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.compat import other_ranks
from moesim.cost.routing import home_ranks, route
from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.placement import Placement
from tests.reference.cost import route_reference

FIELDS = ("slot_tokens", "messages", "gpu_fan_out", "node_fan_out", "num_tokens")

# Two nodes of two GPUs, GPUs 0 1 | 2 3, two slots each; experts 0 and 5 have a replica on 0 and 3.
PLACEMENT = Placement(np.array([[0, 5, 1, 2, 3, 4, 0, 5]], np.int32), 4, 2, 6)


def messages(rows: dict[tuple[int, int], int]) -> list[list[int]]:
    out = np.zeros((4, 4), int)
    for pair, count in rows.items():
        out[pair] = count
    return out.tolist()


@pytest.mark.parametrize(
    ("dedup", "want"),
    [
        # Token 0 (home 1) chose experts 1 and 2, both on GPU 1: nothing is sent.
        # Token 1 (home 1) chose 3 and 4, both on GPU 2, and token 2 (home 0) chose 4 and 0:
        # expert 0's first choice goes to its first replica, on GPU 0.
        # Token 3 (home 0) chose 0 and 3: expert 0's second choice goes to GPU 3, expert 3 to GPU 2.
        ("none", {(1, 2): 2, (0, 2): 2, (0, 3): 1}),
        # Once per GPU: token 1 sends GPU 2 one copy.
        ("gpu", {(1, 2): 1, (0, 2): 2, (0, 3): 1}),
        # Once per node, to the GPU of the sender's local rank: token 1 goes 1 -> 3 -> 2, token 2
        # goes 0 -> 2, token 3 goes 0 -> 2 -> 3.
        ("node", {(1, 3): 1, (3, 2): 1, (0, 2): 2, (2, 3): 1}),
    ],
)
def test_messages_by_hand(build: ModuleType, dedup: Any, want: dict[tuple[int, int], int]) -> None:
    trace = build.make_trace([[[1, 2]], [[3, 4]], [[4, 0]], [[0, 3]]], 6)
    home = np.array([1, 1, 0, 0], np.int32)
    routed = route(trace, build.cut(trace, 4), PLACEMENT, dedup=dedup, home=home)
    # Slots:           0: 0  5  1: 1  2  2: 3  4  3: 0  5
    assert routed.slot_tokens.tolist() == [[[1, 0, 1, 1, 2, 2, 1, 0]]]
    assert routed.gpu_tokens(4).tolist() == [[[1, 2, 4, 1]]]
    assert routed.messages[0, 0].tolist() == messages(want)
    # Distinct GPUs: token 0 one, 1 one, 2 two (2, 0), 3 two (3, 2). Nodes: 1, 1, 2, 1.
    assert routed.gpu_fan_out.tolist() == [[6]]
    assert routed.node_fan_out.tolist() == [[5]]
    assert routed.num_tokens.tolist() == [4]


def test_policies_by_hand(build: ModuleType) -> None:
    """Expert 0 on GPUs 0 and 3, five tokens: split alternates, nearest stays at home."""
    trace = build.make_trace(np.zeros((5, 1, 1), int), 6)
    batches = build.cut(trace, 5)
    home = np.array([0, 1, 2, 3, 3], np.int32)
    split = route(trace, batches, PLACEMENT, policy="split", home=home)
    assert split.slot_tokens[0, 0, [0, 6]].tolist() == [3, 2]
    # Home 0 is served at home, 1 by its node's GPU 0, 2 by GPU 3, both of home 3 at home.
    near = route(trace, batches, PLACEMENT, policy="nearest", home=home)
    assert near.slot_tokens[0, 0, [0, 6]].tolist() == [2, 3]
    assert near.messages[0, 0].tolist() == messages({(1, 0): 1, (2, 3): 1})


def test_turns_start_anew_in_every_batch(build: ModuleType) -> None:
    trace = build.make_trace(np.zeros((4, 1, 1), int), 6)
    routed = route(trace, build.cut(trace, 1, 1, 2), PLACEMENT)
    assert routed.slot_tokens[:, 0, [0, 6]].tolist() == [[1, 0], [1, 0], [1, 1]]


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2), (6, 3), (4, 4), (6, 2)]),
    experts=st.integers(1, 12),
    spare=st.integers(0, 3),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    policy=st.sampled_from(["split", "nearest"]),
    dedup=st.sampled_from(["none", "gpu", "node"]),
    ranks=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_kernel_equals_reference(
    build: ModuleType,
    seed: int,
    shape: tuple[int, int],
    experts: int,
    spare: int,
    missing: float,
    policy: Any,
    dedup: Any,
    ranks: bool,
) -> None:
    rng = np.random.default_rng(seed)
    gpus, nodes = shape
    per_gpu = min(experts, -(-experts // gpus) + spare)
    top_k = int(rng.integers(1, experts + 1))
    given_ranks = rng.integers(0, 3 * gpus, 20) if ranks else None
    trace = build.random_trace(rng, 20, 2, experts, top_k, missing=missing, rank_ids=given_ranks)
    placement = build.random_placement(rng, 2, experts, gpus, nodes, per_gpu)
    batches = build.cut(trace, 7, 1, 12)
    home = home_ranks(trace, batches, gpus)
    fast = route(trace, batches, placement, policy=policy, dedup=dedup)
    slow = route_reference(trace, batches, placement, home, policy=policy, dedup=dedup)
    for name in FIELDS:
        assert np.array_equal(getattr(fast, name), getattr(slow, name)), name


def test_empty_slots_serve_nothing(build: ModuleType) -> None:
    rng = np.random.default_rng(0)
    trace = build.random_trace(rng, 30, 1, 3, 2)
    placement = Placement(np.array([[0, 1, 2, 0, 2, -1]], np.int32), 2, 1, 3)
    routed = route(trace, build.cut(trace, 30), placement)
    assert routed.slot_tokens[0, 0, 5] == 0
    assert routed.slot_tokens.sum() == 60


def test_hash_policy(build: ModuleType) -> None:
    """A token's replica depends on token and expert alone, and shares come out about even."""
    trace = build.make_trace(np.tile([[[0, 5]]], (4000, 1, 1)), 6)
    whole = route(trace, build.cut(trace, 4000), PLACEMENT, policy="hash")
    parts = route(trace, build.cut(trace, 1, 1500, 2499), PLACEMENT, policy="hash")
    assert np.array_equal(whole.slot_tokens.sum(axis=0), parts.slot_tokens.sum(axis=0))
    first = whole.slot_tokens[0, 0, [0, 1]]  # replicas of experts 0 and 5 on GPU 0
    # 4,000 fair coins: five standard deviations are 5 x sqrt(4000 / 4) = 158.
    assert (np.abs(first - 2000) < 158).all()
    # Experts hash independently: both on GPU 0 or both on GPU 3 for about half of the tokens.
    assert abs(int(whole.gpu_fan_out.sum()) - 6000) < 158


def test_home_ranks(build: ModuleType) -> None:
    trace = build.make_trace(np.zeros((9, 1, 1), int), 1)
    # 6 tokens over 4 GPUs: token i to GPU i * 4 // 6; 3 tokens likewise.
    assert home_ranks(trace, build.cut(trace, 6, 3), 4).tolist() == [0, 0, 1, 2, 2, 3, 0, 1, 2]
    ranked = build.make_trace(np.zeros((9, 1, 1), int), 1, rank_ids=[0, 3, 1, 2, 2, 2, 2, 0, 1])
    assert home_ranks(ranked, build.cut(trace, 3, 2), 4).tolist() == [0, 3, 1, 2, 2]
    assert other_ranks(ranked, 4) is None


@pytest.mark.parametrize("ranks", [[0] * 9, [0, 1, 2] * 3, [0, 1, 2, 4] * 2 + [1], [5] * 9])
def test_ranks_of_other_gpus_are_no_homes(build: ModuleType, ranks: list[int]) -> None:
    """One rank's tokens, or ranks that are not 0 to 3, say nothing about four GPUs: even homes."""
    trace = build.make_trace(np.zeros((9, 1, 1), int), 1, rank_ids=ranks)
    assert home_ranks(trace, build.cut(trace, 6), 4).tolist() == [0, 0, 1, 2, 2, 3]
    assert "home ranks are taken as even" in (other_ranks(trace, 4) or "")


@given(st.integers(1, 40), st.integers(1, 16))
def test_home_ranks_are_even_and_contiguous(build: ModuleType, tokens: int, gpus: int) -> None:
    trace = build.make_trace(np.zeros((tokens, 1, 1), int), 1)
    home = home_ranks(trace, build.cut(trace, tokens), gpus)
    assert (np.diff(home) >= 0).all()
    count = np.bincount(home, minlength=gpus)
    assert len(count) == gpus
    assert count.max() - count.min() <= 1


def test_refusals(build: ModuleType) -> None:
    trace = build.make_trace([[[1, 2]], [[3, 4]]], 6)
    batches = build.cut(trace, 2)
    with pytest.raises(MismatchError, match="6 experts, the plan 1 of 3"):
        route(trace, batches, Placement(np.array([[0, 1, 2, 0]], np.int32), 2, 1, 3))
    with pytest.raises(MismatchError, match="the trace has 1 MoE layers"):
        route(trace, batches, Placement(np.tile(np.arange(6, dtype=np.int32), (2, 1)), 2, 1, 6))
    with pytest.raises(UnknownNameError, match="unknown replica policy 'fair'"):
        route(trace, batches, PLACEMENT, policy="fair")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="unknown deduplication 'nodes'"):
        route(trace, batches, PLACEMENT, dedup="nodes")  # type: ignore[arg-type]
    for home in ([0, 4], [-1, 0], [0], [0, 0, 0]):
        with pytest.raises(InputError, match="one of 4 GPUs for every token"):
            route(trace, batches, PLACEMENT, home=np.array(home, np.int32))
