"""Times by a count of rows or tokens, as a table."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np

from moesim.types import FloatArray

GRID_PER_OCTAVE = 4


@dataclass(eq=False)
class CountTable:
    """Piecewise linear in a count, non-decreasing, 0 at 0; beyond the last point in proportion."""

    counts: FloatArray
    times_us: FloatArray

    def __call__(self, count: FloatArray) -> FloatArray:
        inside = np.interp(count, self.counts, self.times_us)
        slope = self.times_us[-1] / self.counts[-1]
        time = np.where(
            count > self.counts[-1],
            self.times_us[-1] + slope * (count - self.counts[-1]),
            inside,
        )
        return np.where(count > 0, time, 0.0)

    def one(self, count: float) -> float:
        """The same for one count."""
        points, times = self._lists
        if count <= points[0]:
            return times[0] if count > 0 else 0.0
        if count >= points[-1]:
            return times[-1] * count / points[-1]
        i = bisect_left(points, count)
        low = points[i - 1]
        return times[i - 1] + (times[i] - times[i - 1]) * (count - low) / (points[i] - low)

    @cached_property
    def _lists(self) -> tuple[list[float], list[float]]:
        return self.counts.tolist(), self.times_us.tolist()


def count_grid(last: float) -> FloatArray:
    """1 to `last`, every integer to 16 and then a few per octave."""
    octaves = np.log2(max(last, 2.0) / 16.0)
    fine = np.arange(1, min(17, int(last) + 1), dtype=np.float64)
    if octaves <= 0:
        return fine
    coarse = 16.0 * 2.0 ** np.linspace(0, octaves, max(2, ceil(octaves * GRID_PER_OCTAVE) + 1))[1:]
    return np.concatenate([fine, coarse])
