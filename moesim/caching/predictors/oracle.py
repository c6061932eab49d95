"""Predict what will be chosen: the bound of what prefetching can do."""

from __future__ import annotations

from moesim.caching.events import Stream, layer_ids
from moesim.caching.predictors.base import Scores, check_depth, multi_hot
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace


class Oracle:
    """Score 1 for each expert that the token chooses, 0 for every other."""

    name = "oracle"

    def __init__(self, depth: int = 1) -> None:
        self.depth = check_depth(depth)

    def fit(self, trace: Trace, requests: RequestIndex) -> None:
        """Nothing to learn."""

    def scores(self, trace: Trace, stream: Stream, layer_idx: int) -> Scores:
        return multi_hot(layer_ids(trace, stream, layer_idx), trace.num_experts)
