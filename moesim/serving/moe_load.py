"""How many tokens each expert of a layer gets, and what a layer of routed experts then takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.types import FloatArray, stream

if TYPE_CHECKING:
    from moesim.cost.expert_gemm import ExpertGemmModel
    from moesim.trace.format import Trace


ASSUMED_SKEW = 0.6
"""Exponent s of the assumed popularity, share of rank r in proportion to r**-s."""
NUM_DRAWS = 8
SAMPLE_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class MoeLoad:
    """Popularity of experts: `inclusion` [X, E], the probability that a token chooses an expert in
    each of X sampled layers (rows sum to K); `source` says where it is from.

    Tokens are taken as independent of each other, so that counts are binomial.
    """

    inclusion: FloatArray
    source: str

    def counts(self, num_tokens: float, seed: int = 0) -> FloatArray:
        """[X, E]: tokens of every expert when the layer serves `num_tokens`, one draw a layer.

        Drawn with common random numbers: the same uniform numbers for every `num_tokens`, so that
        counts grow with it.
        """
        return _drawn(self, num_tokens, seed)

    def spread(self, factor: float) -> MoeLoad:
        """The load whose experts differ from the mean by `factor` times as much (0 to 1 each)."""
        if factor == 1.0:
            return self
        mean = self.inclusion.mean(axis=1, keepdims=True)
        wider = np.clip(mean + factor * (self.inclusion - mean), 0.0, 1.0)
        wider *= mean / np.maximum(wider.mean(axis=1, keepdims=True), 1e-300)
        return MoeLoad(np.minimum(wider, 1.0), f"{self.source}, spread {factor:g} times")


@lru_cache(maxsize=512)
def _drawn(load: MoeLoad, num_tokens: float, seed: int) -> FloatArray:
    """Of many deployments of one load, the same counts are asked for again and again."""
    uniform = stream(seed).random(load.inclusion.shape)
    return _binomial_quantile(num_tokens, load.inclusion, uniform)


@lru_cache(maxsize=16)
def assumed_load(num_experts: int, top_k: int, skew: float = ASSUMED_SKEW) -> MoeLoad:
    """Popularity by a power law of the rank, the ranks shuffled over the experts of each layer."""
    return MoeLoad(
        _power_law_inclusion(num_experts, top_k, skew),
        f"assumed: popularity of rank r in proportion to r**-{skew:g}",
    )


@lru_cache(maxsize=4)
def load_of_trace(trace: Trace, max_tokens: int = 65536) -> MoeLoad:
    """Popularity of the experts of a routing trace, layer by layer."""
    stride = max(1, trace.num_tokens // max_tokens)
    ids = np.asarray(trace.expert_ids[::stride]).astype(np.int64)
    tokens, layers, _ = ids.shape
    inclusion = np.zeros((layers, trace.num_experts))
    for layer in range(layers):
        chosen = ids[:, layer][ids[:, layer] >= 0]
        inclusion[layer] = np.bincount(chosen, minlength=trace.num_experts) / tokens
    return MoeLoad(np.minimum(inclusion, 1.0), "routing trace")


class ExpertSlots(NamedTuple):
    """Of every slot its rank [P], ascending, its expert [X, P], and the share of that one's tokens
    that it serves [X, P] (replicas in equal shares)."""

    rank: npt.NDArray[np.int64]
    expert: npt.NDArray[np.int64]
    share: FloatArray

    def tokens_by_rank(self, counts: FloatArray) -> FloatArray:
        """[X, ranks, most slots], 0 for padding, of tokens by expert [X, E]."""
        tokens = np.take_along_axis(counts, self.expert, axis=1) * self.share
        held = np.bincount(self.rank)
        place = np.arange(len(self.rank)) - np.repeat(np.cumsum(held) - held, held)
        own = np.zeros((len(tokens), len(held), held.max()))
        own[:, self.rank, place] = tokens
        return own


def layer_us(
    load: MoeLoad,
    models: Sequence[ExpertGemmModel],
    kind_of_rank: npt.NDArray[np.int64],
    slots: ExpertSlots,
    num_tokens: float,
    local_tokens: float,
    top_k: int,
    sizes: tuple[int, int, int],
) -> float:
    """Mean over layers of the slowest rank's time: launch, its experts, and summing the rows of the
    `local_tokens` that a rank has of its own.

    kind_of_rank [ranks]: index into `models`. sizes: hidden, intermediate, number of matrices.
    """
    own = slots.tokens_by_rank(load.counts(num_tokens))
    mean = own.sum(axis=-1) / np.bincount(slots.rank)
    per_rank = np.empty(mean.shape)
    for i, model in enumerate(models):
        ranks = kind_of_rank == i
        work = model.slots_time_us(own[:, ranks], *sizes, mean_tokens=mean[:, ranks])
        fixed = model.layer_launch_us() + model.token_overhead_us(local_tokens, top_k, sizes[0])
        per_rank[:, ranks] = fixed + work
    return float(per_rank.max(axis=1).mean())


@lru_cache(maxsize=64)
def _power_law_inclusion(num_experts: int, top_k: int, skew: float) -> FloatArray:
    """Inclusion probabilities of choosing `top_k` without replacement, by sampling (Gumbel)."""
    rng = stream(0)
    log_weight = -skew * np.log(np.arange(1, num_experts + 1))
    noise = rng.gumbel(size=(SAMPLE_TOKENS, num_experts))
    if top_k < num_experts:
        chosen = np.argpartition(-(log_weight + noise), top_k, axis=1)[:, :top_k]
    else:
        chosen = np.tile(np.arange(num_experts), (SAMPLE_TOKENS, 1))
    share = np.bincount(chosen.ravel(), minlength=num_experts) / SAMPLE_TOKENS
    share = np.sort(share)[::-1]
    return np.stack([rng.permutation(share) for _ in range(NUM_DRAWS)])


def _binomial_quantile(n: float, p: FloatArray, u: FloatArray) -> FloatArray:
    """Quantile of the binomial: exact by inversion where few are expected, normal where many."""
    mean = n * p
    out = np.zeros_like(p)
    # Poisson-like inversion term by term, for up to 40 expected tokens.
    small = mean <= 40.0
    q = np.clip(1.0 - p, 1e-12, 1.0)
    term = np.exp(n * np.log(q))
    total = term.copy()
    count = np.zeros_like(p)
    for k in range(1, 120):
        below = small & (u > total)
        if not below.any() or k > n:
            break
        term = term * (n - k + 1) / k * (p / q)
        total = total + term
        count = count + below
    from scipy.special import ndtri

    large = mean + np.sqrt(mean * q) * ndtri(np.clip(u, 1e-9, 1 - 1e-9))
    out = np.where(small, count, np.clip(large, 0.0, n))
    return np.asarray(out, dtype=np.float64)
