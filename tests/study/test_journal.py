"""The journal: what survives a crash, what is noticed, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import FormatError, InputError
from moesim.studies.evaluator import Outcome
from moesim.studies.journal import StudyJournal
from moesim.studies.result import to_json
from moesim.studies.run import Results

Ask = Callable[..., Results]
GRID: dict[str, Any] = {"grid": {"gpus": [1, 2, 4, 8]}}


def outcome(i: int) -> Outcome:
    return Outcome(f"k{i}", {"gpus": i, "name": "ä\n\x00"}, "ok", {"x": 0.1 * i, "y": None})


def write(path: Path, count: int) -> None:
    with StudyJournal(path, "s") as journal:
        for i in range(count):
            journal.add(outcome(i))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, 3)
    with StudyJournal(path, "t") as journal:
        assert journal.outcomes == {f"k{i}": outcome(i) for i in range(3)}
        assert journal.studies == ["s"]
        journal.add(outcome(1))
    assert len(path.read_bytes().splitlines()) == 5  # two headers, three points


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, 10_000))
def test_a_journal_cut_anywhere_holds_its_whole_lines(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)
    write(path, 4)
    whole = path.read_bytes()
    cut = cut % (len(whole) + 1)
    path.write_bytes(whole[:cut])
    kept = max(0, whole[:cut].count(b"\n") - 1)
    with StudyJournal(path, "s") as journal:
        assert sorted(journal.outcomes) == [f"k{i}" for i in range(kept)]
        assert journal.num_damaged == 0
        for i in range(4):
            journal.add(outcome(i))
    assert path.read_bytes() == whole


def test_a_damaged_line_costs_its_point_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, 3)
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace("0.1", "0.7")
    path.write_text("".join(lines))
    with StudyJournal(path, "s") as journal:
        assert sorted(journal.outcomes) == ["k0", "k2"]
        assert journal.num_damaged == 1


@pytest.mark.parametrize("content", ["not a journal\n", '{"format": "moesim-plan"}\n', "\n"])
def test_other_files_are_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(FormatError, match="not the journal"), StudyJournal(path, "s"):
        pass
    assert path.read_text() == content


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with (
        StudyJournal(path, "s"),
        pytest.raises(InputError, match="another process is writing"),
        StudyJournal(path, "s"),
    ):
        pass
    with StudyJournal(path, "s"):
        pass


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write the journal"), StudyJournal(tmp_path, "s"):
        pass


def test_nothing_is_computed_twice(ask: Ask, toy: Any, tmp_path: Path) -> None:
    journal = tmp_path / "j.jsonl"
    first = ask(**GRID, journal=journal)
    assert (first.num_computed, first.num_reused) == (4, 0)
    toy.calls.clear()
    second = ask(**GRID, journal=journal)
    assert not toy.calls
    assert (second.num_computed, second.num_reused) == (0, 4)
    assert to_json(second) == to_json(first)


def test_a_changed_study_is_noticed_and_shares_its_points(
    ask: Ask, toy: Any, tmp_path: Path
) -> None:
    journal = tmp_path / "j.jsonl"
    ask(**GRID, journal=journal)
    toy.calls.clear()
    results = ask(grid={"gpus": [4, 8, 16]}, journal=journal)
    assert [c["gpus"] for c in toy.calls] == [16]
    assert any("the study has changed" in n for n in results.notices)


def test_changed_inputs_are_noticed_and_computed_again(
    ask: Ask, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "j.jsonl"
    ask(**GRID, journal=journal)
    toy.calls.clear()
    monkeypatch.setattr(toy, "inputs", lambda self, params: {"cluster": "another"})
    results = ask(**GRID, journal=journal)
    assert len(toy.calls) == 4
    assert any("the cluster has changed since 4 points" in n for n in results.notices)


def test_other_code_is_noticed_and_computes_again(
    ask: Ask, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "j.jsonl"
    ask(**GRID, journal=journal)
    toy.calls.clear()
    for module in ("space", "tasks", "run"):
        monkeypatch.setattr(f"moesim.studies.{module}.code_hash", lambda: "other")
    results = ask(**GRID, journal=journal)
    assert len(toy.calls) == 4
    assert any("the code of moesim has changed" in n for n in results.notices)


def test_lines_carry_no_clock_and_no_place(ask: Ask, tmp_path: Path) -> None:
    ask(**GRID, journal=tmp_path / "a.jsonl")
    ask(**GRID, journal=tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_journal_without_a_point_goes_away(tmp_path: Path) -> None:
    """A refused study leaves nothing; one that already held points is kept."""
    path = tmp_path / "j.jsonl"
    with StudyJournal(path, "s"):
        assert path.exists()
    assert not path.exists()
    with StudyJournal(path, "s") as journal:
        journal.add(outcome(1))
    with StudyJournal(path, "t"):
        pass
    with StudyJournal(path, "t") as again:
        assert list(again.outcomes) == ["k1"]
