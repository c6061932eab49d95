"""Records that are well-formed, but that no router made: what broken captures leave behind.

- One decode routing again and again: a CUDA graph that replays the ids of its recording
  (sgl-project/sglang issue 12162).
- One rank's experts only: counts or ids that were never summed over ranks (issue 5524 of sglang
  shows such a file).
- An expert in every token: a shared expert that was fused into the routed ones.

Each is told by what chance cannot do; none is proof, so the messages say what was seen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.trace.counts import chunk_tokens
from moesim.trace.format import DECODE, LoadTrace, Trace, drop_pages, iter_chunks

Array = npt.NDArray[Any]
MIN_TOKENS = 64
MIN_DECODE = 16
MAX_DECODE = 1 << 16
MIN_BITS = 32.0
"""Below 64 tokens (16 decoded ones) nothing is said; of decoded ones the first 65,536 are looked
at; and where all layers together allow fewer than 2^32 routings, equal ones are no surprise."""

Suspect = tuple[str, int, str]


def suspects(trace: Trace | LoadTrace) -> list[Suspect]:
    """(code, count, message) of what looks like a broken capture."""
    meta = trace.meta
    if isinstance(trace, LoadTrace):
        load = np.asarray(trace.expert_load.sum(axis=0))
        tokens = load.sum(axis=1) / meta.top_k
        return one_rank(load) + in_every_token(load, tokens, meta.top_k, meta.layer_ids)
    load = count(trace)
    tokens = np.full(trace.num_layers, float(trace.num_tokens))
    return [
        *repeated_decode(trace),
        *one_rank(load),
        *in_every_token(load, tokens, meta.top_k, meta.layer_ids),
    ]


def count(trace: Trace) -> Array:
    """[L, E]: choices of each expert in the whole trace."""
    from moesim.trace.kernels import count_load

    out = np.zeros((1, trace.num_layers, trace.num_experts), np.int64)
    for part in iter_chunks(trace.num_tokens, chunk_tokens(trace.num_layers, trace.top_k)):
        ids = np.asarray(trace.expert_ids[part])
        count_load(ids, np.zeros(len(ids), np.int64), out)
        drop_pages(trace.expert_ids)
    return out[0]


def repeated_decode(trace: Trace) -> list[Suspect]:
    """Where less than half of the decoded tokens' routings (over all layers) are different ones."""
    bits = trace.num_layers * math.log2(math.comb(trace.num_experts, trace.top_k))
    rows = np.flatnonzero(np.asarray(trace.phases) == DECODE)[:MAX_DECODE]
    if len(rows) < MIN_DECODE or bits < MIN_BITS:
        return []
    flat = np.ascontiguousarray(np.asarray(trace.expert_ids[rows]).reshape(len(rows), -1))
    whole = flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1]))).ravel()
    different = len(np.unique(whole))
    if 2 * different >= len(rows):
        return []
    return [
        (
            "repeated-decode",
            len(rows) - different,
            f"{len(rows):,} decoded tokens have only {different:,} different routings: no router"
            " repeats itself so, but a CUDA graph that replays what it recorded does; prefill"
            " tokens may be right, decoding is not (record with CUDA graphs off)",
        )
    ]


def one_rank(load: Array) -> list[Suspect]:
    """load: [L, E]. Where all choices are of one rank's share of the experts, for 2, 4, ... ranks
    that divide E and hold them in order."""
    num_experts = load.shape[1]
    used = np.flatnonzero(load.any(axis=0))
    if load.sum() < MIN_TOKENS or not len(used) or num_experts < 8:
        return []
    ranks = 1
    while num_experts % (2 * ranks) == 0:
        share = num_experts // (2 * ranks)
        if used[0] // share != used[-1] // share:
            break
        ranks *= 2
    if ranks == 1:
        return []
    share = num_experts // ranks
    first = int(used[0]) // share * share
    return [
        (
            "one-rank",
            num_experts - share,
            f"every choice is of experts {first}..{first + share - 1} of {num_experts}, as one of"
            f" {ranks} ranks holds them: the record looks like one rank's, not summed over ranks",
        )
    ]


def in_every_token(
    load: Array, tokens: Array, top_k: int, layer_ids: tuple[int, ...]
) -> list[Suspect]:
    """load: [L, E]; tokens: [L]. Experts that every token chose, where there is a choice."""
    every = (load >= tokens[:, None]) & (tokens[:, None] >= MIN_TOKENS)
    some = every.any(axis=1) & (every.sum(axis=1) < top_k)
    if not some.any() or top_k >= load.shape[1]:
        return []
    layers = np.flatnonzero(some)
    experts = sorted({int(e) for e in np.nonzero(every[layers])[1]})
    named = ", ".join(str(layer_ids[i]) for i in layers[:6]) + (", ..." if len(layers) > 6 else "")
    return [
        (
            "always-chosen",
            int(every[layers].sum()),
            f"experts that every token chose, in layers {named}"
            f" ({', '.join(map(str, experts[:6]))}{', ...' if len(experts) > 6 else ''}): no router"
            " does that, but a shared expert that is counted as a routed one does",
        )
    ]
