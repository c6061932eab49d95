"""Metrics of load and traffic: balancedness, imbalance, fan-out, percentiles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.types import FloatArray


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
