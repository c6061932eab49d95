"""Predict from the experts of an earlier layer by conditional frequency.

The inter-layer affinity that ExFlow (arXiv:2401.08383) and Fate measure: how often
expert e of layer l follows expert e' of layer l - depth for the same token.
"""

from __future__ import annotations

import numpy as np

from moesim.caching.events import Stream, layer_ids
from moesim.caching.predictors.base import Scores, check_depth, multi_hot, source_layer
from moesim.caching.simulate import expert_frequency
from moesim.kernels import kernel
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace

PSEUDO_TOKENS = 4.0
"""Weight of the overall frequency where a pair of experts was rarely seen."""


class PreviousLayer:
    """Score of e: the mean of P(e | e') over the experts e' that the token chose in the source
    layer, each smoothed by `PSEUDO_TOKENS` of e's overall frequency."""

    name = "previous-layer"

    def __init__(self, depth: int = 1) -> None:
        self.depth = check_depth(depth)

    def fit(self, trace: Trace, requests: RequestIndex) -> None:
        share = expert_frequency(trace, requests)
        num = trace.num_experts
        self._given = np.zeros((trace.num_layers, num, num), np.float32)
        tokens = requests.token_idx
        for layer in range(1, trace.num_layers):
            source = source_layer(layer, self.depth)
            before = np.asarray(trace.expert_ids[:, source])[tokens].astype(np.int64)
            after = np.asarray(trace.expert_ids[:, layer])[tokens].astype(np.int64)
            pairs = _count_pairs(before, after, num)
            seen = np.bincount(before[before >= 0], minlength=num)[:, None]
            self._given[layer] = (pairs + PSEUDO_TOKENS * share[layer]) / (seen + PSEUDO_TOKENS)

    def scores(self, trace: Trace, stream: Stream, layer_idx: int) -> Scores:
        source = source_layer(layer_idx, self.depth)
        hot = multi_hot(layer_ids(trace, stream, source), trace.num_experts)
        return np.asarray(hot @ self._given[layer_idx] / trace.top_k, np.float32)


@kernel
def _count_pairs(before, after, num_experts):  # type: ignore[no-untyped-def]
    """[E, E]: tokens that chose e' before and e after."""
    pairs = np.zeros((num_experts, num_experts))
    for t in range(len(before)):
        for a in before[t]:
            for b in after[t]:
                if a >= 0 and b >= 0:
                    pairs[a, b] += 1.0
    return pairs
