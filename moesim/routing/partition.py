"""Batches that serving would see, so that every token of a trace is in one of them.

Where the engine's forward passes are known (`step_ids`), they are the batches. Otherwise prefill
packs whole requests, in random order, up to a budget of tokens (longer ones are cut into chunks),
and decode is continuous batching: a fixed number of requests runs at a time, each with one token
in a step, and the next request takes the place of one that ended.
"""

from __future__ import annotations

import heapq

import numpy as np

from moesim.trace.batches import RequestIndex, index_requests
from moesim.trace.format import DECODE, PREFILL, Trace
from moesim.types import IntArray, stream

PREFILL_TOKENS = 4096
DECODE_TOKENS = 256


def serving_batches(
    trace: Trace,
    prefill_tokens: int = PREFILL_TOKENS,
    decode_tokens: int = DECODE_TOKENS,
    seed: int = 0,
) -> list[IntArray]:
    """Token indices of each batch, in the order in which they would run: prefill, then decode."""
    if trace.step_ids is not None:
        steps = np.asarray(trace.step_ids, np.int64)
        order = np.argsort(steps, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(steps[order])) + 1) if len(order) else []
    phases = np.asarray(trace.phases)
    batches: list[IntArray] = []
    for number, pack in ((PREFILL, _prefill), (DECODE, _decode)):
        if (phases == number).any():
            index, _ = index_requests(trace, "prefill" if number == PREFILL else "decode")
            size = prefill_tokens if number == PREFILL else decode_tokens
            batches += pack(index, size, stream(seed, 0xBA7C, number))
    return batches


def _prefill(index: RequestIndex, budget: int, rng: np.random.Generator) -> list[IntArray]:
    batches: list[IntArray] = []
    open_batch: list[IntArray] = []
    room = budget
    for request in rng.permutation(len(index.ids)):
        tokens = index.token_idx[index.indptr[request] : index.indptr[request + 1]]
        if len(tokens) > room and len(tokens) <= budget:
            batches.append(np.concatenate(open_batch))
            open_batch, room = [], budget
        while len(tokens):
            open_batch.append(tokens[:room])
            tokens, room = tokens[room:], room - len(tokens[:room])
            if room == 0:
                batches.append(np.concatenate(open_batch))
                open_batch, room = [], budget
    return [*batches, np.concatenate(open_batch)] if open_batch else batches


def _decode(index: RequestIndex, size: int, rng: np.random.Generator) -> list[IntArray]:
    lengths = np.diff(index.indptr)
    free = [(0, slot) for slot in range(size)]
    step = np.empty(len(index.token_idx), np.int64)
    place = np.empty(len(index.token_idx), np.int64)
    for request in rng.permutation(len(index.ids)):
        start, slot = heapq.heappop(free)
        part = slice(index.indptr[request], index.indptr[request + 1])
        step[part] = start + np.arange(lengths[request])
        place[part] = slot
        heapq.heappush(free, (start + int(lengths[request]), slot))
    order = np.lexsort((place, step))
    cuts = np.flatnonzero(np.diff(step[order])) + 1
    return list(np.split(index.token_idx[order], cuts))
