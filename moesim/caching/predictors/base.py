"""What a predictor is, and how its predictions become prefetches and figures.

A predictor is fitted on tuning requests and scores the experts of a layer for every token of a
stream. It may use what is known when the prediction is due, and nothing else: the token itself,
the experts that the token chose in layers up to the *source* (`depth` layers before the target,
layer 0 if there are fewer), and everything that the request's earlier tokens chose. Layer 0 is
never predicted: nothing of its step is known before its gate. Streams are those of decoding: in a
prefill step the earlier tokens' choices are not known either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moesim.caching.events import Stream, layer_ids
from moesim.errors import InputError
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace
from moesim.types import IntArray

Scores = npt.NDArray[np.float32]


class Predictor(Protocol):
    """One way to predict. `name` is its key in the registry, `depth` the layers ahead."""

    name: str
    depth: int

    def fit(self, trace: Trace, requests: RequestIndex) -> None:
        """Learn from tuning requests. Raises MismatchError if the trace lacks what is needed."""

    def scores(self, trace: Trace, stream: Stream, layer_idx: int) -> Scores:
        """[N, E] score of each expert of layer `layer_idx` (at least 1) for each token of the
        stream, in the stream's order; higher is likelier, 0 or less is never predicted."""


@dataclass(frozen=True, slots=True, eq=False)
class Accuracy:
    """Predictions against what was then chosen, over layers 1 .. L - 1.

    precision: [L - 1] share of predicted experts that the step used; recall: [L - 1] share of used
    experts that were predicted; wasted_per_token: predicted experts that nothing used, a token,
    over all layers (times the expert's bytes: the link's wasted bytes if nothing were cached).
    """

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    wasted_per_token: float


@dataclass(frozen=True, slots=True, eq=False)
class Guess:
    """expert: [S, L, W] int16 predicted experts, best first, -1 where fewer score above 0;
    score: [S, L, W] their scores."""

    expert: npt.NDArray[np.int16]
    score: Scores

    def above(self, least: float) -> npt.NDArray[np.int16]:
        """`expert` with those of a score below `least` taken out."""
        return np.where(self.score >= least, self.expert, np.int16(-1))


def source_layer(layer_idx: int, depth: int) -> int:
    """The last layer whose choices are known when layer `layer_idx` is predicted."""
    return max(0, layer_idx - depth)


def check_depth(depth: int) -> int:
    if depth < 1:
        raise InputError(f"prefetch depth {depth} is below 1", "predict at least 1 layer ahead")
    return depth


def predict(predictor: Predictor, trace: Trace, stream: Stream, width: int) -> Guess:
    """The `width` likeliest experts of every layer for every step, scores summed over its tokens;
    layer 0 is left empty."""
    width = min(width, trace.num_experts)
    shape = (stream.num_steps, trace.num_layers, width)
    expert, value = np.full(shape, -1, np.int16), np.zeros(shape, np.float32)
    for layer in range(1, trace.num_layers):
        score = predictor.scores(trace, stream, layer)
        if stream.num_tokens > stream.num_steps:
            score = np.add.reduceat(score, stream.indptr[:-1], axis=0)
        best = np.argsort(-score, axis=1, kind="stable")[:, :width]
        value[:, layer] = np.take_along_axis(score, best, axis=1)
        expert[:, layer] = np.where(value[:, layer] > 0, best, -1)
    return Guess(expert, value)


def accuracy(predicted: npt.NDArray[np.int16], trace: Trace, stream: Stream) -> Accuracy:
    """Precision, recall and waste of predicted experts [S, L, W] (Guess.expert or Guess.above)."""
    num_layers, num_experts = trace.num_layers, trace.num_experts
    precision, recall = np.full(num_layers - 1, np.nan), np.full(num_layers - 1, np.nan)
    wasted = 0
    step = np.repeat(np.arange(stream.num_steps), np.diff(stream.indptr))
    for layer in range(1, num_layers):
        used = np.zeros((stream.num_steps, num_experts + 1), bool)
        used[step[:, None], layer_ids(trace, stream, layer)] = True
        used[:, -1] = False
        guess = np.zeros_like(used)
        guess[np.arange(stream.num_steps)[:, None], predicted[:, layer]] = True
        guess[:, -1] = False
        both = int((used & guess).sum())
        wasted += int(guess.sum()) - both
        if guess.any():
            precision[layer - 1] = both / guess.sum()
        if used.any():
            recall[layer - 1] = both / used.sum()
    return Accuracy(precision, recall, wasted / max(1, stream.num_tokens))


def multi_hot(ids: npt.NDArray[np.integer], num_experts: int) -> Scores:
    """[N, K] ids (-1: none) as [N, E] of 0 and 1."""
    out = np.zeros((len(ids), num_experts + 1), np.float32)
    np.put_along_axis(out, ids.astype(np.int64), 1.0, axis=1)
    return out[:, :num_experts]


def by_request(trace: Trace, token_idx: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Order that sorts the tokens by request and position, and in that order [N] whether a token
    is the first of its request."""
    requests = np.asarray(trace.request_ids)[token_idx]
    order = np.lexsort((np.asarray(trace.positions)[token_idx], requests))
    ordered = requests[order]
    return order, np.concatenate(([True], ordered[1:] != ordered[:-1]))


def shares_before(hot: Scores, first: npt.NDArray[np.bool_]) -> tuple[Scores, Scores]:
    """For tokens in order of request: [N, E] the previous token's choices (0 at a request's
    start), and [N, E] the share of the request's earlier tokens that chose each expert."""
    previous = np.zeros_like(hot)
    previous[1:] = hot[:-1]
    previous[first] = 0.0
    start = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
    total = np.cumsum(hot, axis=0, dtype=np.float64) - hot
    before = total - total[start]
    seen = np.arange(len(first)) - start
    return previous, (before / np.maximum(1, seen)[:, None]).astype(np.float32)
