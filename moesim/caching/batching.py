"""Which of the waiting requests decode together: first come first served, or by shared experts.

More requests are ready than a batch holds. A batch whose tokens share experts activates fewer of
them, so that fewer are fetched; the price is that others are held back. ExpertFlow's token
scheduling (arXiv:2410.17954) regroups tokens of several batches by predicted routing path, Read-ME
(arXiv:2410.19123) gates requests before they are batched and so knows their experts. Here a batch
is filled greedily: first what has waited too long, then the one that has waited longest, then
whichever adds fewest experts to the batch, over all layers.

Time is counted in steps here; `waits` turns it into seconds once the steps' times are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from moesim.caching.events import Stream
from moesim.caching.predictors.base import by_request, multi_hot
from moesim.caching.predictors.token_id import TokenId, token_ids
from moesim.choices import Order as Order
from moesim.errors import InputError, UnknownNameError
from moesim.kernels import kernel
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace
from moesim.types import FloatArray, IntArray, stream

ORDERS: dict[str, str] = {
    "fifo": "the requests that have waited longest",
    "pre-gated": "fewest experts, which the router has named beforehand (Read-ME)",
    "predicted": "fewest experts, as predicted from token ids, or from the request's last token",
}
MAX_POOL = 4096


@dataclass(frozen=True, slots=True)
class Batching:
    """How batches are formed from `pool` requests that decode at the same time.

    patience: steps that a ready request is held back at most, as long as no more than a batch have
    waited so long. Raises UnknownNameError or InputError.
    """

    order: Order
    pool: int
    patience: int = 16

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise UnknownNameError("order of batching", self.order, ORDERS)
        if not 1 <= self.pool <= MAX_POOL:
            raise InputError(f"a pool of {self.pool} requests", f"give 1 to {MAX_POOL}")
        if self.patience < 1:
            raise InputError(f"patience of {self.patience} steps", "give at least 1")


def pooled_stream(
    trace: Trace,
    requests: RequestIndex,
    batch_size: int,
    batching: Batching,
    *,
    fit: RequestIndex | None = None,
    seed: int = 0,
) -> Stream:
    """Requests decoded `batch_size` at a time out of a pool.

    The pool has as many lanes as requests in it; a lane whose request ends takes the next one, in
    seeded random order, and a request is ready again right after the step that served it. fit:
    requests that `predicted` learns from, none for the last token's experts alone. Raises
    InputError where a batch is larger than the pool.
    """
    if not 1 <= batch_size <= batching.pool:
        raise InputError(
            f"batches of {batch_size} from a pool of {batching.pool} requests",
            "give a pool at least as large as the batch",
        )
    if len(requests.token_idx) == 0:
        raise InputError("there are no tokens to simulate", "give a trace with tokens")
    order = stream(seed, len(requests.ids)).permutation(len(requests.ids))
    length = np.diff(requests.indptr)[order].astype(np.int64)
    order, length = order[length > 0], length[length > 0]
    begin = requests.indptr[order].astype(np.int64)
    sets = np.zeros((len(requests.token_idx), 0), bool)
    if batching.order == "pre-gated":
        sets = _chosen(trace, requests.token_idx)
    elif batching.order == "predicted":
        sets = _expected(trace, requests, fit)
    place, lane, indptr = _schedule(
        begin, length, batch_size, batching.pool, batching.patience, sets
    )
    return Stream(
        requests.token_idx[place],
        indptr,
        lane,
        np.isin(place, begin),
        batching.pool,
    )


def waits(stream: Stream, step_s: FloatArray) -> FloatArray:
    """[N] seconds that each token's request was ready and not served: from the end of the step
    that served it last (for its first token, from the end of the lane's last request, or from the
    start) to the start of the step that serves the token. `step_s` [S]."""
    end = np.cumsum(step_s)
    step = np.repeat(np.arange(stream.num_steps), np.diff(stream.indptr))
    order = np.lexsort((step, stream.lane_idx))
    lane = stream.lane_idx[order]
    before = np.concatenate(([-1], step[order][:-1]))
    before[np.concatenate(([True], lane[1:] != lane[:-1]))] = -1
    ready = np.where(before >= 0, end[np.maximum(before, 0)], 0.0)
    out = np.empty(len(step))
    out[order] = np.maximum(end[step[order]] - step_s[step[order]] - ready, 0.0)
    return out


def _chosen(trace: Trace, token_idx: IntArray) -> npt.NDArray[np.bool_]:
    """[N, L x E]: the experts that each token chooses."""
    ids = np.asarray(trace.expert_ids)[token_idx]
    hot = multi_hot(ids.reshape(-1, trace.top_k), trace.num_experts) > 0
    return hot.reshape(len(token_idx), -1)


def _expected(
    trace: Trace, requests: RequestIndex, fit: RequestIndex | None
) -> npt.NDArray[np.bool_]:
    """[N, L x E]: the experts expected of each token, top-k a layer, before it is computed: by
    token id where the trace has ids and `fit` tells of them, else those of the request's token
    before (none for the first)."""
    tokens = requests.token_idx
    if fit is None or trace.token_ids is None:
        order, first = by_request(trace, tokens)
        chosen = _chosen(trace, tokens[order])
        before = np.zeros_like(chosen)
        before[1:] = chosen[:-1]
        before[first] = False
        out = np.empty_like(before)
        out[order] = before
        return out
    model = TokenId()
    model.fit(trace, fit)
    ids = token_ids(trace)[tokens]
    out = np.zeros((len(tokens), trace.num_layers, trace.num_experts), bool)
    for layer in range(trace.num_layers):
        scores = model.token_scores(ids, layer)
        best = np.argpartition(-scores, trace.top_k - 1, axis=1)[:, : trace.top_k]
        np.put_along_axis(out[:, layer], best, True, axis=1)
    return out.reshape(len(tokens), -1)


@kernel
def _schedule(begin, length, batch_size, pool, patience, sets):  # type: ignore[no-untyped-def]
    """Places in the request index in order of execution, the lane of each, and step bounds.

    begin, length: of each request. sets [N, W]: what each token needs, W = 0 for none known.
    """
    total = length.sum()
    place = np.empty(total, np.int64)
    lane_of = np.empty(total, np.int32)
    bounds = np.zeros(total + 1, np.int64)
    at = np.full(pool, -1, np.int64)
    left = np.zeros(pool, np.int64)
    since = np.zeros(pool, np.int64)
    upcoming = 0
    for lane in range(pool):
        if upcoming < len(begin):
            at[lane], left[lane] = begin[upcoming], length[upcoming]
            upcoming += 1
    union = np.zeros(sets.shape[1], np.bool_)
    taken = np.zeros(pool, np.bool_)
    done, step = 0, 0
    while done < total:
        union[:] = False
        taken[:] = False
        size = 0
        while size < batch_size:
            oldest = -1
            for lane in range(pool):
                ready = left[lane] > 0 and not taken[lane]
                if ready and (oldest < 0 or since[lane] < since[oldest]):
                    oldest = lane
            if oldest < 0:
                break
            pick = oldest
            if size > 0 and sets.shape[1] > 0 and step - since[oldest] < patience:
                fewest = sets.shape[1] + 1
                for lane in range(pool):
                    if left[lane] == 0 or taken[lane]:
                        continue
                    added = 0
                    for i in range(sets.shape[1]):
                        added += sets[at[lane], i] and not union[i]
                    if added < fewest or (added == fewest and since[lane] < since[pick]):
                        fewest, pick = added, lane
            taken[pick] = True
            size += 1
            for i in range(sets.shape[1]):
                union[i] = union[i] or sets[at[pick], i]
        for lane in range(pool):
            if not taken[lane]:
                continue
            place[done], lane_of[done] = at[lane], lane
            done += 1
            since[lane] = step + 1
            at[lane] += 1
            left[lane] -= 1
            if left[lane] == 0 and upcoming < len(begin):
                at[lane], left[lane] = begin[upcoming], length[upcoming]
                upcoming += 1
        step += 1
        bounds[step] = done
    return place, lane_of, bounds[: step + 1].copy()
