"""Types of tokens in a trace, for `synth_fit`: what they choose, and how long they last."""

from __future__ import annotations

import numpy as np

from moesim.types import Array, FloatArray, IntArray

MIXTURE_TOKENS = 16_384
NUM_TYPES = 128
_MIXTURE_ROUNDS = 12


def token_types(
    ids: Array, share: FloatArray, rng: np.random.Generator
) -> tuple[FloatArray, IntArray]:
    """Mixture of token types by expectation-maximisation (Dempster, Laird and Rubin 1977).

    A type is a distribution over experts in every layer; the choices of a token are taken as
    independent given its type. Returns log shares [L, E, C] and the likeliest type [T].
    """
    from moesim.trace.synth_kernels import type_responsibilities

    top_k, num_experts = ids.shape[2], share.shape[1]
    sample = rng.permutation(len(ids))[:MIXTURE_TOKENS]
    num_types = int(np.clip(len(sample) // 64, 1, NUM_TYPES))
    part = np.array(ids[np.sort(sample)], order="C")
    even = np.maximum(share / np.maximum(share.sum(axis=1, keepdims=True), 1e-12), 1e-6)
    p = np.repeat(0.7 * even[:, :, None], num_types, axis=2)
    for c, token in enumerate(ids[sample[:num_types]].astype(np.int64)):
        for layer, row in enumerate(token):
            p[layer, row[row >= 0], c] += 0.3 / top_k
    prior = np.full(num_types, 1.0 / num_types)
    shape = (len(even), num_experts, num_types)
    for _ in range(_MIXTURE_ROUNDS):
        counts, weight = np.zeros(shape, np.float32), np.zeros(num_types)
        label = np.zeros(len(part), np.int64)
        _expect(type_responsibilities, part, p, prior, counts, weight, label)
        prior = (weight + 0.1) / (weight + 0.1).sum()
        pseudo = 5.0 * top_k
        p = (counts + pseudo * even[:, :, None]) / (counts.sum(axis=1, keepdims=True) + pseudo)
    label = np.zeros(len(ids), np.int64)
    counts, weight = np.zeros(shape, np.float32), np.zeros(num_types)
    _expect(type_responsibilities, ids, p, prior, counts, weight, label)
    return np.log(p), label


def _expect(kernel, ids, p, prior, counts, weight, label) -> None:  # type: ignore[no-untyped-def]
    log_share = np.log(np.maximum(p, 1e-12)).astype(np.float32)
    kernel(ids, log_share, np.log(prior).astype(np.float32), counts, weight, label)


def type_dynamics(
    label: IntArray, starts: IntArray, type_share: FloatArray, tokens: FloatArray
) -> tuple[float, float]:
    """Dirichlet concentration and persistence of token types, from how often two tokens of a
    request have the same type: next to each other, and 16 or 32 apart."""
    request = np.repeat(np.arange(len(starts) - 1), np.diff(starts))

    def alike(lag: int) -> float:
        pairs = request[lag:] == request[:-lag]
        return float((label[lag:] == label[:-lag])[pairs].mean()) if pairs.any() else float("nan")

    by_chance = float(np.average((type_share**2).sum(axis=1), weights=tokens))
    far = np.array([alike(lag) for lag in (16, 32)])
    far = far[np.isfinite(far)]
    if not far.size or far.mean() >= 1.0:
        return 100.0, 0.0
    apart, near = float(far.mean()), alike(1)
    concentration = float(np.clip((1 - apart) / max(apart - by_chance, 1e-3), 1.0, 1e4))
    return concentration, float(np.clip((near - apart) / (1 - apart), 0.0, 0.9))
