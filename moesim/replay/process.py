"""One rank of a replay: its process group, its device, and how it fails.

A replay must end within a bounded time whatever happens to a peer. Four things see to that: the
process group's timeout, a watchdog thread for work that no such timeout covers (a collective inside
a CUDA graph), torchrun, which ends the other ranks when one fails, and a parent-death signal, so
that no rank outlives a torchrun that was killed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from moesim.errors import InputError, MoesimError
from moesim.files import atomic_write
from moesim.processes import die_with_parent
from moesim.replay.launch import PREFIX, STATUS_DIR, free_port

EXIT_LOST = 3
DEFAULT_TIMEOUT_S = 120.0
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


@dataclass
class Watchdog:
    """Ends the process when `beat` was not called for `limit_s` seconds."""

    limit_s: float
    on_expiry: Callable[[str], None]
    _last: float = field(default_factory=time.monotonic)
    _what: str = "starting"
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, what: str) -> None:
        self._last, self._what = time.monotonic(), what

    def stop(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(0.5, self.limit_s / 4)):
            if time.monotonic() - self._last > self.limit_s:
                self.on_expiry(self._what)
                return


@dataclass
class Context:
    """A rank's place among its peers, and the few collective helpers that measuring needs.

    Everything but `rank0_print` is collective: every rank must call it, in the same order.
    """

    rank: int
    num_ranks: int
    local_rank: int
    device: torch.device
    timeout_s: float
    watchdog: Watchdog

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def beat(self, what: str) -> None:
        """Tell the watchdog that work goes on; `what` names it should it stop."""
        self.watchdog.beat(what)

    def sync(self) -> None:
        """Wait for this rank's device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for every rank and its device."""
        self.gather([0.0])
        self.sync()

    def gather(self, values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """[G, n]: every rank's n numbers, the same n on every rank."""
        mine = torch.tensor(np.asarray(values, np.float64).reshape(-1), device=self.device)
        if self.num_ranks == 1:
            return mine.cpu().numpy()[None]
        out = torch.empty(self.num_ranks * mine.numel(), dtype=torch.float64, device=self.device)
        all_gather_flat(out, mine)
        return out.cpu().numpy().reshape(self.num_ranks, -1)

    def max(self, value: float) -> float:
        return float(self.gather([value]).max())

    def min(self, value: float) -> float:
        return float(self.gather([value]).min())

    def agree(self, mine: bool) -> bool:
        """True where every rank says so."""
        return self.min(float(mine)) > 0

    def rank0_print(self, text: str) -> None:
        if self.rank == 0:
            print(PREFIX + text, file=sys.stderr, flush=True)


def all_gather_flat(
    out: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup | None = None
) -> None:
    """All-gather into one tensor, under the name that this version of torch prefers."""
    newer = getattr(dist, "all_gather_single", None)
    (newer or dist.all_gather_into_tensor)(out, mine, group=group)


@contextmanager
def joined(device: str = "auto", timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[Context]:
    """Join the ranks that torchrun started (or be the only rank) for the length of the block.

    device: "auto" takes CUDA with NCCL where there is a GPU, else the CPU with gloo; "cuda" and
    "cpu" insist. NVLink multicast stays off unless the environment says otherwise.
    Raises InputError when there are more ranks than GPUs on the host.
    """
    die_with_parent()
    environment = os.environ
    for name, value in NO_MULTICAST.items():
        environment.setdefault(name, value)
    if "WORLD_SIZE" not in environment:
        environment.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    rank, local_rank = int(environment["RANK"]), int(environment.get("LOCAL_RANK", "0"))
    num_local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    where = _pick_device(device, local_rank, num_local)
    watchdog = Watchdog(timeout_s, lambda what: _give_up(rank, timeout_s, what))
    watchdog.start()
    ctx = Context(rank, int(environment["WORLD_SIZE"]), local_rank, where, timeout_s, watchdog)
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if ctx.is_cuda:
        torch.cuda.set_device(where)
        options["device_id"] = where
    dist.init_process_group("nccl" if ctx.is_cuda else "gloo", **options)
    try:
        ctx.barrier()
        yield ctx
        ctx.beat("leaving")
        dist.destroy_process_group()
    finally:
        watchdog.stop()


def run_rank(body: Callable[[], int]) -> int:
    """Run a rank's body; on failure report on stderr and in the status folder, and exit at once.

    Returns the body's exit code. A failing rank leaves through os._exit, since tearing down a
    process group whose peers are gone can block for ever.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        code = body()
    except MoesimError as error:
        _report(rank, "error", error.cause, error.remedy, error.exit_code)
        if rank == 0 or error.exit_code == 1:
            print(f"error: {error.cause}\n{error.remedy}", file=sys.stderr, flush=True)
        _leave(error.exit_code)
    except torch.OutOfMemoryError as error:
        cause = f"rank {rank}: the GPU ran out of memory ({str(error).splitlines()[0]})"
        remedy = "use fewer tokens, layers or weight sets, or more GPUs"
        _report(rank, "error", cause, remedy, 2)
        print(f"error: {cause}\n{remedy}", file=sys.stderr, flush=True)
        _leave(2)
    except (RuntimeError, dist.DistError) as error:
        if not _is_lost_peer(error):
            _crash(rank, error)
        first = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().splitlines()[0])[:160]
        cause = f"rank {rank}: lost contact with a peer ({first})"
        remedy = "see which rank failed first, above; then run again"
        _report(rank, "lost", cause, remedy, EXIT_LOST)
        print(f"error: {cause}\n{remedy}", file=sys.stderr, flush=True)
        _leave(EXIT_LOST)
    except Exception as error:
        _crash(rank, error)
    _report(rank, "done", "", "", code)
    return code


def _crash(rank: int, error: Exception) -> NoReturn:
    """Report an error that nobody foresaw, with its traceback, and leave."""
    traceback.print_exception(error)
    cause = f"rank {rank}: {type(error).__name__}: {error}"
    _report(rank, "error", cause, "this is a bug: report it with the traceback (--debug)", 2)
    _leave(2)


def _is_lost_peer(error: BaseException) -> bool:
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error).lower()
    words = ("connection closed", "connection reset", "timed out", "gloo", "nccl", "broken pipe")
    return any(word in text for word in words)


def _give_up(rank: int, limit_s: float, what: str) -> None:
    cause = f"rank {rank}: no progress for {limit_s:.0f} s while {what}"
    remedy = "a peer hangs or died; see the other ranks' messages, or raise --timeout"
    _report(rank, "lost", cause, remedy, EXIT_LOST)
    print(f"error: {cause}\n{remedy}", file=sys.stderr, flush=True)
    _leave(EXIT_LOST)


def _report(rank: int, status: str, cause: str, remedy: str, exit_code: int) -> None:
    folder = os.environ.get(STATUS_DIR)
    if folder and Path(folder).is_dir():
        record = {
            "rank": rank,
            "status": status,
            "cause": cause,
            "remedy": remedy,
            "exit_code": exit_code,
        }
        atomic_write(Path(folder) / f"rank{rank}.json", json.dumps(record))


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _pick_device(wanted: str, local_rank: int, num_local: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if num_local > num_gpus:
        raise InputError(
            f"{num_local} ranks on this host, but it has {num_gpus} GPUs",
            f"start {num_gpus} ranks (torchrun --nproc-per-node {num_gpus}), or pass --device cpu"
            if num_gpus
            else "pass --device cpu, or run where CUDA sees a GPU",
        )
    return torch.device("cuda", local_rank)
