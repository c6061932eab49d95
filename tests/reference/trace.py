"""The counting kernels of `moesim.trace.kernels`, slowly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.types import Array, IntArray


def count_load_reference(ids: Array, group_idx: IntArray, out: IntArray) -> None:
    """The reference of `count_load`."""
    for t, layer, k in np.ndindex(*ids.shape):
        if group_idx[t] >= 0 and ids[t, layer, k] >= 0:
            out[group_idx[t], layer, ids[t, layer, k]] += 1


def count_pairs_reference(ids: Array, between: Array, within: Array) -> None:
    """The reference of `count_pairs`."""
    for token in ids.astype(np.int64):
        chosen = [sorted(int(e) for e in row if e >= 0) for row in token]
        for layer in range(within.shape[0]):
            for n, a in enumerate(chosen[layer]):
                for b in chosen[layer][n + 1 :]:
                    within[layer, a, b] += 1
        for layer in range(between.shape[0]):
            for a in chosen[layer]:
                for b in chosen[layer + 1]:
                    between[layer, a, b] += 1


def count_reuse_reference(ids: Array, follows: npt.NDArray[np.bool_], shared: IntArray) -> None:
    """The reference of `count_reuse`."""
    for t in range(1, ids.shape[0]):
        if follows[t]:
            for layer in range(ids.shape[1]):
                shared[layer] += len((set(ids[t, layer]) & set(ids[t - 1, layer])) - {-1})
