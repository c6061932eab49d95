"""Names used everywhere: arrays, progress callbacks, random streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
"""Of a type that the docstring gives; what compiled functions take."""
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def stream(seed: int, *purpose: int) -> np.random.Generator:
    """The random numbers of one purpose: streams of different purposes are independent of each
    other, however many numbers each of them draws."""
    return np.random.default_rng([seed, *purpose] if purpose else seed)


def shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    """`progress` for one part of a job of which `done` of `total` came before it."""
    if progress is None:
        return None
    return lambda now, _: progress(done + now, total)
