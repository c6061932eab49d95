"""Several ranks over gloo, started with torchrun."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'moesim[torch]')")

from moesim.replay.launch import ReplayError, launch

BOUND_S = 60.0


def arguments_of(inputs, out: Path, *names: str, tokens: int = 16) -> list[str]:
    arguments = ["validate", "--trace", str(inputs.trace), "--device", "cpu"]
    arguments += ["--shape", json.dumps(inputs.shape.to_json()), "--out", str(out)]
    for name in names:
        arguments += ["--plan", str(inputs.plans[name])]
    return [*arguments, "--tokens", str(tokens), "--budget", "0.05", "--timeout", "30"]


def test_every_variant_on_four_ranks(forked) -> None:
    """Numerics and conservation (INV-1) for each policy, dedup and home distribution, idle ranks
    too; a calibration and a validation; all with torch, numpy and moesim alone to import."""
    assert forked.returncode == 0, forked.stderr[-2000:]
    assert "18 variants and a synthetic layer on 4 ranks" in forked.stderr
    record = json.loads(forked.measured.read_text())
    assert record["environment"]["num_ranks"] == 4
    assert [c["plan"] for c in record["checks"]] == ["idle_rank"]
    assert record["checks"][0]["relative_error"] < 1e-5
    assert record["kernels"]["ffn"] == "loop"
    assert record["environment"]["settings"]["NCCL_NVLS_ENABLE"] == "0"


def test_input_errors_come_back_whole(inputs, tmp_path) -> None:
    with pytest.raises(ReplayError, match="plan four is for 4 GPUs, the replay has 1") as caught:
        launch(arguments_of(inputs, tmp_path / "m.json", "four"), 1)
    assert caught.value.exit_code == 2
    assert caught.value.remedy.startswith("start 4 ranks")


def ranks_of(name: str) -> dict[int, int]:
    """Rank -> pid of the replay processes that write a file of this name."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [v[5:] for v in environment if v.startswith(b"RANK=")]
        if ranks and any(part.endswith(name.encode()) for part in command):
            found[int(ranks[0])] = int(entry.name)
    return found


@dataclass
class Launched:
    """A replay of two ranks that would go on for long, in a thread of its own."""

    name: str
    caught: list[ReplayError] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    ended_s: float = 0.0

    def start(self, inputs, folder: Path) -> threading.Thread:
        arguments = arguments_of(inputs, folder / self.name, "linear", "replicas", tokens=64)
        arguments += ["--batches", "500", "--timeout", "5"]

        def run() -> None:
            try:
                launch(arguments, 2, notify=lambda _: self.started.set())
            except ReplayError as error:
                self.caught.append(error)
            self.ended_s = time.monotonic()

        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the ranks")
def test_a_rank_that_dies_or_hangs(inputs, tmp_path, monkeypatch) -> None:
    """A clear error within a bounded time, and nobody left behind; both at once, and with less
    grace than usual, to save time."""
    monkeypatch.setattr("moesim.replay.launch.GRACE_S", 1.0)
    unique = f"{os.getpid()}.json"
    runs = {signal.SIGKILL: Launched(f"k{unique}"), signal.SIGSTOP: Launched(f"s{unique}")}
    threads = {number: run.start(inputs, tmp_path) for number, run in runs.items()}
    since = {}
    for number, run in runs.items():
        assert run.started.wait(BOUND_S), "the replay never started"
        victims = ranks_of(run.name)
        assert sorted(victims) == [0, 1]
        since[number] = time.monotonic()
        os.kill(victims[1], number)
    for number, run in runs.items():
        threads[number].join(BOUND_S)
        assert not threads[number].is_alive(), "the launcher hangs"
        assert run.ended_s - since[number] < BOUND_S
        assert run.caught, "the launcher did not notice"
        assert run.caught[0].exit_code == 2
        assert "rank 1 died" in run.caught[0].cause
        assert ("SIGKILL" in run.caught[0].cause) == (number == signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(ranks_of(run.name) for run in runs.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [ranks_of(run.name) for run in runs.values()] == [{}, {}]
