"""Compiled kernels of the synthetic generator and of its fit, with slow references.

The generator uses its own counter-based random stream (splitmix64: Steele, Lea and Flood 2014)
per request and layer, so that what a request looks like depends on the seed and its number alone.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from moesim.kernels import kernel
from moesim.types import Array, FloatArray, IntArray

Float32Array = npt.NDArray[np.float32]
SeedArray = npt.NDArray[np.uint64]

_STEP = np.uint64(0x9E37_79B9_7F4A_7C15)
_LAYER = np.uint64(0xD134_2543_DE82_EF95)
_LOW16 = np.uint64(0xFFFF)
_UNIT = 2.0**-53
_ID_BITS = 15
_SCALE = np.float32(1 << 24)
_TAKEN = np.int64(-(1 << 62))


@cache
def noise_tables() -> tuple[Float32Array, Float32Array]:
    """Quantiles of the Gumbel and of the normal distribution at (i + 1/2) / 65536: 16 random
    bits index one draw."""
    from scipy.special import ndtri

    p = (np.arange(1 << 16) + 0.5) / (1 << 16)
    return (-np.log(-np.log(p))).astype(np.float32), np.asarray(ndtri(p), np.float32)


@kernel
def splitmix(x: np.uint64) -> np.uint64:
    """The splitmix64 finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def draw_types(
    types: IntArray,
    starts: IntArray,
    domain_idx: IntArray,
    seeds: SeedArray,
    type_cum: FloatArray,
    concentration: float,
    persistence: float,
) -> None:
    """The type of every token, in place.

    A token keeps the type of the token before it with probability `persistence`; otherwise it
    copies a random earlier token of its request with probability n / (n + concentration), n being
    the tokens so far, and else draws from its domain. This is Polya's urn, whose long-run shares
    are Dirichlet-distributed around those of the domain (Blackwell and MacQueen 1973).

    types: [T] out; starts: [R+1]; domain_idx, seeds: [R]; type_cum: [D, C] cumulative shares.
    """
    num_types = type_cum.shape[1]
    for r in range(len(domain_idx)):
        state = splitmix(seeds[r])
        cum = type_cum[domain_idx[r]]
        for t in range(starts[r], starts[r + 1]):
            n = t - starts[r]
            state += _STEP
            u = np.float64(splitmix(state) >> np.uint64(11)) * _UNIT
            if n > 0 and u < persistence:
                types[t] = types[t - 1]
                continue
            state += _STEP
            u = np.float64(splitmix(state) >> np.uint64(11)) * _UNIT
            state += _STEP
            v = np.float64(splitmix(state) >> np.uint64(11)) * _UNIT
            if u * (n + concentration) < n:
                types[t] = types[starts[r] + np.int64(v * n)]
            else:
                types[t] = min(np.searchsorted(cum, v * cum[-1], "right"), num_types - 1)


@kernel
def choose_experts(
    ids: Array,
    types: IntArray,
    starts: IntArray,
    domain_idx: IntArray,
    seeds: SeedArray,
    base: Float32Array,
    type_logits: Float32Array,
    chain: Float32Array,
    request_spread: FloatArray,
    noise_persistence: FloatArray,
    gumbel: Float32Array,
    normal: Float32Array,
) -> None:
    """Choose K experts of every token and layer, in place, in descending order of score.

    score[e] = base[d, l, e] + type_logits[l, z, e] + request_spread[l] u[r, l, e]
             + sum over the experts c chosen in layer l-1 of chain[l-1, c, e] + Gumbel noise

    The K highest scores are a draw without replacement from the softmax of the rest of the sum
    (Gumbel-top-k: Vieira 2014; Kool et al. 2019). u is standard normal, one a request, layer and
    expert. The noise of an expert is kept from the token before with probability
    noise_persistence[l], else drawn again, so that its distribution is always Gumbel.

    ids: [T, L, K] out; types: [T]; starts: [R+1]; domain_idx, seeds: [R]; base: [D, L, E];
    type_logits: [L, C, E]; chain: [L-1, E, E]; request_spread, noise_persistence: [L];
    gumbel, normal: `noise_tables()`.
    """
    num_layers, top_k, num_experts = ids.shape[1], ids.shape[2], base.shape[2]
    noise = np.zeros(num_experts + 1, np.float32)
    centre = np.zeros(num_experts + 3, np.float32)
    score = np.zeros(num_experts, np.float32)
    key = np.zeros(num_experts, np.int64)
    for r in range(len(domain_idx)):
        for layer in range(num_layers):
            state = splitmix(seeds[r] + np.uint64(layer + 1) * _LAYER)
            for e in range(0, num_experts, 4):
                state += _STEP
                x = splitmix(state)
                for i in range(4):
                    centre[min(e + i, num_experts)] = normal[x & _LOW16]
                    x >>= np.uint64(16)
            spread = np.float32(request_spread[layer])
            for e in range(num_experts):
                centre[e] = base[domain_idx[r], layer, e] + spread * centre[e]
            kept = np.uint64(noise_persistence[layer] * 65536.0)
            for t in range(starts[r], starts[r + 1]):
                keep = kept if t > starts[r] else np.uint64(0)
                for e in range(0, num_experts, 2):
                    state += _STEP
                    x = splitmix(state)
                    fresh = gumbel[(x >> np.uint64(16)) & _LOW16]
                    noise[e] = fresh if (x & _LOW16) >= keep else noise[e]
                    fresh = gumbel[x >> np.uint64(48)]
                    again = ((x >> np.uint64(32)) & _LOW16) >= keep
                    noise[e + 1] = fresh if again else noise[e + 1]
                row = type_logits[layer, types[t]]
                for e in range(num_experts):
                    score[e] = centre[e] + row[e] + noise[e]
                if layer > 0:
                    for k in range(top_k):
                        row = chain[layer - 1, np.int64(ids[t, layer - 1, k])]
                        for e in range(num_experts):
                            score[e] += row[e]
                for e in range(num_experts):
                    key[e] = (np.int64(score[e] * _SCALE) << _ID_BITS) | e
                for k in range(top_k):
                    best = key[0]
                    for e in range(1, num_experts):
                        best = max(best, key[e])
                    chosen = best & ((1 << _ID_BITS) - 1)
                    ids[t, layer, k] = chosen
                    key[chosen] = _TAKEN


@kernel
def type_responsibilities(
    ids: Array,
    log_share: Float32Array,
    log_prior: Float32Array,
    counts: Float32Array,
    weight: FloatArray,
    label: IntArray,
) -> None:
    """One expectation step of the mixture of token types, adding up what the next
    maximisation needs.

    ids: [T, L, K]; log_share: [L, E, C], log probability that a choice of a type-c token in layer
    l is e; log_prior: [C]. counts: [L, E, C] and weight: [C] gain the expected choices and tokens
    of each type; label: [T] gets the most probable type.
    """
    num_types = len(log_prior)
    p = np.zeros(num_types, np.float32)
    for t in range(ids.shape[0]):
        p[:] = log_prior
        for layer in range(ids.shape[1]):
            for k in range(ids.shape[2]):
                e = np.int64(ids[t, layer, k])
                if e >= 0:
                    row = log_share[layer, e]
                    for c in range(num_types):
                        p[c] += row[c]
        label[t] = np.argmax(p)
        p = np.exp(p - p[label[t]])
        p /= p.sum()
        for c in range(num_types):
            weight[c] += p[c]
        for layer in range(ids.shape[1]):
            for k in range(ids.shape[2]):
                e = np.int64(ids[t, layer, k])
                if e >= 0:
                    row = counts[layer, e]
                    for c in range(num_types):
                        row[c] += p[c]


@kernel
def request_variance(ids: Array, starts: IntArray, share: FloatArray) -> FloatArray:
    """[L]: how far requests are from the mean load, sum over requests and experts of
    (c_re - n_r share_e)^2 over sum of n_r^2.

    ids: [T, L, K] with the tokens of a request together; starts: [R+1]; share: [L, E], choices
    a token. The sum is the part of the variance of a batch's load that its requests bring.
    """
    num_layers, num_experts = share.shape
    out: FloatArray = np.zeros(num_layers)
    count = np.zeros(num_experts)
    scale = 0
    for r in range(len(starts) - 1):
        n = starts[r + 1] - starts[r]
        scale += n * n
        for layer in range(num_layers):
            count[:] = 0
            for t in range(starts[r], starts[r + 1]):
                for k in range(ids.shape[2]):
                    e = np.int64(ids[t, layer, k])
                    if e >= 0:
                        count[e] += 1
            for i in range(num_experts):
                out[layer] += (count[i] - n * share[layer, i]) ** 2
    return out / max(scale, 1)
