"""Token- and chunk-level sparsity after BlockFFN (arXiv:2507.08771, section 1).

Token-level sparsity (TLS) is the fraction of a layer's experts that one token leaves idle,
chunk-level sparsity (CLS) the fraction that a whole chunk of consecutive tokens leaves idle. CLS
is what counts for speculative decoding and for small batches of one request: experts that the
chunk leaves idle need not be in fast memory.

BlockFFN measures over the channels of its own blocks; here the unit is the routed expert, all of
one size. Shared experts, which are always active, are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.kernels import kernel
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace

CHUNK_LENGTHS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, eq=False)
class Sparsity:
    """`tls` [L] and `cls` {chunk length: [L]}: mean idle fraction of experts; NaN where no
    request is as long as a chunk."""

    tls: npt.NDArray[np.float64]
    cls: dict[int, npt.NDArray[np.float64]]


def sparsity(
    trace: Trace, requests: RequestIndex, chunk_lengths: tuple[int, ...] = CHUNK_LENGTHS
) -> Sparsity:
    """TLS and CLS over the given requests. Chunks are consecutive tokens of one request, without
    overlap; a request's incomplete last chunk does not count."""
    if any(c < 1 for c in chunk_lengths):
        raise InputError("a chunk needs at least 1 token", "give chunk lengths of at least 1")
    tls = np.empty(trace.num_layers)
    cls = {c: np.empty(trace.num_layers) for c in chunk_lengths}
    for layer in range(trace.num_layers):
        ids = np.asarray(trace.expert_ids[:, layer])[requests.token_idx].astype(np.int32)
        tls[layer] = _idle_fraction(ids, requests.indptr, 1, trace.num_experts)
        for chunk in chunk_lengths:
            cls[chunk][layer] = _idle_fraction(ids, requests.indptr, chunk, trace.num_experts)
    return Sparsity(tls, cls)


@kernel
def _idle_fraction(ids, indptr, chunk, num_experts):  # type: ignore[no-untyped-def]
    seen = np.full(num_experts, -1, np.int64)
    chunks = 0
    active = 0
    for r in range(len(indptr) - 1):
        for first in range(indptr[r], indptr[r + 1] - chunk + 1, chunk):
            for t in range(first, first + chunk):
                for k in range(ids.shape[1]):
                    e = ids[t, k]
                    if e >= 0 and seen[e] != chunks:
                        seen[e] = chunks
                        active += 1
            chunks += 1
    if chunks == 0:
        return np.nan
    return 1.0 - active / (chunks * num_experts)
