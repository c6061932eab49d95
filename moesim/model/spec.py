"""What a Mixture-of-Experts model looks like, as far as placing and moving its experts goes.

`ModelSpec` and `AttentionSpec` hold shapes, never weights, and derive sizes from them. All
parameter counts are of weight matrices: norms, biases (those of GPT-OSS' experts too), attention
sinks, rotary tables, shared-expert gates, router correction biases, multi-token-prediction layers
and vision towers are ignored. All but the multi-token-prediction layers (one or more further MoE
layers: 14B beside DeepSeek-V3's 671B) are under 1% of the total.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moesim.errors import FormatError, InputError, UnknownNameError

WEIGHT_BYTES: Mapping[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0 + 4 / (128 * 128),
    "mxfp4": (4 + 8 / 32) / 8,
    "nvfp4": (4 + 8 / 16) / 8,
    "int4": (4 + 16 / 32) / 8,
}
"""Bytes per weight with its scales: fp8 has one fp32 scale for each 128 x 128 block (DeepSeek-V3
report, arXiv:2412.19437, section 3.3), mxfp4 one 8-bit scale for 32 weights (OCP Microscaling
Formats v1.0, section 5: 4.25 bits), nvfp4 one 8-bit scale for 16 (4.5 bits; its one fp32 scale a
tensor is ignored), int4 one 16-bit scale for 32 (4.5 bits, as Kimi-K2.5's config.json)."""

TOKEN_BYTES: Mapping[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0 + 4 / 128,
    "nvfp4": (4 + 8 / 16) / 8,
}
"""Bytes per element of a hidden state on the wire: fp8 carries one fp32 scale for 128 channels, as
DeepEP's dispatch (vLLM quantises its input in chunks of 128: DEEPEP_QUANT_BLOCK_SIZE)."""

KV_BYTES: Mapping[str, float] = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
"""Bytes per element of the KV cache; an fp8 cache with one scale a tensor."""

MAX_LAYERS = 4096
MAX_EXPERTS = 32767
MAX_SIZE = 1 << 24
"""Upper limits of layer count, expert count (trace ids are int16 at the smallest) and any width."""


def bytes_per(table: Mapping[str, float], dtype: str) -> float:
    """Bytes per element of `dtype` in one of the tables above; UnknownNameError otherwise."""
    if dtype not in table:
        raise UnknownNameError("dtype", str(dtype), table)
    return table[dtype]


def _check_int(owner: str, field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(
            f"{owner}: {field} is {type(value).__name__} {value!r:.60}, not a whole number",
            f"give {field} as an integer from {low} to {high}",
        )
    if not low <= value <= high:
        shown = str(value) if abs(value) < 10**20 else "a number of over 20 digits"
        raise FormatError(
            f"{owner}: {field} is {shown}, outside {low} to {high}",
            f"give {field} as an integer from {low} to {high}",
        )


def _check_layer_ids(owner: str, field: str, ids: object, num_layers: int) -> None:
    if not isinstance(ids, tuple):
        raise FormatError(f"{owner}: {field} is not a tuple", f"give {field} as a tuple of layers")
    previous = -1
    for layer in ids:
        _check_int(owner, field, layer, 0, num_layers - 1)
        if layer <= previous:
            raise FormatError(
                f"{owner}: {field} is not strictly increasing at layer {layer}",
                f"list every layer of {field} once, in order",
            )
        previous = layer


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Attention of one model.

    kind: "gqa" (grouped-query; multi-head when num_kv_heads == num_heads) or "mla" (multi-head
    latent, DeepSeek-V2, arXiv:2405.04434, section 2.1). `head_dim` is the width of a query or key
    head; for mla it is qk_nope_head_dim + qk_rope_head_dim. q_lora_rank 0 means that queries are
    not compressed. `window_layer_ids` are the layers with a sliding window of `window_tokens`
    (0: no window anywhere). `linear_layer_ids` are layers of linear attention, which keep a state
    of constant size instead of a KV cache; each has `linear_layer_params` weights. `note` says
    what else a reader should know (chunked attention, estimates).
    """

    kind: Literal["gqa", "mla"]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    window_tokens: int = 0
    window_layer_ids: tuple[int, ...] = ()
    linear_layer_ids: tuple[int, ...] = ()
    linear_layer_params: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        owner = "attention"
        if self.kind not in ("gqa", "mla"):
            raise FormatError(f"attention kind is {self.kind!r:.60}", "give 'gqa' or 'mla'")
        for field in ("num_heads", "num_kv_heads", "head_dim"):
            _check_int(owner, field, getattr(self, field), 1, MAX_SIZE)
        latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        low = 1 if self.kind == "mla" else 0
        for field in latent:
            _check_int(owner, field, getattr(self, field), low, MAX_SIZE)
        _check_int(owner, "q_lora_rank", self.q_lora_rank, 0, MAX_SIZE)
        _check_int(owner, "window_tokens", self.window_tokens, 0, 1 << 31)
        if self.num_heads % self.num_kv_heads:
            raise FormatError(
                f"attention: num_heads {self.num_heads} is no multiple of "
                f"num_kv_heads {self.num_kv_heads}",
                "each KV head serves the same number of query heads",
            )
        if bool(self.window_tokens) != bool(self.window_layer_ids):
            raise FormatError(
                "attention: window_tokens and window_layer_ids must both be given or both left out",
                "give the window's length and the layers that have it",
            )

    def layer_params(self, hidden_size: int) -> int:
        """Weights of one softmax-attention layer: query, key, value and output projections."""
        if self.kind == "gqa":
            return 2 * hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        query_width = self.num_heads * self.head_dim
        query = (
            self.q_lora_rank * (hidden_size + query_width)
            if self.q_lora_rank
            else hidden_size * query_width
        )
        compress = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
        expand = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + compress + expand + self.num_heads * self.v_head_dim * hidden_size

    @property
    def kv_elements_per_layer(self) -> int:
        """Cached elements of one token in one layer: keys and values, or the latent for mla."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes of one Mixture-of-Experts model; see the module's docstring for what is ignored.

    moe_layer_ids: absolute numbers of the layers whose feed-forward part is routed experts; the
    other layers are dense with `dense_intermediate_size`. `shared_intermediate_size` is the total
    width of the shared experts of one layer (0: none). `n_group`, `topk_group`: experts are in
    `n_group` groups and a token takes experts of at most `topk_group` of them (1, 1: no limit).
    `expert_dtype` is the stored type of routed experts, `dense_dtype` that of attention, dense
    layers and shared experts. `ffn_matrices` is 3 for gate, up and down. `source` says where the
    numbers came from, `architecture` is the Hugging Face model type, `note` what was assumed.

    Raises FormatError that names the field if the numbers are impossible.
    """

    name: str
    source: str
    num_hidden_layers: int
    moe_layer_ids: tuple[int, ...]
    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    vocab_size: int
    attention: AttentionSpec
    num_shared_experts: int = 0
    shared_intermediate_size: int = 0
    dense_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    expert_dtype: str = "bf16"
    dense_dtype: str = "bf16"
    ffn_matrices: int = 3
    tie_word_embeddings: bool = False
    architecture: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        owner = f"model {self.name!r:.80}"
        _check_int(owner, "num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)
        _check_int(owner, "num_experts", self.num_experts, 1, MAX_EXPERTS)
        _check_int(owner, "ffn_matrices", self.ffn_matrices, 2, 3)
        for field in ("hidden_size", "moe_intermediate_size", "top_k", "vocab_size", "n_group"):
            _check_int(owner, field, getattr(self, field), 1, MAX_SIZE)
        _check_int(owner, "topk_group", self.topk_group, 1, self.n_group)
        for field in ("num_shared_experts", "shared_intermediate_size", "dense_intermediate_size"):
            _check_int(owner, field, getattr(self, field), 0, MAX_SIZE)
        layers = self.num_hidden_layers
        _check_layer_ids(owner, "moe_layer_ids", self.moe_layer_ids, layers)
        _check_layer_ids(owner, "window_layer_ids", self.attention.window_layer_ids, layers)
        _check_layer_ids(owner, "linear_layer_ids", self.attention.linear_layer_ids, layers)
        if not self.moe_layer_ids:
            raise FormatError(f"{owner}: no layer has experts", "list its MoE layers")
        if self.top_k > self.num_experts:
            raise FormatError(
                f"{owner}: top_k {self.top_k} is more than num_experts {self.num_experts}",
                "a token cannot choose more experts than there are: check the experts per token",
            )
        if self.num_experts % self.n_group:
            raise FormatError(
                f"{owner}: n_group {self.n_group} does not divide num_experts {self.num_experts}",
                "expert groups have equal sizes: check n_group",
            )
        reachable = self.topk_group * (self.num_experts // self.n_group)
        if self.top_k > reachable:
            raise FormatError(
                f"{owner}: top_k {self.top_k} is more than the {reachable} experts in "
                f"topk_group {self.topk_group} groups",
                "check topk_group and n_group",
            )
        if self.num_moe_layers < layers and not self.dense_intermediate_size:
            raise FormatError(
                f"{owner}: has dense layers but dense_intermediate_size is 0",
                "give the width of the dense layers",
            )
        if bool(self.num_shared_experts) != bool(self.shared_intermediate_size):
            raise FormatError(
                f"{owner}: num_shared_experts {self.num_shared_experts} does not fit "
                f"shared_intermediate_size {self.shared_intermediate_size}",
                "give both or neither",
            )
        bytes_per(WEIGHT_BYTES, self.expert_dtype)
        bytes_per(WEIGHT_BYTES, self.dense_dtype)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layer_ids)

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert: ffn_matrices x hidden_size x moe_intermediate_size."""
        return self.ffn_matrices * self.hidden_size * self.moe_intermediate_size

    def expert_bytes(self, dtype: str | None = None) -> int:
        """Bytes of one routed expert with its scales, as stored or in another weight dtype."""
        return round(self.expert_params * bytes_per(WEIGHT_BYTES, dtype or self.expert_dtype))

    @property
    def expert_flops_per_token(self) -> int:
        """Floating-point operations of one expert on one token: 2 per weight. No activation."""
        return 2 * self.expert_params

    def token_bytes(self, dtype: str = "bf16") -> int:
        """Bytes of one token's hidden state on the wire (TOKEN_BYTES), as dispatch sends it."""
        return round(self.hidden_size * bytes_per(TOKEN_BYTES, dtype))

    @property
    def num_kv_layers(self) -> int:
        """Layers that keep a KV cache: all but those of linear attention."""
        return self.num_hidden_layers - len(self.attention.linear_layer_ids)

    def kv_bytes_per_token(self, dtype: str = "bf16") -> int:
        """Bytes that one more token adds to the KV cache while it is shorter than any window."""
        elements = self.num_kv_layers * self.attention.kv_elements_per_layer
        return round(elements * bytes_per(KV_BYTES, dtype))

    def kv_bytes(self, context_tokens: int, dtype: str = "bf16") -> int:
        """Bytes of the KV cache of one request of `context_tokens`.

        Layers with a sliding window keep at most that many tokens. Chunked attention is counted
        in full, page rounding and the state of linear layers are ignored.
        """
        if context_tokens < 0:
            raise InputError(f"context_tokens is {context_tokens}", "give a length of 0 or more")
        attention = self.attention
        num_windowed = len(set(attention.window_layer_ids) - set(attention.linear_layer_ids))
        in_window = min(context_tokens, attention.window_tokens)
        tokens = (self.num_kv_layers - num_windowed) * context_tokens + num_windowed * in_window
        return round(tokens * attention.kv_elements_per_layer * bytes_per(KV_BYTES, dtype))

    @property
    def embedding_params(self) -> int:
        """Weights of the input embedding table: vocab_size x hidden_size."""
        return self.vocab_size * self.hidden_size

    @property
    def lm_head_params(self) -> int:
        """Weights of the output head; 0 where it is the embedding table (tied)."""
        return 0 if self.tie_word_embeddings else self.embedding_params

    @property
    def router_params(self) -> int:
        """Weights of one layer's router: hidden_size x num_experts."""
        return self.hidden_size * self.num_experts

    @property
    def shared_expert_params(self) -> int:
        """Weights of all shared experts of one MoE layer."""
        return self.ffn_matrices * self.hidden_size * self.shared_intermediate_size

    @property
    def dense_ffn_params(self) -> int:
        """Weights of the feed-forward part of one dense layer."""
        return self.ffn_matrices * self.hidden_size * self.dense_intermediate_size

    @property
    def attention_params(self) -> int:
        """Attention weights of all layers."""
        attention = self.attention
        softmax = self.num_kv_layers * attention.layer_params(self.hidden_size)
        return softmax + len(attention.linear_layer_ids) * attention.linear_layer_params

    @property
    def routed_expert_params(self) -> int:
        """Weights of all routed experts of all layers."""
        return self.num_moe_layers * self.num_experts * self.expert_params

    @property
    def _quantised_dense_params(self) -> int:
        num_dense = self.num_hidden_layers - self.num_moe_layers
        shared = self.num_moe_layers * self.shared_expert_params
        return self.attention_params + shared + num_dense * self.dense_ffn_params

    @property
    def non_expert_params(self) -> int:
        """All weights that every token uses: all but the routed experts, both tables included."""
        tables = self.embedding_params + self.lm_head_params
        return self._quantised_dense_params + self.num_moe_layers * self.router_params + tables

    @property
    def total_params(self) -> int:
        return self.non_expert_params + self.routed_expert_params

    @property
    def active_params(self) -> int:
        """Weights that one token uses, with the input embedding table and the output head.

        Most model cards count so. Those of GPT-OSS and DeepSeek-V2-Lite leave the embedding table
        out (subtract `embedding_params`), those of GLM-4.5 and MiniMax-M2 both tables.
        """
        return self.non_expert_params + self.num_moe_layers * self.top_k * self.expert_params

    def non_expert_bytes(self) -> int:
        """Bytes of `non_expert_params`; routers and both tables at 16 bits or more."""
        dense = bytes_per(WEIGHT_BYTES, self.dense_dtype)
        rest = self.non_expert_params - self._quantised_dense_params
        return round(self._quantised_dense_params * dense + rest * max(2.0, dense))

    def weight_bytes(self) -> int:
        """Bytes of all weights as stored."""
        experts = self.num_moe_layers * self.num_experts * self.expert_bytes()
        return self.non_expert_bytes() + experts

    def to_dict(self) -> dict[str, Any]:
        """Fields and, under "derived", the sizes that follow from them; ready for JSON."""
        fields = asdict(self)
        fields["derived"] = {
            "num_moe_layers": self.num_moe_layers,
            "total_params": self.total_params,
            "active_params": self.active_params,
            "routed_expert_params": self.routed_expert_params,
            "non_expert_params": self.non_expert_params,
            "embedding_params": self.embedding_params,
            "expert_params": self.expert_params,
            "expert_flops_per_token": self.expert_flops_per_token,
            "expert_bytes": {dtype: self.expert_bytes(dtype) for dtype in WEIGHT_BYTES},
            "token_bytes": {dtype: self.token_bytes(dtype) for dtype in TOKEN_BYTES},
            "kv_bytes_per_token": {dtype: self.kv_bytes_per_token(dtype) for dtype in KV_BYTES},
            "non_expert_bytes": self.non_expert_bytes(),
            "weight_bytes": self.weight_bytes(),
        }
        return fields
