"""Plans from expert counts: worked by hand, on steps that come after those that were tuned on."""

from __future__ import annotations

import json
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moesim import metrics
from moesim.cluster import Cluster
from moesim.errors import InfeasibleError, InputError, MismatchError, UnknownNameError
from moesim.jobs.plan import make_plan
from moesim.jobs.plan_result import PlanResult
from moesim.placement import EMPTY, Placement, parse_plan
from moesim.planning import loads as loads_module
from moesim.planning.evaluate import NUM_RESAMPLES
from moesim.planning.loads import measure_loads, split_steps, unequal_steps
from moesim.planning.request import PlanRequest
from moesim.planning.robust import parse_robust
from moesim.trace.format import LoadTrace, TraceMeta


def load_trace(*steps: Any, top_k: int = 2) -> LoadTrace:
    """Steps of [E] counts of one layer, or of [L, E]."""
    counts = np.array(steps, np.int64)
    counts = counts[:, None] if counts.ndim == 2 else counts
    layers, experts = counts.shape[1:]
    return LoadTrace(counts, TraceMeta("toy", experts, top_k, tuple(range(layers))))


@pytest.fixture(scope="module")
def two(build: ModuleType) -> Cluster:
    """Two equal GPUs."""
    made: Cluster = build.small_cluster(1, 2)
    return made


def solve(loads: LoadTrace, cluster: Cluster, **changed: Any) -> PlanResult:
    return make_plan(PlanRequest.of(loads, cluster, None, **changed))


def imbalances(result: PlanResult) -> dict[str, float]:
    return {c.name: c.figures["imbalance"].value for c in result.candidates}


def groups(result: PlanResult, layer: int = 0) -> set[frozenset[int]]:
    """The experts of each GPU."""
    placement = result.plan.placement
    rows = placement.physical_to_logical[layer].reshape(placement.num_gpus, -1)
    return {frozenset(x for x in row.tolist() if x != EMPTY) for row in rows}


def test_first_half_tunes_second_half_evaluates() -> None:
    """Steps without load do not count: of 1, 2, -, 3, 4, 5 the first two tune."""
    counts = load_trace([1, 0], [2, 0], [0, 0], [0, 3], [4, 0], [0, 5]).expert_load
    split = split_steps(counts)
    assert split.apart
    assert split.tune.sum(axis=(1, 2)).tolist() == [1, 2]
    assert split.held_out.sum(axis=(1, 2)).tolist() == [3, 4, 5]


def test_one_step_serves_for_both_and_none_is_an_error() -> None:
    split = split_steps(load_trace([0, 0], [1, 2]).expert_load)
    assert not split.apart
    np.testing.assert_array_equal(split.tune, split.held_out)
    with pytest.raises(InputError, match="every step of the load trace is empty"):
        split_steps(load_trace([0, 0]).expert_load)


def test_counts_whose_sum_no_integer_holds(two: Cluster) -> None:
    """2^62 tokens of each of 4 experts: int64 sums would wrap to 0 and call the step empty."""
    result = solve(load_trace([1 << 62] * 4, [1 << 62] * 4), two)
    assert imbalances(result)["local_search"] == pytest.approx(1)


def test_hand_worked_plan(two: Cluster) -> None:
    """Tuned on 6, 4, 2, 0: only {0, 3} and {1, 2} are even. Held out 4, 4, 2, 2: those have 6 and
    6; linear placement {0, 1}, {2, 3} has 8 and 4, max over mean 8 / 6."""
    result = solve(load_trace([6, 4, 2, 0], [3, 2, 1, 0], [4, 4, 2, 2], [8, 8, 4, 4]), two)
    assert groups(result) == {frozenset({0, 3}), frozenset({1, 2})}
    found = imbalances(result)
    assert found["local_search"] == pytest.approx(1)
    assert found["linear"] == pytest.approx(8 / 6)
    chosen = result.chosen
    assert chosen.figures["balancedness"].value == pytest.approx(1)
    np.testing.assert_allclose(chosen.measured.gpu_load, [[9, 9]])
    assert chosen.solution.objective_value == pytest.approx(1)
    assert chosen.solution.bound == pytest.approx(1)
    assert result.defaults == {"objective": "balance (counts say nothing of messages)"}


def test_drift_counts_against_the_plan(two: Cluster) -> None:
    """The plan of the test above, when later steps have 6, 0, 0, 6: all load on one GPU, where
    linear placement is even."""
    result = solve(load_trace([6, 4, 2, 0], [6, 0, 0, 6]), two)
    assert imbalances(result)["local_search"] == pytest.approx(2)
    assert imbalances(result)["linear"] == pytest.approx(1)
    assert result.judged_on.startswith("held-out: 1 step after")


def test_one_step_is_said_to_be_tuned_on(two: Cluster) -> None:
    result = solve(load_trace([6, 4, 2, 0]), two)
    assert result.judged_on.startswith("NOT held out")
    assert result.plan.evaluation["held_out"] is False


def test_unequal_slots(two: Cluster) -> None:
    """Three slots and one: the heaviest expert sits alone, 3 against 1 + 1 + 1. EPLB needs equal
    GPUs, so greedy is the baseline."""
    result = solve(load_trace([1, 3, 1, 1], [1, 3, 1, 1]), two, slots=(3, 1))
    assert groups(result) == {frozenset({0, 2, 3}), frozenset({1})}
    assert set(imbalances(result)) == {"linear", "greedy", "local_search"}
    assert imbalances(result)["local_search"] == pytest.approx(1)


def test_replicas_share_and_empty_slots_have_nothing() -> None:
    """Expert 0 (6 tokens) on both GPUs: 3 each. GPU 0: 3 + 1, GPU 1: 3 + 1 + 1, one slot empty."""
    table = np.array([[0, 1, EMPTY, 0, 2, 3]], np.int32)
    steps = load_trace([6, 1, 1, 1]).expert_load
    measured = measure_loads(steps, Placement(table, 2, 1, 4), np.array([0, 0]), 1, np.ones(2))
    np.testing.assert_allclose(measured.gpu_load, [[4, 5]])
    np.testing.assert_allclose(measured.values["imbalance"], [[5 / 4.5]] * 2)
    np.testing.assert_allclose(measured.values["balancedness"], [[4.5 / 5]] * 2)


def test_a_slow_gpu_counts_by_its_speed() -> None:
    """6 and 6 tokens on GPUs of speed 1 and 1/2: of the mean speed 3/4 they are 4/3 and 2/3, so
    the loads count 4.5 and 9 against a mean of 6."""
    table = np.array([[0, 1]], np.int32)
    steps = load_trace([6, 6]).expert_load
    measured = measure_loads(
        steps, Placement(table, 2, 1, 2), np.array([0]), 1, np.array([1.0, 0.5])
    )
    np.testing.assert_allclose(measured.values["imbalance"], [[1.5]])


def test_pieces_of_the_steps_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 50, (7, 3, 4))
    placement = Placement(np.tile(np.arange(4, dtype=np.int32), (3, 1)), 2, 1, 4)
    args = (steps, placement, np.arange(7), 7, np.ones(2))
    whole = measure_loads(*args)
    monkeypatch.setattr(metrics, "CHUNK_CELLS", 25)
    parts = measure_loads(*args)
    np.testing.assert_array_equal(whole.values["imbalance"], parts.values["imbalance"])
    np.testing.assert_array_equal(whole.gpu_load, parts.gpu_load)


def test_resamples_are_runs_of_steps() -> None:
    """Of 10 steps: runs of 3 that go round at the end, cut to 10 rows a resample."""
    sample, order = loads_module._sample(10, 0)
    assert (sample.num_main, sample.num_resamples) == (10, NUM_RESAMPLES)
    assert order[:10].tolist() == list(range(10))
    rows = order[10:].reshape(NUM_RESAMPLES, 10)
    follows = np.diff(rows, axis=1) % 10 == 1
    assert follows[:, [0, 1, 3, 4, 6, 7]].all()
    assert not follows[:, [2, 5, 8]].all()


def test_steps_that_are_alike_have_no_interval(two: Cluster) -> None:
    figure = solve(load_trace(*[[6, 4, 2, 0]] * 8), two).chosen.figures["imbalance"]
    assert figure.low == figure.value == figure.high


def test_plan_file_and_reproducibility(two: Cluster) -> None:
    rng = np.random.default_rng(0)
    loads = load_trace(*rng.integers(0, 90, (12, 3, 8)))

    def text() -> str:
        raw = json.loads(solve(loads, two, redundant_experts=2).plan.to_json())
        raw["provenance"].pop("run")
        return json.dumps(raw)

    assert text() == text()
    plan = parse_plan(json.loads(text()))
    assert plan.objective == "balance"
    assert plan.replica_policy == "split"
    assert plan.placement.num_slots == 10
    assert plan.evaluation["num_steps"] == 6
    assert plan.provenance["trace"] == loads.content_hash()
    assert set(plan.evaluation["plans"]) == {"linear", "eplb", "local_search"}


def test_an_interrupted_search_says_so(two: Cluster) -> None:
    loads = load_trace([6, 4, 2, 0], [6, 4, 2, 0])
    result = make_plan(PlanRequest.of(loads, two, None), stop=lambda: True)
    assert result.plan.status == "time_limit"
    assert any("interrupted" in note for note in result.notices)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"objective": "time"}, "`objective` time"),
        ({"objective": "traffic"}, "`objective` traffic"),
        ({"phase": "decode"}, "`phase` decode"),
        ({"batch_tokens": 64}, "`batch_tokens` 64"),
        ({"domain": "code"}, "`domain` code"),
        ({"all_to_all": "deepep"}, "`all_to_all` deepep"),
        ({"replica_policy": "nearest"}, "`replica_policy` nearest"),
        ({"home_ranks": "oracle"}, "`home_ranks` oracle"),
        ({"robust": parse_robust("worst-domain")}, "`robust`"),
    ],
)
def test_what_counts_cannot_tell_is_refused_by_name(
    two: Cluster, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match="needs token-level routing") as error:
        solve(load_trace([1, 2], [2, 1]), two, **changed)
    assert error.value.cause.startswith(words)


def test_a_plan_to_move_from_is_refused(two: Cluster) -> None:
    loads = load_trace([6, 4, 2, 0], [6, 4, 2, 0])
    old = solve(loads, two).plan
    with pytest.raises(InputError, match="`old_plan` needs token-level routing"):
        solve(loads, two, old_plan=old)


def test_unknown_names_and_misfits(two: Cluster, build: ModuleType) -> None:
    loads = load_trace([6, 4, 2, 0], [6, 4, 2, 0])
    with pytest.raises(UnknownNameError, match="unknown objective 'fairness'"):
        solve(loads, two, objective="fairness")
    with pytest.raises(UnknownNameError, match="unknown solver"):
        solve(loads, two, solver="eplbb")
    with pytest.raises(InfeasibleError, match="do not fit"):
        solve(loads, two, slots=(1, 1))
    request = PlanRequest.of(loads, two, build.toy_model(1, 8, 2))
    with pytest.raises(MismatchError, match="4 experts"):
        make_plan(request)
    big = replace(build.toy_model(1, 4, 2), hidden_size=1 << 20, moe_intermediate_size=1 << 20)
    with pytest.raises(InfeasibleError, match="GB"):
        make_plan(request.but(model=big))


def test_notice_of_steps_of_unequal_size() -> None:
    """Five steps of 10 tokens and five of 100."""
    even = load_trace(*[[10, 0]] * 10).expert_load
    assert unequal_steps(even) == []
    mixed = load_trace(*[[10, 0]] * 5, *[[60, 40]] * 5).expert_load
    (note,) = unequal_steps(mixed)
    assert "10 to 100 choices per layer" in note
