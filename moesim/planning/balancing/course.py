"""What is served: steps through a trace's requests in their order, and what is seen on the way.

A course of N steps goes once through the held-out requests, in the order of the trace, or domain by
domain. The log is cut into stretches, each with enough requests to fill a batch; every step draws
its batch from the stretch that it falls into. A sample of the steps is judged.

What a scheme may look at while it serves are the tuning requests of the same stretches: the same
drift, but no request that it is judged on. The engine's own composition of steps is ignored.

Intervals are over requests. The judged steps belong in turn to NUM_RESAMPLES bootstrap resamples of
the held-out requests of every stretch; the spread of the resamples' means gives the interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError, MismatchError
from moesim.planning.evaluate import NUM_RESAMPLES, Z_95, Interval
from moesim.planning.tuning import batch_counts
from moesim.trace.batches import Batches, Phase, RequestIndex, draw_batches, resample_requests
from moesim.trace.format import Trace
from moesim.types import FloatArray, IntArray

MAX_STRETCHES = 48
MIN_STRETCH_REQUESTS = 8
MAX_JUDGED = 1000
MAX_JUDGED_CHOICES = 120_000_000
MAX_SEEN_BATCHES = 64
MAX_STEPS = 1 << 30
FILL = 2.0
"""Tokens of a stretch's requests over a batch's, up to which requests are drawn several times."""


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """names: of the stretches; cuts: [Q + 1] their first steps; tune: [Q] the tuning requests of
    each. batches: the J judged ones; step_of, group_of: [J] their step, ascending, and resample."""

    trace: Trace
    num_steps: int
    names: tuple[str, ...]
    cuts: IntArray
    tune: tuple[RequestIndex, ...]
    batches: Batches
    step_of: IntArray
    group_of: IntArray
    num_requests: int
    seed: int
    _counts: list[npt.NDArray[np.float32]] = field(default_factory=list)

    @property
    def batch_tokens(self) -> int:
        return self.batches.batch_tokens

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """[J, L, E] tokens of each expert in the judged batches."""
        if not self._counts:
            self._counts.append(batch_counts(self.trace, self.batches))
        return self._counts[0]

    def seen(self, step: int, window: int) -> npt.NDArray[np.float32]:
        """[W, L, E] loads of the `window` steps before `step`, of at most MAX_SEEN_BATCHES of them,
        evenly spread."""
        first = max(0, step - window)
        num = min(step - first, MAX_SEEN_BATCHES)
        steps = first + (np.arange(num) * 2 + 1) * (step - first) // (2 * num)
        stretch = np.searchsorted(self.cuts, steps, side="right") - 1
        parts = []
        for q, many in zip(*np.unique(stretch, return_counts=True), strict=True):
            enough = FILL * self.batch_tokens / max(1, len(self.tune[q].token_idx))
            pool = self.tune[q]
            if enough > 1:
                pool = resample_requests(pool, self.seed + step, enough)
            batches = draw_batches(
                pool,
                self.batches.phase,
                self.batch_tokens,
                int(many),
                self.seed * 1_000_003 + step,
            )
            parts.append(batch_counts(self.trace, batches))
        return np.concatenate(parts)

    def recent(self, step: int, window: int) -> RequestIndex:
        """The tuning requests of the stretch before `step` whose loads `seen` are."""
        return self.tune[int(np.searchsorted(self.cuts, max(0, step - 1), side="right")) - 1]

    def runs(self, first_steps: IntArray) -> Iterator[tuple[int, slice]]:
        """Which of the consecutive runs that begin at `first_steps` (ascending, from 0) hold judged
        steps, and which of these."""
        edges = np.searchsorted(self.step_of, np.append(first_steps, self.num_steps))
        for run in range(len(first_steps)):
            if edges[run] < edges[run + 1]:
                yield run, slice(int(edges[run]), int(edges[run + 1]))

    def part(self, rows: slice) -> Batches:
        """Some of the judged batches."""
        indptr = self.batches.indptr[rows.start : rows.stop + 1]
        return Batches(
            self.batches.token_idx[indptr[0] : indptr[-1]],
            indptr - indptr[0],
            self.batches.phase,
            self.batch_tokens,
        )

    def interval(self, values: FloatArray) -> Interval:
        """Mean of `values` [J] with its 95 % interval over requests."""
        groups = np.array([values[self.group_of == g].mean() for g in np.unique(self.group_of)])
        half = Z_95 * float(groups.std(ddof=1))
        mean = float(values.mean())
        return Interval(mean, mean - half, mean + half)


def make_course(
    trace: Trace,
    tune: RequestIndex,
    held_out: RequestIndex,
    phase: Phase,
    batch_tokens: int,
    num_steps: int,
    seed: int,
    *,
    drift: bool = False,
) -> Course:
    """A course of `num_steps` steps. drift: the trace's domains one after the other, in equal
    shares of the steps; otherwise its requests in their order.

    Raises InputError for fewer than 2 NUM_RESAMPLES steps or too many, MismatchError for a drift
    through a trace without domains on both sides.
    """
    if not 2 * NUM_RESAMPLES <= num_steps <= MAX_STEPS:
        raise InputError(
            f"`steps` {num_steps}", f"give at least {2 * NUM_RESAMPLES}, such as the default"
        )
    if drift:
        names, seen, served = _by_domain(trace, tune, held_out)
    else:
        names, seen, served = _in_order(tune, held_out, batch_tokens)
    cuts = np.linspace(0, num_steps, len(names) + 1).astype(np.int64)
    choices = batch_tokens * trace.num_layers * trace.top_k
    most = int(np.clip(MAX_JUDGED_CHOICES // choices, 2 * NUM_RESAMPLES, MAX_JUDGED))
    judged = min(num_steps, most // NUM_RESAMPLES * NUM_RESAMPLES)
    step_of = (np.arange(judged) * 2 + 1) * num_steps // (2 * judged)
    group_of = np.arange(judged) % NUM_RESAMPLES
    stretch = np.searchsorted(cuts, step_of, side="right") - 1
    picked: list[IntArray] = [np.zeros(0, np.int64)] * judged
    for q, requests in enumerate(served):
        for g in range(NUM_RESAMPLES):
            rows = np.flatnonzero((stretch == q) & (group_of == g))
            if not len(rows):
                continue
            enough = max(1.0, FILL * batch_tokens / max(1, len(requests.token_idx)))
            pool = resample_requests(requests, seed * 7919 + q * NUM_RESAMPLES + g, enough)
            drawn = draw_batches(pool, phase, batch_tokens, len(rows), seed + g)
            for i, row in enumerate(rows):
                picked[row] = drawn[i]
    indptr = np.concatenate(([0], np.cumsum([len(p) for p in picked]))).astype(np.int64)
    batches = Batches(np.concatenate(picked), indptr, phase, batch_tokens)
    return Course(
        trace, num_steps, names, cuts, seen, batches, step_of, group_of, len(held_out.ids), seed
    )


def _in_order(
    tune: RequestIndex, held_out: RequestIndex, batch_tokens: int
) -> tuple[tuple[str, ...], tuple[RequestIndex, ...], tuple[RequestIndex, ...]]:
    """Both sides cut at the same places of the log, where a request is by its first token."""
    place = [side.token_idx[side.indptr[:-1]] for side in (tune, held_out)]
    smallest = min(len(tune.token_idx), len(held_out.token_idx)) // batch_tokens
    fewest = min(len(tune.ids), len(held_out.ids)) // MIN_STRETCH_REQUESTS
    num = int(np.clip(min(smallest, fewest), 1, MAX_STRETCHES))
    edges = np.quantile(place[1], np.linspace(0, 1, num + 1)[1:-1]) if num > 1 else np.zeros(0)
    number = [np.searchsorted(edges, p, side="right") for p in place]
    whole = [q for q in range(num) if all((n == q).sum() >= 2 for n in number)]
    if not whole:
        return ("all",), (tune,), (held_out,)
    sides = [
        tuple(side.select(n == q) for q in whole)
        for side, n in zip((tune, held_out), number, strict=True)
    ]
    return tuple(f"part {q + 1} of {num}" for q in whole), sides[0], sides[1]


def _by_domain(
    trace: Trace, tune: RequestIndex, held_out: RequestIndex
) -> tuple[tuple[str, ...], tuple[RequestIndex, ...], tuple[RequestIndex, ...]]:
    if trace.domain_ids is None or not trace.meta.domains:
        raise MismatchError("the trace has no domains to drift through", "leave out `drift`")
    domain = [
        np.asarray(trace.domain_ids)[side.token_idx[side.indptr[:-1]]] for side in (tune, held_out)
    ]
    both = [d for d in range(len(trace.meta.domains)) if all((x == d).any() for x in domain)]
    if not both:
        raise MismatchError(
            "no domain of the trace has a request to tune on and one that is held out",
            "leave out `drift`, or give a trace with more requests",
        )
    sides = [
        tuple(side.select(x == d) for d in both)
        for side, x in zip((tune, held_out), domain, strict=True)
    ]
    return tuple(trace.meta.domains[d] for d in both), sides[0], sides[1]
