"""Metrics of load and traffic: balancedness, imbalance, fan-out, percentiles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.placement import EMPTY, Placement
from moesim.types import Array, FloatArray

CHUNK_CELLS = 20_000_000


def gpu_loads(steps: Array, placement: Placement) -> FloatArray:
    """[S, L, G] tokens of every GPU for loads [S, L, E] of the experts, shared equally among the
    replicas of each."""
    table = placement.physical_to_logical
    safe = np.where(table == EMPTY, 0, table)
    share = np.where(table == EMPTY, 0.0, 1.0)
    share /= np.take_along_axis(placement.replica_count, safe, axis=1)
    num_layers, num_slots = table.shape
    gpus = np.empty((len(steps), num_layers, placement.num_gpus))
    chunk = max(1, CHUNK_CELLS // (num_layers * num_slots))
    for start in range(0, len(steps), chunk):
        part = steps[start : start + chunk].astype(np.float64)
        slots = np.take_along_axis(part, safe[None], axis=2) * share
        gpus[start : start + chunk] = slots.reshape(*slots.shape[:2], placement.num_gpus, -1).sum(
            axis=3
        )
    return gpus


def imbalance(load: npt.NDArray[np.number], speed: FloatArray | None = None) -> FloatArray:
    """Max over mean load of the GPUs; 1 is perfect.

    load: [..., G] tokens or seconds. speed: [G] relative GPU speeds; load is then compared with
    each GPU's share of the total speed. Where a batch has no load at all there is no ratio: NaN.
    """
    values = np.asarray(load, np.float64)
    if speed is not None:
        values = values / (speed / speed.mean())
        mean = np.asarray(load, np.float64).mean(axis=-1)
    else:
        mean = values.mean(axis=-1)
    out = np.full_like(mean, np.nan)
    np.divide(values.max(axis=-1), mean, out=out, where=mean > 0)
    return out


def balancedness(load: npt.NDArray[np.number], speed: FloatArray | None = None) -> FloatArray:
    """Mean over max load of the GPUs, [..., G] -> [...]; the inverse of `imbalance`."""
    return 1.0 / imbalance(load, speed)
