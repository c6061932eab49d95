"""Tuning data of a placement problem, drawn from the tuning requests alone.

The objective that solvers minimise is an average over batches that have not been seen yet, from
requests that have not been seen yet. Batches are therefore drawn from bootstrap resamples of the
tuning requests: what a placement gains by fitting the particular requests at hand it loses on the
resamples. docs/evaluation.md has what that is worth.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.trace.batches import (
    Batches,
    Phase,
    RequestIndex,
    draw_batches,
    draw_prefill_requests,
    resample_requests,
)
from moesim.trace.format import Trace
from moesim.types import stream

NUM_RESAMPLES = 300
RESAMPLE_FRACTION = 1.0
BATCHES_PER_RESAMPLE = 8
MAX_COUNT_CELLS = 40_000_000
MAX_DRAWN_CHOICES = 400_000_000


def tuning_counts(
    trace: Trace, requests: RequestIndex, phase: Phase, batch_tokens: int, seed: int
) -> npt.NDArray[np.float32]:
    """[B, L, E] float32: tokens of each expert in B batches of bootstrap-resampled requests.

    B is 2,400, or fewer where the counts would not fit 40 million cells (at least 64).
    """
    cells = trace.num_layers * trace.num_experts
    resamples = int(np.clip(MAX_COUNT_CELLS // (cells * BATCHES_PER_RESAMPLE), 8, NUM_RESAMPLES))
    if phase == "prefill":
        return _prefill_counts(trace, requests, batch_tokens, resamples, seed)
    choices = BATCHES_PER_RESAMPLE * batch_tokens * trace.num_layers * trace.top_k
    resamples = int(np.clip(MAX_DRAWN_CHOICES // choices, 8, resamples))
    parts = []
    for i in range(resamples):
        pool = resample_requests(requests, seed * 100_003 + i, RESAMPLE_FRACTION)
        batches = draw_batches(pool, phase, batch_tokens, BATCHES_PER_RESAMPLE, seed + i)
        parts.append(batch_counts(trace, batches))
    return np.concatenate(parts)


def batch_counts(trace: Trace, batches: Batches) -> npt.NDArray[np.float32]:
    """[B, L, E] float32: tokens of each expert in each batch."""
    from moesim.trace.kernels import count_load

    out = np.zeros((len(batches), trace.num_layers, trace.num_experts), np.int64)
    group = np.repeat(np.arange(len(batches)), np.diff(batches.indptr))
    count_load(np.asarray(trace.expert_ids[batches.token_idx]), group, out)
    return out.astype(np.float32)


def _prefill_counts(
    trace: Trace, requests: RequestIndex, batch_tokens: int, resamples: int, seed: int
) -> npt.NDArray[np.float32]:
    """Prefill batches hold whole requests, so their counts are sums of request counts."""
    capped = requests.cap(batch_tokens)
    whole = Batches(capped.token_idx, capped.indptr, "prefill", batch_tokens)
    of_request = batch_counts(trace, whole).reshape(len(capped.ids), -1)
    lengths = np.diff(capped.indptr)
    rng = stream(seed, 0x7EE)
    member = np.zeros((resamples * BATCHES_PER_RESAMPLE, len(capped.ids)), np.float32)
    size = max(2, int(len(capped.ids) * RESAMPLE_FRACTION))
    for i in range(resamples):
        pool = rng.integers(0, len(capped.ids), size)
        for j in range(BATCHES_PER_RESAMPLE):
            picked = draw_prefill_requests(lengths[pool], batch_tokens, rng)
            np.add.at(member[i * BATCHES_PER_RESAMPLE + j], pool[picked], 1)
    return (member @ of_request).reshape(len(member), trace.num_layers, trace.num_experts)
