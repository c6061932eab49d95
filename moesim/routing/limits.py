"""Expert capacity: how many choices an expert takes, and which are beyond it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from moesim.types import Array, IntArray


def capacity(factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """C = ceil(factor k T / E), the factor being the capacity factor gamma."""
    return math.ceil(factor * top_k * num_tokens / num_experts - 1e-9)


def beyond(cell: IntArray, key: Array, limit: IntArray | int) -> npt.NDArray[np.int64]:
    """Indices of the choices that their cell cannot take: all but the `limit` (of each choice's
    cell, or of all) with the smallest key. cell, key: [n]; equal keys in order."""
    order = np.lexsort((key, cell))
    ordered = cell[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    limits = limit if isinstance(limit, int) else limit[order]
    return np.asarray(order[rank >= limits])
