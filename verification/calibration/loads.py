"""Per-expert token counts behind the MoE tables, which record only totals.

The tables' own generators are in `collector/helper.py` and `collector/vllm/collect_moe.py` of
github.com/ai-dynamo/aiconfigurator @095f58a. `balanced` is deterministic. `power_law_ALPHA` draws
each expert's load from a power law, rounds to the exact total, and puts the rank with the largest
total first; the draws were not seeded, so ours are five draws of our own, as the tables average
over five. The measured GPU always plays rank 0, the first num_experts / ep experts.
"""

from __future__ import annotations

import math
import zlib
from functools import cache

import numpy as np

NUM_DRAWS = 5
IntArray = np.ndarray


@cache
def balanced_counts(num_tokens: int, num_experts: int, top_k: int, ep: int) -> IntArray:
    """Tokens of each of rank 0's experts, shape `[num_experts // ep]`: choice k of token t is
    expert t + k ceil(E / K) modulo E, tokens spread out when they are fewer than the stride."""
    stride = math.ceil(num_experts / top_k)
    token = np.arange(num_tokens, dtype=np.float64)[:, None]
    offset = np.arange(top_k)[None, :] * stride
    if num_tokens < stride:
        token = token * stride / num_tokens
    chosen = ((token + offset) % num_experts).astype(np.int64)
    return np.bincount(chosen.ravel(), minlength=num_experts)[: num_experts // ep]


def raise_lowest(counts: IntArray, added: IntArray) -> IntArray:
    """Add `added[r]` units to row r of `counts`, each to its then smallest entry."""
    low = counts.min(axis=1)
    high = low + added + 1
    while np.any(high - low > 1):
        middle = (low + high) // 2
        fits = np.maximum(middle[:, None] - counts, 0).sum(axis=1) <= added
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    left = added - np.maximum(low[:, None] - counts, 0).sum(axis=1)
    level = np.maximum(counts, low[:, None])
    at_level = level == low[:, None]
    return level + (at_level & (np.cumsum(at_level, axis=1) <= left[:, None]))


def _round_robin(counts: IntArray, units: int, sign: int) -> IntArray:
    ranks = counts.shape[0]
    share = units // ranks + (np.arange(ranks) < units % ranks)
    if sign > 0:
        return raise_lowest(counts, share)
    return -raise_lowest(-counts, np.minimum(share, counts.sum(axis=1)))


@cache
def power_law_counts(
    num_tokens: int, num_experts: int, top_k: int, ep: int, alpha: float
) -> tuple[IntArray, ...]:
    """Five draws of rank 0's per-expert counts, each of shape `[num_experts // ep]`."""
    seed = zlib.crc32(repr((num_tokens, num_experts, top_k, ep, alpha)).encode())
    rng = np.random.default_rng(seed)
    total = num_tokens * top_k
    low, high = (1.0, num_tokens * 0.8) if total > num_experts else (0.01, 2.0)
    draws = []
    for _ in range(NUM_DRAWS):
        u = rng.random(num_experts)
        span = high ** (1 - alpha) - low ** (1 - alpha)
        load = (span * u + low ** (1 - alpha)) ** (1 / (1 - alpha))
        counts = np.rint(load / load.sum() * total).astype(np.int64)
        overflow = int(np.maximum(counts - num_tokens, 0).sum())
        by_rank = np.minimum(counts, num_tokens).reshape(ep, -1)
        by_rank = _round_robin(by_rank, overflow, 1)
        missing = total - int(by_rank.sum())
        by_rank = _round_robin(by_rank, abs(missing), 1 if missing >= 0 else -1)
        draws.append(by_rank[int(by_rank.sum(axis=1).argmax())])
    return tuple(draws)


def rank0_counts(
    distribution: str, num_tokens: int, num_experts: int, top_k: int, ep: int
) -> tuple[IntArray, ...]:
    """One or several draws of rank 0's counts for a table's `distribution` name."""
    if distribution == "balanced":
        return (balanced_counts(num_tokens, num_experts, top_k, ep),)
    alpha = float(distribution.removeprefix("power_law_"))
    return power_law_counts(num_tokens, num_experts, top_k, ep, alpha)
