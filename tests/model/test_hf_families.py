"""Architectures with layers of several kinds: small inputs, sizes by hand."""

from __future__ import annotations

from typing import Any

import pytest

from moesim.errors import FormatError
from moesim.model.hf.reader import Reading, read_config
from moesim.model.spec import ModelSpec

H, V = 64, 1000
COMMON = {"hidden_size": H, "vocab_size": V, "num_attention_heads": 4, "torch_dtype": "bfloat16"}


def reading(config: dict[str, Any], **changes: Any) -> Reading:
    return read_config({**COMMON, **config, **changes}, "here", "toy", "by hand")


def spec(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return reading(config, **changes).spec


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


QWEN_NEXT = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "full_attention_interval": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}


def test_gated_delta_net_and_gated_attention() -> None:
    # Linear: q, k of 2 x 8 and v of 4 x 16: 96 channels; z 64; b and a 2 x 4; conv 96 x 4; out.
    # Softmax, in the last of four layers: q twice (gate) 4 x 32, k and v 2 x 32, out.
    made = spec(QWEN_NEXT)
    linear = H * 96 + H * 64 + H * 8 + 96 * 4 + 64 * H
    full = 2 * H * 128 + 2 * H * 64 + 128 * H
    assert made.attention_params == 3 * linear + full
    assert made.kv_bytes_per_token() == 2 * 2 * 32 * 2
    assert made.num_kv_layers == 1
    # Conv state 96 x 3 in 2 bytes, a matrix of 8 x 16 a value head in 4 bytes.
    assert made.state_bytes == 3 * (96 * 3 * 2 + 4 * 8 * 16 * 4)
    assert spec(QWEN_NEXT, mamba_ssm_dtype="bfloat16").state_bytes == 3 * (576 + 4 * 8 * 16 * 2)
    listed = {
        **without(QWEN_NEXT, "full_attention_interval"),
        "layer_types": ["full_attention"] * 4,
    }
    assert spec(listed).num_kv_layers == 4
    with pytest.raises(FormatError, match="missing key layer_types"):
        spec(without(QWEN_NEXT, "full_attention_interval"))


def test_layers_for_further_tokens_are_counted_apart() -> None:
    plain, more = spec(QWEN_NEXT), spec(QWEN_NEXT, mtp_num_hidden_layers=2)
    assert more.total_params == plain.total_params
    full = 2 * H * 128 + 2 * H * 64 + 128 * H
    moe = 16 * 3 * H * 24 + H * 16 + 3 * H * 24
    assert (more.mtp_layers, more.mtp_moe_layers) == (2, 2)
    assert more.mtp_params == 2 * (full + moe + 2 * H * H)


V4 = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 128,
    "sliding_window": 16,
    "num_hash_layers": 1,
    "compress_ratios": [0, 128, 4, 4, 0],
    "num_nextn_predict_layers": 1,
    "hc_mult": 2,
}


def test_deepseek_v4_windows_compressed_entries_and_indexers() -> None:
    made = spec(V4)
    assert made.hash_layer_ids == (0,)
    assert made.moe_layer_ids == (0, 1, 2, 3)
    base = H * 16 + 16 * 128 + H * 32 + 128 * 8 + 2 * 8 * H
    heavy = base + 2 * H * 32
    light = base + 4 * H * 32 + 4 * H * 128 + 16 * 2 * 128 + H * 2
    assert made.attention_params == base + heavy + 2 * light
    # Each layer: 32 elements a token in its window; 32 for each 128 or 4 tokens; an indexer's 128
    # elements of 1 + 4/128 bytes for each 4.
    beyond = 64 / 128 + 2 * (64 / 4 + 132 / 4)
    assert made.kv_bytes_per_token_beyond_windows() == round(beyond)
    assert made.kv_bytes_per_token() == round(4 * 64 + beyond)
    # 1000 tokens: 16 in each window, 7 groups of 128, 250 of 4.
    assert made.kv_bytes(1000) == 4 * 16 * 64 + 7 * 64 + 2 * 250 * (64 + 132)
    assert made.other_params == 4 * 2 * (2 + 2) * 2 * 2 * H
    assert made.mtp_params == base + 17 * 3 * H * 24 + H * 16 + 2 * H * H


def test_deepseek_v4_defaults_are_taken_and_named() -> None:
    short = without(V4, "q_lora_rank", "compress_ratios")
    made = spec(short)
    assert "q_lora_rank, compress_ratios" in made.note
    with pytest.raises(FormatError, match="compress_ratios holds 8"):
        spec(V4, compress_ratios=[8, 0, 0, 0])
    with pytest.raises(FormatError, match="num_key_value_heads"):
        spec(V4, num_key_value_heads=4)


KIMI = {
    "model_type": "kimi_linear",
    "num_hidden_layers": 4,
    "intermediate_size": 100,
    "moe_intermediate_size": 24,
    "num_experts": 16,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "linear_attn_config": {
        "kda_layers": [1, 2, 3],
        "full_attn_layers": [4],
        "num_heads": 2,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
}


def test_kimi_delta_attention_numbers_its_layers_from_one() -> None:
    made = spec(KIMI)
    assert made.attention.linear_layer_ids == (0, 1, 2)
    assert made.kv_bytes_per_token() == (32 + 8) * 2
    low = H * 16 + 16 * 32
    linear = 3 * H * 32 + low + low + H * 2 + 3 * 32 * 4 + 32 * H
    full = H * 4 * 24 + H * 40 + 32 * 4 * 32 + 4 * 16 * H
    assert made.attention_params == 3 * linear + full
    assert made.state_bytes == 3 * (3 * 32 * 3 * 2 + 2 * 16 * 16 * 4)
    config = {**KIMI["linear_attn_config"], "kda_layers": [1, 2]}
    with pytest.raises(FormatError, match="share out"):
        spec(KIMI, linear_attn_config=config)
    config = {**KIMI["linear_attn_config"], "kda_layers": [0, 1, 2]}
    with pytest.raises(FormatError, match="kda_layers"):
        spec(KIMI, linear_attn_config=config)


def test_latent_experts_work_and_travel_in_their_own_width() -> None:
    # Kimi-K3: experts of 3 x 32 x 24, projections 64 to 32 and back beside the shared expert.
    made = spec(KIMI, routed_expert_hidden_size=32, mla_use_output_gate=True)
    assert made.expert_params == 3 * 32 * 24
    assert made.latent_params == 2 * H * 32
    assert made.token_bytes() == 2 * 32
    assert made.attention_params == spec(KIMI).attention_params + H * 4 * 16


NEMOTRON = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME*E-",
    "num_hidden_layers": 5,
    "intermediate_size": 100,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 48,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "mlp_hidden_act": "relu2",
}


def test_nemotron_layers_are_one_block_each() -> None:
    made = spec(NEMOTRON)
    assert made.moe_layer_ids == (1, 3)
    assert made.no_ffn_layer_ids == (0, 2)
    assert made.attention.absent_layer_ids == (1, 3, 4)
    assert (made.num_dense_layers, made.num_kv_layers, made.num_mixing_layers) == (1, 1, 2)
    channels = 32 + 2 * 2 * 16
    mamba = H * (32 + channels + 4) + channels * 4 + 32 * H
    attention = 2 * H * 4 * 16 + 2 * H * 2 * 16
    assert made.attention_params == mamba + attention
    assert made.expert_params == 2 * H * 24
    assert made.shared_expert_params == 2 * H * 48
    assert made.state_bytes == channels * 3 * 2 + 32 * 16 * 4
    dense, router = 2 * H * 100, H * 16
    rest = mamba + attention + dense + 2 * (router + 2 * H * 48) + 2 * V * H
    assert made.total_params == rest + 2 * 16 * 2 * H * 24
    words = ["mamba", "moe", "attention", "moe", "mlp"]
    listed = without(NEMOTRON, "hybrid_override_pattern", "num_hidden_layers")
    assert spec(listed, layers_block_type=words).total_params == made.total_params
    with pytest.raises(FormatError, match="mamba_num_heads, n_groups"):
        spec(without(NEMOTRON, "mamba_num_heads", "n_groups"))


LONGCAT = {
    "model_type": "longcat_flash",
    "num_layers": 2,
    "ffn_hidden_size": 100,
    "expert_ffn_hidden_size": 24,
    "n_routed_experts": 16,
    "zero_expert_num": 8,
    "zero_expert_type": "identity",
    "moe_topk": 3,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


def test_longcat_two_attentions_two_dense_parts_and_experts_that_compute_nothing() -> None:
    made = spec(LONGCAT)
    attention = H * 16 + 16 * 4 * 24 + H * 40 + 32 * 4 * 32 + 4 * 16 * H
    assert made.attention_params == 2 * 2 * attention
    assert made.kv_bytes_per_token() == 2 * 2 * 40 * 2
    assert made.num_kv_layers == 4
    assert made.router_params == H * 24
    dense, expert = 3 * H * 100, 3 * H * 24
    rest = 4 * attention + 4 * dense + 2 * H * 24 + 2 * V * H
    assert made.total_params == rest + 2 * 16 * expert
    # Of 3 choices among 24, 2 fall on experts that compute.
    assert made.active_params == rest + 2 * 2 * expert
    assert made.real_top_k == 2
    with pytest.raises(FormatError, match="ngram_vocab_size_ratio"):
        spec(LONGCAT, ngram_vocab_size_ratio=78)


MIMO = {
    "model_type": "mimo_v2_flash",
    "num_hidden_layers": 3,
    "intermediate_size": 100,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "n_shared_experts": None,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "v_head_dim": 16,
    "swa_num_key_value_heads": 2,
    "hybrid_layer_pattern": [0, 1, 1],
    "moe_layer_freq": [0, 1, 1],
    "sliding_window": 128,
    "attention_chunk_size": 128,
}


def test_mimo_windowed_layers_have_heads_of_their_own() -> None:
    made = spec(MIMO)
    full = H * 24 * (4 + 1) + H * 16 * (4 + 1)
    windowed = H * 24 * (4 + 2) + H * 24 * (4 + 2)
    assert made.attention_params == full + 2 * windowed
    assert made.kv_bytes_per_token_beyond_windows() == (24 + 16) * 2
    assert made.kv_bytes(1000) == 1000 * 80 + 2 * 128 * 2 * 48 * 2
    assert made.attention.window_layer_ids == (1, 2)
    assert spec(MIMO, swa_v_head_dim=16).attention_params == full + 2 * (H * 40 * 6)
    with pytest.raises(FormatError, match="disagree"):
        spec(MIMO, attention_chunk_size=64)


GEMMA = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 2,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "num_experts": 16,
    "top_k_experts": 2,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}


def test_gemma_global_heads_and_the_dense_part_beside_experts() -> None:
    made = spec(GEMMA)
    # Global: 4 queries and 1 key of 32, no value weights; key and value are both cached.
    assert made.attention_params == H * 16 * (4 + 2) * 2 + H * 32 * (4 + 1 + 4)
    assert made.kv_bytes(100) == 8 * 2 * 2 * 16 * 2 + 100 * 2 * 32 * 2
    assert (made.num_shared_experts, made.shared_intermediate_size) == (3, 72)
    assert made.lm_head_params == 0
    for key in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
        with pytest.raises(FormatError, match=key):
            spec(GEMMA, **{key: 1})


STEP = {
    "model_type": "step3p5",
    "num_hidden_layers": 3,
    "intermediate_size": 100,
    "num_attention_groups": 2,
    "head_dim": 16,
    "moe_num_experts": 16,
    "moe_top_k": 2,
    "moe_intermediate_size": 24,
    "share_expert_dim": 24,
    "moe_layers_enum": "1,2",
    "use_head_wise_attn_gate": True,
    "sliding_window": 8,
    "layer_types": [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "sliding_attention",
    ],
    "num_nextn_predict_layers": 1,
    "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 6},
}


def test_step_windowed_layers_have_more_heads_and_gates() -> None:
    made = spec(STEP)
    assert made.moe_layer_ids == (1, 2)
    full = H * 16 * 2 * (4 + 2) + H * 4
    windowed = H * 16 * 2 * (6 + 2) + H * 6
    assert made.attention_params == full + 2 * windowed
    assert made.kv_bytes_per_token() == 3 * 2 * 2 * 16 * 2
    assert (made.num_shared_experts, made.shared_intermediate_size) == (1, 24)
    # The layer for further tokens is dense, and slides as the fourth entry says.
    assert made.mtp_params == windowed + 3 * H * 100 + 2 * H * H
    assert "not given" in spec(without(STEP, "attention_other_setting")).note
    with pytest.raises(FormatError, match="moe_layers_enum"):
        spec(STEP, moe_layers_enum="1,7")


M3 = {
    "model_type": "minimax_m3",
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "dense_intermediate_size": 100,
    "shared_intermediate_size": 24,
    "n_shared_experts": 1,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_layer_freq": [0, 1],
    "num_mtp_modules": 7,
    "num_nextn_predict_layers": 1,
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_num_index_heads": 2,
        "sparse_index_dim": 8,
        "sparse_attention_freq": [0, 1],
    },
}


def test_minimax_m3_indexer_in_sparse_layers() -> None:
    made = spec(M3)
    plain = 2 * H * 16 * (4 + 2)
    assert made.attention_params == plain + plain + H * 2 * 8 + H * 8
    assert made.kv_bytes_per_token() == 2 * (2 * 2 * 2 * 16) + 2 * 8
    assert made.mtp_layers == 1
    with pytest.raises(FormatError, match="attention_output_gate"):
        spec(M3, attention_output_gate=True)


def test_latent_ranks_count_only_where_use_mla_does_not_switch_them_off() -> None:
    ranks = {"kv_lora_rank": 32, "q_lora_rank": 16, "qk_nope_head_dim": 16}
    ranks |= {"qk_rope_head_dim": 8, "v_head_dim": 16}
    off = spec(HUNYUAN, **ranks, use_mla=False)
    assert off.attention.kind == "gqa"
    assert off.attention_params == spec(HUNYUAN).attention_params
    assert "kv_lora_rank 32" in off.note
    assert spec(HUNYUAN, **ranks).attention.kind == "mla"
    with pytest.raises(FormatError, match="missing key kv_lora_rank"):
        spec(HUNYUAN, use_mla=True)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2", "glm_moe_dsa"])
def test_a_latent_family_without_its_rank_is_incomplete(model_type: str) -> None:
    plain = {"n_shared_experts": 1, "first_k_dense_replace": 1, "model_type": model_type}
    with pytest.raises(FormatError, match="kv_lora_rank"):
        spec(HUNYUAN, **plain)
    assert spec(HUNYUAN, **plain, use_mla=False).attention.kind == "gqa"


def test_indexers_only_where_a_layer_has_its_own() -> None:
    latent = {
        "model_type": "glm_moe_dsa",
        "num_hidden_layers": 3,
        "intermediate_size": 100,
        "moe_intermediate_size": 24,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    index = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 128}
    none, every = spec(latent), spec(latent, **index)
    own = 16 * 2 * 128 + H * 128 + H * 2
    assert every.attention_params == none.attention_params + 3 * own
    assert every.kv_bytes_per_token() == none.kv_bytes_per_token() + 3 * 132
    types = ["full", "shared", "shared"]
    some = spec(latent, **index, indexer_types=types, index_topk_freq=4)
    assert some.attention_params == none.attention_params + own
    assert some.kv_bytes_per_token("fp8") == 3 * 40 + 132
    with pytest.raises(FormatError, match="indexer_types"):
        spec(latent, **index, index_topk_freq=4)


ERNIE = {
    "model_type": "ernie4_5_moe",
    "num_hidden_layers": 6,
    "intermediate_size": 100,
    "num_key_value_heads": 2,
    "moe_num_experts": 16,
    "moe_k": 2,
    "moe_num_shared_experts": 2,
    "moe_intermediate_size": 24,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 4,
    "moe_layer_interval": 1,
}


def test_ernie_first_and_last_layer_with_experts() -> None:
    assert spec(ERNIE).moe_layer_ids == (1, 2, 3, 4)
    assert spec(ERNIE, moe_layer_interval=2).moe_layer_ids == (1, 3)
    assert spec(ERNIE, moe_layer_end_index=-1).moe_layer_ids == (1, 2, 3, 4, 5)
    assert spec(ERNIE).shared_intermediate_size == 48


HUNYUAN = {
    "model_type": "hunyuan_v1_moe",
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "moe_topk": [2, 2],
    "moe_intermediate_size": [24, 24],
    "num_shared_expert": [1, 1],
    "use_mixed_mlp_moe": True,
}


def test_hunyuan_lists_of_one_number_a_layer() -> None:
    made = spec(HUNYUAN)
    assert (made.top_k, made.moe_intermediate_size, made.shared_intermediate_size) == (2, 24, 40)
    assert spec(HUNYUAN, use_mixed_mlp_moe=False).shared_intermediate_size == 0
    with pytest.raises(FormatError, match="differs from layer to layer"):
        spec(HUNYUAN, moe_topk=[2, 4])
    # Cross-layer attention: every second layer has queries and output alone, and caches nothing.
    shared = spec(HUNYUAN, use_cla=True, cla_share_factor=2)
    assert shared.attention_params == 2 * H * 16 * (4 + 2) + 2 * H * 64
    assert shared.kv_bytes_per_token() * 2 == made.kv_bytes_per_token()


def test_state_spaces_of_granite_and_jamba() -> None:
    granite = {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "shared_intermediate_size": 48,
        "num_key_value_heads": 2,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    }
    made = spec(granite)
    channels = 128 + 2 * 16
    mamba = H * (128 + channels + 8) + channels * 4 + 128 * H
    assert made.attention_params == mamba + 2 * H * 16 * 6
    assert made.state_bytes == channels * 3 * 2 + 128 * 16 * 4
    jamba = {
        "model_type": "jamba",
        "num_hidden_layers": 4,
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": "auto",
    }
    made = spec(jamba)
    assert made.moe_layer_ids == (1, 3)
    mamba = H * 256 + 128 * 4 + 128 * (4 + 32) + 4 * 128 + 128 * 16 + 128 * H
    assert made.attention_params == 3 * mamba + 2 * H * 16 * 6
    assert made.kv_bytes_per_token() == 2 * 2 * 16 * 2


def test_ling_linear_layers_in_groups() -> None:
    ling = {
        "model_type": "bailing_moe_linear",
        "num_hidden_layers": 5,
        "intermediate_size": 100,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "layer_group_size": 2,
    }
    made = spec(ling)
    # Groups of two end in softmax; the fifth layer, left over, is softmax too.
    assert made.attention.linear_layer_ids == (0, 2)
    assert made.attention_params == 2 * 5 * H * 64 + 3 * 2 * H * 16 * 6
    assert made.state_bytes == 2 * 4 * 16 * 16 * 4


def test_ling_3_has_kimi_delta_attention_of_full_rank_and_gates_of_a_number_a_head() -> None:
    ling = {
        "model_type": "bailing_hybrid",
        "num_hidden_layers": 4,
        "intermediate_size": 100,
        "head_dim": 16,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 12,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "layer_group_size": 4,
        "short_conv_kernel_size": 4,
        "no_kda_lora": True,
        "kda_safe_gate": True,
        "kda_lower_bound": -5,
        "gated_attention_proj_granularity_type": "head_wise",
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    made = spec(ling)
    linear = 5 * H * 64 + H * 4 + 3 * 64 * 4 + 64 * H
    full = H * 4 * 24 + H * 40 + 32 * 4 * 32 + 4 * 16 * H + H * 4
    assert made.attention_params == 3 * linear + full
    assert made.shared_intermediate_size == 12
    assert made.note == ""
    with pytest.raises(FormatError, match="granularity"):
        spec(ling, gated_attention_proj_granularity_type="element_wise")


def test_dbrx_and_grok_by_their_own_words() -> None:
    dbrx = {
        "model_type": "dbrx",
        "d_model": H,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": V,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 16, "moe_top_k": 4},
    }
    made = read_config(dbrx, "here", "toy", "by hand").spec
    assert (made.num_experts, made.top_k, made.expert_params) == (16, 4, 3 * H * 24)
    assert made.attention_params == 2 * 2 * H * 16 * 6
    grok = {
        "architectures": ["Grok1ForCausalLM"],
        "model_type": "git",
        "num_hidden_layers": 2,
        "intermediate_size": 100,
        "moe_intermediate_size": 24,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "residual_moe": True,
    }
    made = spec(grok)
    assert made.architecture == "grok"
    assert made.params_by_class["dense"] == 2 * 3 * H * 100
    with pytest.raises(FormatError, match="residual_moe"):
        spec(grok, residual_moe=False)


def test_the_first_of_two_nested_objects_is_the_thinker() -> None:
    text = {**COMMON, **without(QWEN_NEXT, "model_type"), "model_type": "qwen3_next_text"}
    outer = {"model_type": "x", "thinker_config": {"text_config": text, "audio_config": {}}}
    made = read_config(outer, "here", "toy", "by hand").spec
    assert made.architecture == "qwen3_next"
    assert "thinker_config.text_config" in made.note


def test_convolution_layers_keep_their_last_tokens() -> None:
    lfm = {
        "model_type": "lfm2_moe",
        "num_hidden_layers": 2,
        "intermediate_size": 100,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention"],
    }
    made = spec(lfm)
    assert made.attention_params == 4 * H * H + H * 3 + 2 * H * 16 * 6
    assert made.state_bytes == H * 2 * 2


def test_a_key_that_nobody_read_is_named_or_refused() -> None:
    known = reading(QWEN_NEXT, num_dense_last_layers=1, rope_theta=1e6, hidden_act="silu")
    assert known.noted == ("num_dense_last_layers",)
    assert "num_dense_last_layers 1" in known.spec.note
    assert {"rope_theta"} <= set(known.harmless)
    assert known.read["num_experts"] == 16
    unknown = {
        **without(MIMO, "hybrid_layer_pattern", "swa_num_key_value_heads"),
        "model_type": "x",
    }
    plain = without(unknown, "v_head_dim", "attention_chunk_size", "sliding_window")
    assert "is not known" in spec(plain).note
    for key, value in {
        "global_kv_heads": 2,
        "expert_dim_list": [1, 2],
        "swa_layers": [1],
        "attention_interval": 2,
        "latentSize": 4,
        "mixerTypes": ["a"],
        "kv_rank": 8,
    }.items():
        with pytest.raises(FormatError, match=key) as caught:
            spec(plain, **{key: value})
        assert "docs/models.md" in caught.value.remedy


def test_switched_off_and_harmless_keys_change_nothing() -> None:
    off = {"num_kv_shared_layers": 0, "sliding_layers": [], "use_mixer": False, "kv_rank": None}
    assert spec(QWEN_NEXT, **off) == spec(QWEN_NEXT)
    assert spec(QWEN_NEXT, rope_parameters={"rope_theta": 1}, attention_dropout=0.1).note == ""
