"""Kinds of chart: what is drawn, where axes begin, what is left out, legends and marks."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.draw.axes import Axes, log_ticks
from moesim.draw.charts import Bar, Interval, Line, Points, bars, columns, intervals, lines, points
from moesim.draw.figures import percent, significant
from moesim.draw.picture import Picture

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a&b' c", "\u202e\x00"]


def values(picture: Picture, layer: int = 0) -> list[dict[str, Any]]:
    found = picture.view["layer"][layer]["data"]["values"]
    assert isinstance(found, list)
    return found


def domain(picture: Picture, channel: str, layer: int = 0) -> list[float]:
    encoding = picture.view["layer"][layer]["encoding"]
    found = encoding[channel]["scale"]["domain"]
    assert isinstance(found, list)
    return found


def texts(picture: Picture) -> list[str]:
    root = ET.fromstring(picture.svg())
    return [e.text or "" for e in root.iter() if e.tag.endswith("}text")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.2345, "1.234"),
        (0.9999999, "1.000"),
        (1262.7984, "1,263"),
        (12, "12"),
        (445164, "445,164"),
        (2465212.1, "2,465,000"),
        (0.0012345, "0.001234"),
        (-2.9, "-2.900"),
        (1.5e-7, "1.5e-07"),
        (float("nan"), "–"),
    ],
)
def test_figures_have_four_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_a_percentage_has_a_typographic_minus() -> None:
    assert percent(-0.0514) == "−5.1%"
    assert percent(float("nan")) == "–"


def test_logarithmic_ticks_are_round_and_within() -> None:
    assert log_ticks(1, 1000, 6) == pytest.approx([1, 10, 100, 1000])
    assert log_ticks(40, 700, 6) == pytest.approx([50, 100, 200, 500])


@given(st.floats(1e-3, 1e6), st.floats(1.01, 1e6), st.integers(2, 9))
def test_logarithmic_ticks_are_few(low: float, times: float, most: int) -> None:
    ticks = log_ticks(low, low * times, most)
    assert 1 <= len(ticks) <= max(2, most)
    assert all(low * (1 - 1e-6) <= t <= low * times * (1 + 1e-6) for t in ticks)


def test_stacked_bars_lie_end_to_end_and_begin_at_0() -> None:
    drawn = bars("t", [Bar("a", [("x", 0, 1.0), ("y", 1, 3.0), ("z", 2, 0.0)], "4")], "ms")
    assert [(v["from"], v["to"]) for v in values(drawn)] == [(0.0, 1.0), (1.0, 4.0)]
    assert values(drawn)[0]["hint"] == "a: x 1"
    assert domain(drawn, "x") == [0, pytest.approx(4.08)]


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=5), st.floats(0, 1e9))
def test_bars_always_begin_at_0_and_hold_their_mark(parts: list[float], mark: float) -> None:
    rows = [Bar(str(i), [("", 0, v)], "") for i, v in enumerate(parts)]
    low, high = domain(bars("t", rows, "ms", mark=(mark, "bound")), "x")
    assert low == 0
    assert high >= max(*parts, mark)
    assert high > 0


def test_an_interval_says_that_its_axis_is_not_from_0() -> None:
    """The axis runs 6% beyond 1 to 4: from 0.82 to 4.18; with an end at 0 it needs no words."""
    drawn = intervals("t", [Interval("a", 2, 1, 4, 0, "2")], "ratio")
    low, high = domain(drawn, "x")
    assert (low, high) == (pytest.approx(0.82), pytest.approx(4.18))
    assert "ratio, not from 0" in texts(drawn)
    assert "ratio" in texts(intervals("t", [Interval("a", 2, 0, 4, 0, "2")], "ratio"))


def test_lines_are_thinned_and_keep_their_ends() -> None:
    many = list(range(5000))
    drawn = lines("t", [Line("a", many, many, 0)], Axes("x", "y"))
    assert len(values(drawn)) == 400
    assert (values(drawn)[0]["x"], values(drawn)[-1]["x"]) == (0, 4999)


def test_logarithmic_axes_leave_out_what_they_cannot_show_and_say_so() -> None:
    axes = Axes("x", "y", log_x=True, log_y=True)
    drawn = lines("t", [Line("a", [0, 1, 10], [5, 0, 5], 0)], axes)
    assert [(v["x"], v["y"]) for v in values(drawn)] == [(10, 5)]
    assert {"x, logarithmic", "y, logarithmic"} <= set(texts(drawn))
    empty = lines("t", [Line("a", [], [], 0)], Axes("x", "y"))
    assert "x" in texts(empty)


def test_marks_beyond_the_axes_are_left_out() -> None:
    """A promise of 1 s beside latencies of 1 to 3 ms would make everything else invisible."""
    axes = Axes("x", "y", marks_x=[(2.0, "near"), (1000.0, "far")], marks_y=[(2.5, "half")])
    drawn = texts(lines("t", [Line("a", [1, 2, 3], [1, 2, 3], 0)], axes))
    assert {"near", "half"} <= set(drawn)
    assert "far" not in drawn


def test_one_series_needs_no_legend_several_have_one_with_shapes_or_dashes() -> None:
    one = lines("t", [Line("alone", [1, 2], [1, 2], 0)], Axes("x", "y"))
    assert "alone" not in texts(one)
    two = [Line(name, [1, 2], [1, 2], i) for i, name in enumerate(("first", "second"))]
    drawn = lines("t", two, Axes("x", "y"))
    assert {"first", "second"} <= set(texts(drawn))
    encoding = drawn.view["layer"][0]["encoding"]
    dashes = encoding["strokeDash"]["scale"]["range"]
    assert dashes[0] != dashes[1]
    groups = [Points(name, [1], [1], i, ["h"]) for i, name in enumerate(("first", "second"))]
    shapes = points("t", groups, Axes("x", "y")).view["layer"][0]["encoding"]["shape"]["scale"]
    assert shapes["range"] == ["circle", "square"]


def test_a_band_is_relative_and_both_axes_are_one() -> None:
    group = Points("a", [10.0, 100.0], [20.0, 50.0], 0, ["", ""])
    drawn = points("t", [group], Axes("x", "y", log_x=True, log_y=True), band=0.1)
    edge = values(drawn)[10]
    assert edge["low"] == pytest.approx(edge["x"] * 0.9)
    assert edge["high"] == pytest.approx(edge["x"] * 1.1)
    assert domain(drawn, "x", 1) == domain(drawn, "y", 1)


def test_columns_stack_from_0_in_the_order_of_their_parts() -> None:
    parts = [("dispatch", 1, [1.0, 2.0]), ("experts", 0, [3.0, 4.0])]
    drawn = columns("t", ["0", "1"], parts, Axes("layer", "us"))
    found = [(v["column"], v["part"], v["from"], v["to"]) for v in drawn.view["data"]["values"]]
    assert found == [
        ("0", "dispatch", 0.0, 1.0),
        ("1", "dispatch", 0.0, 2.0),
        ("0", "experts", 1.0, 4.0),
        ("1", "experts", 2.0, 6.0),
    ]
    assert drawn.view["encoding"]["y"]["scale"]["domain"][0] == 0


@pytest.mark.parametrize("text", HOSTILE)
def test_every_chart_takes_any_name_as_text(text: str) -> None:
    drawn = [
        bars(text, [Bar(text, [(text, 0, 1.0), ("b", 1, 2.0)], text)], text, mark=(1.0, text)),
        intervals(text, [Interval(text, 1, 0, 2, 0, text)], text, mark=(1.0, text)),
        lines(text, [Line(text, [1, 2], [1, 2], 0)], Axes(text, text, marks_x=[(1, text)])),
        points(text, [Points(text, [1, 2], [1, 2], 0, [text, text])], Axes(text, text)),
        columns(text, [text], [(text, 0, [1.0])], Axes(text, text)),
    ]
    shown = "".join(ch if ch.isprintable() else " " for ch in text)
    for picture in drawn:
        root = ET.fromstring(picture.svg())
        assert not {e.tag.rpartition("}")[2] for e in root.iter()} & {"script", "img", "image"}
        assert any(shown.strip()[:8] in (e.text or "") for e in root.iter())
