"""Time as a function of size: concave pieces, short tables, and the answer type they share.

All sizes are bytes, all times microseconds, all rates GB/s (1e9 bytes/s). Every curve is
non-decreasing in size by construction, so that more bytes never take less time (INV-9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moesim.choices import Basis as Basis
from moesim.types import FloatArray

BYTES_PER_US_AT_1_GB_PER_S = 1e3
FLOPS_PER_US_AT_1_TFLOPS = 1e6
_RANK: dict[str, int] = {"assumed": 0, "datasheet": 1, "measured": 2}


def weakest(*bases: Basis) -> Basis:
    """The weakest of several bases, in the order assumed < datasheet < measured."""
    return min(bases, key=lambda basis: _RANK[basis])


@dataclass(frozen=True)
class Evaluation:
    """A predicted time and what it rests on.

    `time_us` has the shape of the sizes asked for. `in_range` is False as soon as one of them
    lies outside what was measured: the time is then the curve's asymptote, not a measurement.
    """

    time_us: FloatArray
    basis: Basis
    in_range: bool
    source: str

    @property
    def extrapolated(self) -> bool:
        return not self.in_range


@dataclass(frozen=True)
class AffineMin:
    """`min_i(latency_i + bytes / rate_i)`: concave, non-decreasing, at most a few pieces.

    One piece is the alpha-beta model (Hockney 1994). Several are what a library does that
    switches protocol with size: each protocol is affine and the cheaper one is taken.

    `segments`: pairs of (latency_us, gb_per_s), each positive.
    """

    segments: tuple[tuple[float, float], ...]

    @property
    def latency_us(self) -> float:
        """Time at zero bytes."""
        return min(latency for latency, _ in self.segments)

    def time_us(self, num_bytes: npt.ArrayLike) -> FloatArray:
        size = np.asarray(num_bytes, dtype=np.float64)
        latency, rate = np.asarray(self.segments, dtype=np.float64).T
        pieces = latency + size[..., None] / (rate * BYTES_PER_US_AT_1_GB_PER_S)
        return pieces.min(axis=-1)


@dataclass(frozen=True)
class SizeTable:
    """Measured (bytes, us) points with log-log interpolation between them.

    Times are first made non-decreasing in size (a running maximum, which removes dips that only
    noise explains). Below the first size the first time holds; above the last size the time
    grows in proportion to size, which is the rate of the last point.
    """

    num_bytes: FloatArray
    times_us: FloatArray

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float]]) -> SizeTable:
        """`rows`: (bytes, us, ...) in any order; further columns are ignored."""
        points = np.asarray([[row[0], row[1]] for row in rows], dtype=np.float64)
        points = points[np.argsort(points[:, 0], kind="stable")]
        return cls(points[:, 0], np.maximum.accumulate(points[:, 1]))

    @property
    def latency_us(self) -> float:
        return float(self.times_us[0])

    def time_us(self, num_bytes: npt.ArrayLike) -> FloatArray:
        size = np.asarray(num_bytes, dtype=np.float64)
        clipped = np.clip(size, self.num_bytes[0], self.num_bytes[-1])
        inside = np.exp(np.interp(np.log(clipped), np.log(self.num_bytes), np.log(self.times_us)))
        beyond = np.maximum(size / self.num_bytes[-1], 1.0)
        return np.asarray(inside * beyond, dtype=np.float64)


class SizeCurve(Protocol):
    """What `AffineMin` and `SizeTable` have in common."""

    @property
    def latency_us(self) -> float: ...

    def time_us(self, num_bytes: npt.ArrayLike) -> FloatArray: ...


def power_mean_max(a: FloatArray, b: FloatArray, sharpness: float) -> FloatArray:
    """Smooth maximum `(a**q + b**q)**(1/q)`, evaluated without overflow.

    Between `max(a, b)` (q to infinity) and `a + b` (q = 1): how far two bounds that hold at once
    (memory traffic and arithmetic, say) overlap. Non-decreasing in both for q >= 1.
    """
    high = np.maximum(a, b)
    low = np.minimum(a, b)
    ratio = np.divide(low, high, out=np.zeros_like(high), where=high > 0)
    return high * (1.0 + ratio**sharpness) ** (1.0 / sharpness)
