"""Synthetic specifications without a trace of the same shape: from a few parameters, or carried
over from a fit to a model of another shape.

Both draw random tables and calibrate them, so that load and affinity are as asked for. They are
plausible, not measured: which experts are busy, and which follow which, is made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from moesim.errors import InputError
from moesim.trace.format import MAX_EXPERTS
from moesim.trace.measures import affinity as mutual_information
from moesim.trace.synth import draw_requests, request_seeds, run_model
from moesim.trace.synth_fit import Targets, calibrate, measure, race_score
from moesim.trace.synth_routers import Routers, decide_together
from moesim.trace.synth_spec import MAX_CELLS, MAX_REQUEST_TOKENS, SynthSpec
from moesim.types import FloatArray, IntArray, Progress, stream

NUM_TYPES = 128
_TYPE_RANK = 4
_PROBE_TOKENS = 49_152
_RUN_IDS = 4_000_000
_MAX_INCLUSION = 0.95
_CHAIN_STD = 0.1


def design(
    layer_ids: Sequence[int],
    num_experts: int,
    top_k: int,
    *,
    model: str = "",
    skew: Literal["zipf", "lognormal"] = "lognormal",
    skew_strength: float = 0.5,
    affinity: float = 0.15,
    routers: Routers = "own",
    num_domains: int = 1,
    domain_spread: float = 0.3,
    request_spread: float = 0.4,
    prompt_tokens: float = 512.0,
    output_tokens: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> SynthSpec:
    """A specification from parameters.

    skew: `zipf`, load of the i-th busiest expert in proportion to i^-skew_strength; `lognormal`,
        log load normal with that standard deviation. An expert is in at most 95% of the choices.
    affinity: mutual information of adjacent layers over its ceiling, 0 to 1 (see
        `measures.affinity`); real models lie between 0.06 and 0.30. What domains and requests
        bring by themselves is the least that can be had.
    routers: `shared` by all layers or `linked` from layer to layer, see `decide_together`.
    domain_spread, request_spread: standard deviation of the score of an expert between domains
        and between requests; fits to real traces give 0.1 to 0.5, and 0.1 to 2.
    prompt_tokens, output_tokens: mean lengths; lengths are log-normal with a coefficient of
        variation of 1. Without prompt tokens all tokens are decode tokens, and the reverse.

    Raises InputError for parameters out of range.
    """
    _check_shape(layer_ids, num_experts, top_k)
    for name, value, low, high in (
        ("skew strength", skew_strength, 0.0, 4.0),
        ("affinity", affinity, 0.0, 0.9 if routers == "own" else 1.0),
        ("domain spread", domain_spread, 0.0, 3.0),
        ("request spread", request_spread, 0.0, 3.0),
        ("prompt tokens", prompt_tokens, 0.0, 1e6),
        ("output tokens", output_tokens, 0.0, 1e6),
        ("number of domains", num_domains, 1, 1000),
    ):
        if not low <= value <= high:
            raise InputError(f"{name} {value:g}", f"give a value from {low:g} to {high:g}")
    if prompt_tokens + output_tokens < 1:
        raise InputError("requests of no tokens", "raise the prompt or the output tokens")
    rng = stream(seed, 0xDE51)
    num_layers = len(layer_ids)
    rank = np.arange(num_experts)
    if skew == "zipf":
        weight = (rank + 1.0) ** -skew_strength
    else:
        weight = np.exp(skew_strength * _normal_quantiles(num_experts))
    share = _inclusion(rng.permuted(np.tile(weight, (num_layers, 1)), axis=1), top_k)
    domains = tuple(f"domain-{d}" for d in range(num_domains)) if num_domains > 1 else ()
    requests = _lengths(prompt_tokens, output_tokens, num_domains, rng)
    tilt = rng.normal(0, domain_spread, (num_domains, num_layers, num_experts))
    types = rng.normal(size=(NUM_TYPES, _TYPE_RANK)) @ rng.normal(
        size=(num_layers, _TYPE_RANK, num_experts)
    )
    spec = SynthSpec(
        model=model,
        num_experts=num_experts,
        top_k=top_k,
        layer_ids=tuple(layer_ids),
        requests=requests,
        base=np.zeros((num_domains, num_layers, num_experts), np.float32),
        type_logits=types.astype(np.float32),
        type_share=rng.dirichlet(np.full(NUM_TYPES, 5.0), num_domains),
        type_concentration=30.0,
        type_persistence=0.1,
        chain=np.zeros((num_layers - 1, num_experts, num_experts), np.float32),
        request_spread=np.full(num_layers, float(request_spread)),
        noise_persistence=np.full(num_layers, 0.2),
        domains=domains,
        source={
            "skew": f"{skew}:{skew_strength:g}",
            "affinity": affinity,
            "domain_spread": domain_spread,
            "request_spread": request_spread,
            "design_seed": seed,
        },
    )
    ceiling = np.full(num_layers - 1, _ceiling(share, top_k))
    bits = (affinity if routers == "own" else 0.1) * ceiling
    chain_std = np.full(num_layers, _CHAIN_STD)
    made = _calibrated(spec, share, tilt, bits, chain_std, seed, progress)
    return made if routers == "own" else decide_together(made, routers, affinity, seed)


def reshape(
    fitted: SynthSpec,
    layer_ids: Sequence[int],
    num_experts: int,
    top_k: int,
    *,
    model: str = "",
    seed: int = 0,
    progress: Progress | None = None,
) -> SynthSpec:
    """Carry the character of a fitted specification over to a model of another shape.

    Layer i of L takes after the fitted layer at the same relative depth. Carried over: the
    distribution of relative expert load (quantiles over experts, dealt out at random), affinity
    over its ceiling, the distributions of the scores of token types and domains, the spread
    between requests, persistence, and request lengths. Raises InputError for an impossible shape.
    """
    _check_shape(layer_ids, num_experts, top_k)
    rng = stream(seed, 0x5A9E)
    num_layers, num_domains = len(layer_ids), len(fitted.base)
    depth = np.linspace(0, fitted.num_layers - 1, num_layers)
    like = np.round(depth).astype(np.int64)
    ids, starts, domain_idx = _probe(fitted, seed)
    probe = measure(ids, starts, domain_idx, num_domains, fitted.num_experts)
    relative = probe.load.sum(axis=0) * fitted.num_experts / (len(ids) * fitted.top_k)
    at = (np.arange(num_experts) + 0.5) / num_experts
    weight = np.quantile(relative, at, axis=1).T[like]
    share = _inclusion(rng.permuted(weight, axis=1), top_k)
    tilt_pool = fitted.base - fitted.base.mean(axis=0)
    tilt = np.empty((num_domains, num_layers, num_experts))
    num_types = fitted.type_logits.shape[1]
    types = np.empty((num_layers, num_types, num_experts), np.float32)
    for layer, source in enumerate(like):
        tilt[:, layer] = rng.choice(tilt_pool[:, source].ravel(), tilt[:, layer].shape)
        types[layer] = rng.choice(fitted.type_logits[source].ravel(), types[layer].shape)
    if fitted.num_layers > 1:
        found = mutual_information(probe.between, len(ids), fitted.top_k).normalised
        normalised = np.interp(
            np.linspace(0, len(found) - 1, num_layers - 1), np.arange(len(found)), found
        )
        chain_std = np.append(fitted.chain.std(axis=(1, 2)), 0.0)[like]
    else:
        normalised, chain_std = np.full(num_layers - 1, 0.15), np.full(num_layers, _CHAIN_STD)
    spec = replace(
        fitted,
        model=model,
        num_experts=num_experts,
        top_k=top_k,
        layer_ids=tuple(layer_ids),
        base=np.zeros((num_domains, num_layers, num_experts), np.float32),
        type_logits=types,
        chain=np.zeros((num_layers - 1, num_experts, num_experts), np.float32),
        request_spread=fitted.request_spread[like],
        noise_persistence=fitted.noise_persistence[like],
        source={
            **fitted.source,
            "reshaped_from": {
                "model": fitted.model,
                "num_layers": fitted.num_layers,
                "num_experts": fitted.num_experts,
                "top_k": fitted.top_k,
            },
            "design_seed": seed,
        },
    )
    ceiling = np.array([_ceiling(pair, top_k) for pair in np.stack((share[:-1], share[1:]), 1)])
    return _calibrated(spec, share, tilt, normalised * ceiling, chain_std, seed, progress)


def _calibrated(
    spec: SynthSpec,
    share: FloatArray,
    tilt: FloatArray,
    bits: FloatArray,
    chain_std: FloatArray,
    seed: int,
    progress: Progress | None,
) -> SynthSpec:
    """Fill in base and chain of `spec`, and calibrate it to load `share` [L, E] tilted by domain
    [D, L, E], and affinity `bits` [L-1]."""
    lengths = (spec.requests[:, 2] + spec.requests[:, 3]).astype(np.float64)
    domain = np.bincount(spec.requests[:, 0], lengths, len(tilt))
    domain = domain / domain.sum()
    load = share * np.exp(tilt)
    for _ in range(20):
        load *= share / np.maximum((load * domain[:, None, None]).sum(axis=0), 1e-12)
        load = np.clip(load, 1e-4, 0.99)
    score = race_score(load)
    spec = replace(
        spec,
        base=(score - score.mean(axis=2, keepdims=True)).astype(np.float32),
        chain=_chain_of_types(spec, share, chain_std),
    )
    run_tokens = int(np.clip(_RUN_IDS // (spec.num_layers * spec.top_k), 4096, 24_576))
    targets = Targets(load, bits)
    return calibrate(
        spec,
        targets,
        spec.requests,
        scale_types=True,
        run_tokens=run_tokens,
        seed=seed,
        progress=progress,
    )


def _chain_of_types(spec: SynthSpec, share: FloatArray, chain_std: FloatArray) -> np.ndarray:
    """[L-1, E, E] float32: log lift of pairs of experts that the types imply, brought to the
    given standard deviation, so that the chain speaks for the same pairs as the types do."""
    prior = spec.type_share.mean(axis=0)
    score = race_score(share)[:, None] + spec.type_logits
    inclusion = 1 - np.exp(-np.exp(np.minimum(score, 5.0)))
    inclusion *= spec.top_k / inclusion.sum(axis=2, keepdims=True)
    chain = np.zeros((spec.num_layers - 1, spec.num_experts, spec.num_experts), np.float32)
    for layer in range(len(chain)):
        first, second = inclusion[layer], inclusion[layer + 1]
        joint = (first * prior[:, None]).T @ second
        lift = np.log(joint / np.outer(prior @ first, prior @ second))
        chain[layer] = lift * (chain_std[layer] / max(float(lift.std()), 1e-9))
    return chain


def _probe(spec: SynthSpec, seed: int) -> tuple[np.ndarray, IntArray, IntArray]:
    order = np.concatenate(list(draw_requests(spec, _PROBE_TOKENS, seed)))
    starts = np.concatenate(([0], np.cumsum(order[:, 2] + order[:, 3])))
    domain_idx = order[:, 0].copy()
    return (
        run_model(spec, starts, domain_idx, request_seeds(seed, 0, len(order))),
        starts,
        domain_idx,
    )


def _inclusion(weight: FloatArray, top_k: int) -> FloatArray:
    """[L, E]: choices a token in proportion to `weight`, summing up to K, none above the cap."""
    cap = max(_MAX_INCLUSION, top_k / weight.shape[1])
    low, high = np.zeros(len(weight)), top_k / weight.min(axis=1).clip(1e-12)
    for _ in range(100):
        middle = (low + high) / 2
        over = np.minimum(weight * middle[:, None], cap).sum(axis=1) > top_k
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return np.minimum(weight * high[:, None], cap)


def _ceiling(share: FloatArray, top_k: int) -> float:
    p = share / share.sum(axis=1, keepdims=True)
    entropy = -(p * np.log2(np.maximum(p, 1e-300))).sum(axis=1)
    return max(0.0, float(entropy.min()) - float(np.log2(top_k)))


def _lengths(
    prompt_tokens: float, output_tokens: float, num_domains: int, rng: np.random.Generator
) -> IntArray:
    """256 requests a domain with log-normal lengths of the given means."""
    sigma = float(np.sqrt(np.log(2.0)))
    rows = []
    for domain in range(num_domains):
        shape = np.exp(sigma * _normal_quantiles(256) - sigma**2 / 2)
        prompt = np.round(rng.permutation(shape) * prompt_tokens)
        output = np.round(rng.permutation(shape) * output_tokens)
        rows.append(np.stack([np.full(256, domain), np.zeros(256), prompt, output], 1))
    out = np.concatenate(rows).astype(np.int64)
    column = 2 if prompt_tokens >= output_tokens else 3
    out[:, column] = np.maximum(out[:, column], 1)
    return np.minimum(out, MAX_REQUEST_TOKENS)


def _normal_quantiles(count: int) -> FloatArray:
    from scipy.special import ndtri

    return np.asarray(ndtri((np.arange(count) + 0.5) / count))


def _check_shape(layer_ids: Sequence[int], num_experts: int, top_k: int) -> None:
    if not layer_ids or len(set(layer_ids)) != len(layer_ids) or min(layer_ids) < 0:
        raise InputError("layers must be distinct numbers from 0", "give at least one layer")
    if not 1 <= top_k <= num_experts <= MAX_EXPERTS:
        raise InputError(
            f"top-{top_k} of {num_experts} experts", "give 1 <= top-k <= experts <= 32767"
        )
    if len(layer_ids) * num_experts**2 > MAX_CELLS:
        raise InputError(
            f"{len(layer_ids)} layers of {num_experts} experts need too much memory",
            "ask for fewer layers",
        )
