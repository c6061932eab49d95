"""The time over which a service's rates are taken: warm-up and drain left out (INV-12).

The window ends with the last arrival, and begins where MSER-5 puts it (K. P. White, "An effective
truncation heuristic for bias reduction in simulation output", Simulation 69(6), 1997; K. P. White,
M. J. Cobb, S. C. Spratt, "A comparison of five steady-state truncation heuristics for simulation",
Winter Simulation Conference 2000): of a series in batches of BATCH bins, so many of the first are
left out that the squared standard error of the mean of the others is least; more than half left out
means that it never levels off. The series are the output tokens/s, which have to level off, the
requests that end and those in the service, whose warm-up is left out as well where it ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moesim.types import FloatArray

BATCH = 5
FEWEST_BATCHES = 10
GROWTH_SIGMAS = 3.0
GROWTH_SHARE = 0.1
LATE_SHARE = 0.02

State = Literal["steady", "growing", "varying", "short"]


@dataclass(frozen=True, slots=True)
class Window:
    """start_s, end_s: from the first arrival on. offered, served: requests that arrive and end in
    it; in_system: requests in the service at its start and end.

    state: steady; growing, where the requests in the system grow from the third quarter of the
    window to the last by more than LATE_SHARE of those that arrive in that time, or over the window
    by more than GROWTH_SHARE, and by more than GROWTH_SIGMAS standard deviations of counts that
    come and go by chance (Poisson); varying, where the output never levels off, as that of a log
    whose load changes or of few requests: the window begins after the mean time that a request
    stays, if that is in the first half; short, where nothing can be said of rates: fewer requests
    end in the window than run at a time, so that by Little's law it is shorter than one of them.
    """

    start_s: float
    end_s: float
    state: State
    offered: int
    served: int
    in_system: tuple[int, int]

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def has_rates(self) -> bool:
        """Whether a mean over the window stands for the service."""
        return self.state != "short"

    @property
    def warning(self) -> str:
        """What a reader of the rates has to know; "" where they are steady."""
        before, after = self.in_system
        if self.state == "growing":
            return (
                f"no steady state: {self.offered / self.seconds:,.2f} requests/s are offered and"
                f" {self.served / self.seconds:,.2f} served; {before:,} were in the service after"
                f" {self.start_s:,.0f} s and {after:,} after {self.end_s:,.0f} s: it is overloaded,"
                " or the requests too few to tell. Latencies grow with the length of the run"
            )
        if self.state == "varying":
            return (
                "no steady state: the output does not level off; rates are means over the last"
                f" {self.seconds:,.0f} s of arrivals"
            )
        if self.state == "short":
            return (
                f"no steady state, so no rates: arrivals end after {self.end_s:,.1f} s, before the"
                f" output has levelled off, with {after:,} requests still in the service; give"
                " several times as many. Latencies are of a service that is still filling"
            )
        return ""


def find_window(
    tokens: FloatArray,
    running: FloatArray,
    bin_s: float,
    arrival_s: FloatArray,
    leave_s: FloatArray,
    last: float,
) -> Window:
    """tokens, running: [bins] of `bin_s` seconds, output tokens and running sequences. arrival_s,
    leave_s: [R] of the requests that were taken; leave_s is infinite for those that had not ended
    when the run did. last: seconds to the last arrival, or to where the run was stopped before."""
    batches = int(last / bin_s) // BATCH
    whole = _counted(0.0, last, "short", arrival_s, leave_s)
    if batches < FEWEST_BATCHES:
        return whole
    edges = np.arange(batches * BATCH + 1) * bin_s
    ended = np.searchsorted(np.sort(leave_s), edges)
    present = (np.searchsorted(arrival_s, edges) - ended)[1:].astype(np.float64)
    cut = mser_cut(_batch_means(tokens[: batches * BATCH]))
    state: State = "varying" if cut is None else "steady"
    if cut is None:
        stay = (leave_s - arrival_s)[np.isfinite(leave_s)]
        cut = math.ceil(float(stay.mean()) / (BATCH * bin_s)) if len(stay) else batches
    else:
        for series in (present, np.diff(ended).astype(np.float64)):
            cut = max(cut, mser_cut(_batch_means(series)) or 0)
    first = cut * BATCH
    if cut > batches // 2:
        return whole
    window = _counted(first * bin_s, last, state, arrival_s, leave_s)
    if window.served < running[first : batches * BATCH].mean():
        return whole
    third, fourth = (float(q.mean()) for q in np.array_split(present[first:], 4)[2:])
    come = max(window.offered, 1)
    late = _grows(third, fourth, LATE_SHARE * come / 4)
    if late or _grows(*window.in_system, GROWTH_SHARE * come):
        return replace(window, state="growing")
    return window


def _grows(before: float, after: float, least: float) -> bool:
    return after - before > max(least, GROWTH_SIGMAS * math.sqrt(before + after))


def _batch_means(series: FloatArray) -> FloatArray:
    return np.asarray(series.reshape(-1, BATCH).mean(axis=1), np.float64)


def mser_cut(means: FloatArray) -> int | None:
    """How many of the batch means [n] to leave out; None where that is more than half of them."""
    n = len(means)
    left = np.arange(n, 0, -1, dtype=np.float64)
    total, squares = (np.cumsum(v[::-1])[::-1] for v in (means, means**2))
    spread = np.maximum(squares - total**2 / left, 0.0)
    error = spread / left**2
    cut = int(np.argmin(error[: n - FEWEST_BATCHES // 2]))
    return cut if cut <= n // 2 else None


def _counted(
    start: float, end: float, state: State, arrival_s: FloatArray, leave_s: FloatArray
) -> Window:
    def inside(times: FloatArray) -> int:
        return int(((times > start) & (times <= end)).sum())

    def present(when: float) -> int:
        return int(((arrival_s <= when) & (leave_s > when)).sum())

    ends = present(start) if start > 0 else 0, present(end)
    return Window(start, end, state, inside(arrival_s), inside(leave_s), ends)
