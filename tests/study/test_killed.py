"""Studies that are killed: by SIGKILL at any moment, here and with a Dask worker of several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MAIN = [sys.executable, "-c", "from moesim.cli.main import main; main()", "whatif"]
CONCURRENCY = "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16"
STUDY = [
    "--model", "qwen3-30b-a3b", "--cluster", "h200-sxm-ib", "--gpus", "1",
    "--set", "input_tokens=512", "--set", "output_tokens=64", "--set", "num_requests=600",
    "--vary", f"concurrency={CONCURRENCY}",
    "--slo", "tpot_p99<20ms", "--maximize", "throughput", "--sensitivity", "0",
]  # fmt: skip
NUM_POINTS = 16


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """A study in a process group of its own, so that its workers can be killed with it."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*MAIN, *STUDY, *more],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err.decode()
    return err.decode()


def journaled(folder: Path) -> list[str]:
    """Keys of the whole lines of the journal, in order."""
    path = folder / "study.journal.jsonl"
    if not path.exists():
        return []
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    points = [json.loads(line).get("point") for line in whole]
    return [point["key"] for point in points if point is not None]


def wait_for(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(journaled(folder)) < count:
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of the study when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, "--backend", "serial"))
    return (folder / "study.json").read_bytes()


@pytest.mark.parametrize(("backend", "counts"), [("serial", (1, 7)), ("local:2", (4,))])
def test_killed_again_and_again(
    tmp_path: Path, whole: bytes, backend: str, counts: tuple[int, ...]
) -> None:
    seen: list[str] = []
    for count in counts:
        process = start(tmp_path, "--backend", backend)
        wait_for(tmp_path, count, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "study.json").exists()
        now = journaled(tmp_path)
        # What was on disk stays, and nothing is there twice.
        assert now[: len(seen)] == seen
        assert len(set(now)) == len(now)
        assert count <= len(now) < NUM_POINTS
        seen = now
    err = finish(start(tmp_path, "--backend", backend))
    assert f"{NUM_POINTS - len(seen)} points evaluated, {len(seen)} taken" in err
    keys = journaled(tmp_path)
    assert keys[: len(seen)] == seen
    assert len(set(keys)) == len(keys) == NUM_POINTS
    assert (tmp_path / "study.json").read_bytes() == whole


@pytest.fixture
def dask_cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and three worker processes of one thread each: (host:port, workers)."""
    pytest.importorskip("distributed", reason="the package distributed is not installed")
    file = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    scheduler = subprocess.Popen(
        [*dask, "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
         "--scheduler-file", str(file)],
        cwd=tmp_path, **quiet,
    )  # fmt: skip
    processes = [scheduler]
    try:
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().strip().endswith("}"):
            assert scheduler.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"].removeprefix("tcp://")
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://{address}"]
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1"]
        processes += [
            subprocess.Popen([*worker, *options], cwd=tmp_path, **quiet) for _ in range(3)
        ]
        yield address, processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_killed_dask_worker_changes_nothing(
    tmp_path: Path, whole: bytes, dask_cluster: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    address, workers = dask_cluster
    folder = tmp_path / "study"
    process = start(folder, "--backend", f"dask://{address}")
    wait_for(folder, 3, process)
    workers[1].send_signal(signal.SIGKILL)
    err = finish(process)
    assert workers[1].wait() == -signal.SIGKILL
    assert f"{NUM_POINTS} points evaluated" in err
    keys = journaled(folder)
    assert len(set(keys)) == len(keys) == NUM_POINTS
    assert (folder / "study.json").read_bytes() == whole


def test_statistics_of_a_directory_trace_on_dask(
    tmp_path: Path, dask_cluster: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    from moesim.trace.format import load_trace, save_trace

    save_trace(load_trace("sample:debian-moe"), tmp_path / "trace")
    info = [*MAIN[:-1], "trace", "info", str(tmp_path / "trace"), "--json"]
    found = [
        subprocess.run([*info, *more], capture_output=True, check=True, timeout=120).stdout
        for more in ([], ["--backend", f"dask://{dask_cluster[0]}"])
    ]
    assert found[0] == found[1]
    assert json.loads(found[0])["num_tokens"] > 0
