"""The rules by hand: a few tokens each, with the arithmetic."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from routing_traces import chosen, in_order, random_scores, scored_trace

from moesim.errors import InputError, UnknownNameError
from moesim.routing.api import reroute
from moesim.routing.rules.base import balanced
from moesim.routing.rules.bias import Bias, lagrangian
from moesim.routing.rules.merge import groups
from moesim.routing.spec import rule_text
from moesim.trace.format import Trace

FOUR = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]]
"""Scores of 4 tokens for 2 experts: three prefer expert 0."""


def four(**changes: object) -> Trace:
    return scored_trace(np.array(FOUR)[:, None], 1, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        ("score", [{0}, {0}, set(), {1}]),
        ("position", [{0}, {0}, set(), {1}]),
    ],
)
def test_drop(keep: str, wanted: list[set[int]]) -> None:
    """C = ceil(1 * 1 * 4 / 2) = 2: expert 0 drops one of three, that of 0.7 by score, and the last
    of the request by position."""
    trace = four(request_ids=[0, 0, 0, 0])
    done = reroute(trace, f"drop:factor=1,keep={keep}")
    assert chosen(done.trace) == wanted
    assert done.changes.gate_mass_kept == pytest.approx((0.9 + 0.8 + 0.6) / 3.0, abs=1e-3)


def test_drop_by_order_in_the_batch() -> None:
    """One request of 4 tokens is one batch in order: `last` drops the first token."""
    trace = four(request_ids=[0, 0, 0, 0])
    assert chosen(reroute(trace, "drop:factor=1,keep=last").trace) == [set(), {0}, {0}, {1}]
    assert chosen(reroute(trace, "drop:factor=1,keep=first").trace) == [{0}, {0}, set(), {1}]


def test_drop_by_position_falls_on_the_end_of_sequences() -> None:
    """Two requests of 4 tokens that all choose expert 0 of 2: C = 4, and the later half of each is
    dropped, where by order in the batch a whole request is."""
    trace = scored_trace(np.tile([[[0.9, 0.1]]], (8, 1, 1)), 1, request_ids=np.repeat([0, 1], 4))
    by_position = reroute(trace, "drop:factor=1,keep=position")
    assert by_position.changes.notes["dropped_late_share"] == 1.0
    by_order = reroute(trace, "drop:factor=1,keep=first")
    assert by_order.changes.notes["dropped_late_share"] == 0.5
    assert by_position.changes.dropped == by_order.changes.dropped == 4


@settings(max_examples=20)
@given(st.integers(0, 2**20), st.floats(0.2, 2))
def test_no_expert_takes_more_than_its_capacity(seed: int, factor: float) -> None:
    trace = scored_trace(random_scores(np.random.default_rng(seed), 30, 2, 6), 2)
    limit = int(np.ceil(factor * 2 * 30 / 6 - 1e-9))
    for spec in (f"drop:factor={factor}", f"expanded-drop:factor={factor},reach=all"):
        ids = np.asarray(reroute(trace, spec).trace.expert_ids).astype(int)
        for layer in range(2):
            assert np.bincount(ids[:, layer][ids[:, layer] >= 0]).max() <= limit


def test_expanded_drop_goes_to_the_best_with_room() -> None:
    """3 tokens, 3 experts, C = 1, all choose expert 0; by score the overflow of 0.5 looks first and
    takes its second, expert 2, so that of 0.4 finds expert 1."""
    scores = np.array([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.4, 0.25, 0.35]])[:, None]
    trace = scored_trace(scores, 1)
    done = reroute(trace, "expanded-drop:factor=1,reach=all")
    assert chosen(done.trace) == [{0}, {2}, {1}]
    assert (done.changes.kept, done.changes.moved, done.changes.dropped) == (1, 2, 0)


def test_expanded_drop_on_the_own_gpu() -> None:
    """Experts 0 and 1 on GPU 0, 2 and 3 on GPU 1; tokens 0 and 2 live on GPU 0 (their request's
    number is even), 1 and 3 on GPU 1. All choose expert 0, C = 1. Of the overflow, token 1 (0.8)
    takes 2 on its GPU, token 2 (0.7) expert 1 on its, and token 3 (0.6) expert 3."""
    scores = np.array(
        [
            [0.9, 0.05, 0.03, 0.02],
            [0.8, 0.1, 0.06, 0.04],
            [0.7, 0.1, 0.15, 0.05],
            [0.6, 0.1, 0.2, 0.1],
        ]
    )[:, None]
    trace = scored_trace(scores, 1)
    done = reroute(trace, "expanded-drop:factor=1", in_order(trace, 2))
    assert chosen(done.trace) == [{0}, {2}, {1}, {3}]


def test_fill_in_gives_room_to_the_highest_scores() -> None:
    """C = 2 of 4 tokens on 2 experts: expert 0 drops token 2; expert 1 has room for one, which of
    the tokens that did not choose it goes to the highest score, token 2 (0.3)."""
    done = reroute(four(request_ids=[0] * 4), "fill-in:factor=1,parts=fill")
    assert chosen(done.trace) == [{0}, {0}, {1}, {1}]
    assert done.changes.notes["filled"] == 1


def test_intra_gpu_rectification_ignores_capacity() -> None:
    """One GPU holds both experts: the choice that expert 0 drops goes to expert 1, however full."""
    trace = four(request_ids=[0] * 4)
    done = reroute(trace, "fill-in:factor=0.5,parts=intra", in_order(trace, 1))
    assert chosen(done.trace) == [{0}, {1}, {1}, {1}]


def test_base_takes_the_best_balanced_assignment() -> None:
    """Two tokens each. Of the three that prefer expert 0 the one that loses least, 0.7 - 0.3, goes:
    0.9 + 0.8 + 0.3 + 0.6 = 2.6."""
    done = reroute(four(request_ids=[0] * 4), "base")
    assert chosen(done.trace) == [{0}, {0}, {1}, {1}]
    assert done.changes.score_mass == pytest.approx(2.6 / 3.0, abs=1e-3)


@settings(max_examples=30)
@given(st.integers(0, 2**20), st.integers(1, 12), st.integers(2, 5))
def test_balanced_loads_differ_by_one_and_nothing_is_better(
    seed: int, tokens: int, experts: int
) -> None:
    """For K = 1: loads are floor or ceil of n / E, and no exchange of two tokens gains."""
    values = np.random.default_rng(seed).random((tokens, experts))
    taken = balanced(values, 1)[:, 0]
    load = np.bincount(taken, minlength=experts)
    assert load.min() >= tokens // experts
    assert load.max() <= -(-tokens // experts)
    for a in range(tokens):
        for b in range(a):
            now = values[a, taken[a]] + values[b, taken[b]]
            assert now >= values[a, taken[b]] + values[b, taken[a]] - 1e-12


def test_base_counts_what_the_trace_does_not_list() -> None:
    """Four tokens that list experts 0 and 1 of 4: one each, so two get experts that no candidate
    is. With no score known, the one choice of such a token keeps the token's whole weight."""
    scores = np.tile([[[0.5, 0.4, 0.06, 0.04]]], (4, 1, 1))
    trace = scored_trace(scores, 1, listed=2, request_ids=[0] * 4)
    done = reroute(trace, "base")
    assert done.changes.unlisted == 2
    ids = np.asarray(done.trace.expert_ids)[:, 0, 0]
    assert sorted(ids.tolist()) == [0, 1, 2, 3]
    np.testing.assert_allclose(done.trace.gate_weights, 0.5, atol=1e-3)


def test_expert_choice_gives_every_expert_the_same() -> None:
    """C = 2: expert 0 takes 0.9 and 0.8, expert 1 takes 0.6 and 0.3."""
    done = reroute(four(request_ids=[0] * 4), "expert-choice")
    assert chosen(done.trace) == [{0}, {0}, {1}, {1}]


def test_expert_choice_may_leave_a_token_out() -> None:
    """Token 1 is second for both experts with C = 1."""
    trace = scored_trace(np.array([[[0.9, 0.8]], [[0.5, 0.4]]]), 1, request_ids=[0, 0])
    done = reroute(trace, "expert-choice")
    assert chosen(done.trace) == [{0, 1}, set()]
    assert done.changes.emptied == 1


@settings(max_examples=25)
@given(st.integers(0, 2**20), st.integers(1, 3))
def test_the_dual_is_above_every_balanced_assignment(seed: int, top_k: int) -> None:
    """Weak duality, whatever the biases: 12 tokens, 4 experts."""
    rng = np.random.default_rng(seed)
    scores, bias = rng.random((12, 4)), rng.normal(size=4)
    taken = balanced(scores, top_k)
    primal = np.take_along_axis(scores, taken, 1).sum()
    assert lagrangian(scores, bias, top_k) >= primal - 1e-9


@settings(max_examples=25)
@given(st.integers(0, 2**20))
def test_a_dual_step_lowers_the_lagrangian_by_its_slope(seed: int) -> None:
    """While no token changes its experts, a step of r over the choices lowers the dual by exactly
    r * sum((load - mean)^2) / choices: it is linear there, with slope load - mean. A step below
    half the least gap between scores of a token changes none."""
    rng = np.random.default_rng(seed)
    scores = rng.random((20, 5))
    gap = np.diff(np.sort(scores, axis=1), axis=1).min()
    rule = Bias(rate=max(1e-9, gap / 3), update="dual")
    ids = np.argsort(-scores, axis=1)[:, :2]
    bias = rule.updated(np.zeros(5), ids)
    over = np.bincount(ids.ravel(), minlength=5) - 8.0
    fall = lagrangian(scores, np.zeros(5), 2) - lagrangian(scores, bias, 2)
    assert fall == pytest.approx(rule.rate * (over**2).sum() / 40, abs=1e-9)


def test_bias_balances_in_time() -> None:
    """32 tokens of one batch that prefer expert 3 of 4; sign steps of 0.01 until loads even out."""
    scores = random_scores(np.random.default_rng(0), 32, 1, 4) * [1, 1, 1, 1.5]
    trace = scored_trace(scores, 1, request_ids=np.zeros(32))
    spread = []
    for passes in (0, 60):
        ids = np.asarray(reroute(trace, f"bias:rate=0.01,passes={passes}").trace.expert_ids)
        spread.append(np.ptp(np.bincount(ids.ravel(), minlength=4)))
    assert spread[1] < spread[0] / 2


def test_local_prefers_the_own_gpu() -> None:
    """Request 0 lives on GPU 0 with experts 0, 1, request 1 on GPU 1 with 2, 3. With 0.2 more,
    expert 1 (0.25 + 0.2) beats expert 2 (0.4) for request 0; with 0.1 it does not."""
    scores = np.array([[0.2, 0.25, 0.4, 0.15], [0.2, 0.25, 0.4, 0.15]])[:, None]
    trace = scored_trace(scores, 1)
    near = reroute(trace, "local:weight=0.2", in_order(trace, 2))
    assert chosen(near.trace) == [{1}, {2}]
    assert chosen(reroute(trace, "local:weight=0.1", in_order(trace, 2)).trace) == [{2}, {2}]
    assert near.changes.notes["capacity_floor"] == 2.0


def test_group_limit() -> None:
    """Groups {0, 1} and {2, 3}. Best: 0.4 of the second, so experts 2 and 3. By the best two: 0.35
    + 0.2 = 0.55 of the first against 0.4 + 0.05."""
    trace = scored_trace(np.array([[[0.35, 0.2, 0.4, 0.05]]]), 2)
    assert chosen(trace) == [{0, 2}]
    assert chosen(reroute(trace, "group-limit:groups=2").trace) == [{2, 3}]
    assert chosen(reroute(trace, "group-limit:groups=2,by=two").trace) == [{0, 1}]
    with pytest.raises(InputError, match="3 groups of 4 experts"):
        reroute(trace, "group-limit:groups=3")


def test_random_ignores_the_router() -> None:
    """4,000 tokens that all chose experts 0 and 1 of 8: every expert gets 1,000 within 5 sigma."""
    scores = np.tile([[[0.5, 0.3, 0.1, 0.04, 0.03, 0.01, 0.01, 0.01]]], (4000, 1, 1))
    ids = np.asarray(reroute(scored_trace(scores, 2), "random").trace.expert_ids)
    load = np.bincount(ids.ravel(), minlength=8)
    assert load.sum() == 8000
    assert np.abs(load - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_k_takes_the_largest_gates_or_the_next_candidates() -> None:
    trace = scored_trace(np.tile([[[0.4, 0.3, 0.2, 0.1]]], (2, 2, 1)), 2)
    assert chosen(reroute(trace, "k:k=1").trace) == [{0}, {0}]
    more = reroute(trace, "k:k=3,layers=1").trace
    assert (chosen(more, 0)[0], chosen(more, 1)[0]) == ({0, 1}, {0, 1, 2})
    assert more.top_k == 3
    with pytest.raises(InputError, match="k 5 of 4 candidates"):
        reroute(trace, "k:k=5")


def test_top_p_takes_the_fewest() -> None:
    """0.4 alone is 0.4 of all, 0.7 with the second, 0.9 with the third."""
    trace = scored_trace(np.array([[[0.4, 0.3, 0.2, 0.1]]]), 2)
    for p, wanted in ((0.35, {0}), (0.6, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert chosen(reroute(trace, f"top-p:p={p}").trace) == [wanted]


def test_threshold_is_a_share_of_the_largest() -> None:
    """Second over first: 0.3 / 0.4 = 0.75."""
    trace = scored_trace(np.array([[[0.4, 0.3, 0.2, 0.1]]]), 2)
    assert chosen(reroute(trace, "threshold:share=0.7").trace) == [{0, 1}]
    assert chosen(reroute(trace, "threshold:share=0.8").trace) == [{0}]


def test_null_experts_leave_so_many_on_average() -> None:
    """On the tuning requests exactly, on all of 400 closely: within a tenth."""
    trace = scored_trace(random_scores(np.random.default_rng(1), 400, 1, 8), 2, listed=4)
    done = reroute(trace, "null:mean=1.5")
    real = (np.asarray(done.trace.expert_ids).astype(int) >= 0).sum() / 400
    assert real == pytest.approx(1.5, rel=0.1)


def test_prune_tokens_drops_the_second_of_those_that_stand_out() -> None:
    """Second over first: 0.2, 0.4, 0.6, 0.8 in turn, over tokens 0 to 7. The tuning half has its
    own median; every token below keeps one choice, every other two."""
    second = np.tile([0.1, 0.2, 0.3, 0.4], 2)
    trace = scored_trace(np.stack([np.full(8, 0.5), second], 1)[:, None], 2)
    done = reroute(trace, "prune-tokens").trace
    count = (np.asarray(done.expert_ids).astype(int) >= 0).sum(axis=(1, 2))
    assert count.tolist() == sorted(count[:4].tolist()) * 2
    assert set(count.tolist()) == {1, 2}
    kept = reroute(trace, "prune-tokens:quantile=1,protect=1").trace
    np.testing.assert_array_equal(kept.expert_ids, trace.expert_ids)


def test_prune_moves_to_the_next_that_is_kept() -> None:
    """Expert 2 is least used; its token goes to its next candidate, or nowhere without any."""
    scores = np.tile([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]], (10, 1))
    scores[19] = [0.2, 0.3, 0.5]
    trace = scored_trace(scores[:, None], 1)
    assert chosen(reroute(trace, "prune:keep=2").trace)[19] == {1}
    bare = Trace(
        **{**trace.arrays(), "candidate_ids": None, "candidate_scores": None}, meta=trace.meta
    )
    done = reroute(bare, "prune:keep=2")
    assert chosen(done.trace)[19] == set()
    assert done.changes.dropped == 1


def test_merge_joins_what_is_alike() -> None:
    """Experts 0 and 2 score alike, 1 and 3 do: with 0 and 1 most used, 2 goes to 0 and 3 to 1."""
    values = np.array([[0.5, 0.1, 0.3, 0.1], [0.1, 0.5, 0.05, 0.35], [0.5, 0.1, 0.35, 0.05]])
    assert groups(values, np.array([9, 8, 1, 1]), 2).tolist() == [0, 1, 0, 1]


def test_choices_that_meet_are_one_with_both_weights() -> None:
    """All tokens choose 0 and 1 with 0.6 and 0.4; one expert stays, so every second one meets."""
    trace = scored_trace(np.tile([[[0.6, 0.4]]], (6, 1, 1)), 2)
    done = reroute(trace, "merge:keep=1")
    assert chosen(done.trace) == [{0}] * 6
    assert done.changes.notes["met"] == 6
    np.testing.assert_allclose(done.trace.gate_weights, 1.0, atol=1e-3)


def frozen() -> Trace:
    """One request: its prompt chose expert 0 twice, then 1; its answer 2 and 2. And one without a
    prompt, which chose 2."""
    picks = [0, 0, 1, 2, 2, 2]
    scores = np.full((6, 1, 3), 0.1)
    scores[np.arange(6), 0, picks] = 0.8
    return scored_trace(scores, 1, request_ids=[0, 0, 0, 0, 0, 1], phases=[0, 0, 0, 1, 1, 1])


def test_freeze_decodes_with_the_prompts_experts() -> None:
    done = reroute(frozen(), "freeze")
    assert chosen(done.trace) == [{0}, {0}, {1}, {0}, {0}, {2}]
    assert done.changes.notes["decode_tokens_without_prompt"] == 1
    assert chosen(reroute(frozen(), "freeze:by=last").trace)[3:] == [{1}, {1}, {2}]


def test_steer_moves_the_other_domains_alone() -> None:
    """Domain a chooses expert 0, b expert 1. With 0.5 more for a's expert, b's 0.3 + 0.5 > 0.7."""
    scores = np.where(np.arange(20)[:, None] % 2 == 0, [0.7, 0.3], [0.3, 0.7])[:, None]
    trace = scored_trace(scores, 1, domain_ids=np.arange(20) % 2, domains=("a", "b"))
    done = reroute(trace, "steer:toward=a,experts=1,strength=0.5")
    assert chosen(done.trace) == [{0}] * 20
    weak = reroute(trace, "steer:toward=a,experts=1,strength=0.3")
    np.testing.assert_array_equal(weak.trace.expert_ids, trace.expert_ids)
    with pytest.raises(UnknownNameError, match="'c'"):
        reroute(trace, "steer:toward=c")


def test_skip_layer_lets_the_largest_pass() -> None:
    """Of one batch of 4, the two with the largest gate weight (0.9, 0.8) pass layer 1; layer 0 is
    whole."""
    trace = scored_trace(np.tile(np.array(FOUR)[:, None], (1, 2, 1)), 1, request_ids=[0] * 4)
    done = reroute(trace, "skip-layer:keep=0.5,every=2")
    assert chosen(done.trace, 1) == [{0}, {0}, set(), set()]
    assert done.changes.emptied == 2
    assert chosen(done.trace, 0) == chosen(trace, 0)


def test_drop_keeps_by_score_where_there_are_gates_and_says_what_it_took() -> None:
    """A trace without gate weights is not refused: the first in the batch stay, as `simulate`
    does, and the rule that was applied names it."""
    rng = np.random.default_rng(0)
    scored = scored_trace(random_scores(rng, 32, 2, 8), 2)
    for trace, keep in ((scored, "score"), (replace(scored, gate_weights=None), "first")):
        plain = reroute(trace, "drop:factor=1")
        asked = reroute(trace, f"drop:factor=1,keep={keep}")
        assert rule_text(plain.rule) == f"drop:factor=1,keep={keep}"
        assert plain.trace.content_hash() == asked.trace.content_hash()
