"""Predict the most frequent experts of the tuning requests: the baseline of every other method."""

from __future__ import annotations

import numpy as np

from moesim.caching.events import Stream
from moesim.caching.predictors.base import Scores, check_depth
from moesim.caching.simulate import expert_frequency
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace


class Popularity:
    """Scores are shares of tuning tokens, the same for every token."""

    name = "popularity"

    def __init__(self, depth: int = 1) -> None:
        self.depth = check_depth(depth)

    def fit(self, trace: Trace, requests: RequestIndex) -> None:
        self._share = expert_frequency(trace, requests).astype(np.float32)

    def scores(self, trace: Trace, stream: Stream, layer_idx: int) -> Scores:
        return np.broadcast_to(
            self._share[layer_idx], (stream.num_tokens, trace.num_experts)
        ).copy()
