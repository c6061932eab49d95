"""The cache of compiled functions: renewed by edits in other files, and never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba import config

from moesim import kernels
from moesim.kernels import imported, kernel

USER = """from moesim.errors import InputError
from moesim.cost.routing import (
    BLOCK_TOKENS,
    route,
)
import moesim.plan as plan


def late() -> None:
    from moesim.cluster import load_cluster
"""
CALLEE = """from typing import NamedTuple
from moesim.kernels import kernel

class {name}(NamedTuple):
    value: int

@kernel
def value_of(pair):
    return pair.value + {more}
"""
CALLER = """from moesim.kernels import kernel
from moesim.callee import {name}, value_of

@kernel
def twice(pair):
    return 2 * value_of(pair)

print(twice({name}(5)), sum(twice.stats.cache_hits.values()))
"""


def test_imports_at_the_top_count() -> None:
    package = kernels.PACKAGE
    files = imported(USER)
    assert {package / "errors.py", package / "cost" / "routing.py", package / "plan.py"} <= files
    assert package / "cluster" / "__init__.py" not in files


def test_options_pass_and_the_setting_stays() -> None:
    before = config.CACHE_DIR

    @kernel(fastmath=True)
    def double(x: float) -> float:
        return 2 * x

    assert double(3.0) == 6.0
    assert double.targetoptions["fastmath"]
    assert double.targetoptions["nogil"]
    assert before == config.CACHE_DIR


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package called moesim of the decorator and two modules of its own."""
    made = tmp_path / "moesim"
    made.mkdir()
    (made / "__init__.py").write_text("")
    (made / "kernels.py").write_text(Path(kernels.__file__).read_text())
    return made


def run(package: Path, name: str, more: int, cache: Path | None = None) -> list[int]:
    """What `twice` gives for 5, and how often it came from the cache, in a new process."""
    (package / "callee.py").write_text(CALLEE.format(name=name, more=more))
    (package / "caller.py").write_text(CALLER.format(name=name))
    environ = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    if cache is not None:
        environ["NUMBA_CACHE_DIR"] = str(cache)
    found = subprocess.run(
        [sys.executable, "-m", "moesim.caller"],
        cwd=package.parent,
        env={**environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return [int(x) for x in found.stdout.split()]


def test_edits_elsewhere_are_seen(package: Path) -> None:
    """The caller's file stays as it is while the callee's changes; then nothing does."""
    assert run(package, "Pair", 1) == [12, 0]
    assert run(package, "Pair", 2) == [14, 0]
    assert run(package, "Pair", 2) == [14, 1]


def test_a_class_that_is_gone_is_no_error(package: Path, tmp_path: Path) -> None:
    for name in ("Pair", "Renamed"):
        assert run(package, name, 1, tmp_path / "cache") == [12, 0]
    assert list((tmp_path / "cache").glob("moesim-*"))


def test_nothing_is_kept_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "_compiled_in", lambda *given: None)

    @kernel
    def half(x: float) -> float:
        return x / 2

    assert half(3.0) == 1.5
    assert not half.stats.cache_path
