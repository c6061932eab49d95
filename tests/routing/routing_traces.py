"""Traces with candidates for the tests of rules."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.placement import Placement
from moesim.trace.format import Trace, TraceMeta


def scored_trace(
    scores: Any,
    top_k: int,
    *,
    listed: int | None = None,
    request_ids: Any = None,
    phases: Any = None,
    domain_ids: Any = None,
    domains: tuple[str, ...] = (),
    gates: bool = True,
    **more: Any,
) -> Trace:
    """A trace of routers with `scores` [T, L, E] that choose the `top_k` best and list `listed`
    candidates, or all; gate weights are the scores. By default each token is its own request."""
    values = np.asarray(scores, np.float16)
    order = np.argsort(-values, axis=2, kind="stable")[..., : listed or values.shape[2]]
    ranked = np.take_along_axis(values, order, 2)
    tokens = len(values)
    requests = np.asarray(np.arange(tokens) if request_ids is None else request_ids, np.int32)
    first = np.searchsorted(requests, requests)
    return Trace(
        expert_ids=order[..., :top_k].astype(np.uint8),
        request_ids=requests,
        positions=(np.arange(tokens) - first).astype(np.int32),
        phases=np.asarray(np.zeros(tokens) if phases is None else phases, np.uint8),
        meta=TraceMeta("toy", values.shape[2], top_k, tuple(range(values.shape[1])), domains),
        gate_weights=ranked[..., :top_k].astype(np.float32) if gates else None,
        candidate_ids=order.astype(np.uint8),
        candidate_scores=ranked,
        domain_ids=None if domain_ids is None else np.asarray(domain_ids, np.int16),
        **more,
    )


def random_scores(rng: np.random.Generator, tokens: int, layers: int, experts: int) -> Any:
    """Scores that sum to 1, of experts that are liked more the higher their number."""
    raw = rng.random((tokens, layers, experts)) ** 2 * np.linspace(1, 3, experts)
    return raw / raw.sum(axis=2, keepdims=True)


def in_order(trace: Trace, gpus: int, nodes: int = 1) -> Placement:
    """Experts in order of their numbers."""
    table = np.tile(np.arange(trace.num_experts, dtype=np.int32), (trace.num_layers, 1))
    return Placement(table, gpus, nodes, trace.num_experts)


def chosen(trace: Trace, layer: int = 0) -> list[set[int]]:
    """The experts of each token."""
    return [{int(e) for e in row if e >= 0} for row in np.asarray(trace.expert_ids)[:, layer]]
