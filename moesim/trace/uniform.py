"""A trace of uniform routing: what is assumed where there is none."""

from __future__ import annotations

import numpy as np

from moesim.trace.format import Trace, TraceMeta
from moesim.types import stream

REQUESTS, TOKENS = 24, 64


def uniform_trace(
    model: str, layer_ids: tuple[int, ...], num_experts: int, top_k: int, seed: int = 0
) -> Trace:
    """Decode tokens of REQUESTS requests that choose every set of experts with the same chance,
    independently of each other, of layers and of what came before."""
    rng = stream(seed, 31)
    tokens = REQUESTS * TOKENS
    ids = np.empty((tokens, len(layer_ids), top_k), np.int16)
    for layer in range(len(layer_ids)):
        order = rng.random((tokens, num_experts), np.float32)
        ids[:, layer] = np.argpartition(order, top_k - 1, axis=1)[:, :top_k]
    return Trace(
        expert_ids=ids,
        request_ids=np.repeat(np.arange(REQUESTS, dtype=np.int32), TOKENS),
        positions=np.tile(np.arange(TOKENS, dtype=np.int32), REQUESTS),
        phases=np.ones(tokens, np.uint8),
        meta=TraceMeta(model, num_experts, top_k, layer_ids, source={"kind": "uniform, assumed"}),
    )
