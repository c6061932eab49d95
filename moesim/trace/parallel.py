"""Statistics of a trace on many processes or machines: parts counted apart, counts added up.

Every worker reads the trace itself, by its path, a directory trace through a memory map; only
counts travel. They are integers, so that the figures are those of a single pass to the last bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moesim.backend import Backend
from moesim.errors import InputError, MismatchError
from moesim.trace.counts import TraceCounts, chunk_tokens, count_trace, merge_counts
from moesim.trace.format import Trace, load_trace, require_tokens
from moesim.trace.stats import TraceStats, stats_from_counts
from moesim.types import Progress

PARTS_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens `start` to `stop` of the trace at `path`, which has `num_tokens` and this meta."""

    path: str
    start: int
    stop: int
    num_tokens: int
    meta: str


def trace_stats_on(backend: Backend, trace: Trace, progress: Progress | None = None) -> TraceStats:
    """`trace_stats` of a trace that was read from a path, on the workers of `backend`.

    Raises InputError for a trace without a path, MismatchError where a worker finds another trace
    there.
    """
    if not trace.path or not Path(trace.path).exists():
        raise InputError(
            "a trace in memory cannot be counted elsewhere", "save it, and count the file"
        )
    parts = _parts(backend, trace)
    if len(parts) == 1:
        return stats_from_counts(trace.meta, count_trace(trace, progress))

    def counted() -> Iterator[TraceCounts]:
        done = 0
        for i, counts in backend.run(_count, parts):
            done += parts[i].stop - parts[i].start
            if progress is not None:
                progress(done, trace.num_tokens)
            yield counts

    return stats_from_counts(trace.meta, merge_counts(counted()))


def _parts(backend: Backend, trace: Trace) -> list[_Part]:
    """A few parts for each worker, none smaller than a chunk."""
    most = math.ceil(trace.num_tokens / chunk_tokens(trace.num_layers, trace.top_k))
    count = max(1, min(most, backend.num_workers * PARTS_PER_WORKER))
    cuts = [trace.num_tokens * i // count for i in range(count + 1)]
    path, meta = str(Path(trace.path).resolve()), trace.meta.to_json()
    return [
        _Part(path, start, stop, trace.num_tokens, meta) for start, stop in itertools.pairwise(cuts)
    ]


def _count(part: _Part) -> TraceCounts:
    trace = _load(part.path, _state(part.path))
    if trace.num_tokens != part.num_tokens or trace.meta.to_json() != part.meta:
        raise MismatchError(
            f"a worker finds another trace at {part.path}",
            "let the file be until the count is done, and the same on every worker",
        )
    return count_trace(trace, tokens=slice(part.start, part.stop))


def _state(path: str) -> tuple[tuple[int, int], ...]:
    """Sizes and times of the trace's files, which a worker that lives on sees change."""
    root = Path(path)
    files = sorted(root.iterdir()) if root.is_dir() else [root]
    found = [file.stat() for file in files]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in found)


@lru_cache(maxsize=1)
def _load(path: str, state: tuple[tuple[int, int], ...]) -> Trace:
    """The trace without the check of every id, which the caller's own load has made."""
    return require_tokens(load_trace(path, validate=False), "counting a trace")
