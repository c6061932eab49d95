"""Studies on a Ray cluster: a real one of two workers on this machine."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesim.backend import open_backend
from moesim.errors import InputError

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ray", "grpc")),
    reason="ray with its client is not installed (pip install 'moesim[ray]')",
)
ROOT = Path(__file__).parents[2]
START_S = 90


def square(value: int) -> int:
    return value * value


def die_once(marker: str) -> int:
    """Kill this worker the first time; afterwards answer."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return 1
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def fail(value: int) -> int:
    raise InputError(f"task {value} failed", "do otherwise")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head node with two workers, in a process group of its own."""
    head, client, agent = free_ports(3)
    folder = tmp_path_factory.mktemp("ray")
    options = {
        "port": head, "ray-client-server-port": client, "runtime-env-agent-port": agent,
        "num-cpus": 2, "include-dashboard": "false", "object-store-memory": 100_000_000,
        "node-ip-address": "127.0.0.1",
    }  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
            + [f"--{name}={value}" for name, value in options.items()],
            env={**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + START_S
            while not listens(client):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield f"ray://127.0.0.1:{client}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_tasks_errors_and_a_killed_worker(address: str, tmp_path: Path) -> None:
    """One connection for all, since opening it takes seconds."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        with open_backend(address) as backend:
            assert backend.num_workers == 2
            assert sorted(backend.run(square, range(9))) == [(i, i * i) for i in range(9)]
            assert list(backend.run(die_once, [str(tmp_path / "marker")])) == [(0, 1)]
            with pytest.raises(InputError) as caught:
                list(backend.run(fail, [3]))
        assert (caught.value.cause, caught.value.remedy) == ("task 3 failed", "do otherwise")
    finally:
        cloudpickle.unregister_pickle_by_value(module)
