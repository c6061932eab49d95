"""What a Mixture-of-Experts model looks like, as far as placing and moving its experts goes.

`ModelSpec` holds shapes, never weights, and derives sizes from them. All parameter counts are of
weight matrices: norms, biases (those of GPT-OSS' experts too), attention sinks, rotary tables,
shared-expert gates, router correction biases and vision towers are ignored: under 1% of the total.
Multi-token-prediction layers (14B beside DeepSeek-V3's 671B) are counted apart, in `mtp_params`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moesim.errors import InputError
from moesim.model.attention import AttentionSpec, Cache, LayerKind
from moesim.model.checks import check_spec
from moesim.model.dtypes import KV_BYTES, TOKEN_BYTES, WEIGHT_BYTES, bytes_per

_WIDE_CLASSES = ("router", "tables", "other")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes of one Mixture-of-Experts model; see the module's docstring for what is ignored.

    moe_layer_ids: absolute numbers of the layers whose feed-forward part is routed experts; the
    other layers are dense with `dense_intermediate_size`, but for `no_ffn_layer_ids`, which have
    no feed-forward part. `hash_layer_ids`: MoE layers that choose experts by token id, without
    scores. `shared_intermediate_size` is the total width of the shared experts of one layer (0:
    none); `moe_dense_ffns` dense parts stand beside the experts of each MoE layer. `n_group`,
    `topk_group`: experts are in `n_group` groups and a token takes experts of at most `topk_group`
    of them (1, 1: no limit). `num_zero_experts`: further choices of the router that compute
    nothing. `expert_hidden_size`: width that experts read and write where it is not `hidden_size`
    (latent experts). `mtp_layers`, of which `mtp_moe_layers` have experts, are layers for
    predicting further tokens, `mtp_params` their weights without tables, `mtp_caches` what each
    keeps of every token. `other_params` are weights
    that `note` names. `expert_dtype` is the stored type of routed experts, `dense_dtype` that of
    most other projections; `stored` gives bytes per weight by class (TENSOR_CLASSES) where they
    are not those of these types. `ffn_matrices` is 3 for gate, up and down. `source` says where the
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
    hash_layer_ids: tuple[int, ...] = ()
    no_ffn_layer_ids: tuple[int, ...] = ()
    moe_dense_ffns: int = 0
    num_zero_experts: int = 0
    expert_hidden_size: int = 0
    mtp_layers: int = 0
    mtp_moe_layers: int = 0
    mtp_params: int = 0
    mtp_caches: tuple[Cache, ...] = ()
    other_params: int = 0
    stored: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_spec(self)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layer_ids)

    @property
    def num_dense_layers(self) -> int:
        """Layers whose feed-forward part is dense."""
        return self.num_hidden_layers - self.num_moe_layers - len(self.no_ffn_layer_ids)

    @property
    def num_mixing_layers(self) -> int:
        """Layers with attention or what stands in its place."""
        return self.num_hidden_layers - len(self.attention.absent_layer_ids)

    @property
    def real_top_k(self) -> int:
        """Experts per token that compute something: the mean where a router has zero experts."""
        share = self.num_experts / (self.num_experts + self.num_zero_experts)
        return max(1, round(self.top_k * share))

    @property
    def expert_hidden(self) -> int:
        """Width of what an expert reads and writes, and of a row on the wire."""
        return self.expert_hidden_size or self.hidden_size

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert: ffn_matrices x expert_hidden x moe_intermediate_size."""
        return self.ffn_matrices * self.expert_hidden * self.moe_intermediate_size

    def expert_bytes(self, dtype: str | None = None) -> int:
        """Bytes of one routed expert with its scales, as stored or in another weight dtype."""
        return round(self.expert_params * self.bytes_per_weight("experts", dtype))

    @property
    def expert_flops_per_token(self) -> int:
        """Floating-point operations of one expert on one token: 2 per weight. No activation."""
        return 2 * self.expert_params

    def token_bytes(self, dtype: str = "bf16") -> int:
        """Bytes of one token's row on the wire (TOKEN_BYTES), as dispatch sends it to experts."""
        return round(self.expert_hidden * bytes_per(TOKEN_BYTES, dtype))

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """All layers that mix tokens, by kind: weights, caches and state of each."""
        return self.attention.layer_kinds(self.num_hidden_layers, self.hidden_size)

    @property
    def num_kv_layers(self) -> int:
        """Attention blocks that keep a KV cache: one a layer, but for `attention.per_layer`."""
        cached = sum(len(kind.layer_ids) for kind in self.layer_kinds if kind.caches)
        return cached * self.attention.per_layer

    def kv_bytes_per_token(self, dtype: str = "bf16") -> int:
        """Bytes that one more token adds to the KV cache while it is shorter than any window.

        Keys of indexers included, in their own type; compressed entries by their share.
        """
        return round(self._growth(dtype, windows=True))

    def kv_bytes_per_token_beyond_windows(self, dtype: str = "bf16") -> int:
        """Bytes that one more token adds once every window is full."""
        return round(self._growth(dtype, windows=False))

    def mtp_kv_bytes_per_token(self, dtype: str = "bf16") -> int:
        """Bytes that all multi-token-prediction layers cache of one token."""
        element = bytes_per(KV_BYTES, dtype)
        each = sum(cache.entry_bytes(element) / cache.tokens_per_entry for cache in self.mtp_caches)
        return round(self.mtp_layers * each)

    def _growth(self, dtype: str, windows: bool) -> float:
        element = bytes_per(KV_BYTES, dtype)
        return sum(
            len(kind.layer_ids) * cache.entry_bytes(element) / cache.tokens_per_entry
            for kind in self.layer_kinds
            for cache in kind.caches
            if windows or not cache.window
        )

    def kv_bytes(self, context_tokens: int, dtype: str = "bf16") -> int:
        """Bytes of the KV cache of one request of `context_tokens`, without `state_bytes`.

        Layers with a sliding window keep at most that many tokens. Chunked attention is counted
        in full, page rounding is ignored.
        """
        if context_tokens < 0:
            raise InputError(f"context_tokens is {context_tokens}", "give a length of 0 or more")
        element = bytes_per(KV_BYTES, dtype)
        return round(
            sum(
                len(kind.layer_ids) * cache.entries(context_tokens) * cache.entry_bytes(element)
                for kind in self.layer_kinds
                for cache in kind.caches
            )
        )

    @property
    def state_bytes(self) -> int:
        """Bytes that one sequence keeps whatever its length: linear attention, state spaces."""
        return sum(len(kind.layer_ids) * kind.state_bytes for kind in self.layer_kinds)

    @property
    def embedding_params(self) -> int:
        """Weights of the input embedding table: vocab_size x hidden_size."""
        return self.vocab_size * self.hidden_size

    @property
    def lm_head_params(self) -> int:
        """Weights of the output head; 0 where it is the embedding table (tied)."""
        return 0 if self.tie_word_embeddings else self.embedding_params

    @property
    def lookup_params(self) -> int:
        """Weights of the embedding table where it is looked up only, not the output head too."""
        return 0 if self.tie_word_embeddings else self.embedding_params

    @property
    def router_params(self) -> int:
        """Weights of one layer's router: hidden_size x choices, zero experts among them."""
        return self.hidden_size * (self.num_experts + self.num_zero_experts)

    @property
    def shared_expert_params(self) -> int:
        """Weights of all shared experts of one MoE layer."""
        return self.ffn_matrices * self.hidden_size * self.shared_intermediate_size

    @property
    def dense_ffn_params(self) -> int:
        """Weights of one dense feed-forward part."""
        return self.ffn_matrices * self.hidden_size * self.dense_intermediate_size

    @property
    def num_dense_ffns(self) -> int:
        """Dense feed-forward parts of all layers, those beside experts included."""
        return self.num_dense_layers + self.moe_dense_ffns * self.num_moe_layers

    @property
    def latent_params(self) -> int:
        """Weights of one MoE layer's projections into the experts' latent space and back."""
        return 2 * self.hidden_size * self.expert_hidden_size

    @property
    def mtp_expert_params(self) -> int:
        """Weights of the routed experts among `mtp_params`."""
        return self.mtp_moe_layers * self.num_experts * self.expert_params

    @property
    def mtp_window(self) -> int:
        """Tokens that a multi-token-prediction layer attends to, 0 for all."""
        windows = [cache.window for cache in self.mtp_caches]
        return max(windows) if windows and all(windows) else 0

    @property
    def attention_params(self) -> int:
        """Weights of all layers' attention, and of what stands in its place."""
        return sum(len(kind.layer_ids) * kind.params for kind in self.layer_kinds)

    @property
    def routed_expert_params(self) -> int:
        """Weights of all routed experts of all layers."""
        return self.num_moe_layers * self.num_experts * self.expert_params

    @property
    def params_by_class(self) -> dict[str, int]:
        """All weights, by class (TENSOR_CLASSES); multi-token-prediction layers left out."""
        layers = self.num_moe_layers
        return {
            "experts": self.routed_expert_params,
            "attention": self.attention_params,
            "shared": layers * self.shared_expert_params,
            "dense": self.num_dense_ffns * self.dense_ffn_params,
            "latent": layers * self.latent_params,
            "router": layers * self.router_params,
            "tables": self.embedding_params + self.lm_head_params,
            "other": self.other_params,
        }

    @property
    def non_expert_params(self) -> int:
        """All weights that every token uses: all but the routed experts, both tables included."""
        return sum(self.params_by_class.values()) - self.routed_expert_params

    @property
    def total_params(self) -> int:
        return self.non_expert_params + self.routed_expert_params

    @property
    def active_params(self) -> int:
        """Weights that one token uses, with the input embedding table and the output head.

        Where a router has zero experts, the mean over choices taken evenly. Most model cards count
        so. Those of GPT-OSS and DeepSeek-V2-Lite leave the embedding table out (subtract
        `lookup_params`), those of GLM-4.5 and MiniMax-M2 both tables.
        """
        real = self.top_k * self.num_experts / (self.num_experts + self.num_zero_experts)
        return self.non_expert_params + round(self.num_moe_layers * real * self.expert_params)

    def bytes_per_weight(self, tensor_class: str, dtype: str | None = None) -> float:
        """Bytes per weight of a class, scales included: as stored, or in another type.

        `dtype` stands for `expert_dtype` of the experts and `dense_dtype` of all others; routers,
        tables and the rest have 16 bits or more where the checkpoint does not say otherwise.
        """
        own = self.expert_dtype if tensor_class == "experts" else self.dense_dtype
        if dtype in (None, own):
            stored = dict(self.stored).get(tensor_class)
            if stored is not None:
                return stored
        value = bytes_per(WEIGHT_BYTES, dtype or own)
        return max(2.0, value) if tensor_class in _WIDE_CLASSES else value

    def non_expert_bytes(self) -> int:
        """Bytes of `non_expert_params` as stored."""
        return round(
            sum(
                count * self.bytes_per_weight(name)
                for name, count in self.params_by_class.items()
                if name != "experts"
            )
        )

    def weight_bytes(self) -> int:
        """Bytes of all weights as stored, without multi-token-prediction layers."""
        experts = self.num_moe_layers * self.num_experts * self.expert_bytes()
        return self.non_expert_bytes() + experts

    def to_dict(self) -> dict[str, Any]:
        """Fields and, under "derived", the sizes that follow from them; ready for JSON."""
        fields = asdict(self)
        fields["derived"] = {
            "num_moe_layers": self.num_moe_layers,
            "total_params": self.total_params,
            "active_params": self.active_params,
            "active_params_without_embedding": self.active_params - self.lookup_params,
            "active_params_without_tables": self.active_params
            - self.embedding_params
            - self.lm_head_params,
            "routed_expert_params": self.routed_expert_params,
            "non_expert_params": self.non_expert_params,
            "embedding_params": self.embedding_params,
            "params_by_class": self.params_by_class,
            "expert_params": self.expert_params,
            "expert_flops_per_token": self.expert_flops_per_token,
            "expert_bytes": {dtype: self.expert_bytes(dtype) for dtype in WEIGHT_BYTES},
            "token_bytes": {dtype: self.token_bytes(dtype) for dtype in TOKEN_BYTES},
            "kv_bytes_per_token": {dtype: self.kv_bytes_per_token(dtype) for dtype in KV_BYTES},
            "kv_bytes_per_token_beyond_windows": {
                dtype: self.kv_bytes_per_token_beyond_windows(dtype) for dtype in KV_BYTES
            },
            "state_bytes": self.state_bytes,
            "non_expert_bytes": self.non_expert_bytes(),
            "weight_bytes": self.weight_bytes(),
        }
        return fields
