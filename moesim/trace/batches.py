"""Batches drawn from a trace, and the split of its requests into tuning and held-out.

A batch is a list of token indices. Prefill batches pack whole requests; decode batches take one
token of each concurrent request. Tuning and evaluation never share a request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.choices import Phase as Phase
from moesim.errors import InputError
from moesim.trace.format import DECODE, PREFILL, Trace
from moesim.types import IntArray, stream

HELD_OUT_FRACTION = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class RequestIndex:
    """Tokens grouped by request: tokens of request `ids[i]` are `token_idx[indptr[i]:indptr[i+1]]`,
    in order of position."""

    ids: IntArray
    indptr: IntArray
    token_idx: IntArray

    def select(self, keep: npt.NDArray[np.bool_]) -> RequestIndex:
        """The index restricted to the requests where `keep` [num_requests] is true."""
        lengths = np.diff(self.indptr)
        indptr = np.concatenate(([0], np.cumsum(lengths[keep])))
        return RequestIndex(self.ids[keep], indptr, self.token_idx[np.repeat(keep, lengths)])

    def cap(self, max_tokens: int) -> RequestIndex:
        """The index with every request cut to its first `max_tokens` tokens."""
        lengths = np.diff(self.indptr)
        within = np.arange(len(self.token_idx)) - np.repeat(self.indptr[:-1], lengths)
        indptr = np.concatenate(([0], np.cumsum(np.minimum(lengths, max_tokens))))
        return RequestIndex(self.ids, indptr, self.token_idx[within < max_tokens])


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """B batches of tokens: batch b holds tokens `token_idx[indptr[b]:indptr[b+1]]`."""

    token_idx: IntArray
    indptr: IntArray
    phase: Phase
    batch_tokens: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, b: int) -> IntArray:
        return self.token_idx[self.indptr[b] : self.indptr[b + 1]]


def index_requests(trace: Trace, phase: Phase | None = None) -> tuple[RequestIndex, str]:
    """Group the tokens of `phase` by request; also return a notice, empty when all is as asked.

    A trace that has no token of the phase is used whole, and the notice says so: expert choice
    depends far more on text than on phase, but the user should know.
    """
    keep = np.ones(trace.num_tokens, bool)
    notice = ""
    if phase is not None:
        keep = np.asarray(trace.phases) == (PREFILL if phase == "prefill" else DECODE)
        if not keep.any():
            other = "decode" if phase == "prefill" else "prefill"
            notice = f"the trace has no {phase} tokens: its {other} tokens are used instead"
            keep[:] = True
    tokens = np.flatnonzero(keep)
    requests = np.asarray(trace.request_ids)[tokens]
    order = np.lexsort((np.asarray(trace.positions)[tokens], requests))
    ids, lengths = np.unique(requests, return_counts=True)
    indptr = np.concatenate(([0], np.cumsum(lengths)))
    return RequestIndex(ids.astype(np.int64), indptr, tokens[order]), notice


def split_requests(index: RequestIndex, seed: int = 0) -> tuple[RequestIndex, RequestIndex]:
    """Split requests into (tuning, held-out) by a hash of their id, so that the side of a request
    does not depend on what else the trace holds. Raises InputError below two requests."""
    if len(index.ids) < 2:
        raise InputError(
            f"the trace has {len(index.ids)} request(s); tuning and evaluation need one each",
            "use a trace with at least two requests",
        )
    score = _splitmix64(index.ids.astype(np.uint64) + np.uint64(seed * 0x51_7CC1 % 2**64))
    held_out = score < np.uint64(int(HELD_OUT_FRACTION * 2**64))
    if held_out.all() or not held_out.any():
        held_out = np.arange(len(index.ids)) % 2 == 1
    return index.select(~held_out), index.select(held_out)


def draw_batches(
    requests: RequestIndex, phase: Phase, batch_tokens: int, num_batches: int, seed: int
) -> Batches:
    """Draw `num_batches` seeded batches of at most `batch_tokens` tokens.

    prefill: whole requests in random order, each added if it still fits (a request longer than
    the budget is cut to it); requests are not repeated within a batch.
    decode: `batch_tokens` tokens, each at a random position of its own request; with fewer
    requests than tokens, requests are reused at other positions.
    """
    if batch_tokens < 1 or num_batches < 1:
        raise InputError("batch size and number of batches must be at least 1", "raise them")
    if seed < 0:
        raise InputError(f"seed {seed} is negative", "give a seed of 0 or more")
    rng = stream(seed, num_batches, batch_tokens, phase == "decode")
    draw = _prefill_batch if phase == "prefill" else _decode_batch
    parts = [draw(requests, batch_tokens, rng) for _ in range(num_batches)]
    indptr = np.concatenate(([0], np.cumsum([len(p) for p in parts])))
    return Batches(np.concatenate(parts), indptr, phase, batch_tokens)


def resample_requests(requests: RequestIndex, seed: int, fraction: float = 1.0) -> RequestIndex:
    """A bootstrap resample: `fraction` of as many requests (at least 2), drawn with replacement,
    duplicates kept apart."""
    rng = stream(seed, len(requests.ids))
    size = max(2, int(len(requests.ids) * fraction))
    pick = rng.integers(0, len(requests.ids), size)
    lengths = np.diff(requests.indptr)[pick]
    tokens = [requests.token_idx[requests.indptr[i] : requests.indptr[i + 1]] for i in pick]
    return RequestIndex(
        requests.ids[pick], np.concatenate(([0], np.cumsum(lengths))), np.concatenate(tokens)
    )


def draw_prefill_requests(lengths: IntArray, budget: int, rng: np.random.Generator) -> IntArray:
    """Indices of the requests of one prefill batch: in random order, each taken if its tokens
    (`lengths` [R], cut to `budget`) still fit."""
    capped = np.minimum(lengths, budget)
    left, shortest = budget, int(capped.min())
    taken = []
    for i in rng.permutation(len(capped)):
        if capped[i] <= left:
            taken.append(i)
            left -= int(capped[i])
            if left < shortest:
                break
    return np.array(taken, np.int64)


def _prefill_batch(requests: RequestIndex, budget: int, rng: np.random.Generator) -> IntArray:
    lengths = np.diff(requests.indptr)
    starts = requests.indptr[:-1]
    return np.concatenate(
        [
            requests.token_idx[starts[i] : starts[i] + min(lengths[i], budget)]
            for i in draw_prefill_requests(lengths, budget, rng)
        ]
    )


def _decode_batch(requests: RequestIndex, size: int, rng: np.random.Generator) -> IntArray:
    num_requests = len(requests.ids)
    rounds = -(-size // num_requests)
    pick = np.concatenate([rng.permutation(num_requests) for _ in range(rounds)])[:size]
    start, length = requests.indptr[pick], np.diff(requests.indptr)[pick]
    return requests.token_idx[start + (rng.random(size) * length).astype(np.int64)]


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
