"""Index tables: by hand, against the cost model's own routing, and by simulating the exchange."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import MismatchError, UnknownNameError
from moesim.replay.routing import (
    Assignment,
    RankWork,
    assign_replicas,
    home_ranks,
    rank_work,
    send_matrix,
)


def test_split_by_hand() -> None:
    # Slots 0,1 on rank 0 hold experts 0,1; slots 2,3 on rank 1 hold experts 0,2.
    # Expert 0 is chosen by tokens 0, 1, 3 in order: slots 0, 2, 0.
    placement = np.array([0, 1, 0, 2])
    ids = np.array([[0, 1], [0, 2], [1, -1], [0, 2]])
    home = home_ranks(4, 2)
    got = assign_replicas(ids, None, placement, home, 2)
    assert got.slots.tolist() == [[0, 1], [2, 3], [1, -1], [0, 3]]
    assert got.slot_rows.tolist() == [2, 2, 1, 2]
    # Homes: tokens 0, 1 on rank 0, tokens 2, 3 on rank 1. Rows, deduplicated a destination:
    # token 0 -> rank 0 (own); token 1 -> rank 1; token 2 -> rank 0; token 3 -> ranks 0 and 1.
    assert send_matrix(got, "gpu").tolist() == [[1, 1], [2, 1]]
    # Without deduplication token 0 sends two rows to itself and token 1 two to rank 1.
    assert send_matrix(got, "none").tolist() == [[2, 2], [2, 1]]


def test_rank_work_by_hand() -> None:
    placement = np.array([0, 1, 0, 2])
    ids = np.array([[0, 1], [0, 2], [1, -1], [0, 2]])
    gates = np.array([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.625, 0.375]], np.float32)
    assignment = assign_replicas(ids, gates, placement, home_ranks(4, 2), 2)
    work = rank_work(assignment, 0)
    # Rank 0 keeps token 0 and sends token 1 (its local token 1) to rank 1.
    assert (work.pack_idx.tolist(), work.num_own) == ([0, 1], 1)
    assert (work.send_splits.tolist(), work.recv_splits.tolist()) == ([0, 1], [0, 2])
    # Received rows: tokens 2 and 3 from rank 1, then own token 0. Slot 0 (expert 0) serves tokens
    # 3 and 0, rows 1 and 2; slot 1 (expert 1) serves tokens 2 and 0, rows 0 and 2.
    assert work.expand_idx.tolist() == [1, 2, 0, 2]
    assert work.slot_offsets.tolist() == [2, 4]
    # Row 0 (token 2) sums GEMM row 2; row 1 (token 3) GEMM row 0; row 2 (token 0) rows 1 and 3.
    assert work.reduce_idx.tolist() == [2, 0, 1, 3]
    assert work.reduce_ptr.tolist() == [0, 1, 2, 4]
    assert work.reduce_weights.tolist() == [1.0, 0.625, 0.75, 0.25]
    # Home tokens 0 and 1 get one row each: own row 0, then the row that came back.
    assert (work.return_idx.tolist(), work.return_ptr.tolist()) == ([0, 1], [0, 1, 2])
    assert work.return_weights is None


def test_wrong_inputs() -> None:
    ids, home = np.array([[0, 1]]), np.array([0])
    with pytest.raises(UnknownNameError, match="replica policy"):
        assign_replicas(ids, None, np.array([0, 1]), home, 2, "lp")
    with pytest.raises(MismatchError, match="expert 1, which has no slot"):
        assign_replicas(ids, None, np.array([0, -1]), home, 2)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    num_ranks = draw(st.sampled_from([1, 2, 3, 4]))
    spr = draw(st.integers(2, 4))
    num_experts = draw(st.integers(2, num_ranks * spr))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    placement = np.full((num_ranks, spr), -1)
    cells = [(g, s) for s in range(spr) for g in range(num_ranks)]
    for expert, (g, s) in zip(rng.permutation(num_experts), cells, strict=False):
        placement[g, s] = expert
    for g, s in cells[num_experts:]:
        expert = int(rng.integers(num_experts))
        if rng.random() < 0.7 and expert not in placement[g]:
            placement[g, s] = expert
    num_tokens = draw(st.integers(1, 30))
    top_k = draw(st.integers(1, min(3, num_experts)))
    ids = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k]
    ids[rng.random(ids.shape) < 0.15] = -1
    return ids, placement.reshape(-1), rng.integers(0, num_ranks, num_tokens), num_ranks


def exchange(works: list[RankWork], rows: list[np.ndarray], back: bool) -> list[np.ndarray]:
    """A pure-Python all-to-all: what each rank receives, in order of source."""
    size = len(works)
    out = []
    for d in range(size):
        parts = []
        for s in range(size):
            splits = works[s].recv_splits if back else works[s].send_splits
            start = int(splits[:d].sum())
            parts.append(rows[s][start : start + int(splits[d])])
        out.append(np.concatenate(parts))
    return out


def replay(assignment: Assignment, x: np.ndarray, dedup: str, scale: np.ndarray) -> np.ndarray:
    """The layer with expert e multiplying by its slot's scale, following the tables alone."""
    ranks = range(assignment.num_ranks)
    works = [rank_work(assignment, r, dedup) for r in ranks]
    homes = [np.flatnonzero(assignment.home == r) for r in ranks]
    packed = [x[homes[r]][works[r].pack_idx] for r in ranks]
    arrived = exchange(
        works, [p[w.num_own :] for p, w in zip(packed, works, strict=True)], back=False
    )
    summed = []
    for r, w in zip(ranks, works, strict=True):
        rows = np.concatenate([arrived[r], packed[r][: w.num_own]])[w.expand_idx]
        local = scale[r * assignment.slots_per_rank : (r + 1) * assignment.slots_per_rank]
        rows = rows * np.repeat(local, w.slot_rows)
        sums = np.zeros(len(w.reduce_ptr) - 1)
        groups = np.repeat(np.arange(len(sums)), np.diff(w.reduce_ptr))
        np.add.at(sums, groups, rows[w.reduce_idx] * w.reduce_weights)
        summed.append(sums)
    returned = exchange(
        works, [s[: w.num_received] for s, w in zip(summed, works, strict=True)], back=True
    )
    out = np.full(len(x), np.nan)
    for r, w in zip(ranks, works, strict=True):
        rows = np.concatenate([summed[r][w.num_received :], returned[r]])
        weights = 1.0 if w.return_weights is None else w.return_weights
        sums = np.zeros(len(homes[r]))
        groups = np.repeat(np.arange(len(sums)), np.diff(w.return_ptr))
        np.add.at(sums, groups, rows[w.return_idx] * weights)
        out[homes[r]] = sums
    return out


@settings(max_examples=120, deadline=None)
@given(cases(), st.sampled_from(["gpu", "none"]), st.sampled_from(["split", "hash", "nearest"]))
def test_every_choice_served_once_by_its_expert(case, dedup, policy) -> None:
    """INV-1: following the tables gives each token the weighted sum over its experts, once each."""
    ids, placement, home, num_ranks = case
    rng = np.random.default_rng(1)
    gates = rng.random(ids.shape).astype(np.float32)
    assignment = assign_replicas(ids, gates, placement, home, num_ranks, policy)
    expert_scale = rng.random(placement.max() + 1)
    x = rng.random(len(ids))
    got = replay(assignment, x, dedup, np.where(placement >= 0, expert_scale[placement], np.nan))
    factor = np.where(ids >= 0, gates * expert_scale[ids], 0.0).sum(axis=1)
    np.testing.assert_allclose(got, x * factor, rtol=1e-5)


@pytest.mark.parametrize(("num_gpus", "num_nodes"), [(2, 1), (4, 2), (8, 2)])
@pytest.mark.parametrize("policy", ["split", "hash", "nearest"])
def test_same_slots_and_messages_as_the_cost_model(
    num_gpus: int, num_nodes: int, policy: str
) -> None:
    from moesim.cost.routing import route
    from moesim.placement import Placement
    from moesim.trace.batches import draw_batches, index_requests
    from moesim.trace.format import load_token_trace

    trace = load_token_trace("sample:debian-moe", "test").take(np.arange(3000))
    rng = np.random.default_rng(num_gpus)
    num_slots = trace.num_experts + 2 * num_gpus
    rows = []
    for _ in range(trace.num_layers):
        while True:
            extra = rng.choice(trace.num_experts, 2 * num_gpus, replace=False)
            row = rng.permutation(np.concatenate([np.arange(trace.num_experts), extra]))
            if all(len(set(part)) == len(part) for part in row.reshape(num_gpus, -1)):
                break
        rows.append(row)
    placement = Placement(np.array(rows, np.int32), num_gpus, num_nodes, trace.num_experts)
    assert placement.num_slots == num_slots
    batches = draw_batches(index_requests(trace)[0], "prefill", 150, 2, 0)
    for dedup in ("gpu", "none"):
        want = route(trace, batches, placement, policy=policy, dedup=dedup)
        for b in range(len(batches)):
            tokens = batches[b]
            for layer in (0, trace.num_layers - 1):
                got = assign_replicas(
                    np.asarray(trace.expert_ids[tokens, layer]),
                    None,
                    placement.physical_to_logical[layer],
                    home_ranks(len(tokens), num_gpus),
                    num_gpus,
                    policy,
                    token_ids=tokens,
                    num_nodes=num_nodes,
                )
                messages = send_matrix(got, dedup).copy()
                np.fill_diagonal(messages, 0)
                np.testing.assert_array_equal(got.slot_rows, want.slot_tokens[b, layer])
                np.testing.assert_array_equal(messages, want.messages[b, layer])
