"""The page: what is on it, what is left out and why, escaping, size, the same bytes."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesim.cli.main import run as run_command
from moesim.report.html.page import MAX_PAGE_BYTES

HOSTILE = "<script>alert(1)</script>"
QUOTED = '"><img src=x onerror=alert(1)>'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Tags, texts by tag, and whether tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def report(out: Path, *arguments: str | Path) -> str:
    assert run_command(["report", *map(str, arguments), "--out", str(out)], debug=True) == 0
    return out.read_text()


def test_the_page_has_every_section_and_every_chart_its_table(page: Path) -> None:
    read = Reader(page.read_text())
    assert read.open == []
    for title in (
        "Plan: debian-olmoe on 4 GPUs",
        "Simulated steps on h100-sxm-ib",
        "Experts in memory on l40s",
        "Requests served by debian-olmoe on 2 x h100-sxm",
        "Study: least cost_usd_per_hour with tpot_p99<50ms",
        "Predicted and measured on a GPU",
        "Provenance",
    ):
        assert title in read.text
    figures = read.named("figure")
    charts = [a for a in read.named("svg") if a.get("class") == "chart"]
    assert len(charts) == len(figures) == len(read.named("details"))
    assert all(a["role"] == "img" for a in charts)


def test_the_page_loads_nothing_and_runs_nothing(page: Path) -> None:
    text = page.read_text()
    read = Reader(text)
    names = {tag for tag, _ in read.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    for _, attributes in read.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert not {"src", "xlink:href"} & set(attributes)
    assert all(str(a["href"]).startswith("#s") for a in read.named("a"))
    assert "url(" not in text
    assert "http:" not in text
    assert "https:" not in text
    policy = next(a for a in read.named("meta") if a.get("http-equiv"))
    assert str(policy["content"]).startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in str(policy["content"])


def test_the_figures_on_the_page_are_those_of_the_files(page: Path, made: SimpleNamespace) -> None:
    text = Reader(page.read_text()).text
    plan = json.loads((made.folder / "plan.json").read_text())
    value = plan["evaluation"]["plans"]["greedy"]["step_us"]["value"]
    assert f"{value / 1e3:.3f} ms" in text or f"{value / 1e3:.4f} ms" in text
    cache = json.loads((made.folder / "cache.json").read_text())
    assert f"{cache['plan']['predicted']['hit_rate']:.1%}" in text
    simulated = json.loads((made.folder / "simulation.json").read_text())
    assert f"{simulated['plans']['plan']['tokens_per_s']:,.0f}" in text
    assert plan["provenance"]["trace"] in text
    served = json.loads((made.folder / "serving.json").read_text())
    assert f"{served['metrics']['ttft_p90'] * 1e3:.4g}" in text
    study = json.loads((made.folder / "study.json").read_text())
    assert f"{len(study['pareto']['points'])}\nof 4 points evaluated" in text


def test_every_figure_says_what_it_rests_on(page: Path) -> None:
    text = page.read_text()
    for block in re.findall(r"<figure>.*?</figure>", text, re.DOTALL):
        assert re.search(r'class="badge (measured|parts|datasheet|assumed|counted)"', block), block[
            :200
        ]
    for block in re.findall(r'<div class="card">.*?</div>', text, re.DOTALL):
        assert 'class="badge' in block


def test_heat_maps_show_every_layer_and_gpu_of_three_placements(
    page: Path, made: SimpleNamespace
) -> None:
    text = page.read_text()
    maps = re.findall(r"<figure>\s*<h3>Load by layer and GPU.*?</figure>", text, re.DOTALL)
    assert len(maps) == 3
    for drawing in maps:
        assert drawing.count('class="mark"') == made.layers * made.gpus
        assert drawing.count("<title>MoE layer ") == made.layers * made.gpus
    traffic = re.findall(r"<figure>\s*<h3>Traffic from GPU to GPU.*?</figure>", text, re.DOTALL)
    assert len(traffic) == 3
    for drawing in traffic:
        assert drawing.count('class="mark"') == made.gpus * (made.gpus - 1)
        assert "from GPU 0, to GPU 0:" not in drawing


def test_the_same_runs_give_the_same_bytes(made: SimpleNamespace, tmp_path: Path) -> None:
    files = [made.folder / "plan.json", made.folder / "cache.json"]
    first = report(tmp_path / "a.html", *files)
    assert report(tmp_path / "b.html", *files) == first


def test_without_the_trace_maps_are_left_out_with_the_reason(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads((made.folder / "plan.json").read_text())
    cases = {
        "is not here; give it with --trace": {"command": "moesim plan --trace gone.npz"},
        "does not say which trace": {},
        "sample:debian-moe has changed since": {"command": "moesim plan --trace sample:debian-moe"},
    }
    for said, run in cases.items():
        plan["provenance"]["run"] = run
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        text = report(tmp_path / "r.html", tmp_path / "plan.json")
        assert said in text
        assert "left-out" in text
        assert "Load by layer and GPU" not in text
        assert said in capsys.readouterr().err
    again = report(tmp_path / "r.html", tmp_path / "plan.json", "--trace", made.trace)
    assert "Load by layer and GPU" in again
    printed = report(tmp_path / "r.html", made.folder / "plan-run.json")
    assert "the placement is in the plan file" in printed


def test_another_trace_is_said_to_be_another(made: SimpleNamespace, tmp_path: Path) -> None:
    plan = json.loads((made.folder / "plan.json").read_text())
    plan["provenance"]["trace"] = "0" * 64
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    text = report(tmp_path / "r.html", tmp_path / "plan.json", "--trace", made.trace)
    assert "The maps are of another trace" in text


@pytest.mark.parametrize("name", [HOSTILE, QUOTED, "a\u202eb", "x" * 5000, "\ud800", "{{ 7 * 7 }}"])
def test_names_from_files_are_escaped_everywhere(
    name: str, made: SimpleNamespace, validation: dict[str, Any], tmp_path: Path
) -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        keep = ("moesim-", "feasible", "optimal", "split", "time_limit", "measured", "assumed")
        return value if not isinstance(value, str) or value.startswith(keep) else name

    def renamed(plans: dict[str, Any]) -> dict[str, Any]:
        return {f"{name}{i}": value for i, value in enumerate(plans.values())}

    runs = {
        n: spoil(json.loads((made.folder / f"{n}.json").read_text()))
        for n in ("plan", "plan-run", "simulation", "cache", "serving", "study")
    }
    runs["validation"] = spoil(copy.deepcopy(validation))
    runs["simulation"]["plans"] = renamed(runs["simulation"]["plans"])
    runs["plan"]["evaluation"]["plans"] = renamed(runs["plan"]["evaluation"]["plans"])
    runs["cache"]["sweep"]["tokens_per_s"] = renamed(runs["cache"]["sweep"]["tokens_per_s"])
    for n, data in runs.items():
        (tmp_path / f"{n}.json").write_text(json.dumps(data))
    text = report(tmp_path / "r.html", tmp_path)
    read = Reader(text)
    assert read.open == []
    assert not {"script", "img"} & {tag for tag, _ in read.tags}
    assert not any(k.startswith("on") for _, attributes in read.tags for k in attributes)
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)[0]


def test_a_hostile_file_name_is_escaped(made: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / '"><img src=x onerror=alert(1)>.json'
    path.write_text((made.folder / "simulation.json").read_text())
    read = Reader(report(tmp_path / "r.html", path))
    assert not read.named("img")
    assert "onerror=alert(1)>.json" in read.text


def test_a_plan_of_320_gpus_and_58_layers_stays_small(tmp_path: Path, build: Any) -> None:
    from moesim.placement import Placement, Plan
    from moesim.planning.maps import PlacementMap, PlanMaps
    from moesim.report.html.map_section import busiest_figure, map_blocks
    from moesim.report.html.page import _render
    from moesim.report.html.parts import Figures, Section

    layers, gpus = 58, 320
    rng = np.random.default_rng(0)
    table = np.tile(np.arange(gpus, dtype=np.int32), (layers, 1))
    plan = Plan("m", tuple(range(layers)), Placement(table, gpus, 40, gpus))
    maps = {
        name: PlacementMap(
            rng.random((layers, gpus)) * 100, rng.random((gpus, gpus)), 1 + rng.random(48 * layers)
        )
        for name in ("linear", "eplb", "local_search")
    }
    found = PlanMaps(maps, 48, "node", 7168.0, True, ())
    blocks = [Figures([busiest_figure(found)]), *map_blocks(plan, found, "counted")]
    section = Section("Plan", blocks=blocks, anchor="s1")
    text = _render([], [section])
    assert len(text) < MAX_PAGE_BYTES / 5
    assert "GPUs and layers are drawn in groups" in text


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("simulation", ("plans",), "plans must be an object"),
        ("simulation", ("plans", "plan", "step_us", "mean"), "plans.plan.step_us.mean must be"),
        ("cache", ("results", 0, "tokens_per_s"), "results[0].tokens_per_s must be a finite"),
        ("cache", ("plan",), "plan must be an object"),
        ("plan", ("placement", "physical_to_logical"), "placement.physical_to_logical"),
        ("serving", ("metrics", "ttft_p99"), "metrics.ttft_p99 must be a finite number"),
        ("serving", ("cdf", "ttft"), "cdf.ttft must be a list"),
        ("serving", ("series", "serving", "busy"), "series.serving.busy must be a list"),
        ("recommendation", ("answers",), "answers must be a list"),
        ("recommendation", ("answers", 0, "tried", 0, "tpot_p99"), "tried[0].tpot_p99 must be"),
        ("recommendation", ("asked", "promises"), "asked.promises must be a list"),
        ("recommendation", ("answers", 0, "options"), "options must be a list"),
        ("recommendation", ("answers", 0, "tried", 0, "kept"), "kept must be"),
        ("study", ("points",), "points must be a list"),
        ("study", ("points", 0, "figures"), "points[0].figures must be an object"),
        ("study", ("pareto", "axes"), "pareto.axes must be a list"),
        ("plan", ("evaluation", "plans", "eplb", "step_us"), "eplb.step_us must be an object"),
    ],
)
def test_damaged_fields_are_named_and_the_old_page_stays(
    file: str,
    change: tuple[str | int, ...],
    said: str,
    made: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = json.loads((made.folder / f"{file}.json").read_text())
    at = data
    for key in change[:-1]:
        at = at[key]
    at[change[-1]] = "nonsense"
    (tmp_path / "a.json").write_text(json.dumps(data))
    out = tmp_path / "r.html"
    out.write_text("old")
    assert run_command(["report", str(tmp_path / "a.json"), "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0].startswith("error: ")
    assert said in error[0]
    assert error[1].startswith("remedy: ")
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "r.html"]


@pytest.mark.parametrize("key", ["tried", "options", "tpot_p99"])
def test_what_a_drawing_needs_is_named_where_it_is_missing(
    key: str, made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((made.folder / "recommendation.json").read_text())
    answer = data["answers"][0]
    del (answer["tried"][0] if key == "tpot_p99" else answer)[key]
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert run_command(["report", str(tmp_path / "a.json"), "--out", str(tmp_path / "r.html")]) == 2
    assert f"{key} must be" in capsys.readouterr().err


def test_the_command_refuses_what_it_cannot_do(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(made.folder / "plan.json")
    cases = {
        "cannot write": [plan, "--out", str(tmp_path / "no" / "r.html")],
        "is one of the runs": [plan, "--out", plan],
        "the plan 8 of 64": [
            plan,
            "--trace",
            "sample:debian-moe",
            "--out",
            str(tmp_path / "r.html"),
        ],
        "No such file": [str(tmp_path / "none.json"), "--out", str(tmp_path / "r.html")],
    }
    for said, arguments in cases.items():
        assert run_command(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "remedy: " in error
    assert run_command(["report"]) == 2


def test_json_says_what_was_made(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.html"
    report(out, made.folder / "simulation.json", "--json")
    data = json.loads(capsys.readouterr().out)
    assert data["bytes"] == out.stat().st_size
    assert data["sections"] == ["Simulated steps on h100-sxm-ib", "Provenance"]
    assert data["left_out"] == []
