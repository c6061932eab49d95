"""Balancing schemes on cases worked by hand, and what all of them keep."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.copies import WeightMove
from moesim.cost.routing import route
from moesim.cost.step import build_step_model
from moesim.errors import InputError, MismatchError
from moesim.placement import EMPTY, Placement
from moesim.planning.balancing.bench import Bench, Costs, Moves
from moesim.planning.balancing.course import Course, make_course
from moesim.planning.balancing.echo import clone
from moesim.planning.balancing.epic import swap_pairs
from moesim.planning.balancing.eplb import Eplb, Rhythm, _Clock
from moesim.planning.balancing.llep import spill
from moesim.planning.balancing.moonep import equal_shares
from moesim.planning.balancing.per_batch import homes_of, lent
from moesim.planning.case import token_case
from moesim.planning.migration import movers
from moesim.planning.request import PlanRequest
from moesim.sim.rebalance import slot_table
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import Trace

HOMES = np.array([0, 0, 1, 1, 2, 2])


def counts_of(experts: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(0, 60), min_size=experts, max_size=experts).map(
        lambda values: np.array(values, np.int64)
    )


def test_equal_shares_by_hand() -> None:
    """Loads 9+3, 2+1, 0+0 of 15: five each. GPU 2 lacks 5, GPU 1 lacks 2, GPU 0 has 7 too many.
    GPU 2 comes first, takes 5 of expert 0 (9, 4 left); GPU 1 takes 2 of expert 0 (2 left)."""
    share = np.zeros((6, 3), np.int64)
    equal_shares(np.array([9, 3, 2, 1, 0, 0]), HOMES, share)
    assert share.tolist() == [[2, 2, 5], [3, 0, 0], [0, 2, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]


@given(counts_of(6))
def test_equal_shares_are_equal_and_from_one_other_gpu(counts: np.ndarray) -> None:
    share = np.zeros((6, 3), np.int64)
    equal_shares(counts, HOMES, share)
    assert (share.sum(axis=1) == counts).all()
    load = share.sum(axis=0)
    assert load.max() - load.min() <= 1
    assert (share >= 0).all()
    for gpu in range(3):
        givers = {int(HOMES[e]) for e in np.flatnonzero(share[:, gpu])} - {gpu}
        assert len(givers) <= 1


def test_spill_by_hand() -> None:
    """Loads 9+3, 2+1, 0: mean 5, largest 12 >= 1.3 x 5. Expert 0 (9 tokens) comes first: its GPU
    has 3 to come, so 2 stay; 7 spill: GPU 2 (0) takes 5, then GPU 1 (3 to come) 2. Expert 1 (3):
    GPU 0 has 2, room for 3. Experts 2 and 3: GPU 1 has 2, room for all."""
    share = np.zeros((6, 3), np.int64)
    spill(np.array([9, 3, 2, 1, 0, 0]), HOMES, 1.3, 1.0, 1, share)
    assert share.tolist() == [[2, 2, 5], [3, 0, 0], [0, 2, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_spill_leaves_what_is_balanced_enough() -> None:
    """Largest 6 of mean 5 is 1.2 times: below the ratio, everything stays at home."""
    share = np.zeros((6, 3), np.int64)
    spill(np.array([5, 1, 5, 0, 2, 2]), HOMES, 1.3, 1.0, 1, share)
    assert (share.sum(axis=0) == [6, 5, 4]).all()


def test_spill_makes_no_small_gemm() -> None:
    """Seven tokens are beyond GPU 0's room of 5. No other GPU has room for 6 of them or for all,
    so the least loaded takes them whole."""
    share = np.zeros((6, 3), np.int64)
    spill(np.array([12, 0, 3, 0, 0, 0]), HOMES, 1.3, 1.0, 6, share)
    assert share[0].tolist() == [5, 0, 7]


@given(counts_of(6), st.integers(1, 20), st.floats(0.5, 2.0))
def test_spill_keeps_every_token(counts: np.ndarray, least: int, factor: float) -> None:
    share = np.zeros((6, 3), np.int64)
    spill(counts, HOMES, 1.0, factor, least, share)
    assert (share.sum(axis=1) == counts).all()
    assert (share >= 0).all()


def test_clone_by_hand() -> None:
    """Loads 12, 3, 0 of mean 5. GPU 0 keeps the 3 of expert 1 and 2 of expert 0, 7 spill: GPU 2 has
    most room, 5, then GPU 1, 2."""
    share = np.zeros((6, 3), np.int64)
    clone(np.array([9, 3, 2, 1, 0, 0]), HOMES, 1, share)
    assert share.sum(axis=0).tolist() == [5, 5, 5]
    assert share[0].tolist() == [2, 2, 5]


def test_clone_takes_the_largest_pieces() -> None:
    """Loads 13, 0, 0 of mean 4. Of 6 and 7 on GPU 0 the 6 come first: 2 and 7 spill. GPU 1 gets 4
    of the 7, GPU 2 the other 3 and 1 of the 2, for which one spare slot has no room."""
    for spare, kept in ((1, [6, 4, 3]), (2, [5, 4, 4])):
        share = np.zeros((6, 3), np.int64)
        clone(np.array([6, 7, 0, 0, 0, 0]), HOMES, spare, share)
        assert share.sum(axis=0).tolist() == kept


@given(counts_of(6), st.integers(0, 2))
def test_clone_keeps_tokens_and_slots(counts: np.ndarray, spare: int) -> None:
    share = np.zeros((6, 3), np.int64)
    clone(counts, HOMES, spare, share)
    assert (share.sum(axis=1) == counts).all()
    away = (share > 0) & (HOMES[:, None] != np.arange(3))
    assert (away.sum(axis=0) <= spare).all()
    at_home = np.bincount(HOMES, counts, 3)
    assert share.sum(axis=0).max() <= at_home.max()


def test_swap_pairs_by_hand() -> None:
    """One microsecond a token. GPU 0 has 8 + 4, GPU 1 has 1 + 1: swapping 4 for 1 gives 9 and 5,
    swapping 8 for 1 gives 5 and 9; both save 3, the first found is taken, and pays at 2 us."""
    counts = np.array([4, 8, 1, 1])
    table = np.array([[0, 1], [2, 3]], np.int64)
    sent = np.zeros((2, 2), np.int32)
    times = np.arange(20, dtype=np.float64)
    swap_pairs(counts, table, 2, times, 3.0, sent)
    assert table.tolist() == [[0, 1], [2, 3]]
    swap_pairs(counts, table, 2, times, 2.0, sent)
    assert table.tolist() == [[2, 1], [0, 3]]
    assert sent.tolist() == [[0, 1], [1, 0]]


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_lent_experts_serve_their_quota(build: ModuleType, seed: int) -> None:
    """Tokens go where the shares say, whoever is home, and all of them."""
    rng = np.random.default_rng(seed)
    trace = build.random_trace(rng, 40, 2, 6, 2)
    base = Placement(np.tile(np.arange(6, dtype=np.int32), (2, 1)), 3, 1, 6)
    batch = build.cut(trace, 40)
    counts = np.stack([np.bincount(trace.expert_ids[:, x].ravel(), minlength=6) for x in (0, 1)])
    home = homes_of(base)
    assert home.tolist() == [HOMES.tolist()] * 2
    share = np.zeros((2, 6, 3), np.int64)
    for layer in (0, 1):
        equal_shares(counts[layer], home[layer], share[layer])
    placement, quota, pairs = lent(base, home, share)
    routed = route(trace, batch, placement, quota=quota)
    load = routed.gpu_tokens(3)[0]
    assert (load == share.sum(axis=1)).all()
    assert pairs.sum() == ((share > 0).sum() - (counts > 0).sum() + _left(share, home, counts))


def _left(share: np.ndarray, home: np.ndarray, counts: np.ndarray) -> int:
    """Experts with tokens of which their home GPU keeps none."""
    kept = np.take_along_axis(share, home[:, :, None], axis=2)[:, :, 0]
    return int(((counts > 0) & (kept == 0)).sum())


def drifting(build: ModuleType) -> Trace:
    """Domain a chooses among experts 0-3, domain b among 4-7; 64 requests of 8 tokens."""
    rng = np.random.default_rng(1)
    tokens, half = 512, 256
    ids = np.stack([rng.permuted(np.arange(4))[:2] for _ in range(tokens * 3)])
    ids = ids.reshape(tokens, 3, 2)
    ids[half:] += 4
    return build.make_trace(
        ids,
        8,
        request_ids=np.arange(tokens) // 8,
        domain_ids=np.arange(tokens) // half,
        domains=("a", "b"),
    )


def course_of(build: ModuleType, steps: int = 80, *, drift: bool = True) -> Course:
    trace = drifting(build)
    tune, held_out = split_requests(index_requests(trace)[0])
    return make_course(trace, tune, held_out, "prefill", 16, steps, 0, drift=drift)


def test_course_goes_through_the_domains_in_order(build: ModuleType) -> None:
    course = course_of(build)
    assert course.names == ("a", "b")
    assert course.counts[course.step_of < 40][:, :, 4:].sum() == 0
    assert course.counts[course.step_of >= 40][:, :, :4].sum() == 0


def test_course_in_log_order_drifts_as_the_log(build: ModuleType) -> None:
    course = course_of(build, drift=False)
    late = course.counts[:, 0, 4:].sum(axis=1) / course.counts[:, 0].sum(axis=1)
    assert (late[:20] == 0).all()
    assert (late[-20:] == 1).all()


def test_what_is_seen_is_never_judged(build: ModuleType) -> None:
    course = course_of(build)
    requests = np.asarray(course.trace.request_ids)
    judged = set(requests[course.batches.token_idx].tolist())
    seen = {int(r) for index in course.tune for r in index.ids}
    assert judged.isdisjoint(seen)


def test_window_holds_the_steps_before(build: ModuleType) -> None:
    """Ten steps after the change at 40, a window of 20 is half of each domain."""
    seen = course_of(build).seen(50, 20)
    assert len(seen) == 20
    assert (seen[:, 0, :4].sum(axis=1) > 0).sum() == 10


def test_course_refuses_what_it_cannot_go_through(build: ModuleType) -> None:
    with pytest.raises(InputError, match="steps"):
        course_of(build, steps=3)
    trace = build.random_trace(np.random.default_rng(0), 80, 2, 4, 2)
    tune, held_out = split_requests(index_requests(trace)[0])
    with pytest.raises(MismatchError, match="no domains"):
        make_course(trace, tune, held_out, "prefill", 8, 80, 0, drift=True)


def move_costs(plan_us: float = 10_000.0, layer_us: float = 9_000.0) -> Costs:
    stopped, beside = (WeightMove("links", mode, layer_us) for mode in (False, True))
    return Costs(stopped, beside, plan_us)


def bench_of(build: ModuleType, **costs: float) -> Bench:
    trace, cluster = drifting(build), build.small_cluster(1, 4)
    model = build.toy_model(3, 8, 2)
    request = PlanRequest.of(
        trace, cluster, model, objective="time", batch_tokens=16, check_memory=False
    )
    case = token_case(request)
    data = case.data
    assert data is not None
    course = make_course(trace, data.tune, data.held_out, "prefill", 16, 80, 0, drift=True)
    step = build_step_model(cluster, model, calibration=build.toy_calibration(num_nodes=1))
    problem, took = case.problem, move_costs(**costs)
    return Bench(course, step, cluster, model, problem.capacity, problem, took)


def test_moving_takes_as_long_as_plans_say(build: ModuleType) -> None:
    bench = bench_of(build)
    old, new = bench.placed("linear", "balance", 0), bench.placed("round_robin", "balance", 0)
    away = movers(old, bench.cluster, bench.model, bench.step).plan(new)
    moves = bench.moving(slot_table(old), slot_table(new))
    assert moves.experts.sum() == away.num_moves
    layer = moves.link_us.max(axis=1)
    one_by_one = (layer + moves.latency_us)[layer > 0].sum()
    assert moves.us(bench.costs.stopped) == pytest.approx(one_by_one)
    assert moves.link_us.sum(axis=0).max() + moves.latency_us == pytest.approx(away.us)


def test_synchronous_moves_stop_serving_chunk_by_chunk(build: ModuleType) -> None:
    """Three layers, two of which move, each 100 us on the links and 5 us of latency. All at once:
    plan 1000, host 2 x 50, links 2 x 105. In chunks of one the same, in steps 7, 8 and 9."""
    bench = bench_of(build, plan_us=1000.0, layer_us=50.0)
    moves = Moves(np.array([[100.0], [0.0], [100.0]]), np.array([1, 0, 1]), np.ones(3), 5.0)
    whole = _Clock(bench, Rhythm(10, 10), 1.0, 0.5)
    assert whole.changes(7, moves) == [(7, slice(0, 3))]
    assert whole.stall_us == pytest.approx(1000 + 100 + 210)
    chunks = _Clock(bench, Rhythm(10, 10, chunk=1), 1.0, 0.5)
    assert [step for step, _ in chunks.changes(7, moves)] == [7, 8, 9]
    assert chunks.stall_us == pytest.approx(1000 + 100 + 210)


def test_asynchronous_moves_slow_the_steps_beside_them(build: ModuleType) -> None:
    """Steps of 100 us, half of them on links. Layer 0: 1000 us of plan, 50 of host, 105 us of
    weights at two thirds of the speed: 1207.5 us, so 13 steps; layer 2 207.5 us later: 15 steps.
    Steps are delayed by half of 2 x 105 us."""
    bench = bench_of(build, plan_us=1000.0, layer_us=50.0)
    moves = Moves(np.array([[100.0], [0.0], [100.0]]), np.array([1, 0, 1]), np.ones(3), 5.0)
    clock = _Clock(bench, Rhythm(10, 10, asynchronous=True), 100.0, 0.5)
    assert clock.changes(7, moves) == [(20, slice(0, 1)), (22, slice(2, 3))]
    assert clock.stall_us == 0
    assert clock.slowed_us == pytest.approx(105.0)


def test_rebalancing_follows_the_domains(build: ModuleType) -> None:
    """Linear placement has both experts of a domain's pairs on two of four GPUs: imbalance 2. After
    the first plan of each half every GPU has one of the four experts in use."""
    bench = bench_of(build, plan_us=0.0, layer_us=0.0)
    none = bench.price([(0, bench.placed("linear", "balance", 0))])
    eplb = Eplb("e", "", Rhythm(10, 10)).run(bench)
    assert none.imbalance.mean() > 1.95
    early = (bench.course.step_of >= 10) & (bench.course.step_of < 40)
    late = bench.course.step_of >= 50
    assert eplb.priced.imbalance[early].mean() < 1.4
    assert eplb.priced.imbalance[late].mean() < 1.4
    assert eplb.num_plans == pytest.approx(8)
    assert eplb.stall_us > 0


def test_threshold_keeps_what_is_balanced(build: ModuleType) -> None:
    bench = bench_of(build)
    kept = Eplb("e", "", Rhythm(10, 10, threshold=0.1)).run(bench)
    assert (kept.num_plans, kept.num_skipped, kept.stall_us) == (0, pytest.approx(8), 0.0)


def test_plans_cut_off_by_the_clock_are_named(build: ModuleType) -> None:
    bench = bench_of(build)
    bench.problem = replace(bench.problem, time_limit_s=0.0)
    bench.placed("local_search", "balance", 4)
    (said,) = bench.notices
    assert "time limit of 0 s" in said


def test_nothing_is_lent_to_a_gpu_that_holds_a_copy() -> None:
    """Two experts on two GPUs, expert 0 on both. Of expert 0's 6 tokens GPU 1 takes 2 with the copy
    it has; of expert 1's 4, GPU 0 takes 1 with weights sent from GPU 1: one expert is sent."""
    base = Placement(np.array([[0, EMPTY, 0, 1]], np.int32), 2, 1, 2)
    share = np.array([[[4, 2], [1, 3]]], np.int64)
    placement, quota, pairs = lent(base, np.array([[0, 1]]), share)
    assert pairs.tolist() == [[[0, 0], [1, 0]]]
    gpus = placement.logical_to_physical()[0] // placement.slots_per_gpu
    served = {
        (e, int(g)): int(q) for e in (0, 1) for g, q in zip(gpus[e], quota[0, e], strict=True)
    }
    assert served == {(0, 0): 4, (0, 1): 2, (1, 0): 1, (1, 1): 3}
