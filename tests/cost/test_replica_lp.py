"""Replica policy lp: by hand, against a general LP solver, and against the other policies."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.routing import home_ranks, route
from moesim.placement import Placement
from tests.reference.cost import least_largest_load


def choices(ids: Any) -> Any:
    return np.asarray(ids).reshape(-1, 1, 1)


def test_shares_by_hand(build: ModuleType) -> None:
    """GPU 0 has experts 0, 1; GPU 1 has 0, 2; GPU 2 has 2, 3.

    Expert 0 has 6 tokens, 1 has 4, 2 has 2 and 3 has none: 12 on 3 GPUs, so 4 each is the least.
    Expert 1 fills GPU 0, so all of expert 0 goes to GPU 1, which is 6: GPUs 1 and 2 then hold 6 and
    0 to 2. GPU 1 is left by expert 2 alone. {GPU 0, GPU 1} must serve 0 and 1: 10 tokens, so 5 is
    the least: 1 of expert 0 on GPU 0, 5 on GPU 1, and expert 2 on GPU 2.
    """
    placement = Placement(np.array([[0, 1, 0, 2, 2, 3]], np.int32), 3, 1, 4)
    trace = build.make_trace(choices([0] * 6 + [1] * 4 + [2] * 2), 4)
    routed = route(trace, build.cut(trace, 12), placement, policy="lp")
    assert routed.slot_tokens.tolist() == [[[1, 4, 5, 0, 2, 0]]]
    # Split halves expert 0: 3 + 4 on GPU 0.
    split = route(trace, build.cut(trace, 12), placement, policy="split")
    assert split.gpu_tokens(3).max() == 7


def test_tokens_stay_near_where_balance_allows(build: ModuleType) -> None:
    """Expert 0 on GPUs 0 and 1 of one node, expert 1 on GPUs 2 and 3 of the other.

    Homes 0, 1, 2, 3 have three tokens of each. Balance allows all at home or in turn; expert 0's
    tokens of homes 2 and 3 have no replica on their node. Nothing is sent within a node.
    """
    placement = Placement(np.array([[0, 0, 1, 1]], np.int32), 4, 2, 2)
    home = np.repeat(np.arange(4, dtype=np.int32), 6)
    trace = build.make_trace(choices([0, 0, 0, 1, 1, 1] * 4), 2)
    routed = route(trace, build.cut(trace, 24), placement, policy="lp", home=home)
    assert routed.slot_tokens.tolist() == [[[6, 6, 6, 6]]]
    sent = routed.messages[0, 0]
    assert sent[:2, :2].sum() == 0
    assert sent[2:, 2:].sum() == 0
    assert sent.sum() == 12


def test_chain_of_replicas(build: ModuleType) -> None:
    """Tokens reach an idle GPU over a chain: 0 on GPUs 0, 1; 1 on 1, 2; 2 on 2, 3. Expert 0 has 8
    tokens, 1 has 8, 2 none: the GPUs' least largest load is 16 / 3 rounded up, since GPU 3 holds
    only expert 2."""
    placement = Placement(np.array([[0, -1, 0, 1, 1, 2, 2, -1]], np.int32), 4, 1, 3)
    trace = build.make_trace(choices([0] * 8 + [1] * 8), 3)
    loads = route(trace, build.cut(trace, 16), placement, policy="lp").gpu_tokens(4)[0, 0]
    assert loads.max() == math.ceil(16 / 3)
    assert loads[3] == 0


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(2, 1), (4, 1), (4, 2), (6, 3), (8, 2), (5, 1)]),
    experts=st.integers(1, 14),
    spare=st.integers(0, 3),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    dedup=st.sampled_from(["none", "gpu", "node"]),
)
@settings(max_examples=120, deadline=None)
def test_exact_and_conserving(
    build: ModuleType,
    seed: int,
    shape: tuple[int, int],
    experts: int,
    spare: int,
    missing: float,
    dedup: Any,
) -> None:
    """INV-1: every choice is served once. The largest load is the LP's optimum rounded up, no other
    policy's is smaller, and more is at home than without preferring it cannot be."""
    rng = np.random.default_rng(seed)
    gpus, nodes = shape
    per_gpu = min(experts, -(-experts // gpus) + spare)
    top_k = int(rng.integers(1, experts + 1))
    trace = build.random_trace(rng, 40, 2, experts, top_k, missing=missing)
    placement = build.random_placement(rng, 2, experts, gpus, nodes, per_gpu)
    batches = build.cut(trace, 17, 1, 22)
    home = home_ranks(trace, batches, gpus)
    routed = route(trace, batches, placement, policy="lp", dedup=dedup, home=home)
    least = routed.gpu_tokens(gpus).max(axis=2)
    for other in ("split", "hash", "nearest"):
        assert (
            least <= route(trace, batches, placement, policy=other).gpu_tokens(gpus).max(axis=2)  # type: ignore[arg-type]
        ).all()
    for b in range(3):
        for layer in range(2):
            ids = trace.expert_ids[batches[b], layer]
            counts = np.bincount(ids[ids >= 0], minlength=experts)
            row = placement.physical_to_logical[layer]
            served = np.zeros(experts, np.int64)
            np.add.at(served, row, routed.slot_tokens[b, layer])
            assert np.array_equal(served, counts)
            optimum = least_largest_load(counts, row, gpus)
            assert least[b, layer] == math.ceil(optimum - 1e-6)
            if dedup == "none":
                self_served = int(counts.sum() - routed.messages[b, layer].sum())
                assert self_served == _at_home(
                    ids, home[batches.indptr[b] : batches.indptr[b + 1]], routed, b, layer, row
                )


def _at_home(ids: Any, home: Any, routed: Any, b: int, layer: int, row: Any) -> int:
    """Most choices that can be served at home, given what each slot serves."""
    per_gpu = len(row) // routed.messages.shape[-1]
    total = 0
    for slot, expert in enumerate(row.tolist()):
        wanted = int(((ids == expert).sum(axis=1))[home == slot // per_gpu].sum())
        total += min(wanted, int(routed.slot_tokens[b, layer, slot]))
    return total


def test_without_replicas_all_policies_agree(build: ModuleType) -> None:
    rng = np.random.default_rng(3)
    trace = build.random_trace(rng, 60, 2, 8, 3)
    placement = build.random_placement(rng, 2, 8, 4, 2, 2)
    batches = build.cut(trace, 60)
    lp, split = (route(trace, batches, placement, policy=p) for p in ("lp", "split"))
    assert np.array_equal(lp.slot_tokens, split.slot_tokens)
    assert np.array_equal(lp.messages, split.messages)


def test_relabelling_gpus_leaves_the_largest_load(build: ModuleType) -> None:
    """INV-5."""
    rng = np.random.default_rng(5)
    trace = build.random_trace(rng, 200, 2, 10, 3)
    placement = build.random_placement(rng, 2, 10, 4, 1, 4)
    table = placement.physical_to_logical.reshape(2, 4, 4)[:, [2, 0, 3, 1]]
    other = Placement(np.ascontiguousarray(table.reshape(2, -1)), 4, 1, 10)
    batches = build.cut(trace, 120, 80)
    one, two = (route(trace, batches, p, policy="lp") for p in (placement, other))
    assert np.array_equal(one.gpu_tokens(4).max(axis=2), two.gpu_tokens(4).max(axis=2))


@pytest.mark.parametrize("policy", ["split", "nearest", "lp"])
def test_batches_are_independent(build: ModuleType, policy: Any) -> None:
    rng = np.random.default_rng(6)
    trace = build.random_trace(rng, 90, 1, 8, 2)
    placement = build.random_placement(rng, 1, 8, 4, 2, 4)
    whole = route(trace, build.cut(trace, 40, 50), placement, policy=policy)
    first = route(trace, build.cut(trace, 40), placement, policy=policy)
    assert np.array_equal(whole.slot_tokens[0], first.slot_tokens[0])
    assert np.array_equal(whole.messages[0], first.messages[0])
