"""Time of host copies, and of row moves: gathering rows, and summing several rows into one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.cost.curves import Basis, Evaluation, SizeCurve
from moesim.types import FloatArray


@dataclass(frozen=True)
class WeightMove:
    """Moving expert weights while an engine serves, through one library, in or beside its steps.

    layer_us: host time for each layer. gb_per_s: rate at which a GPU receives weights, None where
    they go over the links at the links' rates.
    """

    through: str
    asynchronous: bool
    layer_us: float
    gb_per_s: float | None = None
    basis: Basis = "measured"
    source: str = ""


@dataclass(frozen=True)
class CopyModel:
    """Host-link (`h2d`, `d2h`, `both` at once) or local `permute` or `reduce` time by bytes.

    `pinned`, `num_gpus_at_once`: of a host copy, the memory, and the GPUs that copy at a time.
    `fans`: further curves of a row move as (fan, curve), ascending, `curve` being that of fan 1. A
    fan is the number of rows on the larger side a row on the smaller one; a curve's bytes are those
    of both sides.
    """

    direction: str
    curve: SizeCurve
    floor_us: float = 0.0
    bytes_range: tuple[float, float] = (0.0, float("inf"))
    fans: tuple[tuple[float, SizeCurve], ...] = ()
    pinned: bool = True
    num_gpus_at_once: int = 1
    basis: Basis = "measured"
    source: str = ""

    def time_us(self, num_bytes: npt.ArrayLike) -> FloatArray:
        """Time by bytes; for a row move with as many rows on one side as on the other."""
        return np.maximum(self.curve.time_us(num_bytes), self.floor_us)

    def rows_us(self, many: npt.ArrayLike, few: npt.ArrayLike, row_bytes: float) -> FloatArray:
        """Time to move between `many` and `few` rows: a gather reads `few` distinct rows and writes
        `many`, a sum reads `many` and writes `few`.

        Without `fans` the bytes of both sides tell the time. Else, at a given `many`, it is a
        straight line in `few` between two measured fans, which is exact where each side costs by
        its rows. It never decreases in `few`. Zero without rows.
        """
        large, small = np.asarray(many, np.float64), np.asarray(few, np.float64)
        if not self.fans:
            both = large + small
            return np.where(both > 0, self.time_us(both * row_bytes), 0.0)
        share = small / np.maximum(large, 1.0)
        curves = [(1.0, self.curve), *self.fans]
        shares = np.array([1.0 / fan for fan, _ in reversed(curves)])
        times = [
            np.maximum(curve.time_us(large * (1.0 + 1.0 / fan) * row_bytes), self.floor_us)
            for fan, curve in reversed(curves)
        ]
        time = np.broadcast_to(times[0], np.broadcast(large, share).shape)
        for i in range(1, len(times)):
            rise = np.clip((share - shares[i - 1]) / (shares[i] - shares[i - 1]), 0.0, 1.0)
            time = time + rise * np.maximum(times[i] - times[i - 1], 0.0)
        return np.asarray(np.where(large > 0, time, 0.0), np.float64)

    def evaluate(self, num_bytes: npt.ArrayLike) -> Evaluation:
        """`time_us` with its basis and whether all of it lies in the measured range."""
        inside = bool(np.all(np.asarray(num_bytes) <= self.bytes_range[1]))
        return Evaluation(self.time_us(num_bytes), self.basis, inside, self.source)
