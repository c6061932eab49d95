"""Ctrl-C, time limits and what cannot fit, with the program run as its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from moesim.cli.interrupt import stoppable
from moesim.cli.main import run
from moesim.placement import load_plan
from moesim.trace.format import Trace, TraceMeta, save_trace

START = """
import sys, time
from moesim.cli.main import main
from moesim.solvers.ilp.joint import JointLayer

solve = JointLayer.solve

def announced(self, *args, **options):
    print("searching", file=sys.stderr, flush=True)
    time.sleep({deaf})
    return solve(self, *args, **options)

JointLayer.solve = announced
main()
"""
"""The program, saying when it searches; `deaf` seconds of it notice nothing."""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests of 24 experts in four layers, too many for the integer program to prove."""
    rng = np.random.default_rng(0)
    tokens, layers, experts = 2400, 4, 24
    taste = rng.random((tokens, layers, experts)) + 0.03 * np.arange(experts)
    path = tmp_path_factory.mktemp("stop") / "trace.npz"
    save_trace(
        Trace(
            expert_ids=taste.argsort(axis=2)[:, :, :3].astype(np.uint8),
            request_ids=np.repeat(np.arange(120), 20).astype(np.int32),
            positions=np.tile(np.arange(20), 120).astype(np.int32),
            phases=np.zeros(tokens, np.uint8),
            meta=TraceMeta("toy", experts, 3, tuple(range(layers))),
        ),
        path,
    )
    return path


def arguments(trace: Path, out: Path, *more: str) -> list[str]:
    return [
        *("plan", "--trace", str(trace), "--gpus", "4", "--batch-tokens", "240"),
        *("--out", str(out), *more),
    ]


def started(command: list[str], *, deaf: int) -> subprocess.Popen[str]:
    """The program, once it searches."""
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(deaf=deaf), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("searching"):
            return process
    raise AssertionError(f"ended before it searched: {lines}")


def test_the_first_interrupt_ends_the_search_and_writes_the_plan(
    trace: Path, tmp_path: Path
) -> None:
    """A search of ten minutes, interrupted once it runs: exit 0, a valid plan that says how it
    ended, JSON and nothing else on standard output."""
    out = tmp_path / "plan.json"
    command = arguments(trace, out, "--solver", "ilp", "--time-limit", "600", "--json")
    process = started(command, deaf=0)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    said = json.loads(stdout)
    plan = load_plan(out)
    assert said["status"] == plan.status == "time_limit"
    assert "interrupted: finishing" in stderr
    assert any("interrupted" in notice for notice in said["notices"])
    assert plan.placement.num_layers == 4
    assert said["gap"] is not None


def test_the_second_interrupt_aborts(trace: Path, tmp_path: Path) -> None:
    """Exit 130 at once, in a search that does not react, and no plan, whole or in part."""
    out = tmp_path / "plan.json"
    command = arguments(trace, out, "--solver", "ilp", "--time-limit", "600")
    process = started(command, deaf=100)
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    while "interrupted" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "aborted" in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_search_at_its_limit_says_so_with_the_gap(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    code = run(arguments(trace, out, "--solver", "ilp", "--time-limit", "1"))
    said = capsys.readouterr()
    assert code == 0
    assert "ilp stopped at its time limit of 1 s, with a gap of" in said.err
    assert "status time_limit" in said.out
    assert load_plan(out).status == "time_limit"


def test_slots_that_do_not_suffice_are_said_with_numbers(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(trace, tmp_path / "p.json", "--slots", "20", "--solver", "ilp")) == 1
    said = capsys.readouterr()
    assert "24 experts do not fit 20 slots on 4 GPUs" in said.err
    assert "at least 24 slots" in said.err
    assert not (tmp_path / "p.json").exists()


def test_memory_that_does_not_suffice_is_said_with_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSeek-V3's 58 x 256 experts of 44 MB on two GPUs of 80 GB: 327 GB each for experts."""
    rng = np.random.default_rng(0)
    path = tmp_path / "v3.npz"
    ids = rng.random((64, 1, 256)).argsort(axis=2)[:, :, :8].astype(np.uint8)
    save_trace(
        Trace(
            expert_ids=np.repeat(ids, 58, axis=1),
            request_ids=np.repeat(np.arange(16), 4).astype(np.int32),
            positions=np.tile(np.arange(4), 16).astype(np.int32),
            phases=np.zeros(64, np.uint8),
            meta=TraceMeta("DeepSeek-V3", 256, 8, tuple(range(3, 61))),
        ),
        path,
    )
    code = run(["plan", "--trace", str(path), "--gpus", "2", "--out", str(tmp_path / "p.json")])
    said = capsys.readouterr()
    assert code == 1
    assert "128 experts per layer x 58 layers x 44.1 MB" in said.err
    assert "76.0 GB usable" in said.err


def test_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stoppable() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
    assert signal.getsignal(signal.SIGINT) is before


def test_off_the_main_thread_nothing_is_handled() -> None:
    seen: list[bool] = []

    def work() -> None:
        with stoppable() as stop:
            seen.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
