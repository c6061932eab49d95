"""Cost of each layer by its slots, from one-pass runs: what slot allocation works on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.caching.events import Stream
from moesim.caching.simulate import CacheSettings, Depths, layer_choices, run_policy
from moesim.trace.format import Trace
from moesim.types import FloatArray, IntArray

PIN_STEPS = 8
"""Pinned counts are tried in steps of E / PIN_STEPS."""
PIN_GAIN = 0.005
"""More experts are pinned only where that saves this share of the layer's cost: a smaller gain on
these requests is as likely to be a loss on others."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerCurves:
    """cost: [L, E + 1] the cost of the misses of each layer with 0 .. E slots, per token;
    misses: [L, E + 1] their number per token; pins: [L, E + 1] how many of the slots are pinned
    where that is best; expert_misses [L, E + 1, E] misses of each expert, a token."""

    cost: FloatArray
    misses: FloatArray
    pins: IntArray
    expert_misses: FloatArray


def layer_curves(
    trace: Trace,
    stream: Stream,
    settings: CacheSettings,
    frequency: FloatArray,
    miss_cost: FloatArray,
    *,
    pinning: bool = True,
) -> LayerCurves:
    """Curves of one policy on `stream`.

    frequency: [L, E] from other requests: order of pinning and of a warm start. miss_cost: [L, E]
    cost of one miss of each expert. `pinning` tries pinned experts beside the policy's slots.
    """
    num_layers, num = frequency.shape
    cost = np.full((num_layers, num + 1), np.finfo(float).max)
    misses, pins = np.zeros((num_layers, num + 1)), np.zeros((num_layers, num + 1), np.int64)
    per_expert = np.zeros((num_layers, num + 1, num))
    step = max(1, num // PIN_STEPS)
    tries = range(0, num, step) if pinning and settings.policy != "static" else (0,)
    for layer in range(num_layers):
        choices = layer_choices(trace, stream, layer, frequency)
        order = np.argsort(-frequency[layer], kind="stable")
        for pinned in tries:
            run = run_policy(choices, settings, order[:pinned])
            table = miss_table(run)[: num + 1 - pinned] / stream.num_tokens
            value = table @ miss_cost[layer]
            at = np.arange(pinned, num + 1)
            better = value < cost[layer, at] * (1 - PIN_GAIN)
            at, table, value = at[better], table[better], value[better]
            cost[layer, at], pins[layer, at] = value, pinned
            misses[layer, at], per_expert[layer, at] = table.sum(axis=1), table
    return LayerCurves(cost, misses, pins, per_expert)


def miss_table(run: Depths) -> FloatArray:
    """[num_items + 1, num_items]: misses of each item with 0 .. num_items slots."""
    num = run.events.num_items
    depth = np.where(run.depth < 0, num, run.depth).astype(np.int64)
    count = np.bincount(depth * num + run.events.item, minlength=(num + 1) * num)
    by_depth = count.reshape(num + 1, num)
    return np.cumsum(by_depth[::-1], axis=0)[::-1].astype(np.float64)
