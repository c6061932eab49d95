"""Predict from the most similar earlier request: MoE-Infinity's expert activation matrices.

MoE-Infinity (arXiv:2401.14361) keeps the activation matrix [L, E] of past requests, looks for the
one nearest to the current request's by cosine, layer by layer, and takes its rows as prediction.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.caching.events import Stream
from moesim.caching.predictors.base import Scores, by_request, check_depth, multi_hot
from moesim.caching.simulate import expert_frequency
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace
from moesim.types import IntArray

CHUNK_TOKENS = 2048


class History:
    """Score of e: the share of tokens that chose e in the tuning request nearest to what the
    current request has chosen so far; the overall frequency at a request's first token."""

    name = "history"

    def __init__(self, depth: int = 1) -> None:
        self.depth = check_depth(depth)
        self._nearest: tuple[Stream, IntArray] | None = None

    def fit(self, trace: Trace, requests: RequestIndex) -> None:
        shape = (len(requests.ids), trace.num_layers, trace.num_experts)
        self._rows = np.zeros(shape, np.float32)
        for r in range(len(requests.ids)):
            part = slice(int(requests.indptr[r]), int(requests.indptr[r + 1]))
            ids = np.asarray(trace.expert_ids[requests.token_idx[part]])
            for layer in range(trace.num_layers):
                self._rows[r, layer] = multi_hot(ids[:, layer], trace.num_experts).mean(axis=0)
        self._share = expert_frequency(trace, requests).astype(np.float32)
        self._nearest = None

    def scores(self, trace: Trace, stream: Stream, layer_idx: int) -> Scores:
        nearest = self._match(trace, stream)
        known = self._rows[np.maximum(nearest, 0), layer_idx]
        return np.where(nearest[:, None] >= 0, known, self._share[layer_idx])

    def _match(self, trace: Trace, stream: Stream) -> IntArray:
        """[N] the tuning request nearest to each token's request before the token, -1 if the
        token is its request's first. Kept for the stream that was asked for last."""
        if self._nearest is not None and self._nearest[0] is stream:
            return self._nearest[1]
        order, first = by_request(trace, stream.token_idx)
        num_layers, num = trace.num_layers, trace.num_experts
        target = _unit(self._rows).reshape(len(self._rows), -1).T
        found = np.full(len(order), -1, np.int64)
        bounds = np.append(np.flatnonzero(first), len(order))
        for begin, end in pairwise(bounds):
            sums = np.zeros((num_layers, num))
            for a in range(begin, end, CHUNK_TOKENS):
                b = min(a + CHUNK_TOKENS, end)
                ids = np.asarray(trace.expert_ids[stream.token_idx[order[a:b]]])
                hot = multi_hot(ids.reshape(-1, trace.top_k), num).reshape(b - a, num_layers, num)
                total = sums + np.cumsum(hot, axis=0, dtype=np.float64)
                before = np.concatenate((sums[None], total[:-1]))
                near = _unit(before).reshape(b - a, -1).astype(np.float32) @ target
                found[order[a:b]] = near.argmax(axis=1)
                sums = total[-1]
        found[order[first]] = -1
        self._nearest = (stream, found)
        return found


def _unit(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Each layer's row to length 1, so that a dot product sums the layers' cosines."""
    length = np.linalg.norm(rows, axis=2, keepdims=True)
    return rows / np.maximum(length, 1e-12)
