"""Reading Hugging Face config.json: every architecture, and every way to be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import FormatError, InputError, MoesimError
from moesim.model.hf_config import MAX_FILE_BYTES, spec_from_config
from moesim.model.names import load_model
from moesim.model.spec import ModelSpec

BASE = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "num_experts_per_tok": 2,
}
MIXTRAL = {**BASE, "model_type": "mixtral", "intermediate_size": 96, "num_local_experts": 8}
QWEN3 = {
    **BASE,
    "model_type": "qwen3_moe",
    "intermediate_size": 200,
    "moe_intermediate_size": 48,
    "num_experts": 16,
    "head_dim": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DEEPSEEK = {
    **BASE,
    "model_type": "deepseek_v3",
    "intermediate_size": 200,
    "moe_intermediate_size": 48,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
LLAMA4 = {
    **BASE,
    "model_type": "llama4_text",
    "intermediate_size": 96,
    "intermediate_size_mlp": 192,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8192,
    "head_dim": 16,
}
GPT_OSS = {**MIXTRAL, "model_type": "gpt_oss", "sliding_window": 128, "head_dim": 16}


def read(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return spec_from_config({**config, **changes}, where="here", name="toy")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    "model_type", ["mixtral", "phimoe", "olmoe", "granitemoe", "gpt_oss", "minimax_m2"]
)
def test_architectures_whose_intermediate_size_is_the_experts_width(model_type: str) -> None:
    spec = read(MIXTRAL, model_type=model_type)
    assert (spec.num_experts, spec.top_k) == (8, 2)
    assert (spec.moe_intermediate_size, spec.dense_intermediate_size) == (96, 0)
    assert spec.moe_layer_ids == (0, 1, 2, 3)
    assert (spec.attention.kind, spec.attention.head_dim) == ("gqa", 16)
    assert spec.architecture == model_type
    assert not spec.note


def test_qwen_layers_that_are_dense() -> None:
    assert read(QWEN3).moe_layer_ids == (0, 1, 2, 3)
    assert read(QWEN3).attention.head_dim == 32
    # decoder_sparse_step 2: layers whose number + 1 is a multiple of 2
    every_second = read(QWEN3, decoder_sparse_step=2)
    assert every_second.moe_layer_ids == (1, 3)
    assert every_second.dense_intermediate_size == 200
    assert read(QWEN3, mlp_only_layers=[0, 3]).moe_layer_ids == (1, 2)
    assert read(QWEN3, decoder_sparse_step=2, mlp_only_layers=[3]).moe_layer_ids == (1,)


def test_qwen2_shared_experts_are_one_block() -> None:
    spec = read(QWEN3, model_type="qwen2_moe", shared_expert_intermediate_size=192)
    assert (spec.num_shared_experts, spec.shared_intermediate_size) == (4, 192)
    uneven = read(QWEN3, model_type="qwen2_moe", shared_expert_intermediate_size=100)
    assert (uneven.num_shared_experts, uneven.shared_intermediate_size) == (1, 100)


def test_deepseek_dense_layers_groups_and_latent_attention() -> None:
    spec = read(DEEPSEEK)
    assert spec.moe_layer_ids == (1, 2, 3)
    assert (spec.num_shared_experts, spec.shared_intermediate_size) == (2, 96)
    assert (spec.n_group, spec.topk_group) == (4, 2)
    assert spec.attention.kind == "mla"
    assert (spec.attention.head_dim, spec.attention.q_lora_rank) == (24, 0)
    assert spec.kv_bytes_per_token() == 4 * (32 + 8) * 2
    # layers from first_k_dense_replace on whose number is a multiple of moe_layer_freq
    assert read(DEEPSEEK, moe_layer_freq=2).moe_layer_ids == (2,)
    assert read(DEEPSEEK, moe_layer_freq=[0, 1, 0, 1]).moe_layer_ids == (1, 3)
    greedy = read(DEEPSEEK, model_type="deepseek_v2", topk_method="greedy")
    assert (greedy.n_group, greedy.topk_group) == (1, 1)
    listed = without(DEEPSEEK, "first_k_dense_replace", "moe_layer_freq")
    listed["mlp_layer_types"] = ["dense", "dense", "sparse", "sparse"]
    assert read(listed).moe_layer_ids == (2, 3)


def test_glm_and_the_first_deepseek_have_no_latent_attention() -> None:
    plain = without(DEEPSEEK, "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim")
    for model_type in ("glm4_moe", "deepseek"):
        spec = read(plain, model_type=model_type, head_dim=128)
        assert (spec.attention.kind, spec.attention.head_dim) == ("gqa", 128)
        assert spec.num_moe_layers == 3


def test_kimi_inside_a_multimodal_config() -> None:
    inner = {**DEEPSEEK, "model_type": "kimi_k2"}
    spec = read({"model_type": "kimi_k25", "text_config": inner, "vision_config": {}})
    assert (spec.architecture, spec.num_experts) == ("kimi_k2", 16)


def test_llama4_nested_or_not() -> None:
    for config in (LLAMA4, {"model_type": "llama4", "text_config": LLAMA4, "vision_config": {}}):
        spec = read(config)
        assert spec.moe_layer_ids == (1, 3)
        assert (spec.moe_intermediate_size, spec.dense_intermediate_size) == (96, 192)
        assert (spec.num_shared_experts, spec.shared_intermediate_size) == (1, 96)
        assert "8192" in spec.attention.note
    assert read(LLAMA4, moe_layers=[0, 2]).moe_layer_ids == (0, 2)


def test_granite_shared_and_tied() -> None:
    spec = read(
        MIXTRAL,
        model_type="granitemoeshared",
        shared_intermediate_size=32,
        tie_word_embeddings=True,
    )
    assert (spec.num_shared_experts, spec.shared_intermediate_size) == (1, 32)
    assert spec.lm_head_params == 0


def test_sliding_windows() -> None:
    assert read(GPT_OSS).attention.window_layer_ids == (0, 2)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert read(GPT_OSS, layer_types=kinds).attention.window_layer_ids == (1, 3)
    assert read(MIXTRAL, sliding_window=4096).attention.window_layer_ids == (0, 1, 2, 3)
    for off in (
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 4096, "max_position_embeddings": 4096},
    ):
        assert read(MIXTRAL, **off).attention.window_layer_ids == ()
    qwen2 = {**QWEN3, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 0}
    with pytest.raises(FormatError, match="sliding_window"):
        read(qwen2, sliding_window=4096, use_sliding_window=True)


def test_minimax_linear_attention_has_no_kv_cache() -> None:
    config = {**MIXTRAL, "model_type": "minimax_text_01"}
    for layers in (
        {"attn_type_list": [0, 0, 0, 1]},
        {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "model_type": "minimax"},
    ):
        spec = read(config, **layers)
        assert spec.attention.linear_layer_ids == (0, 1, 2)
        assert spec.kv_bytes_per_token() == 1 * 2 * 2 * 16 * 2
        # q, k, v, output gate and output projection, all 64 x 64
        assert spec.attention_params == 3 * 5 * 64 * 64 + (2 * 64 * 64 + 2 * 64 * 32)
    with pytest.raises(FormatError, match="layer_types"):
        read(config)


def test_minimax_text_01_has_its_published_size() -> None:
    # 456B total, 45.9B active (arXiv:2501.08313, abstract); the figures are those of its README
    spec = spec_from_config(
        {
            "model_type": "minimax_text_01",
            "num_hidden_layers": 80,
            "hidden_size": 6144,
            "intermediate_size": 9216,
            "num_local_experts": 32,
            "num_experts_per_tok": 2,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 200064,
            "attn_type_list": ([0] * 7 + [1]) * 10,
        },
        where="here",
        name="MiniMax-Text-01",
    )
    assert spec.total_params / 1e9 == pytest.approx(456, rel=0.005)
    tables = spec.embedding_params + spec.lm_head_params
    assert (spec.active_params - tables) / 1e9 == pytest.approx(45.9, rel=0.005)


INT4 = {"weights": {"type": "int", "num_bits": 4, "group_size": 32}}


@pytest.mark.parametrize(
    ("changes", "expert", "dense"),
    [
        ({}, "bf16", "bf16"),
        ({"torch_dtype": "float16"}, "fp16", "fp16"),
        ({"dtype": "float32"}, "fp32", "fp32"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8", "fp8"),
        (
            {
                "quantization_config": {
                    "quant_method": "fp8",
                    "modules_to_not_convert": ["lm_head", "layers.0.self_attn.q_a_layernorm"],
                }
            },
            "fp8",
            "fp8",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "mxfp4",
                    "modules_to_not_convert": ["model.layers.*.self_attn"],
                }
            },
            "mxfp4",
            "bf16",
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "nvfp4",
            "nvfp4",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": INT4},
                    "ignore": ["re:.*self_attn.*"],
                }
            },
            "int4",
            "bf16",
        ),
    ],
)
def test_stored_types(changes: dict[str, Any], expert: str, dense: str) -> None:
    spec = read(MIXTRAL, **changes)
    assert (spec.expert_dtype, spec.dense_dtype) == (expert, dense)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 3}},
        {"quantization_config": {"quant_method": "aqlm"}},
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        {"quantization_config": {"quant_method": ["fp8"]}},
        {"quantization_config": {}},
        {"quantization_config": "fp8"},
        {"torch_dtype": "int7"},
        {"torch_dtype": 16},
    ],
)
def test_unknown_stored_types_are_refused_not_guessed(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"quantization_config|torch_dtype"):
        read(MIXTRAL, **changes)


def test_modelopt_says_its_type_in_a_second_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    assert load_model(str(tmp_path)).expert_dtype == "nvfp4"
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(FormatError, match="quantization"):
        load_model(str(tmp_path))


def test_an_unknown_architecture_is_read_by_common_names_and_says_so() -> None:
    spec = read(QWEN3, model_type="brand_new_moe")
    assert spec.num_experts == 16
    assert "'brand_new_moe' is not known" in spec.note


def test_an_unknown_architecture_says_all_that_is_missing() -> None:
    with pytest.raises(FormatError) as caught:
        read({"model_type": "brand_new_moe", "num_experts": 8, "hidden_size": 64})
    for key in ("num_hidden_layers", "moe_intermediate_size", "num_experts_per_tok", "vocab_size"):
        assert key in caught.value.cause
    assert "'brand_new_moe' is not known" in caught.value.cause
    assert "docs/models.md" in caught.value.remedy


@pytest.mark.parametrize(
    "changes", [{"hybrid_override_pattern": "MEM*"}, {"mlp_hidden_act": "relu2"}]
)
def test_unknown_hybrids_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=next(iter(changes))):
        read(QWEN3, model_type="brand_new_hybrid", **changes)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (QWEN3, "moe_intermediate_size"),
        (QWEN3, "vocab_size"),
        (MIXTRAL, "intermediate_size"),
        (MIXTRAL, "num_experts_per_tok"),
        (DEEPSEEK, "first_k_dense_replace"),
        (DEEPSEEK, "intermediate_size"),
        (DEEPSEEK, "n_shared_experts"),
        (DEEPSEEK, "q_lora_rank"),
        (DEEPSEEK, "v_head_dim"),
        (LLAMA4, "interleave_moe_layer_step"),
        (LLAMA4, "intermediate_size_mlp"),
    ],
)
def test_a_missing_key_is_named(config: dict[str, Any], key: str) -> None:
    with pytest.raises(FormatError, match=f"missing key {key}"):
        read(without(config, key))


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(FormatError, match="not a Mixture-of-Experts model"):
        read({**without(BASE, "num_experts_per_tok"), "model_type": "llama"})


def test_a_model_that_speaks_of_experts_in_unknown_words_is_not_called_dense() -> None:
    config = {**without(BASE, "num_experts_per_tok"), "model_type": "new", "expert_total": 8}
    with pytest.raises(FormatError, match="expert_total"):
        read(config)


@pytest.mark.parametrize(
    ("config", "changes", "field"),
    [
        (MIXTRAL, {"hidden_size": "64"}, "hidden_size"),
        (MIXTRAL, {"hidden_size": 64.0}, "hidden_size"),
        (MIXTRAL, {"hidden_size": float("nan")}, "hidden_size"),
        (MIXTRAL, {"hidden_size": float("inf")}, "hidden_size"),
        (MIXTRAL, {"hidden_size": True}, "hidden_size"),
        (MIXTRAL, {"hidden_size": [64]}, "hidden_size"),
        (MIXTRAL, {"hidden_size": 0}, "hidden_size"),
        (MIXTRAL, {"hidden_size": -64}, "hidden_size"),
        (MIXTRAL, {"hidden_size": 10**4000}, "hidden_size"),
        (MIXTRAL, {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        (MIXTRAL, {"num_local_experts": 10**6}, "num_local_experts"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        (MIXTRAL, {"num_experts_per_tok": 0}, "num_experts_per_tok"),
        (MIXTRAL, {"experts_per_token": 4}, "experts_per_token"),
        (MIXTRAL, {"num_key_value_heads": 3}, "num_kv_heads"),
        (MIXTRAL, {"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads"),
        (MIXTRAL, {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        (MIXTRAL, {"layer_types": ["full_attention"]}, "layer_types"),
        (MIXTRAL, {"layer_types": ["mamba"] * 4}, "layer_types"),
        (MIXTRAL, {"layer_types": [["full_attention"]] * 4}, "layer_types"),
        (MIXTRAL, {"layer_types": ["sliding_attention"] * 4}, "sliding_window"),
        (QWEN3, {"mlp_only_layers": [4]}, "mlp_only_layers"),
        (QWEN3, {"mlp_only_layers": "0"}, "mlp_only_layers"),
        (QWEN3, {"mlp_only_layers": [0, 1, 2, 3]}, "no layer has experts"),
        (QWEN3, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (DEEPSEEK, {"first_k_dense_replace": 4}, "no layer has experts"),
        (DEEPSEEK, {"n_group": 3}, "n_group"),
        (DEEPSEEK, {"topk_group": 5}, "topk_group"),
        (DEEPSEEK, {"moe_layer_freq": [0, 1, 2, 1]}, "moe_layer_freq"),
        (LLAMA4, {"moe_layers": [-1]}, "moe_layers"),
    ],
)
def test_bad_values_are_refused_with_the_field(
    config: dict[str, Any], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(FormatError, match=field) as caught:
        read(config, **changes)
    assert caught.value.cause.startswith("here: ")
    assert len(caught.value.cause) < 400
    assert caught.value.remedy


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        json.dumps(MIXTRAL).encode()[:-20],
        b"[]",
        b"null",
        b"3",
        b"\xff\xfe\x00{",
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix",
        b"[" * 100_000,
        b'{"hidden_size": ' + b"9" * 10_000 + b"}",
        b'{"a": ' * 50_000,
    ],
    ids=range(11),
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"config\.json"):
        load_model(str(path))


def test_numbers_that_json_lacks_matter_only_where_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**MIXTRAL, "time_step_limit": [0.0, float("inf")]}))
    assert load_model(str(path)).num_experts == 8
    path.write_text(json.dumps({**MIXTRAL, "vocab_size": float("nan")}))
    with pytest.raises(FormatError, match="vocab_size is nan"):
        load_model(str(path))


def test_paths(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        load_model(str(folder))
    path = folder / "config.json"
    path.write_text(json.dumps(MIXTRAL))
    assert load_model(str(folder)).name == "my-model"
    assert load_model(str(path)) == load_model(str(folder))
    path.write_text(json.dumps({**MIXTRAL, "_name_or_path": "org/name\x1b[31m"}))
    assert load_model(str(folder)).name == "org/name[31m"
    path.write_text(json.dumps({**MIXTRAL, "_name_or_path": "/data/somewhere"}))
    assert load_model(str(folder)).name == "my-model"
    with pytest.raises(InputError, match="no such file"):
        load_model(str(folder / "missing.json"))
    with pytest.raises(InputError, match="not a file"):
        load_model("/dev/null")
    path.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(FormatError, match="too long"):
        load_model(str(path))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = sorted(
    {*MIXTRAL, *QWEN3, *DEEPSEEK, *LLAMA4, *GPT_OSS}
    | {"layer_types", "attn_type_list", "mlp_layer_types", "moe_layers", "text_config", "dtype"}
    | {"quantization_config", "tie_word_embeddings", "use_sliding_window", "index_topk"}
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=st.sampled_from([MIXTRAL, QWEN3, DEEPSEEK, LLAMA4, GPT_OSS]),
    changes=st.dictionaries(st.sampled_from(KEYS), ANY_JSON, min_size=1, max_size=4),
)
def test_any_json_gives_a_spec_or_an_error_of_ours(
    config: dict[str, Any], changes: dict[str, Any]
) -> None:
    try:
        spec = read(config, **changes)
    except MoesimError:
        return
    assert 0 < spec.active_params <= spec.total_params
    json.dumps(spec.to_dict())
