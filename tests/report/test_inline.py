"""Pictures within the page: only what draws is kept, hints and names as text, small in bytes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from moesim.draw.axes import Axes
from moesim.draw.charts import Bar, Line, bars, lines
from moesim.draw.colours import DARK
from moesim.draw.heatmap import Colours, Side, heat_map
from moesim.report.html.inline import ATTRIBUTES, ELEMENTS, dark_style, inline

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a&b' c"]


@pytest.mark.parametrize("text", HOSTILE)
def test_only_drawing_is_kept_and_names_are_text(text: str) -> None:
    rows = [Bar(text, [(text, 0, 1.0), ("b", 1, 2.0)], text)]
    drawn = inline(bars(text, rows, text, mark=(1.0, text)))
    root = ET.fromstring(drawn)
    assert {e.tag for e in root.iter()} <= {*ELEMENTS, "title", "desc"}
    assert {k for e in root.iter() for k in e.attrib} <= {*ATTRIBUTES, "class", "role"}
    assert (root[0].tag, root[0].text, root.get("role")) == ("title", text, "img")
    assert f"{text}: {text} 1" in [e.text for e in root.iter("title")]


def test_marks_say_their_values_to_a_pointer() -> None:
    drawn = inline(bars("t", [Bar("a", [("x", 0, 1.0), ("y", 1, 3.0)], "4")], "ms"))
    marks = [e for e in ET.fromstring(drawn).iter() if e.get("class") == "mark"]
    assert [mark.findtext("title") for mark in marks] == ["a: x 1", "a: y 3"]


def test_a_picture_of_the_page_is_as_wide_as_a_phone_and_has_no_size_of_its_own() -> None:
    root = ET.fromstring(inline(lines("t", [Line("a", [1, 2], [1, 2], 0)], Axes("x", "y"))))
    assert str(root.get("viewBox")).startswith("0 0 360 ")
    assert root.get("width") is None


def test_a_map_of_many_cells_is_small_and_keeps_its_colours() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((58, 60))
    names = [str(i) for i in range(60)]
    drawn = inline(heat_map("t", values, Side("l", names[:58]), Side("g", names), Colours(1.0), ""))
    assert len(drawn) < 130_000
    marks = [e for e in ET.fromstring(drawn).iter() if e.get("class") == "mark"]
    assert len(marks) == 9
    assert sum(str(e.get("d")).count("Z") for e in marks) == values.size


def test_coordinates_have_at_most_two_decimals() -> None:
    drawn = inline(lines("t", [Line("a", [1, 2, 3], [1, 2.7182818, 3], 0)], Axes("x", "y")))
    assert not re.search(r"\d\.\d{3}", re.sub(r"<(title|desc)>.*?</\1>", "", drawn))


def test_every_colour_of_a_picture_has_a_rule_for_dark_pages() -> None:
    drawn = inline(bars("t", [Bar("a", [("x", 0, 1.0), ("y", 1, 3.0)], "4")], "ms"))
    used = set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]+)"', drawn))
    assert used
    assert used <= set(DARK)
    style = dark_style(DARK.items())
    assert all(f"[fill='{colour}']{{fill:{DARK[colour]}}}" in style for colour in used)
    assert style.startswith("@media screen and (prefers-color-scheme: dark)")
