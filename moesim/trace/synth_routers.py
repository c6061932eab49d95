"""Routers that decide together: one shared by all layers, or each linked to the one before."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from moesim.errors import InputError
from moesim.trace.synth import draw_requests, request_seeds, run_model
from moesim.trace.synth_spec import SynthSpec
from moesim.types import IntArray, stream

Routers = Literal["own", "shared", "linked"]
_PROBE_TOKENS = 8192
_STRONGEST = 100.0
_ROUNDS = 12


def decide_together(
    spec: SynthSpec, kind: Literal["shared", "linked"], affinity: float, seed: int
) -> SynthSpec:
    """`spec` with the first layer's tables in every layer, and a chain by which an expert adds to
    the score of its successor in the next layer, as much as has a share `affinity` of a token's
    experts followed by their successors (1: every layer repeats the first one's choice).

    shared: the successor of an expert has its number, as with one router for all layers
    (Omni-router, arXiv:2507.05724). linked: it has another, drawn for every layer, as where routers
    of their own pass on what they decided (the layerwise recurrent router, ICLR 2025). Both papers'
    abstracts were read; what their models' affinities are was not.

    Raises InputError where shared tables alone bring more affinity than was asked for, or for one
    layer.
    """
    layers, experts = spec.num_layers, spec.num_experts
    if layers < 2:
        raise InputError(f"{kind} routers in one layer", "ask for two layers or more")
    rng = stream(seed, 0x5B0)
    number = np.tile(np.arange(experts), (layers, 1))
    if kind == "linked":
        number = rng.permuted(number, axis=1)
    base, types = np.empty_like(spec.base), np.empty_like(spec.type_logits)
    links = np.zeros_like(spec.chain)
    for layer in range(layers):
        base[:, layer, number[layer]] = spec.base[:, 0]
        types[layer][:, number[layer]] = spec.type_logits[0]
    for layer in range(layers - 1):
        links[layer, number[layer], number[layer + 1]] = 1.0
    alike = replace(
        spec,
        base=base,
        type_logits=types,
        request_spread=np.full(layers, spec.request_spread[0]),
        source={**spec.source, "routers": kind, "affinity": affinity},
    )

    def at(strength: float) -> SynthSpec:
        return replace(alike, chain=(links * strength).astype(np.float32))

    least = _passed_on(at(0.0), number, seed)
    if affinity < least:
        raise InputError(
            f"{kind} routers of affinity {affinity:g}: token types alone bring {least:.2f}",
            f"ask for {least:.2f} to 1",
        )
    low, high = 0.0, _STRONGEST
    if affinity < 1.0:
        for _ in range(_ROUNDS):
            middle = (low + high) / 2 if high < _STRONGEST else max(1.0, 2 * low)
            if _passed_on(at(middle), number, seed) < affinity:
                low = middle
            else:
                high = middle
    return at(high)


def _passed_on(spec: SynthSpec, number: IntArray, seed: int) -> float:
    """Share of a token's experts whose successors it chooses, mean over layers, of a short sample.
    number: [L, E], what the expert 0, 1, ... is called in a layer."""
    order = next(draw_requests(spec, _PROBE_TOKENS, seed))
    starts = np.concatenate(([0], np.cumsum(order[:, 2] + order[:, 3])))
    ids = run_model(spec, starts, order[:, 0].copy(), request_seeds(seed, 0, len(order)))
    alike = np.stack([np.argsort(number[i])[ids[:, i]] for i in range(spec.num_layers)], axis=1)
    same = alike[:, :-1, :, None] == alike[:, 1:, None, :]
    return float(same.any(axis=3).mean())
