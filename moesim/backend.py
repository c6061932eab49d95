"""Where many independent tasks run: here, on local cores, or on a Dask or Ray cluster.

A backend maps a function over tasks and yields `(index, result)` as each is done, in any order.
Function, tasks and results travel by pickle; a function must be one that a worker can import. What
a task computes must not depend on where it runs, so that every backend gives the same results.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from moesim.errors import InputError, UnknownNameError
from moesim.processes import Terminated, die_with_parent, terminable

Task = TypeVar("Task")
Result = TypeVar("Result")

SCHEMES = ("serial", "local", "dask", "ray")
MAX_LOCAL_JOBS = 1024
CONNECT_S = 20.0
NO_WORKER_S = 60.0
POLL_S = 5.0
MAX_BROKEN_POOLS = 3
IN_FLIGHT_PER_WORKER = 2
MAX_RETRIES = 3


class Backend(Protocol):
    """A place to run tasks. `name` is as asked for; `num_workers` at the start."""

    name: str
    num_workers: int

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        """`(index of the task, its result)` of every task once, in the order they finish.

        An exception of a task is raised here. Raises InputError where workers keep dying.
        """
        ...


@contextmanager
def open_backend(text: str = "serial") -> Iterator[Backend]:
    """The backend named by `serial`, `local`, `local:4`, `dask://host:port` or `ray://host:port`.

    Raises UnknownNameError for another name, InputError for one that is not well formed, whose
    library is not installed, or whose cluster does not answer.
    """
    scheme, _, rest = text.partition(":")
    if scheme not in SCHEMES:
        raise UnknownNameError(
            "backend",
            text[:80],
            SCHEMES,
            "use serial, local, local:4, dask://host:port or ray://host:port",
        )
    if scheme == "serial":
        if rest:
            raise InputError(f"backend {text[:80]}", "serial takes no number: use local:4")
        yield _Serial()
    elif scheme == "local":
        local = _Local(_local_jobs(rest, text))
        try:
            with terminable():
                yield local
        except Terminated:
            _kill_workers()
            raise
    else:
        address = _address(text)
        opened = _open_dask(text, address) if scheme == "dask" else _open_ray(text, address)
        with opened as backend:
            yield backend


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _local_jobs(rest: str, text: str) -> int:
    if not rest:
        return num_cores()
    if not rest.isascii() or not rest.isdigit() or not 1 <= int(rest) <= MAX_LOCAL_JOBS:
        raise InputError(
            f"backend {text[:80]} names no number of processes",
            f"write local, or local:1 to local:{MAX_LOCAL_JOBS}",
        )
    return int(rest)


def _address(text: str) -> str:
    """`host:port` of `scheme://host:port`."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    extra = host is not None and (parts.path not in ("", "/") or parts.query or parts.username)
    if not host or port is None or extra:
        raise InputError(
            f"backend {text[:80]} is not an address", "write dask://host:port, as dask://head:8786"
        )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Serial:
    name = "serial"
    num_workers = 1

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        for i, task in enumerate(tasks):
            yield i, function(task)


def _indexed(function: Callable[[Any], Any], index: int, task: Any, parent: int) -> tuple[int, Any]:
    """In a worker process, which must not outlive `parent`."""
    die_with_parent(parent)
    return index, function(task)


class _Local:
    """joblib's worker processes. A pool that lost a process is started again for what is left."""

    def __init__(self, num_workers: int) -> None:
        self.name = f"local:{num_workers}"
        self.num_workers = num_workers

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        from concurrent.futures.process import BrokenProcessPool

        from joblib import Parallel, delayed

        left = dict(enumerate(tasks))
        for _ in range(MAX_BROKEN_POOLS):
            pool = Parallel(
                n_jobs=self.num_workers,
                backend="loky",
                return_as="generator_unordered",
                batch_size=1,
                pre_dispatch=self.num_workers * IN_FLIGHT_PER_WORKER,
            )
            parent = os.getpid()
            results = pool(
                delayed(_indexed)(function, i, task, parent) for i, task in list(left.items())
            )
            try:
                for i, result in results:
                    del left[i]
                    yield i, result
            except BrokenProcessPool:
                continue
            return
        raise InputError(
            f"worker processes were killed {MAX_BROKEN_POOLS} times; {len(left)} tasks are left"
            " (out of memory?)",
            "use fewer processes, as local:1",
        )


def _kill_workers() -> None:
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=False, kill_workers=True)


@contextmanager
def _open_dask(text: str, address: str) -> Iterator[Backend]:
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            f"backend {text}: the package distributed is not installed",
            "pip install 'moesim[dask]'",
        ) from None
    try:
        client = Client(f"tcp://{address}", timeout=CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise InputError(
            f"no Dask scheduler answers at {address}: {str(error)[:160]}",
            "start one with: dask scheduler, and workers with: dask worker tcp://HOST:8786",
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_S)
        except (TimeoutError, OSError):
            raise InputError(
                f"the Dask cluster at {address} has no worker",
                f"start some: dask worker tcp://{address}",
            ) from None
        yield _Dask(text, client)


class _Dask:
    """An existing Dask cluster. A worker's death gives its tasks to the others."""

    def __init__(self, name: str, client: Any) -> None:
        self.name = name
        self._client = client
        self.num_workers = self._threads()

    def _threads(self) -> int:
        return sum(self._client.nthreads().values())

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        from distributed import KilledWorker
        from distributed.client import wait

        waiting = iter(enumerate(tasks))
        flying: dict[Any, int] = {}
        idle_since = time.monotonic()
        try:
            while True:
                room = max(1, self._threads()) * IN_FLIGHT_PER_WORKER - len(flying)
                for _, (i, task) in zip(range(room), waiting, strict=False):
                    flying[self._client.submit(function, task, pure=False)] = i
                if not flying:
                    return
                try:
                    with self._client.as_current():
                        done = wait(list(flying), POLL_S, "FIRST_COMPLETED").done
                except TimeoutError:
                    done = set()
                for future in done:
                    i = flying.pop(future)
                    yield i, future.result()
                if done or self._threads():
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > NO_WORKER_S:
                    raise InputError(
                        f"{self.name} has had no worker for {NO_WORKER_S:.0f} s",
                        "start workers and run this again",
                    )
        except KilledWorker as error:
            raise InputError(
                f"{self.name}: one task killed several workers ({str(error)[:120]})",
                "give the workers more memory, or leave that point out",
            ) from None
        except (OSError, RuntimeError) as error:
            if self._client.status == "running":
                raise
            raise InputError(
                f"{self.name}: the connection was lost ({str(error)[:120]})",
                "check the scheduler and run this again",
            ) from None
        finally:
            if flying and self._client.status == "running":
                self._client.cancel(list(flying))


@contextmanager
def _open_ray(text: str, address: str) -> Iterator[Backend]:
    try:
        import ray
    except ImportError:
        raise InputError(
            f"backend {text}: the package ray is not installed", "pip install 'moesim[ray]'"
        ) from None
    try:
        connection = ray.init(f"ray://{address}", log_to_driver=False, logging_level="ERROR")
    except ValueError:  # ray alone, without the client
        raise InputError(
            f"backend {text}: ray is installed without its client", "pip install 'moesim[ray]'"
        ) from None
    except (ConnectionError, RuntimeError, OSError) as error:
        raise InputError(
            f"no Ray cluster answers at {address}: {str(error)[:160]}",
            "start one with: ray start --head --ray-client-server-port 10001",
        ) from None
    with connection:
        yield _Ray(text, ray)


class _Ray:
    """An existing Ray cluster, through its client port. Tasks of a dead worker are tried again."""

    def __init__(self, name: str, ray: Any) -> None:
        self.name = name
        self._ray = ray
        self.num_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        ray = self._ray
        remote = ray.remote(max_retries=MAX_RETRIES)(function)
        waiting = iter(enumerate(tasks))
        flying: dict[Any, int] = {}
        try:
            while True:
                room = self.num_workers * IN_FLIGHT_PER_WORKER - len(flying)
                for _, (i, task) in zip(range(room), waiting, strict=False):
                    flying[remote.remote(task)] = i
                if not flying:
                    return
                for reference in ray.wait(list(flying), num_returns=1)[0]:
                    i = flying.pop(reference)
                    yield i, ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            raise InputError(
                f"{self.name}: one task killed several workers ({str(error)[:120]})",
                "give the workers more memory, or leave that point out",
            ) from None
        finally:
            for reference in flying:
                ray.cancel(reference, force=True)
