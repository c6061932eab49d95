"""Attention of a model: the softmax layers that time models use, and every kind of layer's sizes.

`AttentionSpec` describes the main softmax layers. Where all layers are such layers, with a window
or without, or linear layers of one size, that is all; other models list their layers by kind
(`LayerKind`: weights, caches and state of each), and sizes come from the kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesim.errors import FormatError
from moesim.model.checks import MAX_PARAMS, MAX_SIZE, check_int


@dataclass(frozen=True, slots=True)
class Cache:
    """One thing that a layer keeps of every token: `elements` numbers an entry.

    An entry stands for `tokens_per_entry` tokens (more than 1: compressed keys) and is kept for
    the last `window` tokens (0: for all). `heads`: KV heads that tensor parallelism can cut it
    over, 0 where every rank holds it whole. `element_bytes`: 0 for the KV cache's own type, else
    fixed, as for the fp8 keys of a sparse-attention indexer.
    """

    elements: int
    heads: int = 0
    window: int = 0
    tokens_per_entry: int = 1
    element_bytes: float = 0.0

    def __post_init__(self) -> None:
        for field, low in (("elements", 1), ("heads", 0), ("window", 0), ("tokens_per_entry", 1)):
            check_int("cache", field, getattr(self, field), low, 1 << 31)

    def entry_bytes(self, kv_bytes: float) -> float:
        """Bytes of one entry where the KV cache's type has `kv_bytes` an element."""
        return self.elements * (self.element_bytes or kv_bytes)

    def entries(self, context_tokens: int) -> int:
        """Entries of a sequence of `context_tokens`; a group that is not full has none yet."""
        kept = min(context_tokens, self.window) if self.window else context_tokens
        return kept // self.tokens_per_entry


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that mix tokens in the same way: `params` weights, caches and state of each.

    `state_bytes`: of one sequence, whatever its length (linear attention, state-space layers).
    """

    name: str
    layer_ids: tuple[int, ...]
    params: int
    caches: tuple[Cache, ...] = ()
    state_bytes: int = 0

    @property
    def rings(self) -> tuple[Cache, ...]:
        """Windows that a layer keeps beside a cache of all the past: of one size per sequence."""
        endless = any(not cache.window for cache in self.caches)
        return tuple(cache for cache in self.caches if endless and cache.window)

    def __post_init__(self) -> None:
        owner = f"layers of {self.name!r:.60}"
        check_int(owner, "params", self.params, 0, MAX_PARAMS)
        check_int(owner, "state_bytes", self.state_bytes, 0, MAX_PARAMS)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Attention of one model.

    kind: "gqa" (grouped-query; multi-head when num_kv_heads == num_heads) or "mla" (multi-head
    latent, DeepSeek-V2, arXiv:2405.04434, section 2.1). `head_dim` is the width of a query or key
    head; for mla it is qk_nope_head_dim + qk_rope_head_dim. q_lora_rank 0 means that queries are
    not compressed. `window_layer_ids` are the layers with a sliding window of `window_tokens`
    (0: no window anywhere). `linear_layer_ids` are layers that keep a state of constant size
    instead of a KV cache; each has `linear_layer_params` weights. `absent_layer_ids` are layers
    that mix no tokens. `per_layer`: attention blocks of one layer. `shared_kv`: the latent itself
    is key and value (DeepSeek-V4); `o_lora_rank`, `o_groups`: its output projection in two steps.
    `chosen_keys`: a query attends to so many that an indexer picks (DeepSeek-V3.2,
    arXiv:2512.02556, section 2.1; 0: to all); `index_heads`, `index_head_dim` and
    `index_layer_ids`: the indexer, and the layers with one of their own.
    `kinds`: every layer by kind, empty where the fields above say all. `note` says what else a
    reader should know (chunked attention, estimates).
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
    absent_layer_ids: tuple[int, ...] = ()
    per_layer: int = 1
    shared_kv: bool = False
    o_lora_rank: int = 0
    o_groups: int = 1
    chosen_keys: int = 0
    index_heads: int = 0
    index_head_dim: int = 0
    index_layer_ids: tuple[int, ...] = ()
    kinds: tuple[LayerKind, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        owner = "attention"
        if self.kind not in ("gqa", "mla"):
            raise FormatError(f"attention kind is {self.kind!r:.60}", "give 'gqa' or 'mla'")
        for field in ("num_heads", "num_kv_heads", "head_dim", "per_layer", "o_groups"):
            check_int(owner, field, getattr(self, field), 1, MAX_SIZE)
        latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        low = 1 if self.kind == "mla" else 0
        for field in latent:
            check_int(owner, field, getattr(self, field), low, MAX_SIZE)
        check_int(owner, "q_lora_rank", self.q_lora_rank, 0, MAX_SIZE)
        for field in ("chosen_keys", "index_heads", "index_head_dim"):
            check_int(owner, field, getattr(self, field), 0, 1 << 31)
        check_int(owner, "o_lora_rank", self.o_lora_rank, 0, MAX_SIZE)
        check_int(owner, "window_tokens", self.window_tokens, 0, 1 << 31)
        check_int(owner, "linear_layer_params", self.linear_layer_params, 0, MAX_PARAMS)
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
        value = self.v_head_dim or self.head_dim
        if self.kind == "gqa":
            per_head = self.head_dim + value
            return hidden_size * per_head * (self.num_heads + self.num_kv_heads)
        query_width = self.num_heads * self.head_dim
        query = (
            self.q_lora_rank * (hidden_size + query_width)
            if self.q_lora_rank
            else hidden_size * query_width
        )
        compress = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
        expand = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + value)
        out = self.num_heads * value * (self.o_lora_rank or hidden_size)
        out += self.o_groups * self.o_lora_rank * hidden_size
        return query + compress + (0 if self.shared_kv else expand) + out

    @property
    def kv_elements_per_layer(self) -> int:
        """Cached elements of one token in one softmax layer: keys and values, or the latent."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.num_kv_heads * (self.head_dim + (self.v_head_dim or self.head_dim))

    def layer_kinds(self, num_layers: int, hidden_size: int) -> tuple[LayerKind, ...]:
        """`kinds`, or the kinds that the other fields describe."""
        if self.kinds:
            return self.kinds
        linear = self.linear_layer_ids
        windowed = tuple(sorted(set(self.window_layer_ids) - set(linear)))
        rest = set(range(num_layers)) - set(windowed) - set(linear) - set(self.absent_layer_ids)
        params = self.per_layer * self.layer_params(hidden_size)
        heads = self.num_kv_heads if self.kind == "gqa" else 0

        def softmax(name: str, layer_ids: tuple[int, ...], window: int = 0) -> LayerKind:
            cache = Cache(self.kv_elements_per_layer, heads, window)
            return LayerKind(name, layer_ids, params, (cache,) * self.per_layer)

        kinds = (
            softmax("full attention", tuple(sorted(rest))),
            softmax("sliding window", windowed, self.window_tokens),
            LayerKind("linear attention", linear, self.linear_layer_params),
        )
        return tuple(kind for kind in kinds if kind.layer_ids)
