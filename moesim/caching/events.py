"""Steps and events: the order in which a trace's tokens reach the expert cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.kernels import kernel
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace
from moesim.types import IntArray, stream

NO_EXPERT = -1


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Forward steps in order: step s computes tokens `token_idx[indptr[s]:indptr[s + 1]]`.

    `lane_idx` [N] is the place in the batch that a token's request holds, `starts` [N] is true at
    the first token of each request, so that per-request state can be reset; `num_lanes` is the
    batch size.
    """

    token_idx: IntArray
    indptr: IntArray
    lane_idx: npt.NDArray[np.int32]
    starts: npt.NDArray[np.bool_]
    num_lanes: int

    @property
    def num_steps(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.token_idx)


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """Events of one cache in CSR form: event n asks for items `item[indptr[n]:indptr[n + 1]]`,
    distinct and in the order in which they first appear.

    item:  [A] int32, experts (or layer x E + expert where one cache serves all layers).
    count: [A] int32, tokens of the event that chose the item.
    gate:  [A] float32, sum of their gate weights (1/K each where the trace has none).
    """

    indptr: IntArray
    item: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]
    gate: npt.NDArray[np.float32]
    num_items: int

    @property
    def num_events(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_accesses(self) -> int:
        return len(self.item)


def decode_stream(requests: RequestIndex, batch_size: int = 1, seed: int = 0) -> Stream:
    """Requests decoded by continuous batching: `batch_size` lanes, each with one request at a
    time, one token per step; a lane whose request ends takes the next one in seeded random order.

    The last steps may have fewer tokens than lanes. Raises InputError for a batch below 1 or an
    index without tokens.
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is below 1", "give a batch of at least 1")
    if len(requests.token_idx) == 0:
        raise InputError("there are no tokens to simulate", "give a trace with tokens")
    order = stream(seed, len(requests.ids)).permutation(len(requests.ids))
    order = order[np.diff(requests.indptr)[order] > 0]
    length = np.diff(requests.indptr)[order]
    start, lane = _schedule(length.astype(np.int64), batch_size)
    step = np.repeat(start, length) + _ramp(length)
    lanes = np.repeat(lane, length)
    token = requests.token_idx[np.repeat(requests.indptr[order], length) + _ramp(length)]
    first = _ramp(length) == 0
    by_step = np.lexsort((lanes, step))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(step))))
    return Stream(
        token[by_step],
        indptr.astype(np.int64),
        lanes[by_step].astype(np.int32),
        first[by_step],
        batch_size,
    )


def layer_ids(trace: Trace, stream: Stream, layer_idx: int) -> npt.NDArray[np.int32]:
    """[N, K] experts of the stream's tokens in one layer, -1 where a token chose fewer."""
    return np.asarray(trace.expert_ids[:, layer_idx])[stream.token_idx].astype(np.int32)


def layer_gates(trace: Trace, stream: Stream, layer_idx: int) -> npt.NDArray[np.float32]:
    """[N, K] gate weights of one layer, 1/K each where the trace has none."""
    if trace.gate_weights is None:
        return np.full((stream.num_tokens, trace.top_k), 1.0 / trace.top_k, np.float32)
    picked = np.asarray(trace.gate_weights[:, layer_idx])[stream.token_idx]
    return picked.astype(np.float32)


def build_events(
    ids: npt.NDArray[np.int32],
    gates: npt.NDArray[np.float32],
    indptr: IntArray,
    num_items: int,
) -> Events:
    """Group token-level choices [N, K] into events; event n holds tokens indptr[n]:indptr[n+1]."""
    out_ptr, item, count, gate = _collect(ids, gates, indptr, num_items)
    return Events(out_ptr, item, count, gate, num_items)


def split_accesses(ids: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], IntArray, IntArray]:
    """One event an access: [N, K] -> ([A, 1] ids, [A + 1] indptr, [A] token of each access).

    Absent choices (-1) are dropped; the order is that of the tokens and, within a token, of its
    choices.
    """
    chosen = ids != NO_EXPERT
    flat = ids[chosen][:, None]
    token = np.repeat(np.arange(len(ids)), chosen.sum(axis=1))
    return flat, np.arange(len(flat) + 1, dtype=np.int64), token


def without(ids: npt.NDArray[np.int32], items: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """`ids` with the given items replaced by -1, as if they were never asked for (pinned)."""
    if len(items) == 0:
        return ids
    return np.where(np.isin(ids, items), np.int32(NO_EXPERT), ids)


def _ramp(length: IntArray) -> IntArray:
    """0, 1, .., length[0]-1, 0, 1, .., length[1]-1, ..."""
    total = int(length.sum())
    return np.arange(total) - np.repeat(np.cumsum(length) - length, length)


@kernel
def _schedule(length, num_lanes):  # type: ignore[no-untyped-def]
    """First step and lane of each request when the earliest free lane takes the next request."""
    free_at = np.zeros(num_lanes, np.int64)
    start = np.empty(len(length), np.int64)
    lane = np.empty(len(length), np.int64)
    for i in range(len(length)):
        best = 0
        for j in range(1, num_lanes):
            if free_at[j] < free_at[best]:
                best = j
        start[i] = free_at[best]
        lane[i] = best
        free_at[best] += length[i]
    return start, lane


@kernel
def _collect(ids, gates, indptr, num_items):  # type: ignore[no-untyped-def]
    num_events = len(indptr) - 1
    item = np.empty(ids.size, np.int32)
    count = np.empty(ids.size, np.int32)
    gate = np.empty(ids.size, np.float32)
    out_ptr = np.zeros(num_events + 1, np.int64)
    place = np.full(num_items, -1, np.int64)
    size = 0
    for n in range(num_events):
        first = size
        for t in range(indptr[n], indptr[n + 1]):
            for k in range(ids.shape[1]):
                e = ids[t, k]
                if e < 0:
                    continue
                at = place[e]
                if at < first:
                    place[e] = size
                    item[size] = e
                    count[size] = 1
                    gate[size] = gates[t, k]
                    size += 1
                else:
                    count[at] += 1
                    gate[at] += gates[t, k]
        out_ptr[n + 1] = size
    return out_ptr, item[:size].copy(), count[:size].copy(), gate[:size].copy()
