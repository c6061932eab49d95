"""Pictures as files, posters and notebook cells; heat maps; where pictures cannot be written."""

from __future__ import annotations

import json
import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from moesim.draw import Picture, check_target, poster, save
from moesim.draw.axes import Axes
from moesim.draw.charts import Bar, Line, bars, lines
from moesim.draw.colours import DARK, DIVERGING, SEQUENTIAL, SERIES, series_of
from moesim.draw.heatmap import Colours, Side, coarser, heat_map
from moesim.draw.plan import layer_times, load_maps, plan_poster, relative_load
from moesim.errors import InputError


def chart(name: str = "a") -> Picture:
    return lines(name, [Line(name, [1, 2], [1, 2], 0)], Axes("x", "y"))


def test_the_suffix_gives_the_format_and_the_same_picture_the_same_bytes(tmp_path: Path) -> None:
    for suffix, head in (
        (".png", b"\x89PNG"),
        (".svg", b"<svg"),
        (".pdf", b"%PDF"),
        (".PNG", b"\x89P"),
    ):
        first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        save(chart(), first)
        chart().save(second)
        assert first.read_bytes().startswith(head)
        if suffix != ".pdf":
            assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [("a.gif", "cannot plot to a.gif"), ("a", "cannot plot"), ("no/a.png", "there is no folder")],
)
def test_places_that_cannot_be_written_are_refused_before_the_work(
    name: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        check_target(tmp_path / name)
    with pytest.raises(InputError, match=said):
        save(chart(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_picture_and_none_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        check_target(tmp_path / "a.png")
    check_target(None)


def test_the_title_is_whole_within_the_picture() -> None:
    """A title wider than the data widens the picture; nothing is cut off at its edge."""
    title = "200 requests of a log with a long name on 32 GPUs of a cluster with a longer one"
    root = ET.fromstring(chart(title).svg())
    assert title in [e.text for e in root.iter()]
    assert float(root.get("width", "0")) > 6 * len(title)


def test_texts_that_svg_cannot_hold_are_cleaned_and_long_ones_cut() -> None:
    root = ET.fromstring(chart("a\x00b\ud800" + "c" * 500).svg())
    (title,) = [e.text for e in root.iter() if (e.text or "").startswith("a b")]
    assert title is not None
    assert len(title) == 160
    assert title.endswith("…")


def test_a_poster_holds_its_panels_with_their_titles() -> None:
    whole = poster("all", [[chart("first"), chart("second")], [chart("third")]], "about it")
    texts = [e.text for e in ET.fromstring(whole.svg()).iter() if e.text]
    assert {"all", "about it", "first", "second", "third"} <= set(texts)


def test_a_notebook_gets_the_specification_and_a_drawing() -> None:
    bundle = chart()._repr_mimebundle_()
    assert bundle["text/plain"] == "Picture('a')"
    assert bundle["image/svg+xml"].startswith("<svg")
    json.dumps(bundle["application/vnd.vegalite.v5+json"], allow_nan=False)
    assert repr(chart()) == "Picture(title='a')"


def test_pictures_load_nothing() -> None:
    drawn = bars("t", [Bar("http://example.org/x.png", [("", 0, 1.0)], "1")], "ms").svg()
    for element in ET.fromstring(drawn).iter():
        assert not {k for k in element.attrib if k.rpartition("}")[2] in ("href", "src")}


def test_every_colour_has_a_dark_one_of_its_own() -> None:
    every = [*SERIES, *DIVERGING, *SEQUENTIAL]
    assert len(set(every)) == len(every)
    assert set(every) <= set(DARK)
    assert all(DARK[c] != c for c in every)


def test_baselines_have_colours_of_their_own() -> None:
    assert series_of(["linear", "eplb", "mine"], "mine") == {"linear": 7, "eplb": 1, "mine": 0}


def colours_of(picture: Picture) -> list[str]:
    root = ET.fromstring(picture.svg())
    return [e.get("fill", "") for e in root.iter() if e.get("aria-roledescription") == "rect mark"]


def test_colours_of_a_heat_map_run_around_the_middle_and_stop_at_the_reach() -> None:
    """0.5..1.5 in eleven steps: 1 is the sixth; what lies beyond has the last colour."""
    values = np.array([[0.5, 1.0, 1.5, 9.0, -9.0, np.nan]])
    names = Side("column", list("abcdef"))
    drawn = heat_map("t", values, Side("row", ["r"]), names, Colours(0.5, 1.0), "u")
    middle, low, high = DIVERGING[5], DIVERGING[0], DIVERGING[10]
    assert colours_of(drawn) == [low, middle, high, high, low]
    upward = heat_map(
        "t", values[:, 1:3], Side("row", ["r"]), Side("c", ["a", "b"]), Colours(1.5), "u"
    )
    assert colours_of(upward) == [SEQUENTIAL[6], SEQUENTIAL[8]]


def test_a_small_map_says_each_value_a_large_one_is_drawn_coarser() -> None:
    values = np.arange(6.0).reshape(2, 3)
    small = heat_map("t", values, Side("row", "ab"), Side("column", "xyz"), Colours(5.0), "u")
    assert small.view["data"]["values"][4]["hint"] == "row b, column y: 4 u"
    rng = np.random.default_rng(0)
    many = rng.random((58, 320))
    names = [str(i) for i in range(320)]
    large = heat_map("t", many, Side("layer", names[:58]), Side("GPU", names), Colours(1.0), "")
    assert len(large.view["data"]["values"]) == 58 * 64
    assert "a cell is the largest of 1 x 5" in large.description


def test_coarser_takes_the_largest_or_the_mean_of_each_group() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((58, 320))
    shown, size = coarser(values, 1, 96, "max")
    assert (size, shown.shape) == (4, (58, 80))
    assert shown[0, 0] == values[0, :4].max()
    mean, _ = coarser(np.where(values < 0.5, np.nan, values), 1, 96, "mean")
    assert mean[0, 1] == pytest.approx(values[0, 4:8][values[0, 4:8] >= 0.5].mean(), nan_ok=True)


def test_load_of_a_layer_without_any_is_even() -> None:
    assert relative_load(np.array([[0.0, 0.0], [1.0, 3.0]])).tolist() == [[1, 1], [0.5, 1.5]]


def test_placements_share_one_scale_of_load_and_one_axis_of_time() -> None:
    """Loads reach 1.5 times the mean in one placement, layers 60 us in the other."""
    loads = {"linear": np.array([[1.0, 3.0]]), "mine": np.array([[2.0, 2.0]])}
    scales = [
        p.view["encoding"]["color"]["scale"]["domain"] for p in load_maps(loads, (0,)).values()
    ]
    assert scales == [[0.5, 1.5], [0.5, 1.5]]
    parts = {"linear": np.array([[10.0, 20.0, 30.0]]), "mine": np.array([[10.0, 10.0, 10.0]])}
    tops = [p.view["encoding"]["y"]["scale"]["domain"] for p in layer_times(parts, (0,)).values()]
    assert tops == [[0.0, pytest.approx(63.0)]] * 2


def test_the_plan_s_picture_shows_load_and_predicted_time_by_layer() -> None:
    """Layers of 60 and 40 us are a step of 0.1 ms."""
    loads = {"linear": np.array([[1.0, 3.0]] * 2), "mine": np.array([[2.0, 2.0]] * 2)}
    busiest = {name: np.array([1.1, 1.2]) for name in loads}
    parts = {n: np.array([[10.0, 20.0, 30.0], [10.0, 20.0, 10.0]]) for n in loads}
    drawn = plan_poster("m on 2 GPUs", "about", loads, busiest, (3, 7), parts)
    texts = [e.text for e in ET.fromstring(drawn.svg()).iter() if e.text]
    for name in loads:
        assert f"Load by layer and GPU: {name}" in texts
        assert f"Predicted time by layer: {name}" in texts
    assert texts.count("0.1000 ms") == 2
    assert {"dispatch", "routed experts", "combine"} <= set(texts)
    without = plan_poster("m on 2 GPUs", "about", loads, busiest, (3, 7), {})
    assert "Predicted" not in without.svg()


def test_a_png_has_twice_the_points_of_the_picture(tmp_path: Path) -> None:
    chart().save(tmp_path / "a.png")
    wide = struct.unpack(">I", (tmp_path / "a.png").read_bytes()[16:20])[0]
    assert wide == pytest.approx(2 * float(ET.fromstring(chart().svg()).get("width", "0")), abs=2)
