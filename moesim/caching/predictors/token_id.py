"""Predict from the token's id: OpenMoE's context-independent specialisation.

OpenMoE (arXiv:2402.01739, section 4) finds that routing is settled largely by the token id, early
in training. Nothing but the id is needed, so every layer can be predicted before the step begins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.caching.events import Stream
from moesim.caching.predictors.base import Scores, check_depth, multi_hot
from moesim.caching.simulate import expert_frequency
from moesim.errors import MismatchError
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace

PSEUDO_TOKENS = 1.0
"""Weight of the overall frequency beside the tokens of the same id."""


class TokenId:
    """Score of e: the share of tuning tokens of the same id that chose e, smoothed by
    `PSEUDO_TOKENS` of the overall frequency; the overall frequency for an id never seen."""

    name = "token-id"

    def __init__(self, depth: int = 1) -> None:
        self.depth = check_depth(depth)

    def fit(self, trace: Trace, requests: RequestIndex) -> None:
        self._share = expert_frequency(trace, requests).astype(np.float32)
        tokens = requests.token_idx
        self._known, row = np.unique(token_ids(trace)[tokens], return_inverse=True)
        self._count = np.bincount(row).astype(np.float32)
        self._tables = [
            self._table(np.asarray(trace.expert_ids[:, layer])[tokens], row, trace.num_experts)
            for layer in range(trace.num_layers)
        ]

    def scores(self, trace: Trace, stream: Stream, layer_idx: int) -> Scores:
        return self.token_scores(token_ids(trace)[stream.token_idx], layer_idx)

    def token_scores(
        self, tokens: npt.NDArray[np.int32], layer_idx: int, own: Scores | None = None
    ) -> Scores:
        """[N, E] scores by id. `own` [N, E]: the tokens' own choices, when they are tuning tokens
        and are to be left out of their own statistics."""
        row = np.searchsorted(self._known, tokens)
        row = np.minimum(row, len(self._known) - 1)
        known = self._known[row] == tokens
        count = np.where(known, self._count[row], 0.0)[:, None]
        hits = np.where(known[:, None], self._tables[layer_idx][row].toarray(), 0.0)
        if own is not None:
            hits, count = hits - own, count - 1
        share = self._share[layer_idx]
        return np.asarray((hits + PSEUDO_TOKENS * share) / (count + PSEUDO_TOKENS), np.float32)

    @staticmethod
    def _table(ids: npt.NDArray[Any], row: npt.NDArray[Any], num_experts: int) -> Any:
        """Sparse [ids, E] counts of one layer."""
        from scipy.sparse import coo_array

        hot = multi_hot(ids, num_experts)
        at, expert = np.nonzero(hot)
        shape = (int(row.max()) + 1, num_experts)
        return coo_array((np.ones(len(at), np.float32), (row[at], expert)), shape).tocsr()


def token_ids(trace: Trace) -> npt.NDArray[np.int32]:
    """The trace's token ids. Raises MismatchError if it has none."""
    if trace.token_ids is None:
        raise MismatchError(
            f"{trace.path or 'this trace'} has no token_ids, which prediction by token id needs",
            "capture or import the trace with token ids, or choose another predictor",
        )
    return np.asarray(trace.token_ids)
