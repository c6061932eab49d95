"""Bytes on the busiest link behind the DeepEP and TensorRT-LLM tables, which record tokens.

Expected values under the tables' own routing: for DeepEP the top k of independent scores, that is
k experts drawn without replacement (`collector/wideep/sglang/deepep/test_*.py` of
github.com/ai-dynamo/aiconfigurator @095f58a); across nodes limited to the min(nodes, 4) nodes whose
best expert scores highest (`test_internode.py`, --num-topk-groups).
"""

from __future__ import annotations

from functools import cache
from math import comb

import numpy as np

GPUS_PER_NODE = 8
FP8_ROW = 1 + 4 / 128  # bytes per element: fp8 and one float32 scale per 128
BF16_ROW = 2.0
LL_HEADER = 16  # bytes before each low-latency message


def expected_other_groups(num_experts: int, top_k: int, num_groups: int) -> float:
    """Expected groups, out of all but one's own, that hold at least one of the k experts."""
    outside = num_experts - num_experts // num_groups
    missed = comb(outside, top_k) / comb(num_experts, top_k)
    return (num_groups - 1) * (1.0 - missed)


@cache
def expected_spread(num_experts: int, top_k: int, num_nodes: int) -> tuple[float, float]:
    """(other nodes, GPUs a reached node) of a token under node-limited routing; 20,000 draws."""
    rng = np.random.default_rng(0)
    draws = 20_000
    limit = min(num_nodes, 4)
    scores = np.abs(rng.standard_normal((draws, num_experts)))
    best = scores.reshape(draws, num_nodes, -1).max(axis=2)
    allowed = np.argsort(-best, axis=1)[:, :limit]
    mask = np.zeros((draws, num_nodes), dtype=bool)
    np.put_along_axis(mask, allowed, True, axis=1)
    scores[~np.repeat(mask, num_experts // num_nodes, axis=1)] = -1.0
    chosen = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
    gpu = chosen * (num_nodes * GPUS_PER_NODE) // num_experts
    reached = np.zeros((draws, num_nodes * GPUS_PER_NODE), dtype=bool)
    np.put_along_axis(reached, gpu, True, axis=1)
    nodes = reached.reshape(draws, num_nodes, GPUS_PER_NODE).any(axis=2).sum(axis=1)
    gpus = reached.sum(axis=1)
    return float(nodes.mean() * (num_nodes - 1) / num_nodes), float(gpus.mean() / nodes.mean())


def trtllm_other_ranks(ep: int, top_k: int) -> float:
    """Other ranks that a token goes to in `collector/network/slurm/collect_trtllm_alltoall.py`:
    k consecutive ranks where ep >= k, every rank where ep < k."""
    if ep < top_k:
        return float(ep - 1)
    return top_k - top_k / ep
