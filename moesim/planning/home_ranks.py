"""Predicting where a request's tokens go, and the home ranks that follow (evaluation rows).

What a token would save on each rank is predicted from what is known before it is routed, never
from its own routing, except by `oracle`, which shows what perfect prediction would be worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from moesim.cost.routing import DEDUP_CODES, Dedup
from moesim.errors import MismatchError, UnknownNameError
from moesim.placement import Placement, ReplicaPolicy
from moesim.planning.home_rank_fit import assign_homes, messages_saved
from moesim.trace.batches import Batches, Phase, RequestIndex
from moesim.trace.format import Trace
from moesim.types import FloatArray

HomeRule = Literal["domain", "tokens", "prefix", "oracle"]
HOME_RANKS = ("contiguous", "predicted", *get_args(HomeRule))
PREFIX_TOKENS = 64
PRIOR_TOKENS = 4.0
"""Tokens that the average over all tuning tokens counts for in a prediction from few tokens."""


def choose_predictor(name: str, trace: Trace, phase: Phase) -> HomeRule:
    """The predictor called `name`; for `predicted` the best that the trace has data for.

    Raises UnknownNameError for another name, MismatchError where the trace lacks what it needs.
    """
    if name not in HOME_RANKS or name == "contiguous":
        raise UnknownNameError("home ranks", name, HOME_RANKS)
    if name == "predicted":
        if phase == "decode":
            return "prefix"
        if trace.token_ids is not None:
            return "tokens"
        name = "domain"
    needs = {
        "tokens": (trace.token_ids is not None, "token ids"),
        "domain": (trace.domain_ids is not None, "domains"),
        "prefix": (phase == "decode", "tokens routed before (its phase is prefill)"),
    }
    there, what = needs.get(name, (True, ""))
    if not there:
        raise MismatchError(
            f"home ranks cannot be predicted by {name}: the trace has no {what}",
            "use another of `home_ranks`, or `home_ranks` contiguous",
        )
    return name  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, eq=False)
class HomePredictor:
    """Home ranks of batches, by one predictor for one placement.

    saved: [T, G] what every token of the trace is predicted to save with its home on each GPU.
    """

    trace: Trace
    saved: FloatArray

    def homes(self, batches: Batches) -> npt.NDArray[np.int32]:
        """[tokens of `batches`] home GPU, as many tokens on each as contiguous cutting has."""
        gpus = self.saved.shape[1]
        out = np.empty(len(batches.token_idx), np.int32)
        requests = np.asarray(self.trace.request_ids)
        for b in range(len(batches)):
            span = slice(int(batches.indptr[b]), int(batches.indptr[b + 1]))
            out[span] = self._batch(requests[batches[b]], self.saved[batches[b]], gpus, batches)
        return out

    def _batch(
        self, request: npt.NDArray[Any], saved: FloatArray, gpus: int, batches: Batches
    ) -> npt.NDArray[np.int32]:
        tokens = len(request)
        room = np.bincount(np.arange(tokens) * gpus // tokens, minlength=gpus)
        if batches.phase == "decode":
            group = np.arange(tokens)
        else:
            new = np.concatenate(([True], request[1:] != request[:-1]))
            group = np.cumsum(new) - 1
        size = np.bincount(group)
        total = np.zeros((len(size), gpus))
        np.add.at(total, group, saved)
        flow = assign_homes(total, size.astype(np.int64), room.astype(np.int64))
        return np.repeat(np.tile(np.arange(gpus, dtype=np.int32), len(size)), flow.ravel())


def predict_homes(
    trace: Trace,
    tune: RequestIndex,
    placement: Placement,
    predictor: HomeRule,
    *,
    policy: ReplicaPolicy,
    dedup: Dedup,
    far: float,
) -> HomePredictor:
    """The predictor, its averages taken over the tuning requests `tune`.

    domain: the mean of its domain's tokens. tokens: the mean of tokens with its token id, shrunk to
    that of all. prefix: the mean of up to 64 tokens at the start of its request, none from its own
    position on, shrunk likewise. oracle: the token's own. far: see `messages_saved`.
    """
    actual = messages_saved(
        np.asarray(trace.expert_ids),
        placement,
        dedup=DEDUP_CODES[dedup],
        nearest=policy in ("nearest", "lp"),
        far=far,
    )
    if predictor == "oracle":
        return HomePredictor(trace, actual)
    mean = actual[tune.token_idx].mean(axis=0)
    if predictor == "prefix":
        return HomePredictor(trace, _from_prefix(trace, actual, mean))
    key = trace.token_ids if predictor == "tokens" else trace.domain_ids
    keys = np.asarray(key).astype(np.int64)
    unique, index = np.unique(keys, return_inverse=True)
    total = np.zeros((len(unique), actual.shape[1]))
    np.add.at(total, index[tune.token_idx], actual[tune.token_idx])
    count = np.bincount(index[tune.token_idx], minlength=len(unique))
    table = (total + PRIOR_TOKENS * mean) / (count + PRIOR_TOKENS)[:, None]
    return HomePredictor(trace, table[index])


def _from_prefix(trace: Trace, actual: FloatArray, mean: FloatArray) -> FloatArray:
    """[T, G]: mean of the first PREFIX_TOKENS tokens of a token's request that are before it."""
    requests, positions = np.asarray(trace.request_ids), np.asarray(trace.positions)
    order = np.lexsort((positions, requests))
    first = np.searchsorted(requests[order], requests[order])
    rank = np.arange(len(order)) - first
    upto = np.concatenate((np.zeros((1, actual.shape[1])), np.cumsum(actual[order], axis=0)))
    seen = np.minimum(rank, PREFIX_TOKENS)
    total = upto[first + seen] - upto[first]
    out = np.empty_like(actual)
    out[order] = (total + PRIOR_TOKENS * mean) / (seen + PRIOR_TOKENS)[:, None]
    return out
