"""One chunked pass over a trace: every count that the statistics are made of.

Memory is bounded by the counts themselves (E x E integers a layer, twice) plus one chunk of
tokens plus 12 bytes per request; it does not grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.trace.format import Trace, drop_pages, iter_chunks
from moesim.types import IntArray, Progress

NUM_WINDOWS = 16
MAX_PAIR_CELLS = 1 << 28
MAX_GROUP_CELLS = 1 << 26
_CHUNK_IDS = 1 << 23
_MAX_PENDING_REQUESTS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class TraceCounts:
    """What one pass over a trace counts.

    window_load: [W, 2, L, E] int64; the trace cut into W equal windows of tokens, and the
        requests of each into two halves by a hash of their id.
    domain_load: [D, 2, L, E] int64 in the same halves, or None. domain_tokens: [D].
    between:     [L-1, E, E]; tokens that chose a in layer l and b in layer l+1, or None.
    within:      [L, E, E], a < b; tokens that chose both in layer l, or None.
    shared:      [L] int64; experts shared with the request's token before, over `num_follows`
        pairs of tokens that are neighbours in file and request.
    request_ids, request_lengths: [R], ids in ascending order.
    notices:     what was left out, and why.
    """

    num_tokens: int
    window_load: IntArray
    domain_load: IntArray | None
    domain_tokens: IntArray
    between: npt.NDArray[Any] | None
    within: npt.NDArray[Any] | None
    shared: IntArray
    num_follows: int
    request_ids: IntArray
    request_lengths: IntArray
    num_prefill: int
    notices: tuple[str, ...]

    @property
    def load(self) -> IntArray:
        """[L, E] choices of each expert over the whole trace."""
        return np.asarray(self.window_load.sum(axis=(0, 1)))


def chunk_tokens(num_layers: int, top_k: int) -> int:
    """Tokens a chunk, so that a chunk holds about eight million ids whatever the shape."""
    return max(1, _CHUNK_IDS // (num_layers * top_k))


def request_half(request_ids: npt.NDArray[Any]) -> IntArray:
    """0 or 1 for each request id: a hash (Knuth's multiplicative one), not its parity."""
    hashed = request_ids.astype(np.uint64) * np.uint64(2_654_435_761)
    return np.asarray((hashed >> np.uint64(17)) & np.uint64(1), dtype=np.int64)


def count_trace(
    trace: Trace, progress: Progress | None = None, tokens: slice | None = None
) -> TraceCounts:
    """Count a trace in one pass. `progress(done, total)` is called with tokens after each chunk.

    Pair counts are left out, with a notice, where they would need more than 2^28 cells; domain
    counts above 2^26 cells. tokens: count a part alone, of which `merge_counts` makes the whole.
    """
    from moesim.trace.kernels import count_load, count_pairs, count_reuse

    num_tokens, num_layers, num_experts = trace.num_tokens, trace.num_layers, trace.num_experts
    notices: list[str] = []
    num_windows = max(1, min(NUM_WINDOWS, num_tokens))
    window_load = np.zeros((num_windows * 2, num_layers, num_experts), np.int64)
    domain_load, num_domains = None, len(trace.meta.domains)
    if trace.domain_ids is not None and num_domains > 1:
        if num_domains * 2 * num_layers * num_experts <= MAX_GROUP_CELLS:
            domain_load = np.zeros((num_domains * 2, num_layers, num_experts), np.int64)
        else:
            notices.append(f"domain statistics are left out: {num_domains} domains are too many")
    pairs = num_layers * num_experts**2 <= MAX_PAIR_CELLS
    if not pairs:
        notices.append(
            f"affinity and co-activation are left out: {num_layers} x {num_experts}^2 pairs are"
            " too many to count"
        )
    cell = np.uint32 if num_tokens < 1 << 32 else np.uint64
    between = np.zeros((num_layers - 1 if pairs else 0, num_experts, num_experts), cell)
    within = np.zeros((num_layers if pairs else 0, num_experts, num_experts), cell)
    shared = np.zeros(num_layers, np.int64)
    domain_tokens = np.zeros(num_domains, np.int64)
    num_follows = num_prefill = 0
    lengths = _RequestLengths()
    begin, end, _ = (tokens or slice(None)).indices(num_tokens)
    for chunk in iter_chunks(end - begin, chunk_tokens(num_layers, trace.top_k)):
        part = slice(begin + chunk.start, begin + chunk.stop)
        first = max(0, part.start - 1)
        rows = np.array(trace.expert_ids[first : part.stop], order="C")
        ids = rows[part.start - first :]
        requests = np.asarray(trace.request_ids[first : part.stop])
        positions = np.asarray(trace.positions[first : part.stop], np.int64)
        half = request_half(requests[part.start - first :])
        window = np.arange(part.start, part.stop) * num_windows // num_tokens
        count_load(ids, window * 2 + half, window_load)
        if domain_load is not None:
            domains = np.asarray(trace.domain_ids[part], np.int64)  # type: ignore[index]
            count_load(ids, domains * 2 + half, domain_load)
            domain_tokens += np.bincount(domains, minlength=num_domains)
        if pairs:
            count_pairs(ids, between, within)
        follows = np.zeros(len(rows), bool)
        follows[1:] = (requests[1:] == requests[:-1]) & (np.diff(positions) == 1)
        count_reuse(rows, follows, shared)
        num_follows += int(follows.sum())
        num_prefill += int((np.asarray(trace.phases[part]) == 0).sum())
        lengths.add(requests[part.start - first :])
        drop_pages(*trace.arrays().values())
        if progress is not None:
            progress(chunk.stop, end - begin)
    request_ids, request_lengths = lengths.result()
    shape = (-1, 2, num_layers, num_experts)
    return TraceCounts(
        num_tokens=end - begin,
        window_load=window_load.reshape(shape),
        domain_load=None if domain_load is None else domain_load.reshape(shape),
        domain_tokens=domain_tokens,
        between=between if pairs else None,
        within=within if pairs else None,
        shared=shared,
        num_follows=num_follows,
        request_ids=request_ids,
        request_lengths=request_lengths,
        num_prefill=num_prefill,
        notices=tuple(notices),
    )


def merge_counts(parts: Iterable[TraceCounts]) -> TraceCounts:
    """The counts of a trace from those of parts that cover it once, in any order.

    At most two parts are held at a time. Raises ValueError without parts.
    """
    total: TraceCounts | None = None
    lengths = _RequestLengths()
    for part in parts:
        lengths.add_counted(part.request_ids, part.request_lengths)
        total = part if total is None else _sum(total, part)
    if total is None:
        raise ValueError("no parts to merge")
    ids, counted = lengths.result()
    return replace(total, request_ids=ids, request_lengths=counted)


def _sum(a: TraceCounts, b: TraceCounts) -> TraceCounts:
    """Both parts' counts; requests aside."""

    def both(x: npt.NDArray[Any] | None, y: npt.NDArray[Any] | None) -> Any:
        return None if x is None or y is None else x + y

    return replace(
        a,
        num_tokens=a.num_tokens + b.num_tokens,
        window_load=a.window_load + b.window_load,
        domain_load=both(a.domain_load, b.domain_load),
        domain_tokens=a.domain_tokens + b.domain_tokens,
        between=both(a.between, b.between),
        within=both(a.within, b.within),
        shared=a.shared + b.shared,
        num_follows=a.num_follows + b.num_follows,
        num_prefill=a.num_prefill + b.num_prefill,
    )


class _RequestLengths:
    """Tokens by request id, merged now and then so that memory follows the requests."""

    def __init__(self) -> None:
        self._ids: list[npt.NDArray[Any]] = []
        self._lengths: list[IntArray] = []
        self._pending = 0

    def add(self, request_ids: npt.NDArray[Any]) -> None:
        self.add_counted(*np.unique(request_ids, return_counts=True))

    def add_counted(self, ids: npt.NDArray[Any], lengths: IntArray) -> None:
        self._ids.append(ids)
        self._lengths.append(lengths)
        self._pending += len(ids)
        if self._pending > max(_MAX_PENDING_REQUESTS, 2 * len(self._ids[0])):
            self._merge()

    def _merge(self) -> None:
        ids, inverse = np.unique(np.concatenate(self._ids), return_inverse=True)
        lengths = np.zeros(len(ids), np.int64)
        np.add.at(lengths, inverse, np.concatenate(self._lengths))
        self._ids, self._lengths, self._pending = [ids], [lengths], len(ids)

    def result(self) -> tuple[IntArray, IntArray]:
        if not self._ids:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._merge()
        return self._ids[0].astype(np.int64), self._lengths[0]
