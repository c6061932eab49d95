"""Which mixer each layer has: softmax attention with or without windows, by family of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moesim.model.hf import mixers
from moesim.model.hf.keys import Keys
from moesim.model.hf.mixers import Indexer, Mixer
from moesim.model.hf.shape import Shape, head_dim, is_latent, kv_heads, missing

SPARSE = "sparse attention: sizes are exact, step times count the whole context"
INDEXED = f"{SPARSE}, but for serving on H100 and H200"

LAYER_TYPES = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "window",
    "linear_attention": "linear",
    "chunked_attention": "full",
    "deepseek_sparse_attention": "full",
    "minimax_m3_sparse": "full",
    "mamba": "mamba",
    "mamba2": "mamba",
}


@dataclass
class Layers:
    """Mixers by layer (None: the layer mixes no tokens), that of a multi-token-prediction layer
    (None: the last softmax layer's), and what should be said."""

    mixers: list[Mixer | None]
    mtp: Mixer | None = None
    notes: list[str] = field(default_factory=list)


Builder = Callable[[Keys, Shape, str], Layers]
"""Arguments: keys, shape, and which layers slide where no list says it ("all", "even", "")."""


def common(keys: Keys, shape: Shape, window_rule: str) -> Layers:
    """Softmax attention in all layers, grouped or latent, some of them with a window."""
    if is_latent(keys):
        return Layers(latent_layers(keys, shape), notes=[INDEXED] * keys.has("index_topk"))
    window, kinds, notes = layer_kinds(keys, shape, window_rule)
    made = {
        kind: mixers.grouped(
            shape.hidden,
            shape.heads,
            kv_heads(keys, shape),
            head_dim(keys, shape),
            window=window if kind == "window" else 0,
        )
        for kind in ("full", "window")
    }
    if set(kinds) - set(made):
        raise keys.error(
            "layer_types has layers of linear attention or state spaces, and moesim does not know "
            "this architecture's",
            "docs/models.md lists the architectures that are read",
        )
    return Layers([made[kind] for kind in kinds], notes=notes)


def all_softmax(keys: Keys, shape: Shape, rule: str) -> Layers:
    """MiniMax-M2: attn_type_list, where it is there, is 1 (softmax) in every layer."""
    if keys.has("attn_type_list"):
        keys.flags("attn_type_list", shape.layers, {1: 1})
    return common(keys, shape, rule)


def all_global(keys: Keys, shape: Shape, rule: str) -> Layers:
    """Grok: sliding_window_size -1 and global_attn_every_n 1, no layer slides."""
    keys.must_be("sliding_window_size", -1)
    keys.must_be("global_attn_every_n", 1)
    return common(keys, shape, rule)


def gated(keys: Keys, shape: Shape, window_rule: str) -> Layers:
    """Trinity (transformers/afmoe): a projection gates every channel of attention's output."""
    window, kinds, notes = layer_kinds(keys, shape, window_rule)
    width = head_dim(keys, shape)
    gate = shape.heads * width
    args = (shape.hidden, shape.heads, kv_heads(keys, shape), width)
    made = {
        "full": mixers.grouped(*args, gate_width=gate),
        "window": mixers.grouped(*args, gate_width=gate, window=window),
    }
    return Layers([made[kind] for kind in kinds], notes=notes)


def latent_mixer(keys: Keys, shape: Shape, indexer: Indexer | None = None, **more: object) -> Mixer:
    """The latent attention that kv_lora_rank and its companions describe."""
    absent = [
        name
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if not keys.has(name)
    ]
    absent += ["q_lora_rank"] if "q_lora_rank" not in keys.data else []
    if absent:
        raise missing(keys, absent)
    keys.optional("head_dim", 0)
    keys.optional("num_key_value_heads", 0)
    return mixers.latent(
        shape.hidden,
        shape.heads,
        q_rank=keys.optional("q_lora_rank", 0),
        kv_rank=keys.number("kv_lora_rank"),
        nope=keys.number("qk_nope_head_dim"),
        rope=keys.number("qk_rope_head_dim"),
        value=keys.number("v_head_dim"),
        indexer=indexer,
        **more,  # type: ignore[arg-type]
    )


def latent_layers(keys: Keys, shape: Shape) -> list[Mixer | None]:
    """Latent attention in all layers; with an indexer in all, or in those that indexer_types names
    "full" (GLM-5.2: the others use the choice of the last such layer)."""
    plain = latent_mixer(keys, shape)
    if keys.has("layer_types"):
        known = {"full_attention": 1, "deepseek_sparse_attention": 1}
        keys.flags("layer_types", shape.layers, known)
    if not keys.has("index_topk"):
        return [plain] * shape.layers
    query = keys.optional("q_lora_rank", 0) or shape.hidden
    sizes = keys.number("index_n_heads"), keys.number("index_head_dim")
    indexer = Indexer(*sizes, query, chosen=keys.number("index_topk"))
    sparse = latent_mixer(keys, shape, indexer, name="latent attention with indexer")
    freq = keys.optional("index_topk_freq", 1, low=1)
    keys.get("index_skip_topk_offset"), keys.get("index_topk_pattern")
    if not keys.has("indexer_types"):
        if freq > 1 or keys.has("index_topk_pattern"):
            raise missing(keys, ["indexer_types"])
        return [sparse] * shape.layers
    own = keys.flags("indexer_types", shape.layers, {"full": True, "shared": False})
    return [sparse if full else plain for full in own]


def layer_kinds(keys: Keys, shape: Shape, window_rule: str) -> tuple[int, list[str], list[str]]:
    """Window length (0: none), kind of every layer, and notes."""
    window = keys.optional("sliding_window", 0, low=0, high=1 << 31)
    longest = keys.optional("max_position_embeddings", 1 << 31, low=1, high=1 << 31)
    if not keys.flag("use_sliding_window", True) or window >= longest:
        window = 0
    every = ["full"] * shape.layers
    chunk = keys.optional("attention_chunk_size", 0)
    notes = [f"chunked attention of {chunk} tokens in part of the layers, cached in full"] * bool(
        chunk
    )
    if keys.has("layer_types"):
        keys.get("sliding_window_pattern")
        extra = keys.optional("num_nextn_predict_layers", 0)
        kinds = keys.flags("layer_types", shape.layers, LAYER_TYPES, shape.layers + extra)
    elif not window:
        kinds = every
    elif window_rule == "even":  # GPT-OSS: layers 0, 2, 4, ... slide
        kinds = ["full" if layer % 2 else "window" for layer in range(shape.layers)]
    elif window_rule == "all":
        kinds = ["window"] * shape.layers
    elif window_rule == "interval":  # Trinity: all but every nth
        every_n = keys.number("global_attn_every_n_layers")
        kinds = ["window" if (i + 1) % every_n else "full" for i in range(shape.layers)]
    else:
        raise keys.error(
            f"sliding_window {window} without layer_types: which layers have it is not said",
            "take the config.json that the model's maker published",
        )
    keys.get("global_attn_every_n_layers")
    slides = "window" in kinds[: shape.layers]
    if slides and not window:
        if keys.data.get("use_sliding_window") is False:
            return 0, ["full" if kind == "window" else kind for kind in kinds], notes
        raise keys.error(
            "layer_types has sliding_attention but no sliding_window",
            "take the config.json that the model's maker published",
        )
    return (window if slides else 0), kinds, notes


def own_window_heads(keys: Keys, shape: Shape, _: str) -> Layers:
    """MiMo-V2 (vllm: models/mimo_v2_flash.py): windowed layers with heads of their own, values
    narrower than keys; hybrid_layer_pattern is 1 where a layer slides."""
    slides = keys.flags("hybrid_layer_pattern", shape.layers, {0: 0, 1: 1})
    names = ("sliding_window", "sliding_window_size", "attention_chunk_size")
    window = keys.first_of(names, 1, 1 << 31)
    if window is None:
        raise missing(keys, ["sliding_window"])
    width = head_dim(keys, shape)
    full = mixers.grouped(
        shape.hidden,
        shape.heads,
        kv_heads(keys, shape),
        width,
        value_dim=keys.optional("v_head_dim", width, low=1),
    )
    own = keys.optional("swa_head_dim", width, low=1)
    windowed = mixers.grouped(
        shape.hidden,
        keys.optional("swa_num_attention_heads", shape.heads, low=1),
        keys.number("swa_num_key_value_heads"),
        own,
        value_dim=keys.optional("swa_v_head_dim", own, low=1),
        window=window,
    )
    return Layers([windowed if slide else full for slide in slides], mtp=windowed)


def global_heads(keys: Keys, shape: Shape, rule: str) -> Layers:
    """Gemma 4 (transformers/gemma4): layers without a window have wider heads, fewer of them for
    keys, and with attention_k_eq_v no value weights (the value is cached all the same)."""
    for name in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
        if keys.optional(name, 0):
            raise keys.error(
                f"{name} is {keys.number(name)}: layers that share caches or add embeddings are "
                "not read",
                "docs/models.md lists what is read of each architecture",
            )
    for name in ("vocab_size_per_layer_input", "use_double_wide_mlp", "enable_moe_block"):
        keys.get(name)
    window, kinds, notes = layer_kinds(keys, shape, rule)
    same = keys.flag("attention_k_eq_v")
    usual = kv_heads(keys, shape)
    wide = keys.optional("num_global_key_value_heads", usual, low=1) if same else usual
    keys.get("num_global_key_value_heads")
    width = head_dim(keys, shape)
    made = {
        "window": mixers.grouped(shape.hidden, shape.heads, usual, width, window=window),
        "full": mixers.grouped(
            shape.hidden,
            shape.heads,
            wide,
            keys.optional("global_head_dim", width, low=1),
            value_is_key=same,
        ),
    }
    return Layers([made[kind] for kind in kinds], notes=notes)


def step(keys: Keys, shape: Shape, rule: str) -> Layers:
    """Step-3.5 and 3.7 (transformers/step3p5): windowed layers with more query heads, a gate of one
    number a head. layer_types goes on with the multi-token-prediction layers."""
    window, kinds, notes = layer_kinds(keys, shape, rule)
    other = keys.inner("attention_other_setting")
    gate = keys.flag("use_head_wise_attn_gate")
    width = head_dim(keys, shape)
    usual = kv_heads(keys, shape)
    many = keys.optional("num_sliding_attention_heads", 0) or other.optional(
        "num_attention_heads", 0
    )
    if not many:
        many = shape.heads
        notes.append("heads of windowed layers not given: read as those of the others")
    other.get("attention_type"), other.get("true_head_dim")
    own_width = other.optional("head_dim", width, low=1)
    made = {
        "full": mixers.grouped(
            shape.hidden, shape.heads, usual, width, gate_width=shape.heads if gate else 0
        ),
        "window": mixers.grouped(
            shape.hidden,
            many,
            other.optional("num_attention_groups", usual, low=1),
            own_width,
            window=window,
            gate_width=many if gate else 0,
        ),
    }
    mtp = made[kinds[shape.layers]] if len(kinds) > shape.layers else made["full"]
    return Layers([made[kind] for kind in kinds[: shape.layers]], mtp=mtp, notes=notes)


def cross_layer(keys: Keys, shape: Shape, rule: str) -> Layers:
    """Hunyuan (its modeling_hunyuan.py): with use_cla only every cla_share_factor-th layer has keys
    and values, which the layers after it read."""
    layers = common(keys, shape, rule)
    if not keys.flag("use_cla"):
        keys.get("cla_share_factor")
        return layers
    factor = keys.number("cla_share_factor")
    reading = mixers.grouped(
        shape.hidden,
        shape.heads,
        kv_heads(keys, shape),
        head_dim(keys, shape),
        caches=False,
        name="keys and values of an earlier layer",
    )
    for layer in range(shape.layers):
        if layer % factor:
            layers.mixers[layer] = reading
    return layers


def two_a_layer(keys: Keys, shape: Shape, _: str) -> Layers:
    """LongCat-Flash (transformers/longcat_flash): two latent attentions in every layer."""
    keys.get("attention_method")
    mixer = latent_mixer(keys, shape, blocks=2, name="two latent attentions")
    return Layers([mixer] * shape.layers)


def block_sparse(keys: Keys, shape: Shape, rule: str) -> Layers:
    """MiniMax-M3 (sglang: python/sglang/srt/models/minimax_m3.py): grouped attention, and in sparse
    layers an indexer of a query a KV head and one key, cached in the KV cache's type."""
    out = common(keys, shape, rule)
    sparse = keys.inner("sparse_attention_config")
    keys.must_be("attention_output_gate", False)
    if not sparse.flag("use_sparse_attention", bool(sparse.data)):
        return out
    for name in list(sparse.data):
        sparse.get(name)
    indexer = Indexer(
        sparse.number("sparse_num_index_heads"),
        sparse.number("sparse_index_dim"),
        shape.hidden,
        kv_typed=True,
        weights=False,
    )
    made = mixers.grouped(
        shape.hidden,
        shape.heads,
        kv_heads(keys, shape),
        head_dim(keys, shape),
        indexer=indexer,
        name="block-sparse attention",
    )
    out.notes.append(SPARSE)
    on = sparse.flags("sparse_attention_freq", shape.layers, {0: 0, 1: 1})
    out.mixers = [made if has else plain for has, plain in zip(on, out.mixers, strict=True)]
    return out


_V4_DEFAULTS = {
    "head_dim": 512,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "sliding_window": 128,
    "index_topk": 512,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "qk_rope_head_dim": 64,
}
_V4_TYPES = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}


def deepseek_v4(keys: Keys, shape: Shape, _: str) -> Layers:
    """DeepSeek-V4 (transformers/deepseek_v4): compress_ratios gives for every layer how many tokens
    one compressed entry stands for; at 4 an indexer chooses among them. What the file leaves out
    has DeepseekV4Config's defaults, and the note says so."""
    absent = [name for name in _V4_DEFAULTS if not keys.has(name)]
    size = {name: keys.optional(name, default, 1) for name, default in _V4_DEFAULTS.items()}
    if keys.optional("num_key_value_heads", 1) != 1:
        raise keys.error("num_key_value_heads is not 1", "DeepSeek-V4 has one key for all heads")
    if size["qk_rope_head_dim"] >= size["head_dim"]:
        raise keys.error("qk_rope_head_dim is not below head_dim", "check the file")
    indexer = Indexer(size["index_n_heads"], size["index_head_dim"], size["q_lora_rank"])
    made = {
        ratio: mixers.compressed(
            shape.hidden,
            shape.heads,
            size["head_dim"],
            rope=size["qk_rope_head_dim"],
            q_rank=size["q_lora_rank"],
            o_rank=size["o_lora_rank"],
            o_groups=size["o_groups"],
            window=size["sliding_window"],
            ratio=ratio,
            indexer=indexer if ratio == 4 else None,
        )
        for ratio in _V4_TYPES.values()
    }
    longest = shape.layers + keys.optional("num_nextn_predict_layers", 1)
    rates = keys.inner("compress_rates")
    for name, ratio in _V4_TYPES.items():
        if rates.optional(name, ratio) != ratio:
            raise keys.error(f"compress_rates.{name} is not {ratio}", "see docs/models.md")
    if keys.has("compress_ratios"):
        each = keys.flags("compress_ratios", shape.layers, {r: r for r in made}, longest)
    elif keys.has("layer_types"):
        each = keys.flags("layer_types", shape.layers, _V4_TYPES, longest)
    else:
        absent.append("compress_ratios")
        each = [128, 128] + [4 if layer % 2 else 128 for layer in range(shape.layers - 2)]
    notes = [SPARSE]
    if absent:
        notes.append(f"not in the file, DeepseekV4Config's defaults taken: {', '.join(absent)}")
    return Layers([made[ratio] for ratio in each[: shape.layers]], mtp=made[0], notes=notes)
