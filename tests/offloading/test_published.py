"""reports/offloading-people is what its script makes of its facts, and keeps what it claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.offloading_hits import limited_hits
from benchmarks.offloading_people import machine_of, medians, memory, page, runs
from benchmarks.what_runs import HEAD, PAGE, section

FOLDER = Path(__file__).parents[2] / "reports" / "offloading-people"


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "facts.yaml").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    return found


def test_runs_and_memory_are_predicted_as_committed(
    facts: dict[str, Any], results: dict[str, Any]
) -> None:
    machines = {name: machine_of(name, raw) for name, raw in facts["machines"].items()}
    made = [*runs(facts, machines), *memory(facts, machines)]
    assert made == results["rows"][: len(made)]


def test_the_page_is_that_of_the_results(results: dict[str, Any]) -> None:
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == page(results)
    assert medians(results["rows"]) == results["medians"]


def test_memory_is_within_three_percent(results: dict[str, Any]) -> None:
    """Weights, KV cache and compute buffer together, against what engines printed."""
    found = [abs(r["error"]) for r in results["rows"] if r["group"] == "memory"]
    assert len(found) == 6
    assert max(found) < 0.03


def test_every_fact_names_its_source(results: dict[str, Any]) -> None:
    assert all(len(r["source"]) > 8 for r in results["rows"])


def test_no_error_above_a_fifth_is_left_without_its_cause(results: dict[str, Any]) -> None:
    counted = [r for r in results["rows"] if not r["fitted"]]
    assert [r["what"] for r in counted if abs(r["error"]) > 0.2 and not r["why"]] == []


def test_hits_of_a_cache_that_brings_in_one_expert_per_token() -> None:
    """Two slots, tokens AB AB AC BC: A comes in (0 of 2), B (1), then AC hits A, and C takes B's
    place as the least recently used (1), BC hits C (1): 3 of 8, and 4 brought in, one per token.
    With A pinned one slot is left: B (1 of 2 by the pin), AB hits both, A and C for B, then C."""
    ids = np.array([[0, 1], [0, 1], [0, 2], [1, 2]])[:, None]
    assert limited_hits(ids, 2, 1) == (3 / 8, 1.0)
    hits, brought = limited_hits(ids, 2, 2, np.array([[0]]))
    assert (hits, brought) == (5 / 8, 3 / 4)


@pytest.mark.parametrize("model", ["GPT-OSS-120B", "Qwen3-30B-A3B"])
def test_what_runs_is_what_the_code_makes(model: str) -> None:
    """`python benchmarks/what_runs.py --check` compares the whole page."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    assert section(model) in text
