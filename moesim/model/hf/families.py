"""Architectures that moesim knows, one row each: how their layers and experts are described.

Known values of `model_type` ("_text" and the like stripped), or of `architectures` where a file
has no usable model type. What a row leaves to its defaults is read by the common key names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from moesim.model.hf import experts, hybrids, layers
from moesim.model.hf.keys import Keys


@dataclass(frozen=True)
class Family:
    """One row.

    width: key of an expert's width; dense_width: of a dense part's. needs: keys (or, a tuple, one
    of them) without which a file is incomplete. window: which layers slide where no list says it.
    modules: names of attention, of experts and of dense parts in the checkpoint, for quantisation.
    dense_beside: dense parts beside the experts of each layer. mtp: feed-forward part of a
    multi-token-prediction layer. refused: keys that change the model in a way that is not read.
    latent: attention is latent unless use_mla says otherwise, so that its rank has to be there.
    """

    layers: layers.Builder = layers.common
    moe: experts.Placer = experts.common
    shared: Callable[[Keys, int], tuple[int, int]] = experts.shared
    width: str = "moe_intermediate_size"
    dense_width: str = "intermediate_size"
    needs: tuple[str | tuple[str, ...], ...] = ()
    window: str = ""
    experts_module: str = "mlp"
    dense_module: str = "mlp"
    dense_beside: int = 0
    matrices: int = 3
    mtp: str = "moe"
    known: bool = True
    refused: tuple[str, ...] = ()
    latent: bool = False


_WIDTH = "intermediate_size"
_PLAIN = Family(width=_WIDTH)
_MIXTRAL = Family(width=_WIDTH, window="all", experts_module="block_sparse_moe")
_LIGHTNING = replace(_MIXTRAL, layers=hybrids.lightning)
_QWEN3 = Family(window="all")
_QWEN_HYBRID = Family(layers=hybrids.delta_net)
_FIRST_DENSE = (("first_k_dense_replace", "mlp_layer_types"),)
_DEEPSEEK = Family(needs=("n_shared_experts", *_FIRST_DENSE))
_LATENT = replace(_DEEPSEEK, latent=True)
_V4 = Family(
    layers=layers.deepseek_v4,
    moe=experts.hashed_first,
    needs=("n_shared_experts",),
    experts_module="ffn",
    dense_module="ffn",
)
_BAILING = Family(layers=hybrids.grouped_layers, needs=_FIRST_DENSE)
_HUNYUAN = Family(
    layers=layers.cross_layer,
    moe=experts.dense_first("moe_layer_num_skipped"),
    shared=experts.hunyuan_shared,
)
_GRANITE = Family(width=_WIDTH, experts_module="block_sparse_moe")
_STEP = Family(
    layers=layers.step,
    moe=experts.step,
    needs=("sliding_window", "layer_types"),
    experts_module="moe",
    mtp="dense",
)
_LONGCAT = Family(
    layers=layers.two_a_layer,
    moe=lambda keys, shape: experts.FeedForward(tuple(range(shape.layers))),
    width="expert_ffn_hidden_size",
    dense_width="ffn_hidden_size",
    needs=("zero_expert_num",),
    dense_module="mlps",
    dense_beside=2,
    mtp="dense",
    refused=("ngram_vocab_size_ratio", "emb_neighbor_num", "emb_split_num", "oe_neighbor_num"),
)
_MIMO = Family(
    layers=layers.own_window_heads,
    needs=("hybrid_layer_pattern", "moe_layer_freq", "swa_num_key_value_heads"),
    mtp="dense",
)
_M3 = Family(
    layers=layers.block_sparse,
    width=_WIDTH,
    dense_width="dense_intermediate_size",
    needs=("moe_layer_freq", "shared_intermediate_size"),
    experts_module="block_sparse_moe",
)
_KIMI_LINEAR = Family(
    layers=hybrids.kimi_linear,
    needs=("num_shared_experts", "first_k_dense_replace"),
    experts_module="block_sparse_moe",
)

FAMILIES: Mapping[str, Family] = {
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "minimax": _LIGHTNING,
    "minimax_m1": _LIGHTNING,
    "minimax_text_01": _LIGHTNING,
    "minimax_m2": Family(
        layers=layers.all_softmax, width=_WIDTH, experts_module="block_sparse_moe"
    ),
    "minimax_m3": _M3,
    "minimax_m3_vl": _M3,
    "olmoe": _PLAIN,
    "flex_olmo": _PLAIN,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": replace(_GRANITE, layers=hybrids.granite),
    "gpt_oss": Family(width=_WIDTH, window="even"),
    "qwen2_moe": Family(needs=("shared_expert_intermediate_size",)),
    "qwen3_moe": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_omni_moe": _QWEN3,
    "qwen3_next": _QWEN_HYBRID,
    "qwen3_5_moe": _QWEN_HYBRID,
    "deepseek": _DEEPSEEK,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "kimi_k2": _LATENT,
    "glm4_moe": _DEEPSEEK,
    "glm4_moe_lite": _LATENT,
    "glm4v_moe": _DEEPSEEK,
    "glm_moe_dsa": _LATENT,
    "dots1": _DEEPSEEK,
    "solar_open": _DEEPSEEK,
    "exaone_moe": Family(needs=_FIRST_DENSE),
    "deepseek_v4": _V4,
    "deepseek_ref": _V4,
    "kimi_linear": _KIMI_LINEAR,
    "kimi_k3": _KIMI_LINEAR,
    "mimo_v2": _MIMO,
    "mimo_v2_flash": _MIMO,
    "nemotron_h": Family(
        layers=hybrids.nemotron,
        moe=experts.nemotron,
        experts_module="mixer",
        dense_module="mixer",
        matrices=2,
    ),
    "llama4": Family(
        shared=experts.one_shared,
        width=_WIDTH,
        dense_width="intermediate_size_mlp",
        needs=(("interleave_moe_layer_step", "moe_layers"),),
        experts_module="feed_forward",
        dense_module="feed_forward",
    ),
    "gemma4": Family(
        layers=layers.global_heads,
        moe=lambda keys, shape: experts.FeedForward(tuple(range(shape.layers))),
        shared=experts.dense_beside,
        needs=("layer_types", "sliding_window", "global_head_dim"),
        experts_module="",
    ),
    "ernie4_5_moe": Family(moe=experts.ernie, mtp="dense"),
    "hunyuan_v1_moe": _HUNYUAN,
    "hunyuan": replace(_HUNYUAN, width=_WIDTH),
    "hy_v3": Family(needs=("first_k_dense_replace", "num_shared_experts")),
    "longcat_flash": _LONGCAT,
    "step3p5": _STEP,
    "step3p7": _STEP,
    "bailing_moe": _BAILING,
    "bailing_moe_v2": _BAILING,
    "bailing_moe_linear": replace(_BAILING, needs=("layer_group_size", *_FIRST_DENSE)),
    "bailing_moe_v2_5": replace(_BAILING, needs=("layer_group_size", *_FIRST_DENSE)),
    "bailing_hybrid": replace(_BAILING, needs=("layer_group_size", *_FIRST_DENSE)),
    "afmoe": Family(
        layers=layers.gated,
        moe=experts.dense_first("num_dense_layers"),
        needs=("num_dense_layers", "num_shared_experts"),
        window="interval",
    ),
    "lfm2_moe": Family(
        layers=hybrids.convolutions,
        moe=experts.dense_first("num_dense_layers"),
        needs=("num_dense_layers", "conv_L_cache"),
        experts_module="feed_forward",
        dense_module="feed_forward",
    ),
    "jamba": Family(
        layers=hybrids.jamba, moe=experts.jamba, width=_WIDTH, experts_module="feed_forward"
    ),
    "dbrx": Family(width="ffn_hidden_size", experts_module="ffn"),
    "grok": Family(
        layers=layers.all_global,
        dense_beside=1,
        needs=("moe_intermediate_size", "intermediate_size", "residual_moe"),
        experts_module="block_sparse_moe",
    ),
    "grok-1": Family(width=_WIDTH, experts_module="moe_block"),
}

BY_ARCHITECTURE: Mapping[str, str] = {
    "Grok1ForCausalLM": "grok",
    "Grok1ModelForCausalLM": "grok-1",
    "DeepseekV4ForCausalLM": "deepseek_v4",
}
"""Model types by class name, for files whose model_type is missing or means nothing."""

ALIASES: Mapping[str, str] = {
    "BailingMoeForCausalLM": "bailing_moe",
    "minimax-m2": "minimax_m2",
    "hunyuan_moe": "hunyuan",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
    "gemma4_moe": "gemma4",
}
"""Other spellings of a model type."""

UNKNOWN = Family(known=False)
