"""The cache of compiled functions: renewed by edits in other files, and never in the way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numba import config
from numba.core.errors import NumbaError

from moesim import kernels
from moesim.kernels import imported, kernel

USER = """from moesim.errors import InputError
from moesim.cost.routing import (
    BLOCK_TOKENS,
    route,
)
import moesim.placement as plan


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
    assert {
        package / "errors.py",
        package / "cost" / "routing.py",
        package / "placement.py",
    } <= files
    assert package / "cluster" / "__init__.py" not in files


def test_every_import_of_the_package_is_found() -> None:
    """Against the parser, for each file: from its modules, and what they hold that is a file."""
    package = kernels.PACKAGE
    for file in sorted(package.rglob("*.py")) + sorted((package / "solvers").rglob("*.py")):
        source = file.read_text()
        names = set()
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} has a relative import, which kernels.py overlooks"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
                names.add(str(node.module))
        paths = [package.joinpath(*n.split(".")[1:]) for n in names if n.split(".")[0] == "moesim"]
        files = {f for p in paths for f in (p / "__init__.py", p.with_suffix(".py")) if f.is_file()}
        assert imported(source) == files, file


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


def run(package: Path, name: str, more: int, **variables: Path) -> list[int]:
    """What `twice` gives for 5, and how often it came from the cache, in a new process."""
    (package / "callee.py").write_text(CALLEE.format(name=name, more=more))
    (package / "caller.py").write_text(CALLER.format(name=name))
    environ = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    found = subprocess.run(
        [sys.executable, "-m", "moesim.caller"],
        cwd=package.parent,
        env={
            **environ,
            "PYTHONPATH": str(package.parent),
            **{k: str(v) for k, v in variables.items()},
        },
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
        assert run(package, name, 1, NUMBA_CACHE_DIR=tmp_path / "cache") == [12, 0]
    assert list((tmp_path / "cache").glob("moesim-*"))


def test_where_the_package_cannot_be_written_the_users_cache_serves(
    package: Path, tmp_path: Path
) -> None:
    (package / "__pycache__").write_text("a file, in which not even root can make folders")
    found = [run(package, "Pair", 1, XDG_CACHE_HOME=tmp_path / "user") for _ in range(2)]
    assert found == [[12, 0], [12, 1]]
    assert list((tmp_path / "user" / "numba").glob("moesim-*"))


def test_nothing_is_kept_where_nothing_can_be_written(package: Path) -> None:
    file = package / "__pycache__"
    file.write_text("")
    for _ in range(2):
        found = run(package, "Pair", 1, XDG_CACHE_HOME=file, NUMBA_CACHE_DIR=file / "own")
        assert found == [12, 0]


def test_a_new_folder_removes_those_unused_for_long(tmp_path: Path) -> None:
    now = time.time()
    for name, days in {"moesim-old": 31, "moesim-used": 29, "others": 31}.items():
        (tmp_path / name / "held").mkdir(parents=True)
        os.utime(tmp_path / name, (now, now - days * 86400))
    kernels._open(tmp_path / "moesim-used")
    assert (tmp_path / "moesim-used").stat().st_mtime > now - 60
    assert (tmp_path / "moesim-old").exists()
    kernels._open(tmp_path / "moesim-new")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"moesim-new", "moesim-used", "others"}


def test_kernels_that_allocate_must_say_so() -> None:
    """Without counted references a view is fine, a new array does not compile."""

    @kernel(allocates=False)
    def last_of(values):
        return values[1:][-1]

    @kernel(allocates=False)
    def total(values):
        return np.zeros(len(values)).sum()

    assert last_of(np.arange(3)) == 2
    if config.DISABLE_JIT:
        pytest.skip("numba compiles nothing here")
    with pytest.raises(NumbaError):
        total(np.arange(3))
