"""Drawing: scales, ticks, figures as text, escaping."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.report.html.charts import (
    Axes,
    Bar,
    Interval,
    Line,
    Points,
    bars,
    intervals,
    legend,
    lines,
    points,
)
from moesim.report.html.heatmap import Colours, Side, coarser, heat_map
from moesim.report.html.svg import (
    Scale,
    element,
    fit,
    linear_ticks,
    log_ticks,
    short,
    significant,
    tick_labels,
)

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a&b' c", "\u202e\x00"]
NS = "{http://www.w3.org/2000/svg}"


def parse(drawing: str) -> ET.Element:
    return ET.fromstring(drawing)


def of_class(drawing: str, name: str) -> list[ET.Element]:
    return [e for e in parse(drawing).iter() if name in e.get("class", "").split()]


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


def test_ticks_are_round_and_within() -> None:
    assert linear_ticks(0, 1, 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert linear_ticks(1.247, 1.352, 6) == pytest.approx([1.25, 1.275, 1.3, 1.325, 1.35])
    assert log_ticks(1, 1000, 6) == pytest.approx([1, 10, 100, 1000])
    assert log_ticks(40, 700, 6) == pytest.approx([50, 100, 200, 500])


@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(1e-3, 1e6, allow_nan=False),
    st.integers(2, 9),
)
def test_linear_ticks_are_few_distinct_and_within(low: float, span: float, most: int) -> None:
    ticks = linear_ticks(low, low + span, most)
    assert len(ticks) <= most + 1
    assert all(low - span * 1e-6 <= t <= low + span * (1 + 1e-6) for t in ticks)
    assert len(set(tick_labels(ticks))) == len(ticks) or abs(low) > 1e4 * span


def test_a_scale_maps_its_ends_linear_and_log() -> None:
    assert [Scale(2, 4, 10, 30)(x) for x in (2, 3, 4)] == [10, 20, 30]
    assert [Scale(1, 100, 0, 2, log=True)(x) for x in (1, 10, 100)] == pytest.approx([0, 1, 2])
    assert Scale(5, 5, 0, 2)(5) == 1


def test_long_names_are_shortened_in_the_middle() -> None:
    assert fit("short", 100) == "short"
    text = fit("a-very-long-name-of-a-plan-and-its-solver", 100)
    assert "…" in text
    assert text[0] == "a"
    assert text[-1] == "r"
    assert len(text) <= 100 / (0.56 * 12)


def test_wide_ranges_have_short_ticks() -> None:
    assert [short(v) for v in (1500, 2e6, 0.01)] == ["1.5k", "2M", "0.01"]


@pytest.mark.parametrize("text", HOSTILE)
def test_elements_escape_attributes_and_text(text: str) -> None:
    out = element("text", text, aria_label=text)
    assert "<script" not in out
    assert "<img" not in out
    if "\x00" not in text:
        found = parse(str(out))
        assert found.text == text
        assert found.get("aria-label") == text


@pytest.mark.parametrize("text", HOSTILE[:3])
def test_every_chart_escapes_names(text: str) -> None:
    drawn = [
        bars(text, [Bar(text, [(text, 0, 1.0), (text, 1, 2.0)], text)], text, mark=(1.0, text)),
        intervals(text, [Interval(text, 1, 0, 2, 0, text)], text, mark=(1.0, text)),
        lines(text, [Line(text, [1, 2], [1, 2], 0)], Axes(text, text)),
        points(text, [Points(text, [1, 2], [1, 2], 0, [text, text])], Axes(text, text)),
        heat_map(text, np.ones((1, 1)), Side(text, [text]), Side(text, [text]), Colours(1.0), text),
    ]
    for drawing in drawn:
        root = parse(str(drawing))
        assert {e.tag for e in root.iter()} <= {
            *("svg", "title", "desc", "text", "rect", "line", "path", "g", "circle"),
            *("polygon",),
        }
        assert root[0].tag == "title"
        assert root[0].text == text
        assert root.get("role") == "img"


def test_stacked_bars_lie_end_to_end_and_add_up() -> None:
    drawing = bars("t", [Bar("a", [("x", 0, 1.0), ("y", 1, 3.0)], "4")], "ms")
    first, second = of_class(drawing, "mark")
    x, wide = float(first.get("x", "")), float(first.get("width", ""))
    # 344 pixels are 4 * 1.02, so that 1 is 84.31; a gap of 1 is left before the next part.
    assert wide == pytest.approx(344 / 4.08 - 1, abs=0.02)
    assert float(second.get("x", "")) == pytest.approx(x + wide + 1, abs=0.02)
    assert first[0].text == "a: x 1"


def test_an_interval_reaches_from_low_to_high() -> None:
    drawing = intervals("t", [Interval("a", 2, 1, 4, 0, "2"), Interval("b", 3, 0, 5, 1, "3")], "x")
    whiskers = [e for e in of_class(drawing, "whisker") if e.get("y1") == e.get("y2")]
    # The axis runs from -0.3 to 5.3 (6% wider than 0 to 5) over 336 pixels from 12.
    want = [12 + (v + 0.3) / 5.6 * 336 for v in (1, 4)]
    got = [float(whiskers[0].get(k, "")) for k in ("x1", "x2")]
    assert got == pytest.approx(want, abs=0.02)


def test_lines_are_thinned_and_keep_their_ends() -> None:
    many = list(range(5000))
    drawing = lines("t", [Line("a", many, many, 0)], Axes("x", "y"))
    (path,) = of_class(drawing, "mark")
    assert path.get("d", "").count("L") == 399
    steps = lines("t", [Line("a", [0, 1], [0, 1], 0, step=True)], Axes("x", "y"))
    assert of_class(steps, "mark")[0].get("d", "").count("L") == 2


def test_log_axes_leave_out_what_they_cannot_show() -> None:
    drawing = lines(
        "t", [Line("a", [0, 1, 10], [5, 0, 5], 0)], Axes("x", "y", log_x=True, log_y=True)
    )
    assert of_class(drawing, "mark")[0].get("d", "").count("L") == 0
    empty = lines("t", [Line("a", [], [], 0)], Axes("x", "y"))
    assert not of_class(empty, "mark")


def test_colours_of_a_heat_map() -> None:
    around = Colours(0.5, 1.0)
    assert [around.of(x) for x in (0.5, 1.0, 1.5, 9.0, -9.0)] == ["q0", "q5", "q10", "q10", "q0"]
    upward = Colours(9.0)
    assert [upward.of(x) for x in (0.0, 4.5, 9.0, math.nan)] == ["w0", "w4", "w8", "none"]
    assert Colours(8.0, low=5.0).of(5.1) == "w0"


def test_a_small_map_has_a_cell_and_a_hint_for_every_value() -> None:
    values = np.arange(6.0).reshape(2, 3)
    drawing = heat_map("t", values, Side("row", "ab"), Side("column", "xyz"), Colours(5.0), "u")
    cells = of_class(drawing, "mark")
    assert len(cells) == 6
    assert cells[4][0].text == "row b, column y: 4 u"


def test_a_large_map_is_drawn_coarser_and_small_in_bytes() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((58, 320))
    names = [str(i) for i in range(320)]
    drawing = heat_map("t", values, Side("layer", names[:58]), Side("GPU", names), Colours(1.0), "")
    assert len(drawing) < 200_000
    assert "GPU" in drawing
    shown, size = coarser(values, 1, 96, "max")
    assert size == 4
    assert shown.shape == (58, 80)
    assert shown[0, 0] == values[0, :4].max()
    mean, _ = coarser(np.where(values < 0.5, np.nan, values), 1, 96, "mean")
    assert mean[0, 1] == pytest.approx(values[0, 4:8][values[0, 4:8] >= 0.5].mean(), nan_ok=True)


def test_legends_draw_what_the_chart_draws() -> None:
    for kind in ("bar", "line", "point"):
        first, second = legend([("a", 0), ("b", 1)], kind)
        assert first.name == "a"
        assert first.swatch != second.swatch
