"""What mixes tokens in one layer: its weight matrices by name, its caches, its state.

A builder a kind. Shapes are those of the modelling files named in each docstring
(transformers: huggingface/transformers, src/transformers/models/; vllm: vllm-project/vllm,
vllm/model_executor/). Biases, norms and per-head vectors are left out. Names are those of the
checkpoint's tensors, since quantisation refers to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moesim.model.attention import Cache

INDEX_KEY_BYTES = 1.0 + 4 / 128
"""Bytes per element of an indexer's cached keys: fp8 with one fp32 scale for 128 (132 bytes for
DeepSeek-V3.2's 128; vllm/v1/attention/backends/mla/indexer.py)."""
STATE_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
CONV_BYTES = 2
"""Convolution states are kept in the activations' 16 bits; recurrent states in 32 bits where the
file does not say otherwise (what SGLang does; vLLM follows mamba_ssm_cache_dtype)."""


@dataclass(frozen=True)
class Tensor:
    """One weight matrix: names it goes by below its module, and its weights.

    `quantised` False: kept in 16 bits or more by every method unless a file names it.
    """

    names: tuple[str, ...]
    params: int
    quantised: bool = True


@dataclass(frozen=True)
class Mixer:
    """One layer's attention or what stands in its place. `softmax`: fields of AttentionSpec."""

    name: str
    role: Literal["full", "window", "linear"]
    module: str
    tensors: tuple[Tensor, ...]
    caches: tuple[Cache, ...] = ()
    state_bytes: int = 0
    window: int = 0
    softmax: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def params(self) -> int:
        return sum(tensor.params for tensor in self.tensors)


@dataclass(frozen=True)
class Indexer:
    """Chooses which keys a query sees, `chosen` of them where timed (0: not); `query_width`: what
    its queries are projected from."""

    heads: int
    head_dim: int
    query_width: int
    kv_typed: bool = False
    weights: bool = True
    chosen: int = 0

    def tensors(self, hidden: int) -> tuple[Tensor, ...]:
        """DeepSeek-V3.2 (transformers/deepseek_v32): wq_b, wk, weights_proj; MiniMax-M3 has no
        weights_proj (sglang: python/sglang/srt/models/minimax_m3.py)."""
        query = ("indexer.wq_b", "index_q_proj")
        out = [
            Tensor(query, self.query_width * self.heads * self.head_dim),
            Tensor(("indexer.wk", "index_k_proj"), hidden * self.head_dim),
        ]
        if self.weights:
            names = ("indexer.weights_proj", "indexers_proj")
            out.append(Tensor(names, hidden * self.heads, False))
        return tuple(out)

    @property
    def cache(self) -> Cache:
        return Cache(self.head_dim, element_bytes=0.0 if self.kv_typed else INDEX_KEY_BYTES)


def grouped(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    value_dim: int = 0,
    window: int = 0,
    gate_width: int = 0,
    gate_in_query: bool = False,
    value_is_key: bool = False,
    caches: bool = True,
    module: str = "self_attn",
    indexer: Indexer | None = None,
    name: str = "",
) -> Mixer:
    """Grouped-query attention. gate_width: a projection that gates the output; gate_in_query: the
    query projection has that gate too (qwen3_next). value_is_key: no value weights, values are
    cached all the same (gemma4). caches False: keys and values of an earlier layer are read."""
    value = value_dim or head_dim
    query = hidden * heads * head_dim
    fused = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")
    tensors = [Tensor(("q_proj", *fused), query * (2 if gate_in_query else 1))]
    if caches:
        tensors.append(Tensor(("k_proj", *fused), hidden * kv_heads * head_dim))
        if not value_is_key:
            tensors.append(Tensor(("v_proj", *fused), hidden * kv_heads * value))
    tensors.append(Tensor(("o_proj", "out_proj", "dense"), heads * value * hidden))
    if gate_width:
        tensors.append(Tensor(("g_proj", "gate_proj"), hidden * gate_width))
    kept = [Cache(kv_heads * (head_dim + value), kv_heads, window)] if caches else []
    if indexer is not None:
        tensors += indexer.tensors(hidden)
        kept.append(indexer.cache)
    softmax = {
        "kind": "gqa",
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "v_head_dim": value_dim if value_dim != head_dim else 0,
    }
    return Mixer(
        name or ("sliding window" if window else "full attention"),
        "window" if window else "full",
        module,
        tuple(tensors),
        tuple(kept),
        window=window,
        softmax=softmax,
    )


def latent(
    hidden: int,
    heads: int,
    *,
    q_rank: int,
    kv_rank: int,
    nope: int,
    rope: int,
    value: int,
    gate_width: int = 0,
    indexer: Indexer | None = None,
    blocks: int = 1,
    name: str = "latent attention",
) -> Mixer:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1; transformers/
    deepseek_v3). gate_width: a projection that gates the output (Kimi-K3: every channel; Ling 3.0:
    a number a head). blocks: attention blocks in one layer (LongCat)."""
    width = nope + rope
    if q_rank:
        fused = "fused_qkv_a_proj_with_mqa"
        tensors = [
            Tensor(("q_a_proj", fused), hidden * q_rank),
            Tensor(("q_b_proj",), q_rank * heads * width),
        ]
    else:
        tensors = [Tensor(("q_proj",), hidden * heads * width)]
    tensors += [
        Tensor(("kv_a_proj_with_mqa", "fused_qkv_a_proj_with_mqa"), hidden * (kv_rank + rope)),
        Tensor(("kv_b_proj",), kv_rank * heads * (nope + value)),
        Tensor(("o_proj", "dense"), heads * value * hidden),
    ]
    if gate_width:
        tensors.append(Tensor(("g_proj",), hidden * gate_width))
    kept = [Cache(kv_rank + rope)]
    if indexer is not None:
        tensors += indexer.tensors(hidden)
        kept.append(indexer.cache)
    softmax = {
        "kind": "mla",
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width,
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "per_layer": blocks,
    }
    if indexer is not None:
        sizes = {"index_heads": indexer.heads, "index_head_dim": indexer.head_dim}
        softmax |= {"chosen_keys": indexer.chosen, **sizes}
    many = tuple(
        Tensor((*t.names, *(f"0.{name}" for name in t.names)), t.params * blocks, t.quantised)
        if blocks > 1
        else t
        for t in tensors
    )
    return Mixer(name, "full", "self_attn", many, tuple(kept) * blocks, softmax=softmax)


def compressed(
    hidden: int,
    heads: int,
    head_dim: int,
    *,
    rope: int,
    q_rank: int,
    o_rank: int,
    o_groups: int,
    window: int,
    ratio: int,
    indexer: Indexer | None,
) -> Mixer:
    """DeepSeek-V4: one key that is its own value for all heads, kept for a window, and compressed
    entries of `ratio` tokens (0: none) for all the past (transformers/deepseek_v4). With an
    indexer the compressor works on overlapping groups, so that its projections are twice as wide;
    the indexer has a compressor of its own. Compressors' half-full groups are left out."""
    tensors = [
        Tensor(("wq_a", "q_a_proj"), hidden * q_rank),
        Tensor(("wq_b", "q_b_proj"), q_rank * heads * head_dim),
        Tensor(("wkv", "kv_proj"), hidden * head_dim),
        Tensor(("wo_a", "o_a_proj"), heads * head_dim * o_rank),
        Tensor(("wo_b", "o_b_proj"), o_groups * o_rank * hidden),
    ]
    kept = [Cache(head_dim, window=window)]
    if ratio:
        overlap = 2 if indexer is not None else 1
        tensors.append(
            Tensor(("compressor.wkv", "compressor.wgate"), 2 * hidden * overlap * head_dim, False)
        )
        kept.append(Cache(head_dim, tokens_per_entry=ratio))
    if indexer is not None:
        own = 4 * hidden * indexer.head_dim
        tensors.append(Tensor(("indexer.compressor.wkv", "indexer.compressor.wgate"), own, False))
        query = indexer.query_width * indexer.heads * indexer.head_dim
        tensors.append(Tensor(("indexer.wq_b",), query))
        tensors.append(Tensor(("indexer.weights_proj",), hidden * indexer.heads, False))
        key = Cache(indexer.head_dim, tokens_per_entry=ratio, element_bytes=INDEX_KEY_BYTES)
        kept.append(key)
    softmax = {
        "kind": "mla",
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "q_lora_rank": q_rank,
        "kv_lora_rank": head_dim - rope,
        "qk_nope_head_dim": head_dim - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": head_dim,
        "shared_kv": True,
        "o_lora_rank": o_rank,
        "o_groups": o_groups,
    }
    name = f"window and 1/{ratio} compressed" if ratio else "sliding window"
    return Mixer(name, "full", "attn", tuple(tensors), tuple(kept), window=window, softmax=softmax)


def gated_delta(
    hidden: int,
    *,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    kernel: int,
    state_element: int,
) -> Mixer:
    """Gated DeltaNet (transformers/qwen3_next, qwen3_5_moe): projections of queries, keys, values
    and gate; of two numbers a value head; a convolution over queries, keys and values; output."""
    keys, values = key_heads * key_dim, value_heads * value_dim
    channels = 2 * keys + values
    tensors = (
        Tensor(("in_proj_qkv", "in_proj_qkvz"), hidden * channels),
        Tensor(("in_proj_z", "in_proj_qkvz"), hidden * values),
        Tensor(("in_proj_b", "in_proj_a", "in_proj_ba"), hidden * 2 * value_heads, False),
        Tensor(("conv1d",), channels * kernel, False),
        Tensor(("out_proj",), values * hidden),
    )
    state = channels * (kernel - 1) * CONV_BYTES + value_heads * key_dim * value_dim * state_element
    return Mixer("gated DeltaNet", "linear", "linear_attn", tensors, state_bytes=state)


def kimi_delta(
    hidden: int,
    heads: int,
    head_dim: int,
    kernel: int,
    *,
    full_gate: bool = False,
    full_decay: bool = False,
) -> Mixer:
    """Kimi Delta Attention (arXiv:2510.26692; vllm: models/kimi_linear.py, layers/kda.py): queries,
    keys, values with a convolution each, a decay of low rank (full rank in Ling 3.0), one number a
    head, an output gate of low rank (full rank in Kimi-K3 and Ling 3.0), output. The recurrent
    state is kept in 32 bits."""
    width = heads * head_dim
    low_rank = hidden * head_dim + head_dim * width
    gate = hidden * width if full_gate else low_rank
    decay = hidden * width if full_decay else low_rank
    tensors = (
        Tensor(("q_proj",), hidden * width),
        Tensor(("k_proj",), hidden * width),
        Tensor(("v_proj",), hidden * width),
        Tensor(("f_proj", "f_a_proj", "f_b_proj"), decay),
        Tensor(("g_proj", "g_a_proj", "g_b_proj"), gate),
        Tensor(("b_proj",), hidden * heads),
        Tensor(("q_conv1d", "k_conv1d", "v_conv1d"), 3 * width * kernel, False),
        Tensor(("o_proj",), width * hidden),
    )
    state = 3 * width * (kernel - 1) * CONV_BYTES + heads * head_dim * head_dim * 4
    return Mixer("Kimi Delta Attention", "linear", "self_attn", tensors, state_bytes=state)


def lightning(hidden: int, heads: int, head_dim: int, module: str = "self_attn") -> Mixer:
    """Lightning attention (MiniMax-01, arXiv:2501.08313; vllm: models/minimax_text_01.py,
    bailing_moe_linear.py): queries, keys and values of all heads, output gate, output; a matrix a
    head in 32 bits."""
    width = heads * head_dim
    tensors = (
        Tensor(("qkv_proj", "query_key_value"), 3 * hidden * width),
        Tensor(("output_gate", "g_proj"), hidden * width),
        Tensor(("out_proj", "o_proj", "dense"), width * hidden),
    )
    state = heads * head_dim * head_dim * 4
    return Mixer("lightning attention", "linear", module, tensors, state_bytes=state)


def short_convolution(hidden: int, kernel: int) -> Mixer:
    """A gated convolution (transformers/lfm2): projection to two gates and a channel, convolution,
    output."""
    tensors = (
        Tensor(("in_proj",), 3 * hidden * hidden),
        Tensor(("conv",), hidden * kernel, False),
        Tensor(("out_proj",), hidden * hidden),
    )
    state = hidden * (kernel - 1) * CONV_BYTES
    return Mixer("short convolution", "linear", "conv", tensors, state_bytes=state)


def mamba2(
    hidden: int,
    *,
    heads: int,
    head_dim: int,
    groups: int,
    state_size: int,
    kernel: int,
    state_element: int,
    module: str,
) -> Mixer:
    """Mamba-2 (transformers/nemotron_h, granitemoehybrid): one projection to gate, convolved
    channels and a step a head; convolution; output."""
    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    tensors = (
        Tensor(("in_proj",), hidden * (inner + channels + heads)),
        Tensor(("conv1d",), channels * kernel, False),
        Tensor(("out_proj",), inner * hidden),
    )
    state = channels * (kernel - 1) * CONV_BYTES + inner * state_size * state_element
    return Mixer("Mamba-2", "linear", module, tensors, state_bytes=state)


def mamba1(
    hidden: int, *, inner: int, state_size: int, kernel: int, rank: int, module: str
) -> Mixer:
    """Mamba (transformers/jamba): projection to channels and gate, convolution, projection to step,
    B and C, the step's expansion, A, output."""
    tensors = (
        Tensor(("in_proj",), hidden * 2 * inner),
        Tensor(("conv1d",), inner * kernel, False),
        Tensor(("x_proj",), inner * (rank + 2 * state_size)),
        Tensor(("dt_proj",), rank * inner),
        Tensor(("A_log",), inner * state_size, False),
        Tensor(("out_proj",), inner * hidden),
    )
    state = inner * (kernel - 1) * CONV_BYTES + inner * state_size * 4
    return Mixer("Mamba", "linear", module, tensors, state_bytes=state)
