"""Requests of a service: when they come, how long they are, what they share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moesim.cost.curves import Basis
from moesim.errors import InputError
from moesim.types import FloatArray, IntArray, stream

MAX_TOKENS = 1 << 30
MAX_PRIORITIES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """R requests in order of arrival.

    arrival_s: [R] seconds since the first, never decreasing. prompt_tokens, output_tokens: [R],
    at least 1. priority: [R], lower is served first. domain: [R] index into `domains`, -1 where
    none. block_ids, block_indptr: the prompt's blocks of `block_tokens` tokens by content, as
    `block_ids[block_indptr[r]:block_indptr[r + 1]]`; equal ids are equal text after an equal
    beginning. Empty where nothing is known of the content. Ids are 0, 1, ... without gaps.
    labels: [R] what a column of the log says of each, as text; empty where none was asked for.
    source, basis: where the requests are from ("measured": a log of a real service).

    Construct with `Requests.of`, which checks.
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    priority: IntArray
    domain: IntArray
    block_ids: IntArray
    block_indptr: IntArray
    block_tokens: int = 512
    domains: tuple[str, ...] = ()
    source: str = ""
    basis: Basis = "assumed"
    notices: tuple[str, ...] = field(default=())
    labels: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        arrival_s: npt.ArrayLike,
        prompt_tokens: npt.ArrayLike,
        output_tokens: npt.ArrayLike,
        *,
        priority: npt.ArrayLike | None = None,
        domain: npt.ArrayLike | None = None,
        blocks: list[list[int]] | None = None,
        block_tokens: int = 512,
        domains: tuple[str, ...] = (),
        source: str = "",
        basis: Basis = "assumed",
        row_name: str = "request",
        first_row: int = 0,
    ) -> Requests:
        """From arrays of one length. `row_name` and `first_row` name rows in errors, as "line 2".

        Raises InputError for no requests, times that are NaN, negative or not in order, lengths
        below 1 or beyond MAX_TOKENS, and more than MAX_PRIORITIES priorities.
        """
        times = np.asarray(arrival_s, np.float64)
        count = len(times)
        if not count:
            raise InputError(
                f"{source or 'the list of requests'} holds no requests",
                "give at least one request",
            )
        _check_times(times, row_name, first_row)
        prompt = _lengths("prompt", prompt_tokens, count, row_name, first_row)
        output = _lengths("output", output_tokens, count, row_name, first_row)
        levels = np.zeros(count, np.int64) if priority is None else np.asarray(priority, np.int64)
        if len(np.unique(levels)) > MAX_PRIORITIES:
            raise InputError(
                f"{len(np.unique(levels))} different priorities",
                f"use at most {MAX_PRIORITIES}, the lowest number first",
            )
        ids, indptr = _blocks(blocks, count)
        return cls(
            times - times[0],
            prompt,
            output,
            levels,
            np.full(count, -1, np.int64) if domain is None else np.asarray(domain, np.int64),
            ids,
            indptr,
            block_tokens,
            domains,
            source,
            basis,
        )

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrival_s[-1])

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals a second: (R - 1) / span; 0 where all arrive at once."""
        return (len(self) - 1) / self.span_s if self.span_s > 0 else 0.0

    def scaled(self, factor: float) -> Requests:
        """The same requests, arriving `factor` times as fast. Raises InputError unless positive."""
        if not (np.isfinite(factor) and factor > 0):
            raise InputError(f"a rate scale of {factor}", "give a number above 0, as 2 for twice")
        return replace(self, arrival_s=self.arrival_s / factor)

    def first(self, count: int) -> Requests:
        """The first `count` requests, or all. Raises InputError unless positive."""
        if count < 1:
            raise InputError(f"{count} requests were asked for", "give at least 1")
        if count >= len(self):
            return self
        return self.picked(np.arange(count))

    def picked(self, index: IntArray) -> Requests:
        """Some of the requests, by ascending index, at the times that they have."""
        lengths = np.diff(self.block_indptr)[index]
        starts = np.repeat(self.block_indptr[index], lengths)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        dense = np.unique(self.block_ids[starts + within], return_inverse=True)[1]
        return replace(
            self,
            arrival_s=self.arrival_s[index],
            prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
            priority=self.priority[index],
            domain=self.domain[index],
            block_ids=dense.astype(np.int64),
            block_indptr=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            labels=tuple(self.labels[i] for i in index) if self.labels else (),
        )

    def content_hash(self) -> str:
        """sha256 of times, lengths, priorities and content of the requests."""
        digest = hashlib.sha256()
        for name in (
            "arrival_s", "prompt_tokens", "output_tokens", "priority", "block_ids", "block_indptr",
        ):  # fmt: skip
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return digest.hexdigest()

    def with_priorities(self, shares: list[float], seed: int = 0) -> Requests:
        """The same requests with priorities 0, 1, ... drawn in these shares. Raises InputError."""
        weights = np.asarray(shares, np.float64)
        valid = len(weights) and np.all(np.isfinite(weights) & (weights >= 0)) and weights.sum() > 0
        if not valid or len(weights) > MAX_PRIORITIES:
            raise InputError(
                f"priorities in shares {shares!s:.80}",
                f"give 1 to {MAX_PRIORITIES} numbers of 0 or more, the most urgent first",
            )
        rng = stream(seed)
        drawn = rng.choice(len(weights), len(self), p=weights / weights.sum())
        return replace(self, priority=drawn.astype(np.int64))

    def describe(self) -> dict[str, object]:
        """Figures for reports: number, span, rate, lengths."""
        return {
            "source": self.source,
            "basis": self.basis,
            "num_requests": len(self),
            "span_s": self.span_s,
            "rate_per_s": self.rate_per_s,
            "prompt_tokens": _summary(self.prompt_tokens),
            "output_tokens": _summary(self.output_tokens),
            "num_prompt_blocks": int(self.block_indptr[-1]),
            "num_different_blocks": int(self.block_ids.max(initial=-1)) + 1,
        }


def _summary(values: IntArray) -> dict[str, float]:
    p50, p99 = np.percentile(values, [50, 99])
    return {
        "mean": float(values.mean()),
        "p50": float(p50),
        "p99": float(p99),
        "max": float(values.max()),
        "total": float(values.sum()),
    }


def _check_times(times: FloatArray, row_name: str, first_row: int) -> None:
    bad = ~np.isfinite(times)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{row_name} {first_row + row}: the arrival time is no number",
            "remove the row or repair it",
        )
    if (times < 0).any():
        row = int((times < 0).argmax())
        raise InputError(
            f"{row_name} {first_row + row}: the arrival time {times[row]:g} s is negative",
            "count times from a start at 0",
        )
    steps = np.diff(times)
    if (steps < 0).any():
        row = int((steps < 0).argmax()) + 1
        raise InputError(
            f"{row_name} {first_row + row} arrives {-steps[row - 1]:g} s before the one above it"
            f" ({int((steps < 0).sum())} such rows)",
            "sort the file by time",
        )


def _lengths(
    what: str, values: npt.ArrayLike, count: int, row_name: str, first_row: int
) -> IntArray:
    given = np.asarray(values, np.float64)
    if len(given) != count:
        raise InputError(
            f"{len(given)} {what} lengths for {count} arrival times", "give one of each a request"
        )
    bad = ~((given >= 1) & (given <= MAX_TOKENS) & (given == np.floor(given)))
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{row_name} {first_row + row}: {given[row]:g} {what} tokens"
            f" ({int(bad.sum())} such rows)",
            f"lengths are whole numbers from 1 to {MAX_TOKENS:,}; leave such rows out with"
            " `skip_empty` if they are requests that failed",
        )
    return given.astype(np.int64)


def _blocks(blocks: list[list[int]] | None, count: int) -> tuple[IntArray, IntArray]:
    if blocks is None:
        return np.zeros(0, np.int64), np.zeros(count + 1, np.int64)
    indptr = np.concatenate(([0], np.cumsum([len(b) for b in blocks]))).astype(np.int64)
    listed = [i for b in blocks for i in b]
    try:
        flat = np.array(listed, dtype=np.int64)
    except OverflowError:
        flat = np.array(listed, dtype=object)
    return np.unique(flat, return_inverse=True)[1].astype(np.int64), indptr
