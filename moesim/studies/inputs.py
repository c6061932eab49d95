"""What a point of a study is computed from: files by content, and the code itself.

Files are loaded once a process and kept; a file that changes is loaded again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec
    from moesim.trace.format import Trace

MAX_KEPT = 4
_NO_FIGURES = ("cli", "report", "exporters", "replay", "draw")
_lock = threading.RLock()
_kept: OrderedDict[tuple[str, str], tuple[tuple[int, ...], Any]] = OrderedDict()


@lru_cache(maxsize=1)
def code_hash() -> str:
    """sha256 over every module and YAML file of moesim that a figure can depend on.

    Left out: the command line, plots, exporters and the replay on GPUs.
    """
    import moesim
    import moesim.solvers
    from moesim.cluster.gpus import topology_dir

    roots = {
        "moesim": Path(moesim.__path__[0]),
        "solvers": Path(moesim.solvers.__path__[0]),
        "topologies": topology_dir(),
    }
    digest = hashlib.sha256()
    for package, folder in roots.items():
        root = folder.resolve()
        for path in sorted(p for kind in ("*.py", "*.yaml") for p in root.rglob(kind)):
            name = path.relative_to(root)
            if package == "moesim" and name.parts[0] in (*_NO_FIGURES, "solvers"):
                continue
            digest.update(f"{package}/{name.as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def trace_of(source: str) -> Trace:
    """The token trace of a file, directory or `sample:NAME`, loaded once."""
    from moesim.jobs.inputs import token_trace_of

    return _keep("trace", source, lambda: token_trace_of(source, "a study"))  # type: ignore[no-any-return]


def rerouted_trace(
    params: Mapping[str, Any], batch_tokens: int | None = None
) -> tuple[Trace, tuple[str, ...]]:
    """The trace of a point through its `reroute`, and a remark on what that changed."""
    return _rerouted(
        trace_hash(params["trace"]),
        params["trace"],
        params["reroute"],
        batch_tokens,
        params["seed"],
    )


def check_rule(params: Mapping[str, Any]) -> None:
    """Raise UnknownNameError or InputError for a `reroute` that is no rule."""
    from moesim.routing.spec import parse_rule

    if params["reroute"] is not None:
        parse_rule(params["reroute"])


@lru_cache(maxsize=MAX_KEPT)
def _rerouted(
    _: str, source: str, rule: str | None, batch_tokens: int | None, seed: int
) -> tuple[Trace, tuple[str, ...]]:
    from moesim.jobs.inputs import rerouted
    from moesim.trace.format import require_tokens

    trace, changed = rerouted(trace_of(source), rule, batch_tokens=batch_tokens, seed=seed)
    return require_tokens(trace, "a study"), () if changed is None else (changed,)


def trace_hash(source: str) -> str:
    """Content hash of a trace, computed once."""
    return str(_keep("trace hash", source, lambda: trace_of(source).content_hash()))


def file_hash(path: str) -> str:
    """sha256 of a file's bytes. Raises InputError where it cannot be read."""

    def read() -> str:
        digest = hashlib.sha256()
        try:
            with Path(path).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
                "check the path; every worker has to reach it",
            ) from None
        return digest.hexdigest()

    return str(_keep("file", path, read))


def cluster_of(name: str, num_gpus: int, *, after: int = 0) -> Cluster:
    """The cluster of a name or file, sized to `num_gpus`, behind the nodes of `after` others."""
    from moesim.cluster import load_cluster

    def load() -> Cluster:
        return load_cluster(name, num_gpus=num_gpus, after=after)

    return _keep(f"cluster {num_gpus} {after}", name, load)  # type: ignore[no-any-return]


def model_of(name: str) -> ModelSpec:
    """The model of a preset or a config.json."""
    from moesim.model.names import load_model

    return _keep("model", name, lambda: load_model(name))  # type: ignore[no-any-return]


def model_hash(name: str) -> str:
    """sha256 of everything that is known of a model."""
    content = dataclasses.asdict(model_of(name))
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def absolute(source: str) -> str:
    """`source` as a worker elsewhere finds it: an existing file's path made absolute."""
    if source.startswith("sample:"):
        return source
    try:
        path = Path(source)
        return str(path.resolve()) if path.exists() else source
    except (OSError, ValueError):
        return source


def kept(kind: str, source: str, load: Callable[[], Any]) -> Any:
    """`load()`, or what it gave before for this kind and an unchanged `source`."""
    return _keep(kind, source, load)


def _keep(kind: str, source: str, load: Callable[[], Any]) -> Any:
    with _lock:
        state = _state(source)
        entry = _kept.get((kind, source))
        if entry is None or entry[0] != state:
            entry = (state, load())
            _kept[kind, source] = entry
            same = [key for key in _kept if key[0] == kind]
            for key in same[: -MAX_KEPT * (16 if "hash" in kind else 1)]:
                del _kept[key]
        _kept.move_to_end((kind, source))
        return entry[1]


def _state(source: str) -> tuple[int, ...]:
    """What changes when a file does: size and time of it, or of the files of a directory."""
    if source.startswith("sample:"):
        return ()
    try:
        path = Path(source)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [file.stat() for file in files]
    except (OSError, ValueError):
        return ()
    return tuple(value for stat in found for value in (stat.st_size, stat.st_mtime_ns, stat.st_ino))
