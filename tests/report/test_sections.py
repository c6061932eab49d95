"""Sections of runs that the commands of the other tests do not make: studies without an answer,
disaggregated serving, faults, cache plans alone, validations of cache plans."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moesim.errors import FormatError
from moesim.report.html.parts import Card, Cards, Figures, Note, Section, TableBlock
from moesim.report.html.plan_section import plan_section, plan_views
from moesim.report.html.runs import load_runs


def section(data: dict[str, Any], folder: Path) -> Section:
    from moesim.report.html.page import SECTIONS

    path = folder / "run.json"
    path.write_text(json.dumps(data))
    (run,), _ = load_runs([path])
    return SECTIONS[run.format](run)


def cards(found: Section) -> dict[str, Card]:
    return {c.label: c for b in found.blocks if isinstance(b, Cards) for c in b.items}


def titles(found: Section) -> list[str]:
    out = []
    for block in found.blocks:
        if isinstance(block, Figures):
            out += [f.title for f in block.items]
        elif isinstance(block, TableBlock):
            out.append(block.title)
    return out


def notes(found: Section) -> str:
    return " ".join(b.text for b in found.blocks if isinstance(b, Note))


@pytest.fixture
def study(made: SimpleNamespace) -> Any:
    return json.loads((made.folder / "study.json").read_text())


def test_a_study_without_an_answer_says_what_is_missed(study: Any, tmp_path: Path) -> None:
    study["answer"] = None
    study["nearest"] = {"point": "x", "violation": 0.5, "missed": ["tpot_p99<1ms"]}
    study["sensitivity"]["rows"] = []
    found = section(study, tmp_path)
    assert cards(found)["answer"].value == "none"
    assert "tpot_p99<1ms" in cards(found)["answer"].detail
    assert "What the answer depends on" not in titles(found)


def test_points_without_figures_are_listed_with_the_reason(study: Any, tmp_path: Path) -> None:
    point = study["points"][0]
    del point["figures"]
    point |= {"status": "infeasible", "cause": "does not fit", "remedy": "more GPUs"}
    found = section(study, tmp_path)
    table = next(
        b for b in found.blocks if isinstance(b, TableBlock) and b.title == "Points without figures"
    )
    assert [row[-2:] for row in table.table.rows] == [["infeasible", "does not fit"]]


def test_the_answer_is_marked_in_the_table(study: Any, tmp_path: Path) -> None:
    chosen = next(p for p in study["points"] if p["key"] == study["answer"]["point"])
    found = section(study, tmp_path)
    table = next(
        b for b in found.blocks if isinstance(b, TableBlock) and b.title == "Points evaluated"
    )
    marked = [row for row in table.table.rows if row[-1].startswith("the answer")]
    assert len(marked) == 1
    assert marked[0][0] == str(chosen["params"][study["varied"][0]])


def test_a_study_whose_answer_changes_says_with_what(study: Any, tmp_path: Path) -> None:
    row = study["sensitivity"]["rows"][0]
    row["changed"] = True
    found = section(study, tmp_path)
    card = cards(found)["answer under other inputs"]
    assert card.value.startswith("changes with 1 of ")
    assert row["input"] in card.detail


def test_a_study_of_one_figure_has_no_front(study: Any, tmp_path: Path) -> None:
    study["pareto"]["axes"] = study["pareto"]["axes"][:1]
    assert "Pareto front" not in titles(section(study, tmp_path))
    for point in study["points"]:
        point["status"] = "failed"
    found = section(study, tmp_path)
    assert "0 of 4 points evaluated" in found.lead


def test_served_requests_with_promises_missed_levels_and_two_roles(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    data = json.loads((made.folder / "serving.json").read_text())
    data["slo"]["missed"] = [{"promise": "tpot_p99<50ms", "limit_s": 0.05, "value_s": 0.06}]
    data["series"]["decode"] = data["series"]["serving"]
    data["by_level"] = [
        {"priority": p, "requests": 30, "finished": 29, "ttft_p99": 0.1, "tpot_p99": None}
        for p in (0, 1)
    ]
    found = section(data, tmp_path)
    card = cards(found)["requests that keep their promises"]
    assert "missed: tpot_p99<50ms" in card.detail
    assert "By priority, the first the most urgent" in titles(found)
    figures = [f for b in found.blocks if isinstance(b, Figures) for f in b.items]
    tokens = next(f for f in figures if f.title == "Tokens per second")
    names = tokens.chart.view["layer"][0]["encoding"]["color"]["scale"]["domain"]
    assert len(names) == 4
    assert names[2] == "output tokens, decoding engines"


def test_latency_charts_mark_the_promise_and_turn_logarithmic(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    data = json.loads((made.folder / "serving.json").read_text())
    data["cdf"]["tpot"] = [0.001 * 1.1**i for i in range(101)]
    found = section(data, tmp_path)
    figures = {f.title: f for b in found.blocks if isinstance(b, Figures) for f in b.items}
    drawn = figures["Time per output token"].chart.svg()
    assert "promise p99" in drawn
    assert "time per output token (s), logarithmic" in drawn
    data["cdf"]["tpot"] = [2.0, 1.0, 3.0]
    with pytest.raises(FormatError, match=r"cdf\.tpot must be quantiles in ascending order"):
        section(data, tmp_path)


def test_faults_drops_and_new_placements_of_a_simulation(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    data = json.loads((made.folder / "simulation.json").read_text())
    plan = data["plans"]["plan"]
    plan["faults"] = {
        "availability": 0.9,
        "steps_retried": 2,
        "outages": [
            {"fault": "gpu:1", "at_us": 5e4, "lost_experts": 3, "time_to_recover_us": None},
            {"fault": "gpu:2", "at_us": 6e4, "lost_experts": 0, "time_to_recover_us": 1e3},
        ],
    }
    data["settings"] = {"slow": "3=0.8", "schedule": "chunked"}
    plan["drops"] = {"choices": 100, "dropped": 7, "dropped_share": 0.07, "substituted": 0}
    plan["rebalance"] = {"num_plans": 3, "mode": "async", "bytes_from_gpus": 1e6, "stall_share": 0}
    found = section(data, tmp_path)
    assert found.title == "Simulated steps on h100-sxm-ib, slow 3=0.8; schedule chunked"
    assert "Settings: slow 3=0.8; schedule chunked." in found.lead
    assert "available 90.0% of the time, 2 steps run again" in notes(found)
    assert "3 new placements (async)" in notes(found)
    tables = {b.title: b.table for b in found.blocks if isinstance(b, TableBlock)}
    assert [row[-1] for row in tables["Faults"].rows] == ["not recovered", "1"]
    assert tables["Choices beyond the experts' capacity"].rows[0][:2] == ["plan", "7.00%"]


def test_a_cache_plan_alone_says_what_it_lacks(made: SimpleNamespace, tmp_path: Path) -> None:
    whole = json.loads((made.folder / "cache.json").read_text())
    found = section(whole["plan"], tmp_path)
    assert "give moesim cache --json as well" in notes(found)
    assert cards(found)["tokens/s"]
    del whole["sweep"]
    assert "Speed against memory is left out" in notes(section(whole, tmp_path))


def test_a_validation_of_cache_plans(tmp_path: Path) -> None:
    data = {
        "format": "moesim-cache-validation",
        "version": 1,
        "model": "m",
        "within_tolerance": False,
        "caches": [
            {
                "cache": "lru",
                "copies_per_token": 12.0,
                "measured_us": 2000.0,
                "predicted_us": 1900.0,
                "error": -0.05,
            }
        ],
        "environment": {"device": "one GPU"},
        "notes": ["throttled"],
    }
    found = section(data, tmp_path)
    assert cards(found)["verdict on cache plans"].value == "out of tolerance"
    (figures,) = (b for b in found.blocks if isinstance(b, Figures))
    assert figures.items[0].table.rows == [["lru", "12", "2", "1.900", "−5.0%"]]
    assert "throttled" in notes(found)


@pytest.fixture
def recommendation(made: SimpleNamespace) -> Any:
    return json.loads((made.folder / "recommendation.json").read_text())


def test_a_recommendation_says_what_you_get_and_how_firm_it_is(
    recommendation: Any, tmp_path: Path
) -> None:
    found = section(recommendation, tmp_path)
    answer = recommendation["answers"][0]
    best = answer["options"][0]
    shown = cards(found)
    assert shown["what you get"].value == f"{best['num_gpus']} x h200-sxm"
    assert shown["what it costs"].value == f"${best['usd_per_hour']:,.0f}/h"
    assert shown["what binds"].detail.startswith("tpot_p99<50ms")
    assert "how firm" in shown
    assert titles(found) == [
        "Layouts tried",
        "The tightest promise",
        "Options, best first",
        "Searched beside it, for you to choose",
    ]


def test_a_recommendation_that_misses_says_so(recommendation: Any, tmp_path: Path) -> None:
    answer = recommendation["answers"][0]
    answer["kept"] = answer["options"][0]["kept"] = False
    answer["options"][0]["promises"]["tpot_p99<50ms"] = None
    answer["binds"]["used"] = answer["firm"] = None
    shown = cards(section(recommendation, tmp_path))
    assert "what you get (misses a promise)" in shown
    assert shown["what binds"].detail.endswith("without end")
    assert "how firm" not in shown


def test_a_plan_says_its_rule_of_routing_and_its_solvers_schedule(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    data = json.loads((made.folder / "plan-run.json").read_text())
    data["evaluation"]["reroute"] = "rerouted: drop: 9 of 10 choices kept"
    data["evaluation"]["own_schedule"] = {
        "schedule": "context-coherent",
        "all_to_all": "nccl",
        "num_steps": 4,
        "step_us": {"linear": 1500.0, "greedy": 1000.0},
    }
    (tmp_path / "run.json").write_text(json.dumps(data))
    (view,) = plan_views(load_runs([tmp_path / "run.json"])[0])
    lead = plan_section(view).lead
    assert "9 of 10 choices kept" in lead
    assert "schedule context-coherent" in lead
    assert "linear 1.500, greedy 1.000" in lead
