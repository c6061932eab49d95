"""Bounds, goals, the best of several points, and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError, UnknownNameError
from moesim.studies.evaluator import Outcome
from moesim.studies.question import (
    COST,
    Question,
    best,
    make_question,
    nearest,
    pareto,
    parse_bounds,
)
from moesim.studies.registry import get_evaluator
from moesim.studies.run import Results

STATIC = get_evaluator("static")


def outcome(key: str, **figures: float | None) -> Outcome:
    return Outcome(key, {}, "ok", dict(figures))


def test_times_are_converted_to_the_unit_of_the_figure() -> None:
    (bound,) = parse_bounds("tpot_p99<50ms", STATIC)
    assert (bound.figure, bound.sign, bound.limit) == ("tpot_p99", "<", pytest.approx(0.05))
    assert str(bound) == "tpot_p99<50ms"
    (bound,) = parse_bounds("step<0.2ms", get_evaluator("plan"))
    assert bound.figure == "step_us"
    assert bound.limit == pytest.approx(200.0)


def test_figures_without_a_unit_of_time() -> None:
    rate, busy = parse_bounds("output_tokens_per_s>1000, tpot_mean<=1s", STATIC)
    assert (rate.sign, rate.limit) == (">", 1000.0)
    assert busy.limit == 1.0
    (share,) = parse_bounds("gpu_busy>60%", get_evaluator("step"))
    assert share.limit == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("tpot_p99<50", InputError, "no unit of time"),
        ("tpot_p99<50parsec", InputError, "no unit of time"),
        ("tpot_p99=50ms", InputError, "no bound"),
        ("tpot_p99<nanms", InputError, "no bound"),
        ("tpot_p99<1e400ms", InputError, "no number"),
        ("tpot_p99<0ms", InputError, "not above 0"),
        ("tpot_p99<1e1e1ms", InputError, "no number"),
        ("tpot_p98<50ms", UnknownNameError, "unknown figure"),
        ("tpot_p99<50ms,tpot_p99<60ms", InputError, "bound twice"),
        ("tpot_p99<50ms,tpot_p99>60ms", InputError, "nothing is both"),
        ("output_tokens_per_s<5ms", InputError, "not measured in ms"),
        (",", InputError, "no bound"),
    ],
)
def test_bounds_that_are_none(text: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        parse_bounds(text, STATIC)


def test_goals() -> None:
    assert make_question(STATIC, "", "gpus", None).goal == "gpus"
    assert make_question(STATIC, "", "cost", None).goal == COST
    throughput = make_question(STATIC, "", None, "throughput")
    assert (throughput.goal, throughput.better) == ("output_tokens_per_s", "high")
    own = make_question(STATIC, "", None, None)
    assert (own.goal, own.better, own.asked) == ("output_tokens_per_s_per_gpu", "high", False)
    with pytest.raises(InputError, match="maximize gpus"):
        make_question(STATIC, "", None, "gpus")
    with pytest.raises(UnknownNameError, match="unknown goal 'happiness'"):
        make_question(STATIC, "", None, "happiness")


def test_best_keeps_the_bounds_first_and_ties_go_to_throughput() -> None:
    question = Question(parse_bounds("tpot_mean<1s", STATIC), "gpus", "low")
    points = [
        outcome("misses", tpot_mean=1.0, gpus=1, output_tokens_per_s=9),
        outcome("slow", tpot_mean=0.5, gpus=2, output_tokens_per_s=5),
        outcome("fast", tpot_mean=0.5, gpus=2, output_tokens_per_s=7),
        outcome("more", tpot_mean=0.1, gpus=4, output_tokens_per_s=9),
    ]
    found = best(question, points, "output_tokens_per_s")
    assert found is not None
    assert found.key == "fast"
    # A bound is strict: exactly 1 s does not keep "below 1 s".
    assert best(question, points[:1]) is None
    close = nearest(question, points[:1])
    assert close is not None
    assert close.key == "misses"


def test_a_missing_figure_keeps_no_bound() -> None:
    question = Question(parse_bounds("tpot_mean<1s", STATIC), "gpus", "low")
    assert best(question, [outcome("none", tpot_mean=None, gpus=1)]) is None
    assert nearest(question, [outcome("none", tpot_mean=None, gpus=1)]) is None


def test_front_by_hand() -> None:
    # (1, 1) is beaten by (1, 2) in the second axis (high); (3, 2) by (1, 2); (2, 5) is best there.
    points = [outcome(f"{x}{y}", x=x, y=y) for x, y in ((1, 1), (1, 2), (3, 2), (2, 5), (4, 5))]
    assert [o.key for o in pareto(points, [("x", "low"), ("y", "high")])] == ["12", "25"]
    twins = [outcome("a", x=1, y=1), outcome("b", x=1, y=1)]
    assert len(pareto(twins, [("x", "low"), ("y", "high")])) == 2
    assert pareto([outcome("n", x=1, y=None)], [("x", "low"), ("y", "high")]) == []


values = st.integers(0, 6)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=30))
def test_front_is_what_the_definition_says(pairs: list[tuple[int, int]]) -> None:
    points = [outcome(str(i), x=a, y=b) for i, (a, b) in enumerate(pairs)]
    front = {o.key for o in pareto(points, [("x", "low"), ("y", "high")])}
    for i, (a, b) in enumerate(pairs):
        beaten = any(c <= a and d >= b and (c, d) != (a, b) for c, d in pairs)
        assert (str(i) in front) is not beaten


def test_fewest_gpus_by_hand(ask: Callable[..., Results]) -> None:
    # time = 8 / g: 8, 4, 2, 1 s; below 3 s from 4 GPUs on.
    results = ask(grid={"gpus": [8, 1, 4, 2]}, slo="time<3s", minimize="gpus")
    assert results.answer is not None
    assert results.answer.params["gpus"] == 4
    assert results.answer.figures["time_s"] == 2.0
    assert ask(grid={"gpus": [1, 2]}, slo="time<3s", minimize="gpus").answer is None
    fastest = ask(grid={"gpus": [1, 8, 2]}, maximize="throughput").answer
    assert fastest is not None
    assert fastest.params["gpus"] == 8


def test_least_dollars_can_be_more_gpus(ask: Callable[..., Results]) -> None:
    content = {
        "cases": [
            {"cluster": "h100-sxm-ib", "gpus": 4, "work": 8.0},
            {"cluster": "a100-sxm-ib", "gpus": 8, "work": 16.0},
        ],
        "slo": "time<3s",
    }
    assert ask(**content, minimize="gpus").answer.params["gpus"] == 4  # type: ignore[union-attr]
    # 4 x $5 = $20 per hour against 8 x $2 = $16.
    priced = {"h100-sxm": 5.0, "a100-sxm": 2.0}
    cheap = ask(**content, minimize="cost", prices=priced).answer
    assert cheap is not None
    assert cheap.params["gpus"] == 8
    assert cheap.figures[COST] == pytest.approx(16.0)


def test_prices_of_the_files_are_labelled(ask: Callable[..., Results]) -> None:
    results = ask(fixed={"gpus": 8}, minimize="cost")
    used = results.study.prices.used["h100-sxm"]
    assert used["kind"] == "assumed"
    assert "put your own" in used["source"]
    given = ask(fixed={"gpus": 8}, minimize="cost", prices={"*": 1.25})
    assert given.study.prices.used["h100-sxm"]["kind"] == "given"
    assert given.answer is not None
    assert given.answer.figures[COST] == pytest.approx(10.0)
    with pytest.raises(UnknownNameError, match="GPU with a price 'h1000'"):
        ask(fixed={"gpus": 8}, minimize="cost", prices={"h1000": 1.0})
