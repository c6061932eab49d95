"""Small traces for the cache tests."""

from __future__ import annotations

import numpy as np

from moesim.trace.batches import RequestIndex, index_requests
from moesim.trace.format import Trace, TraceMeta


def make_trace(
    requests: list[np.ndarray],
    num_experts: int,
    gates: list[np.ndarray] | None = None,
    token_ids: np.ndarray | None = None,
) -> Trace:
    """A trace of the given requests, each [tokens, L, K]."""
    ids = np.concatenate(requests).astype(np.int16)
    lengths = [len(r) for r in requests]
    meta = TraceMeta("toy", num_experts, ids.shape[2], tuple(range(ids.shape[1])))
    return Trace(
        ids,
        np.repeat(np.arange(len(requests)), lengths).astype(np.int32),
        np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        np.ones(len(ids), np.uint8),
        meta,
        gate_weights=None if gates is None else np.concatenate(gates).astype(np.float32),
        token_ids=token_ids,
    )


def random_trace(
    seed: int,
    num_requests: int = 4,
    tokens: int = 20,
    layers: int = 2,
    experts: int = 8,
    k: int = 2,
) -> Trace:
    """Requests with a preference of their own, so that there is some locality."""
    rng = np.random.default_rng(seed)
    requests, gates = [], []
    for _ in range(num_requests):
        taste = rng.gamma(0.7, size=(layers, experts)) + 0.05
        noise = rng.gumbel(size=(tokens, layers, experts)) + np.log(taste)[None]
        requests.append(np.argsort(-noise, axis=2)[:, :, :k])
        gates.append(rng.dirichlet(np.ones(k), size=(tokens, layers)))
    vocabulary = rng.integers(0, 10, num_requests * tokens).astype(np.int32)
    return make_trace(requests, experts, gates, vocabulary)


def all_requests(trace: Trace) -> RequestIndex:
    return index_requests(trace)[0]
