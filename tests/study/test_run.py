"""Running studies of the toy: what is evaluated, what is skipped, sensitivity, search."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import FormatError, InputError, UnknownNameError
from moesim.studies.result import to_json
from moesim.studies.run import Results, make_study

Ask = Callable[..., Results]


def rows_of(results: Results) -> dict[tuple[str, float], dict[str, Any]]:
    return {(r["input"], r["factor"]): r for r in results.sensitivity}


def test_every_point_once_in_the_order_of_the_grid(ask: Ask, toy: Any) -> None:
    results = ask(grid={"gpus": [2, 1], "work": [4.0, 8.0]})
    assert [(p.params["gpus"], p.params["work"]) for p in results.points] == [
        (2, 4.0), (2, 8.0), (1, 4.0), (1, 8.0),
    ]  # fmt: skip
    assert len(toy.calls) == 4
    assert results.answer is not None
    assert results.answer.figures["time_s"] == 2.0


def test_the_same_point_in_other_words_is_one(ask: Ask, toy: Any) -> None:
    # 8.0 is the default of work: the second case says the same as the first.
    results = ask(fixed={"gpus": 1}, cases=[{}, {"work": 8.0}, {"work": 8}])
    assert len(results.points) == 1
    assert len(toy.calls) == 1
    assert any("same as others" in notice for notice in results.notices)


def test_points_that_cannot_be(ask: Ask, toy: Any) -> None:
    results = ask(grid={"gpus": [1, 128], "work": [8.0, -1.0]})
    assert [o.status for o in results.evaluated] == ["ok", "refused", "infeasible", "refused"]
    assert results.evaluated[1].cause == "work below 0"
    with pytest.raises(InputError, match="none of the 2 points can be evaluated; the first: work"):
        ask(grid={"gpus": [1, 2]}, fixed={"work": -1.0})
    assert ask(fixed={"gpus": 128}, slo="time<1s").answer is None


def test_a_bug_in_one_point_does_not_stop_the_others(ask: Ask, tmp_path: Path, toy: Any) -> None:
    journal = tmp_path / "j.jsonl"
    results = ask(fixed={"gpus": 1}, grid={"work": [13.0, 8.0]}, journal=journal)
    assert [f.error for f in results.failures] == ["ZeroDivisionError: a bug"]
    assert results.answer is not None
    data = to_json(results)
    assert [p["status"] for p in data["points"]] == ["failed", "ok"]
    # It is not in the journal, so that the next run tries it again; the other is not.
    toy.calls.clear()
    ask(fixed={"gpus": 1}, grid={"work": [13.0, 8.0]}, journal=journal)
    assert [c["work"] for c in toy.calls] == [13.0]


def test_stop_early_skips_only_what_costs_more(ask: Ask, toy: Any) -> None:
    content: dict[str, Any] = {
        "grid": {"gpus": [16, 8, 4, 2, 1]},
        "slo": "time<3s",
        "minimize": "gpus",
    }
    results = ask(**content, stop_early=True)
    assert sorted(c["gpus"] for c in toy.calls) == [1, 2, 4]
    assert results.answer is not None
    assert results.answer.params["gpus"] == 4
    assert [p["status"] for p in to_json(results)["points"]] == [
        "not evaluated", "not evaluated", "ok", "ok", "ok",
    ]  # fmt: skip
    assert to_json(ask(**content))["answer"]["params"] == {"gpus": 4}
    with pytest.raises(InputError, match="stop_early"):
        ask(grid={"gpus": [1]}, maximize="throughput", stop_early=True)


def test_no_monotonicity_is_assumed(ask: Ask, toy: Any) -> None:
    # With an overhead of 1 s a GPU: 8/g + g = 9, 6, 6, 9 s for 1, 2, 4, 8 GPUs, so 8 GPUs are no
    # better than 1, and 2 keep a promise of 7 s.
    results = ask(
        fixed={"overhead": 1.0}, grid={"gpus": [1, 2, 4, 8]}, slo="time<7s", minimize="gpus"
    )
    assert [o.figures["time_s"] for o in results.evaluated] == [9.0, 6.0, 6.0, 9.0]
    assert results.answer is not None
    assert results.answer.params["gpus"] == 2


def test_sensitivity_by_hand(ask: Ask) -> None:
    # 8 / g s: 4 GPUs keep 2.2 s (2.0). With compute x 0.8 they take 2.5: 8 GPUs (1.25) it is.
    # Load x 1.2: 2.4, 8 GPUs again. Load x 0.8: 1.6, and 2 GPUs take 3.2: still 4. The network
    # plays no part without overhead.
    results = ask(grid={"gpus": [1, 2, 4, 8]}, slo="time<2.2s", minimize="gpus", sensitivity=0.2)
    rows = rows_of(results)
    by_key = {p.key: p.params["gpus"] for p in results.points}
    assert results.sensitivity_over == "all points"
    assert {k: by_key[r["answer"]] for k, r in rows.items()} == {
        ("network bandwidth", 0.8): 4,
        ("network bandwidth", 1.2): 4,
        ("compute", 0.8): 8,
        ("compute", 1.2): 4,
        ("load", 0.8): 4,
        ("load", 1.2): 8,
    }
    slow = rows["compute", 0.8]
    assert slow["changed"]
    assert not slow["kept"]
    assert slow["figures"]["time_s"] == pytest.approx(2.5)
    assert to_json(results)["answer"]["robust"] is False


def test_sensitivity_where_nothing_keeps_the_promise_any_more(ask: Ask) -> None:
    results = ask(fixed={"gpus": 4}, slo="time<2.2s", minimize="gpus", sensitivity=0.2)
    row = rows_of(results)["load", 1.2]
    assert (row["answer"], row["changed"], row["kept"]) == (None, True, False)


def test_sensitivity_to_prices_needs_no_evaluation(ask: Ask, toy: Any) -> None:
    # $16 against $17.6 per hour: the second wins once the first's GPUs cost 20 % more.
    results = ask(
        cases=[
            {"cluster": "a100-sxm-ib", "gpus": 8, "work": 16.0},
            {"cluster": "h100-sxm-ib", "gpus": 4, "work": 8.0},
        ],
        slo="time<3s",
        minimize="cost",
        prices={"a100-sxm": 2.0, "h100-sxm": 4.4},
        sensitivity=0.2,
    )
    assert results.answer is not None
    assert results.answer.params["gpus"] == 8
    rows = rows_of(results)
    assert rows["price of a100-sxm", 1.2]["changed"]
    assert rows["price of h100-sxm", 0.8]["changed"]
    assert not rows["price of h100-sxm", 1.2]["changed"]


def test_large_studies_ask_again_over_the_contenders(ask: Ask, toy: Any) -> None:
    # 30 points, and 30 x 6 more for three inputs lower and higher are above the limit. All points
    # have as many GPUs, so that the front is the fastest alone; the ten fastest are asked again.
    works = [float(w) for w in range(1, 31)]
    results = ask(
        fixed={"gpus": 1},
        grid={"work": works},
        max_points=30,
        maximize="throughput",
        sensitivity=0.5,
    )
    assert results.sensitivity_over == "the Pareto front and the ten best points alone"
    assert len(toy.calls) == 30 + 10 * 6
    assert results.answer is not None
    assert results.answer.params["work"] == 1.0


def test_search_finds_the_best_of_a_separable_grid(ask: Ask, toy: Any) -> None:
    grid = {"gpus": [1, 2, 4, 8, 16], "work": [float(w) for w in range(1, 21)]}
    results = ask(grid=grid, search={"points": 40, "seed": 3})
    assert len(toy.calls) <= 40
    assert results.num_grid == 100
    assert results.answer is not None
    assert (results.answer.params["gpus"], results.answer.params["work"]) == (16, 1.0)
    assert any("not proven" in n for n in results.notices)
    again = ask(grid=grid, search={"points": 40, "seed": 3})
    assert to_json(again) == to_json(results)


def test_random_search_takes_as_many_as_asked(ask: Ask, toy: Any) -> None:
    grid = {"gpus": [1, 2, 4, 8], "work": [1.0, 2.0, 3.0, 4.0]}
    ask(grid=grid, search={"method": "random", "points": 7})
    assert len(toy.calls) == 7


def test_size_of_the_grid_is_said_and_limited(ask: Ask, toy: Any) -> None:
    grid = {"gpus": {"from": 1, "to": 1000, "step": 1}, "work": [1.0, 2.0, 3.0]}
    with pytest.raises(InputError, match=r"3,000 points \(gpus 1000 x work 3\)") as error:
        make_study({"evaluator": "toy", "grid": grid})
    assert "`max_points` 3000" in error.value.remedy
    assert make_study({"evaluator": "toy", "grid": grid}, max_points=3000).space.num_points == 3000
    assert not toy.calls


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ({"grid": {"gpus": [8, 8]}}, FormatError, "grid.gpus: 8 appears twice"),
        ({"grid": {"gpus": []}}, FormatError, "grid.gpus"),
        ({"grid": {"gpus": [float("nan")]}}, FormatError, "must be finite"),
        ({"grid": {"gpus": [[1]]}}, FormatError, "one value"),
        ({"grid": {"gpus": {"from": 8, "to": 1, "times": 2}}}, FormatError, "below from"),
        ({"grid": {"gpus": {"from": 1, "to": 8}}}, FormatError, "either step or times"),
        ({"grid": {"gpus": {"from": 1, "to": 1e9, "step": 1}}}, FormatError, "more than 10,000"),
        ({"fixed": {"gpus": 1}, "grid": {"gpus": [2]}}, FormatError, "grid.gpus: is fixed"),
        ({"fixed": {"gpus": 1}, "cases": [{"gpus": 2}]}, FormatError, "gpus is fixed as well"),
        ({"girds": {}}, FormatError, "unknown key girds"),
        ({"minimize": "gpus", "maximize": "rate"}, FormatError, "ask one of the two"),
        ({"prices": {"h100-sxm": float("nan")}}, FormatError, "must be finite"),
        ({"prices": {"h100-sxm": -1}}, FormatError, "greater than 0"),
        ({"sensitivity": 1.5}, FormatError, "sensitivity"),
        ({"evaluator": "tarot"}, UnknownNameError, "unknown evaluator 'tarot'"),
        ({"front": ["time", "beauty"], "fixed": {"gpus": 1}}, UnknownNameError, "'beauty'"),
        ({"search": {"points": 10**7}}, FormatError, "search.points"),
        ({"search": {"points": 5000}}, InputError, "more than 2,000"),
    ],
)
def test_studies_that_cannot_be(
    toy: Any, content: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        make_study({"evaluator": "toy", **content})


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"gpus": 1, "wrok": 1.0}, "no parameter 'wrok'"),
        ({}, "parameter gpus is missing"),
        ({"gpus": 0}, "gpus 0"),
        ({"gpus": 10**9}, "gpus 1000000000"),
        ({"gpus": True}, "must be a whole number"),
        ({"gpus": "many"}, "must be a whole number"),
        ({"gpus": 1, "network_scale": 0}, "network_scale 0"),
        ({"gpus": 1, "work": "heavy"}, "must be a number"),
    ],
)
def test_parameters_that_cannot_be(ask: Ask, fixed: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ask(fixed=fixed)


def test_result_is_plain_json_and_repeats(ask: Ask) -> None:
    content: dict[str, Any] = {
        "grid": {"gpus": [1, 2, 128]}, "slo": "time<5s", "minimize": "gpus", "sensitivity": 0.1,
    }  # fmt: skip
    data = to_json(ask(**content))
    assert json.dumps(data, allow_nan=False) == json.dumps(to_json(ask(**content)), allow_nan=False)
    assert (data["format"], data["version"]) == ("moesim-study", 1)
    assert data["answer"]["params"] == {"gpus": 2}
    assert [p["status"] for p in data["points"]] == ["ok", "ok", "infeasible"]
    assert data["points"][0]["missed"] == ["time<5s"]
    assert data["points"][1]["notes"] == ["a remark"]
    assert data["pareto"]["points"] == [data["answer"]["point"]]


def test_nearest_miss_is_named(ask: Ask) -> None:
    data = to_json(ask(grid={"gpus": [1, 2]}, slo="time<2s"))
    assert data["answer"] is None
    # 4 s for 2 GPUs, twice the 2 s promised.
    assert data["nearest"]["violation"] == pytest.approx(1.0)
    assert data["nearest"]["missed"] == ["time<2s"]
