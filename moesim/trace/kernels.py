"""Compiled counting kernels of the statistics pass; tests/reference/trace.py has them slowly.

All kernels add into their output arrays, so that a pass can go over a trace chunk by chunk.
Ids below zero (a token chose fewer than K experts) are skipped. Ids are trusted to be below E:
`load_trace` has checked them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.kernels import kernel
from moesim.types import Array, IntArray

_BLOCK_TOKENS = 512


@kernel
def count_load(ids: Array, group_idx: IntArray, out: IntArray) -> None:
    """out[g, l, e] += choices of expert e in layer l by tokens of group g.

    ids: [T, L, K]; group_idx: [T], below zero to leave a token out; out: [groups, L, E] int64.
    """
    num_tokens, num_layers, top_k = ids.shape
    for t in range(num_tokens):
        group = group_idx[t]
        if group < 0:
            continue
        for layer in range(num_layers):
            for k in range(top_k):
                expert = np.int64(ids[t, layer, k])
                if expert >= 0:
                    out[group, layer, expert] += 1


@kernel
def count_pairs(ids: Array, between: Array, within: Array) -> None:
    """Joint counts of expert choices, between adjacent layers and within a layer.

    between: [L-1, E, E] integers; between[l, a, b] += tokens that chose a in layer l and b in
    layer l+1 (all K x K pairs of a token count, once each).
    within: [L, E, E]; within[l, a, b] += tokens that chose both a and b in layer l, with a < b.
    Either may have length 0 on its first axis, which leaves it out.
    """
    num_tokens, _, top_k = ids.shape
    for start in range(0, num_tokens, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, num_tokens)
        for layer in range(within.shape[0]):
            for t in range(start, stop):
                for i in range(top_k):
                    a = np.int64(ids[t, layer, i])
                    if a < 0:
                        continue
                    for j in range(i + 1, top_k):
                        b = np.int64(ids[t, layer, j])
                        if b >= 0:
                            within[layer, min(a, b), max(a, b)] += 1
        for layer in range(between.shape[0]):
            for t in range(start, stop):
                for i in range(top_k):
                    a = np.int64(ids[t, layer, i])
                    if a < 0:
                        continue
                    for j in range(top_k):
                        b = np.int64(ids[t, layer + 1, j])
                        if b >= 0:
                            between[layer, a, b] += 1


@kernel
def count_reuse(ids: Array, follows: npt.NDArray[np.bool_], shared: IntArray) -> None:
    """shared[l] += experts that token t shares with token t-1 in layer l, where follows[t].

    ids: [T, L, K]; follows: [T], its first element is ignored; shared: [L] int64.
    """
    num_tokens, num_layers, top_k = ids.shape
    for t in range(1, num_tokens):
        if not follows[t]:
            continue
        for layer in range(num_layers):
            same = 0
            for i in range(top_k):
                a = ids[t, layer, i]
                if a >= 0:
                    for j in range(top_k):
                        same += a == ids[t - 1, layer, j]
            shared[layer] += same
