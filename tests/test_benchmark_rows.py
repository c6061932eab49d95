"""Rows of benchmarks with a results.csv: anew by default, on after a stopped run with --resume."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.rows import arguments, begin, days, write

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if "import arguments" in path.read_text()
)


def test_rows_are_kept_with_resume_alone(tmp_path: Path) -> None:
    """Two rows with different columns: both come back, what a row lacks as an empty string."""
    table = tmp_path / "report" / "results.csv"
    assert begin(table, resume=True) == []
    write(table, [{"solver": "eplb", "run": "2026-01-02"}, {"solver": "lns", "gap": "0.1"}])
    old, new = begin(table, resume=True)
    assert old == {"solver": "eplb", "run": "2026-01-02", "gap": ""}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", new.pop("run"))
    assert new == {"solver": "lns", "gap": "0.1"}
    assert days([old, old, {"run": "2026-01-01"}]) == "Run on 2026-01-01 and 2026-01-02."
    assert begin(table, resume=False) == []


def test_a_report_is_written_where_its_benchmark_says(tmp_path: Path) -> None:
    parser = arguments("doc", "reports/x")
    assert parser.parse_args([]).out == Path("reports/x")
    assert not parser.parse_args(["--data", "d"]).resume


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_report_names_its_own_command(name: str) -> None:
    """The command in the report has the folder that the report is in."""
    text = (ROOT / "benchmarks" / f"{name}.py").read_text()
    folder = re.search(r'arguments\(__doc__, "(reports/[\w-]+)"\)', text)
    assert folder is not None
    page = (ROOT / folder.group(1) / "README.md").read_text()
    command = f"    python benchmarks/{name}.py --data ../shared/data"
    assert command in page
