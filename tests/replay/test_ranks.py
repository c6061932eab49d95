"""Several ranks over gloo, started with torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'moesim[torch]')")

from moesim.replay.launch import ReplayError, free_port, launch

BOUND_S = 60.0


def validate_arguments(inputs, out: Path, *names: str, tokens: int = 16) -> list[str]:
    arguments = ["validate", "--trace", str(inputs.trace), "--device", "cpu"]
    arguments += ["--shape", json.dumps(inputs.shape.to_json()), "--out", str(out)]
    for name in names:
        arguments += ["--plan", str(inputs.plans[name])]
    return [*arguments, "--tokens", str(tokens), "--budget", "0.05", "--timeout", "30"]


def test_every_variant_on_three_ranks(inputs) -> None:
    """Numerics and conservation for each policy, dedup and home distribution, idle ranks too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += [str(Path(__file__).with_name("ranks.py")), str(inputs.trace)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "18 variants on 3 ranks" in done.stderr


def test_validate_two_ranks(inputs, tmp_path) -> None:
    out, lines = tmp_path / "measured.json", []
    names = ("linear", "round_robin", "replicas", "empty_slots")
    launch(validate_arguments(inputs, out, *names), 2, notify=lines.append)
    record = json.loads(out.read_text())
    assert record["format"] == "moesim-measured"
    assert len(record["checks"]) == 4
    assert max(c["relative_error"] for c in record["checks"]) < 1e-5
    assert len(record["results"]) == 2 * 4
    assert len(lines) == 8
    for result in record["results"]:
        phases = np.array(result["phase_us"])
        assert phases.shape == (3, 2, 5)
        assert (phases > 0).all()
        # INV-1: rows served = choices made; INV-3: rows on the wire at most one a choice.
        served = np.array(result["slot_rows"]).sum(axis=1)
        assert (served == served[0]).all() or len(set(served.tolist())) <= 3
        assert (np.array(result["messages"]).sum(axis=(1, 2)) <= served).all()
    by_plan = {r["plan"]: np.array(r["slot_rows"]).sum() for r in record["results"]}
    assert len(set(by_plan.values())) == 1


def test_input_errors_come_back_whole(inputs, tmp_path) -> None:
    arguments = validate_arguments(inputs, tmp_path / "m.json", "four")
    with pytest.raises(ReplayError, match="plan four is for 4 GPUs, the replay has 2") as caught:
        launch(arguments, 2)
    assert caught.value.exit_code == 2
    assert caught.value.remedy.startswith("start 4 ranks")


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> pid of the replay processes below a process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"MOESIM_TEST={launcher}".encode() in environment and b"moesim.replay" in command:
            ranks = [v[5:] for v in environment if v.startswith(b"RANK=")]
            if ranks:
                found[int(ranks[0])] = int(entry.name)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the ranks")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_rank_that_dies_or_hangs(inputs, tmp_path, monkeypatch, number) -> None:
    """A clear error within a bounded time, and nobody left behind."""
    monkeypatch.setenv("MOESIM_TEST", str(os.getpid()))
    arguments = validate_arguments(inputs, tmp_path / "m.json", "linear", "replicas", tokens=64)
    arguments += ["--batches", "2000", "--timeout", "4"]
    started = threading.Event()
    caught: list[ReplayError] = []

    def run() -> None:
        try:
            launch(arguments, 2, notify=lambda _: started.set())
        except ReplayError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(BOUND_S), "the replay never started"
    victims = ranks_of(os.getpid())
    assert sorted(victims) == [0, 1]
    since = time.monotonic()
    os.kill(victims[1], number)
    thread.join(BOUND_S)
    assert not thread.is_alive(), "the launcher hangs"
    assert time.monotonic() - since < BOUND_S
    assert caught, "the launcher did not notice"
    assert caught[0].exit_code == 2
    assert "rank 1 died" in caught[0].cause
    assert ("SIGKILL" in caught[0].cause) == (number == signal.SIGKILL)
    deadline = time.monotonic() + 10
    while ranks_of(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks_of(os.getpid()) == {}
