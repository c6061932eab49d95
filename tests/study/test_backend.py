"""Backends: every task once, in whatever order; workers that die; names that are none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesim.backend as backends
from moesim.backend import num_cores, open_backend
from moesim.errors import InputError


def square(value: int) -> int:
    return value * value


def die_once(marker: str) -> int:
    """Kill this process the first time; afterwards answer."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return 1
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def die(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def fail(value: int) -> int:
    raise InputError(f"task {value} failed", "do otherwise")


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """Send this file's functions to workers as they are, since they cannot import it."""
    try:
        import cloudpickle
    except ImportError:  # older joblib brings its own
        from joblib.externals import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.parametrize("name", ["serial", "local:2"])
def test_every_task_once(name: str) -> None:
    with open_backend(name) as backend:
        found = list(backend.run(square, range(10)))
        assert sorted(found) == [(i, i * i) for i in range(10)]
        assert list(backend.run(square, [])) == []


def test_local_takes_the_cores_there_are() -> None:
    with open_backend("local") as backend:
        assert backend.num_workers == num_cores() >= 1


@pytest.mark.parametrize("name", ["serial", "local:2"])
def test_an_error_of_a_task_arrives(name: str) -> None:
    with open_backend(name) as backend, pytest.raises(InputError, match="task 1 failed") as error:
        list(backend.run(fail, [1]))
    assert error.value.remedy == "do otherwise"


def test_a_killed_local_worker_costs_nothing(tmp_path: Path) -> None:
    markers = [str(tmp_path / f"m{i}") for i in range(4)]
    for marker in markers[1:]:
        Path(marker).touch()
    with open_backend("local:2") as backend:
        assert sorted(backend.run(die_once, markers)) == [(i, 1) for i in range(4)]


def test_workers_that_keep_dying_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MAX_BROKEN_POOLS", 2)
    with (
        open_backend("local:2") as backend,
        pytest.raises(InputError, match=r"killed 2 times; 1 tasks are left \(out of memory\?\)"),
    ):
        list(backend.run(die, [1]))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("dask://host:8786", "host:8786"),
        ("dask://host:8786/", "host:8786"),
        ("ray://10.0.0.1:10001", "10.0.0.1:10001"),
        ("dask://[::1]:8786", "[::1]:8786"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    assert backends._address(text) == address


SLEEPERS = """
import os, sys, time
from moesim.backend import open_backend

def work(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(600)

def main():
    from pathlib import Path
    from sleepers import work
    with open_backend("local:2") as backend:
        list(backend.run(work, [Path(sys.argv[1])] * 4))

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_study(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    seen = tmp_path / "pids"
    seen.mkdir()
    process = subprocess.Popen(
        [sys.executable, "sleepers.py", str(seen)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(seen.iterdir())) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(30)
    finally:
        process.kill()
    workers = [int(path.name) for path in seen.iterdir()]
    deadline = time.monotonic() + 30
    while any(running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if running(pid)]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
