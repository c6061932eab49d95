"""Measures of skew, affinity, co-activation and divergence, on counts.

Everything here takes plain count arrays, so that real, synthetic and load traces are measured by
the same code. Information is in bits.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.types import FloatArray, IntArray

Counts = npt.NDArray[Any]
LARGE_CELLS = 1 << 22
"""Pairs of experts beyond which layers are measured on threads."""


@dataclass(frozen=True, slots=True, eq=False)
class Skew:
    """Skew of the expert load of each layer; all [L].

    max_over_mean: load of the busiest expert over the mean; 1 is balanced, E the most.
    cv:            standard deviation over mean.
    gini:          Gini coefficient; 0 is balanced, (E-1)/E the most.
    entropy:       entropy of the load over log2(E); 1 is balanced, 0 the least.
    num_unused:    experts that no token chose.
    """

    max_over_mean: FloatArray
    cv: FloatArray
    gini: FloatArray
    entropy: FloatArray
    num_unused: IntArray


def skew(load: Counts) -> Skew:
    """Skew of load [L, E]. A layer without any load counts as balanced."""
    values = np.asarray(load, np.float64)
    num_experts = values.shape[1]
    mean = values.mean(axis=1)
    scale = np.where(mean > 0, mean, 1.0)
    rank = np.arange(1, num_experts + 1)
    gini = ((2 * rank - num_experts - 1) * np.sort(values, axis=1)).sum(axis=1) / (
        num_experts**2 * scale
    )
    bits = entropy_bits(values)
    return Skew(
        max_over_mean=np.where(mean > 0, values.max(axis=1) / scale, 1.0),
        cv=values.std(axis=1) / scale,
        gini=gini,
        entropy=np.where(mean > 0, bits / max(np.log2(num_experts), 1e-300), 1.0)
        if num_experts > 1
        else np.ones(len(values)),
        num_unused=(values == 0).sum(axis=1),
    )


def entropy_bits(counts: Counts) -> FloatArray:
    """Plug-in entropy in bits of counts [..., E] -> [...]; 0 for no counts."""
    values = np.asarray(counts, np.float64)
    total = values.sum(axis=-1, keepdims=True)
    p = values / np.where(total > 0, total, 1.0)
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)


@dataclass(frozen=True, slots=True, eq=False)
class Affinity:
    """Inter-layer affinity of adjacent layers; all [L-1].

    bits:       mutual information, bias-corrected (see `affinity`).
    plug_in:    the same before correction.
    ceiling:    the most that routing of this load and K could show, in bits.
    normalised: bits / ceiling, 0 (independent) to 1 (one layer determines the next).
    """

    bits: FloatArray
    plug_in: FloatArray
    ceiling: FloatArray
    normalised: FloatArray


def affinity(between: Counts, num_tokens: float, top_k: int) -> Affinity:
    """Mutual information between a choice in layer l and a choice in layer l+1 of one token.

    between: [L-1, E, E] joint counts over all K x K pairs of each token. The estimate is that of
    (X, Y) with X drawn evenly from the token's set in layer l and Y from its set in layer l+1.

    Bias: Miller and Madow's correction (Miller 1955) takes (cells - 1) degrees of freedom over
    2N for N independent pairs. The K choices of a token are without replacement, so a layer's
    indicator vector varies along E-1 axes with variance p(1-p) rather than p; the degrees of
    freedom of independent layers are then (E_l - K)(E_l+1 - K), with E_l the experts in use, and
    N = T K^2. What is subtracted is that over 2 N ln 2. Dependence between tokens of a request
    is ignored, so a little bias is left in short traces. The result is not below 0.

    Ceiling: X depends on Y only through the two sets, so I(X; Y) <= H(X) - H(X | set)
    = H(X) - log2 K, and the same for Y; the ceiling is the smaller of the two. It is reached by
    routing in which blocks of K experts are always chosen together.
    """
    num_pairs = len(between)
    bits, plug_in, ceiling = np.zeros(num_pairs), np.zeros(num_pairs), np.zeros(num_pairs)

    def measure(layer: int) -> None:
        joint = between[layer].astype(np.float64)
        total = joint.sum()
        if total == 0:
            return
        x, y = joint.sum(axis=1), joint.sum(axis=0)
        entropy_x, entropy_y = float(entropy_bits(x)), float(entropy_bits(y))
        plug_in[layer] = entropy_x + entropy_y - float(entropy_bits(joint.ravel()))
        used_x, used_y = int((x > 0).sum()), int((y > 0).sum())
        freedom = max(0, used_x - top_k) * max(0, used_y - top_k)
        bias = freedom / (2 * num_tokens * top_k**2 * np.log(2))
        bits[layer] = max(0.0, plug_in[layer] - bias)
        ceiling[layer] = max(0.0, min(entropy_x, entropy_y) - np.log2(top_k))

    with ThreadPoolExecutor(os.cpu_count() if between.size > LARGE_CELLS else 1) as pool:
        list(pool.map(measure, range(num_pairs)))
    normalised = np.where(ceiling > 1e-9, bits / np.where(ceiling > 1e-9, ceiling, 1.0), 0.0)
    return Affinity(bits, plug_in, ceiling, np.minimum(normalised, 1.0))


@dataclass(frozen=True, slots=True)
class Pair:
    """Two experts of one layer, chosen together `count` times, `lift` times what chance gives."""

    layer_idx: int
    first: int
    second: int
    count: int
    lift: float


@dataclass(frozen=True, slots=True, eq=False)
class CoActivation:
    """mean_lift: [L], lift over pairs weighted by how often they occur; 1 is chance.
    top: the pairs of highest lift among those that are frequent enough to tell."""

    mean_lift: FloatArray
    top: tuple[Pair, ...]


def co_activation(within: Counts, load: Counts, num_tokens: int, num_top: int = 10) -> CoActivation:
    """Lift of pairs of experts within a layer.

    within: [L, E, E] with a < b; load: [L, E]. lift(a, b) = n_ab / expected, where expected is
    the count under independent choice without replacement: load_a load_b scaled so that expected
    and observed pairs of the layer have the same sum. Pairs whose observed and expected counts
    are both below max(10, T / 1000) are not listed in `top`.
    """
    num_layers = len(within)
    mean_lift = np.ones(num_layers)
    floor = max(10.0, num_tokens / 1000)
    found: list[Pair] = []
    for layer in range(num_layers):
        observed = np.triu(within[layer], 1).astype(np.float64)
        total = observed.sum()
        p = np.asarray(load[layer], np.float64)
        expected = np.triu(np.outer(p, p), 1)
        if total == 0 or expected.sum() == 0:
            continue
        expected *= total / expected.sum()
        lift = np.divide(observed, expected, out=np.zeros_like(observed), where=expected > 0)
        mean_lift[layer] = (observed * lift).sum() / total
        ranked = np.where(np.maximum(observed, expected) >= floor, lift, 0.0).ravel()
        for flat in np.argsort(-ranked, kind="stable")[:num_top]:
            if ranked[flat] > 0:
                a, b = divmod(int(flat), len(p))
                found.append(Pair(layer, a, b, int(observed[a, b]), float(ranked[flat])))
    found.sort(key=lambda pair: (-pair.lift, pair.layer_idx, pair.first, pair.second))
    return CoActivation(mean_lift, tuple(found[:num_top]))


def jensen_shannon(p: Counts, q: Counts) -> FloatArray:
    """Jensen-Shannon divergence in bits of two load arrays [..., E] -> [...]; 0 to 1.

    NaN where either side has no counts.
    """
    a, b = np.asarray(p, np.float64), np.asarray(q, np.float64)
    total_a, total_b = a.sum(axis=-1, keepdims=True), b.sum(axis=-1, keepdims=True)
    a, b = a / np.where(total_a > 0, total_a, 1.0), b / np.where(total_b > 0, total_b, 1.0)
    out = entropy_bits((a + b) / 2) - (entropy_bits(a) + entropy_bits(b)) / 2
    empty = (total_a[..., 0] == 0) | (total_b[..., 0] == 0)
    return np.where(empty, np.nan, np.maximum(out, 0.0))


@dataclass(frozen=True, slots=True)
class Drift:
    """Change of the load over the trace, in bits of Jensen-Shannon divergence, mean over layers.

    successive: between one window and the next. within: between the two halves of a window's
    requests, which is what sampling and the variety of requests give without any change.
    ends: between the first and the last window. ratio: successive / within; about 1 is no drift.
    None where a half has no requests.
    """

    num_windows: int
    successive: float | None
    within: float | None
    ends: float | None
    ratio: float | None


def drift(window_load: Counts) -> Drift:
    """Drift over windows [W, 2, L, E]; every comparison is between halves, so that all have the
    same amount of data and the noise cancels in the ratio."""
    num_windows = len(window_load)
    within = jensen_shannon(window_load[:, 0], window_load[:, 1])
    successive = [jensen_shannon(window_load[:-1, i], window_load[1:, 1 - i]) for i in range(2)]
    ends = [jensen_shannon(window_load[0, i], window_load[-1, 1 - i]) for i in range(2)]
    noise = _mean(within)
    change = _mean(np.array(successive)) if num_windows > 1 else None
    return Drift(
        num_windows=num_windows,
        successive=change,
        within=noise,
        ends=_mean(np.array(ends)) if num_windows > 1 else None,
        ratio=change / noise if change is not None and noise else None,
    )


@dataclass(frozen=True, slots=True)
class DomainLoad:
    """One domain: its share of tokens, divergence of its load from that of the other domains,
    and the divergence between two halves of its own requests (noise), mean over layers, bits."""

    name: str
    num_tokens: int
    divergence: float | None
    noise: float | None


def domain_loads(
    domain_load: Counts, num_tokens: IntArray, names: tuple[str, ...]
) -> tuple[DomainLoad, ...]:
    """Divergence by domain from counts [D, 2, L, E] and tokens [D]; empty domains are left out.

    Like `drift`, half of a domain is compared with half of the rest. The rest is larger, so that
    a domain without anything of its own shows a divergence of about half its noise.
    """
    total = domain_load.sum(axis=0)
    out = []
    for idx, name in enumerate(names):
        if num_tokens[idx] == 0:
            continue
        own = domain_load[idx]
        rest = total - own
        divergence = _mean(np.array([jensen_shannon(own[i], rest[1 - i]) for i in range(2)]))
        noise = _mean(jensen_shannon(own[0], own[1]))
        out.append(DomainLoad(name, int(num_tokens[idx]), divergence, noise))
    return tuple(out)


def _mean(values: FloatArray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None
