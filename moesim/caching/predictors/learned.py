"""Predict with a small learned model, in the place of ExpertFlow's routing-path predictor.

ExpertFlow (arXiv:2410.17954) trains a transformer on token ids to predict every layer's experts.
Here it is one linear map a layer, fitted in closed form, that weighs what the other predictors
look at: no torch, seconds to fit, the same bytes every time.
"""

from __future__ import annotations

import numpy as np

from moesim.caching.events import Stream
from moesim.caching.predictors.base import (
    Scores,
    by_request,
    check_depth,
    multi_hot,
    shares_before,
    source_layer,
)
from moesim.caching.predictors.token_id import TokenId, token_ids
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace
from moesim.types import IntArray

RIDGE = 10.0
MAX_FIT_TOKENS = 16_384
MAX_FIT_WORK = 1.5e9
"""Tokens x features squared of one layer's fit; wide layers are fitted on fewer tokens, at least
four a feature."""


class Learned:
    """Ridge regression from [choices in the source layer, choices of the request's previous token
    in this layer, shares of the request's earlier tokens in this layer, shares by token id where
    the trace has ids, 1] to this layer's choices; the score is the fitted value."""

    name = "learned"

    def __init__(self, depth: int = 1) -> None:
        self.depth = check_depth(depth)

    def fit(self, trace: Trace, requests: RequestIndex) -> None:
        from scipy.linalg import solve

        self._signals = Signals(self.depth)
        self._signals.fit(trace, requests)
        width = 4 * trace.num_experts + 1
        most = min(MAX_FIT_TOKENS, max(4 * width, int(MAX_FIT_WORK / width**2)))
        tokens = fit_tokens(requests, most)
        self._weights: list[Scores] = [np.zeros((0, 0), np.float32)]
        for layer in range(1, trace.num_layers):
            target = multi_hot(np.asarray(trace.expert_ids[:, layer])[tokens], trace.num_experts)
            x = self._signals.of(trace, tokens, layer, own=target)
            gram = (x.T @ x).astype(np.float64)
            gram[np.diag_indices_from(gram)] += RIDGE
            found = solve(gram, (x.T @ target).astype(np.float64), assume_a="pos")
            self._weights.append(found.astype(np.float32))

    def scores(self, trace: Trace, stream: Stream, layer_idx: int) -> Scores:
        x = self._signals.of(trace, stream.token_idx, layer_idx)
        return np.asarray(x @ self._weights[layer_idx], np.float32)


class Signals:
    """What is known of a token when one of its layers is predicted, as numbers."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def fit(self, trace: Trace, requests: RequestIndex) -> None:
        """Learn which experts tokens of each id choose, where the trace has ids."""
        self._by_id = TokenId(self.depth) if trace.token_ids is not None else None
        if self._by_id is not None:
            self._by_id.fit(trace, requests)

    def of(
        self, trace: Trace, tokens: IntArray, layer_idx: int, own: Scores | None = None
    ) -> Scores:
        """[N, F] of each token. `own` [N, E]: the tokens' own choices, where they are those fitted
        on, to be left out of the statistics by id."""
        num = trace.num_experts
        order, first = by_request(trace, tokens)
        hot = multi_hot(np.asarray(trace.expert_ids[:, layer_idx])[tokens[order]], num)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        previous, share = (part[back] for part in shares_before(hot, first))
        source = source_layer(layer_idx, self.depth)
        parts = [
            multi_hot(np.asarray(trace.expert_ids[:, source])[tokens], num),
            previous,
            share,
            np.ones((len(tokens), 1), np.float32),
        ]
        if self._by_id is not None:
            parts.append(self._by_id.token_scores(token_ids(trace)[tokens], layer_idx, own))
        return np.concatenate(parts, axis=1)


def fit_tokens(requests: RequestIndex, most: int) -> IntArray:
    """The tokens of whole requests, as many as fit into `most`; of the first one if none does."""
    tokens = requests.token_idx
    if len(tokens) <= most:
        return tokens
    kept = np.cumsum(np.diff(requests.indptr)) <= most
    return requests.select(kept).token_idx if kept.any() else tokens[:most]
