"""Start the replay's ranks with torchrun, watch them, and say plainly how they ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from moesim.errors import InputError, MoesimError

STATUS_DIR = "MOESIM_REPLAY_STATUS"
PREFIX = "moesim: "
GRACE_S = 4.0
POLL_S = 0.1
KEPT_LINES = 200
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
_FAILURE = re.compile(r"rank\s*: (\d+) \(local_rank.*?exitcode\s*: (-?\d+)", re.DOTALL)


class ReplayError(MoesimError):
    """The ranks ended with an error; `exit_code` is what the command should exit with."""

    def __init__(self, cause: str, remedy: str, exit_code: int) -> None:
        super().__init__(cause, remedy)
        self.exit_code = exit_code


def launch(
    arguments: Sequence[str],
    num_ranks: int,
    *,
    limit_s: float | None = None,
    notify: Callable[[str], None] | None = None,
    debug: bool = False,
    module: str = "moesim.replay",
) -> None:
    """Run `torchrun --nproc-per-node num_ranks -m module arguments` on this host; a single rank
    without torchrun.

    notify: gets each progress line of rank 0. debug: everything that the ranks print goes to
    stderr. limit_s: end them after that long.
    Raises ReplayError with the first failing rank's own cause and remedy, or with the ranks that
    died without a word; the ranks are gone in every case.
    """
    if num_ranks < 1:
        raise InputError("at least one rank is needed", "raise --ranks")
    with tempfile.TemporaryDirectory(prefix="moesim-replay-") as status_dir:
        environment = {"OMP_NUM_THREADS": "1", **os.environ, STATUS_DIR: status_dir}
        command = [sys.executable]
        if num_ranks > 1:
            command += ["-m", "torch.distributed.run", "--nnodes", "1"]
            command += ["--nproc-per-node", str(num_ranks), "--master-addr", "127.0.0.1"]
            command += ["--master-port", str(free_port())]
        else:
            environment = {k: v for k, v in environment.items() if k not in RANK_VARIABLES}
        command += ["-m", module, *arguments]
        tail: deque[str] = deque(maxlen=KEPT_LINES)
        with _running(command, environment) as process:
            reader = threading.Thread(
                target=_relay, args=(process.stderr, tail, notify, debug), daemon=True
            )
            reader.start()
            timed_out = _wait(process, Path(status_dir), limit_s)
            reader.join(timeout=2.0)
        _verdict(process.returncode, Path(status_dir), num_ranks, tail, timed_out, limit_s)


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The process, which is ended when the block is left, however it is left."""
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """SIGTERM, then SIGKILL after the grace period; a rank dies with torchrun by its own wish."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)


def _wait(process: subprocess.Popen[str], status_dir: Path, limit_s: float | None) -> bool:
    """Wait for the end; True when the limit was hit. Once a rank reported a failure the others
    get the grace period to follow."""
    start = time.monotonic()
    failed_at: float | None = None
    while process.poll() is None:
        now = time.monotonic()
        if limit_s is not None and now - start > limit_s:
            return True
        if failed_at is None and any(r["status"] != "done" for r in _reports(status_dir)):
            failed_at = now
        if failed_at is not None and now - failed_at > GRACE_S:
            return False
        time.sleep(POLL_S)
    return False


def _verdict(
    code: int | None,
    status_dir: Path,
    num_ranks: int,
    tail: deque[str],
    timed_out: bool,
    limit_s: float | None,
) -> None:
    reports = _reports(status_dir)
    own = [r for r in reports if r["status"] == "error"]
    if own:
        raise ReplayError(own[0]["cause"], own[0]["remedy"], own[0]["exit_code"])
    if timed_out:
        raise ReplayError(
            f"the ranks did not finish within {limit_s:.0f} s",
            "replay fewer batches, layers or plans, or raise the limit",
            2,
        )
    if code == 0 and not any(r["status"] == "lost" for r in reports):
        return
    silent = sorted(set(range(num_ranks)) - {r["rank"] for r in reports})
    failures = {int(f[1]): int(f[2]) for f in _FAILURE.finditer("".join(tail))}
    if num_ranks == 1 and code is not None and code < 0:
        failures[0] = code
    for rank in silent:
        if failures.get(rank, 0) not in (0, -signal.SIGTERM):
            raise ReplayError(
                f"rank {rank} died without a report ({_ending(failures[rank])})",
                "see whether the system ended it (memory?); --debug shows all that the ranks print",
                2,
            )
    lost = [r for r in reports if r["status"] == "lost"]
    if silent and lost:
        ranks = ", ".join(map(str, silent))
        raise ReplayError(
            f"rank {ranks} died or hung without a report; {lost[0]['cause']}",
            "see whether the system ended it (memory?), then run again",
            2,
        )
    if lost:
        raise ReplayError(lost[0]["cause"], lost[0]["remedy"], 2)
    last = next((line for line in reversed(tail) if line.strip()), "no output")
    raise ReplayError(
        f"the ranks failed (exit status {code}); last line: {last.strip()[:200]}",
        "run again with --debug to see all that the ranks print",
        2,
    )


def _ending(exit_code: int) -> str:
    if exit_code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-exit_code).name}"
    return f"exit status {exit_code}"


def _relay(
    stream: IO[str], tail: deque[str], notify: Callable[[str], None] | None, debug: bool
) -> None:
    for line in stream:
        tail.append(line)
        if debug:
            sys.stderr.write(line)
        elif line.startswith(PREFIX) and notify is not None:
            notify(line[len(PREFIX) :].rstrip())


def _reports(status_dir: Path) -> list[dict[str, Any]]:
    """What the ranks reported, in order of time."""
    found = []
    for path in status_dir.glob("rank*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append((path.stat().st_mtime, json.loads(path.read_text(encoding="utf-8"))))
    return [report for _, report in sorted(found, key=lambda item: item[0])]


def free_port() -> int:
    """A TCP port of this host that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
