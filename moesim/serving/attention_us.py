"""Time of attention in a step, by what a rank's sequences and prompts attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from moesim.cost.curves import power_mean_max
from moesim.cost.dense import KV_ELEMENT_BYTES, causal_pairs
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cost.dense import AttentionKernel, DenseModel, MlaModule
    from moesim.serving.deployment import Deployment

    Kernel = AttentionKernel | MlaModule


@dataclass(frozen=True)
class AttentionTerms:
    """Attention of one layer kind on one rank: decode is
    launch + us_per_seen x (context + extra x sequences), prefill is
    launch + pmax(us_per_row x rows, us_per_pair x pairs). `window`: keys a query sees, 0 for all.
    us_per_repeat: of a cached token that the same kernel has read for another sequence.
    chosen: keys that an indexer leaves to a query, 0 for all; prompts of more tokens then take
    index_prefill_us + us_per_choosing_row x rows + us_per_index_pair x pairs instead, and decodes
    index_decode_us + us_per_indexed x context more.
    """

    num_layers: int
    window: int
    decode_launch_us: float
    us_per_seen: float
    extra_tokens: float
    prefill_launch_us: float
    us_per_row: float
    us_per_pair: float
    sharpness: float
    us_per_repeat: float = 0.0
    chosen: int = 0
    index_decode_us: float = 0.0
    us_per_indexed: float = 0.0
    index_prefill_us: float = 0.0
    us_per_choosing_row: float = 0.0
    us_per_index_pair: float = 0.0

    def decode_us(self, sequences: FloatArray, context: FloatArray) -> FloatArray:
        """One layer; zero where there are no sequences."""
        most = self.chosen or self.window
        seen = np.minimum(context, sequences * most) if most else context
        time = self.decode_launch_us + self.us_per_seen * (seen + self.extra_tokens * sequences)
        time = time + self.index_decode_us + self.us_per_indexed * context
        return np.where(sequences > 0, time, 0.0)

    def prefill_us(self, rows: FloatArray, pairs: FloatArray) -> FloatArray:
        """One layer; zero where there are no rows."""
        every = pairs
        if self.window:
            length = np.maximum(2.0 * pairs / np.maximum(rows, 1.0) - 1.0, 1.0)
            pairs = rows / length * causal_pairs(length, self.window)
        time = power_mean_max(self.us_per_row * rows, self.us_per_pair * pairs, self.sharpness)
        if self.chosen:
            among = self.us_per_choosing_row * rows + self.us_per_index_pair * every
            more = every > rows * (self.chosen + 1) / 2
            time = np.where(more, self.index_prefill_us + among, time)
        return np.where(rows > 0, self.prefill_launch_us + time, 0.0)

    def one_us(self, sequences: float, context: float, rows: float, pairs: float) -> float:
        """Both phases of one layer, as `decode_us` and `prefill_us`, by plain numbers."""
        time = 0.0
        if sequences > 0:
            most = self.chosen or self.window
            seen = min(context, sequences * most) if most else context
            time = self.decode_launch_us + self.us_per_seen * (seen + self.extra_tokens * sequences)
            time += self.index_decode_us + self.us_per_indexed * context
        if rows > 0 and self.chosen and pairs > rows * (self.chosen + 1) / 2:
            time += self.prefill_launch_us + self.index_prefill_us
            time += self.us_per_choosing_row * rows + self.us_per_index_pair * pairs
        elif rows > 0:
            if self.window:
                length = max(2.0 * pairs / max(rows, 1.0) - 1.0, 1.0)
                inside = min(length, self.window)
                pairs = rows / length * (inside * (inside + 1) / 2 + (length - inside) * inside)
            a, b = self.us_per_row * rows, self.us_per_pair * pairs
            high, low = (a, b) if a > b else (b, a)
            share = (1.0 + (low / high) ** self.sharpness) ** (1.0 / self.sharpness)
            time += self.prefill_launch_us + high * share
        return time


def attention_terms(
    deployment: Deployment, dense: DenseModel
) -> tuple[tuple[AttentionTerms, ...], Kernel, Kernel]:
    """Terms of each kind of attention layer of a deployment, and the kernels of decodes and of
    prompts that they are from."""
    model, d = deployment.model, deployment
    spec = model.attention
    if spec.kind == "mla":
        return _latent_terms(deployment, dense)
    heads, kv_heads = spec.num_heads // d.tp, ceil(spec.num_kv_heads / d.tp)
    width = spec.head_dim
    decode = dense.attention_kernel("decode", width, d.kv_dtype)
    prefill = dense.attention_kernel("prefill", width, d.kv_dtype)
    read_us = 2.0 * kv_heads * width * _element_bytes(d) / decode.gb_per_s / 1e3
    arithmetic_us = 4.0 * heads * width / decode.tflops / 1e6
    seen = power_mean_max(np.array(read_us), np.array(arithmetic_us), decode.sharpness)
    windowed = set(spec.window_layer_ids) - set(spec.linear_layer_ids)
    kept = d.kv_window or 0
    inner = min(spec.window_tokens, kept) if kept else spec.window_tokens
    counts = [(kept, model.num_kv_layers - len(windowed)), (inner, len(windowed))]
    terms = tuple(
        AttentionTerms(
            num_layers=count,
            window=window,
            decode_launch_us=decode.launch_us,
            us_per_seen=float(seen),
            extra_tokens=decode.extra_tokens,
            prefill_launch_us=prefill.launch_us,
            us_per_row=4.0 * width * (heads + kv_heads) / prefill.gb_per_s / 1e3,
            us_per_pair=4.0 * heads * width / prefill.tflops / 1e6,
            sharpness=prefill.sharpness,
            us_per_repeat=arithmetic_us,
        )
        for window, count in counts
        if count
    )
    return terms, decode, prefill


def _latent_terms(
    deployment: Deployment, dense: DenseModel
) -> tuple[tuple[AttentionTerms, ...], Kernel, Kernel]:
    model, d = deployment.model, deployment
    spec = model.attention
    heads = spec.num_heads // d.tp
    decode = dense.mla_module("decode", d.dense_dtype, d.kv_dtype)
    prefill = dense.mla_module("prefill", d.dense_dtype, d.kv_dtype)
    latent, rope = spec.kv_lora_rank, spec.qk_rope_head_dim
    read_us = (latent + rope) * _element_bytes(d) / decode.kv_gb_per_s / 1e3
    arithmetic_us = 2.0 * heads * (2 * latent + rope) / decode.attention_tflops / 1e6
    seen = power_mean_max(np.array(read_us), np.array(arithmetic_us), decode.sharpness)
    width = spec.qk_nope_head_dim + rope + spec.v_head_dim
    terms = AttentionTerms(
        num_layers=model.num_kv_layers,
        window=d.kv_window or 0,
        decode_launch_us=decode.launch_us,
        us_per_seen=float(seen),
        extra_tokens=decode.extra_tokens,
        prefill_launch_us=prefill.launch_us,
        us_per_row=(4.0 * heads * width + 4.0 * model.hidden_size) / prefill.kv_gb_per_s / 1e3,
        us_per_pair=2.0 * heads * width / prefill.attention_tflops / 1e6,
        sharpness=prefill.sharpness,
        us_per_repeat=arithmetic_us,
    )
    return _among_chosen(terms, deployment, dense), decode, prefill


def _among_chosen(
    terms: AttentionTerms, deployment: Deployment, dense: DenseModel
) -> tuple[AttentionTerms, ...]:
    """Terms of layers that have an indexer, and of those that use another's choice. All keys are
    attended to where no kernel for it was measured, or a window is asked for."""
    spec, d = deployment.model.attention, deployment
    first = dense.indexed_module("decode", d.kv_dtype)
    prompts = dense.indexed_module("prefill", d.kv_dtype)
    if not spec.chosen_keys or d.kv_window or first is None or prompts is None:
        return (terms,)
    row_us = prompts.chosen_us(spec, spec.num_heads // d.tp)
    chosen = replace(terms, chosen=spec.chosen_keys, us_per_choosing_row=row_us)
    own = replace(
        chosen,
        num_layers=len(spec.index_layer_ids),
        index_decode_us=first.launch_us,
        us_per_indexed=first.index_us(spec),
        index_prefill_us=prompts.launch_us,
        us_per_index_pair=prompts.index_us(spec),
    )
    rest = terms.num_layers - own.num_layers
    return (own, replace(chosen, num_layers=rest)) if rest else (own,)


def _element_bytes(deployment: Deployment) -> float:
    return KV_ELEMENT_BYTES[deployment.kv_dtype] * deployment.kv_scale
