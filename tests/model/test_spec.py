"""ModelSpec arithmetic and presets. Reading config.json is in the other files of this folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import FormatError, InputError, UnknownNameError
from moesim.model.attention import Cache, LayerKind
from moesim.model.names import (
    KV_BYTES,
    TOKEN_BYTES,
    WEIGHT_BYTES,
    AttentionSpec,
    ModelSpec,
    load_model,
    preset_aliases,
    preset_names,
)

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

# (preset, total, active, tables, source), in billions as printed. `tables`: which vocabulary
# tables the published active count contains: both, the output head only, or none.
PUBLISHED = [
    ("Mixtral-8x7B", "46.7", "12.9", "both", "arXiv:2401.04088 abstract and mistral.ai/news"),
    ("Mixtral-8x22B", "141", "39", "both", "mistral.ai/news/mixtral-8x22b"),
    ("OLMoE-1B-7B", "6.9", "1.3", "both", "arXiv:2409.02060"),
    ("Qwen2-57B-A14B", "57.4", "14", "both", "arXiv:2407.10671 and its model card"),
    ("Qwen3-30B-A3B", "30.5", "3.3", "both", "its model card"),
    ("Qwen3-235B-A22B", "235", "22", "both", "its model card"),
    ("DeepSeek-V2-Lite", "15.7", "2.4", "head", "arXiv:2405.04434 appendix B"),
    ("DeepSeek-V2", "236", "21", "both", "arXiv:2405.04434 abstract"),
    ("DeepSeek-V3", "671", "37", "both", "arXiv:2412.19437 abstract"),
    ("Kimi-K2", "1040", "32.6", "both", "arXiv:2507.20534"),
    ("GPT-OSS-20B", "20.91", "3.61", "head", "arXiv:2508.10925 table 1"),
    ("GPT-OSS-120B", "116.83", "5.13", "head", "arXiv:2508.10925 table 1"),
    ("Llama-4-Scout", "109", "17", "both", "ai.meta.com/blog/llama-4-multimodal-intelligence"),
    ("Llama-4-Maverick", "400", "17", "both", "ai.meta.com/blog/llama-4-multimodal-intelligence"),
    ("GLM-4.5", "355", "32", "none", "arXiv:2508.06471 table 1"),
    ("GLM-4.5-Air", "106", "12", "none", "arXiv:2508.06471 table 1"),
    ("GLM-5", "744", "40", "none", "GLM-5 report, architecture table"),
    ("MiniMax-M2", "230", "10", "none", "its model card"),
    ("DeepSeek-V3.2", "671", "37", "head", "its model card; indexers add 0.85 to V3's 37.6"),
    ("DeepSeek-V4-Flash", "284", "13", "head", "its model card"),
    ("DeepSeek-V4-Pro", "1600", "49", "head", "its model card"),
    ("Qwen3-Coder-480B-A35B", "480", "35", "both", "its model card"),
    ("Qwen3.5-35B-A3B", "35", "3", "head", "its name"),
    ("Qwen3.5-122B-A10B", "122", "10", "both", "its name"),
    ("Qwen3.5-397B-A17B", "397", "17", "both", "its name"),
    ("Kimi-K3", "2780", "104", "both", "its model card"),
    ("GLM-5.2", "744", "40", "none", "the model card of GLM-5"),
    ("MiniMax-M3", "428", "23", "none", "its model card, with its vision tower"),
    ("MiMo-V2-Flash", "309", "15", "head", "its model card"),
    ("Nemotron-3-Nano", "31.6", "3.6", "both", "its technical report"),
    ("Nemotron-3-Super", "120", "12", "head", "its technical report, abstract"),
    ("Nemotron-3-Ultra", "550", "55", "head", "research.nvidia.com/labs/nemotron"),
    ("Gemma-4-26B-A4B", "25.2", "3.8", "both", "its model card"),
    ("PhiMoE", "41.9", "6.6", "both", "the model card of Phi-3.5-MoE-instruct"),
    ("Granite-3.0-1B-A400M", "1.3", "0.4", "none", "its model card"),
    ("Granite-3.0-3B-A800M", "3.3", "0.8", "none", "its model card"),
]


def _agrees(value: float, printed: str) -> bool:
    """Within 2%, or the same when rounded or cut to the printed digits (2.451 as 2.4)."""
    digits = len(printed.partition(".")[2])
    target = float(printed)
    above = value - target
    return abs(above) <= max(0.02 * target, 0.5 * 10**-digits) or 0 <= above < 10**-digits


@pytest.mark.parametrize(("name", "total", "active", "tables", "source"), PUBLISHED)
def test_parameter_counts_agree_with_the_published_ones(
    name: str, total: str, active: str, tables: str, source: str
) -> None:
    spec = load_model(name)
    counted = spec.active_params
    if tables == "head":
        counted -= spec.lookup_params
    if tables == "none":
        counted -= spec.embedding_params + spec.lm_head_params
    assert _agrees(spec.total_params / 1e9, total), source
    assert _agrees(counted / 1e9, active), source


def test_stored_sizes_agree_with_the_checkpoints() -> None:
    # GPT-OSS-120B: 60.8 GiB (arXiv:2508.10925 table 1) = 65.3e9 bytes.
    assert load_model("GPT-OSS-120B").weight_bytes() == pytest.approx(60.8 * 2**30, rel=0.01)
    assert load_model("GPT-OSS-20B").weight_bytes() == pytest.approx(12.8 * 2**30, rel=0.01)
    # granite-3.0-3b-a800m-instruct: safetensors of 5.00 + 1.75 GB, which hold the tied table twice.
    granite = load_model("Granite-3.0-3B-A800M")
    assert granite.weight_bytes() + 2 * granite.embedding_params == pytest.approx(6.75e9, rel=0.01)


def test_layers_for_further_tokens_of_deepseek_v3() -> None:
    # README_WEIGHTS.md of DeepSeek-V3: 11.5B of its own beside the shared tables.
    v3 = load_model("DeepSeek-V3")
    assert (v3.mtp_layers, v3.mtp_moe_layers) == (1, 1)
    assert v3.mtp_params / 1e9 == pytest.approx(11.5, rel=0.02)
    assert load_model("Kimi-K2").mtp_params == 0


def test_the_cache_of_deepseek_v4_pro_at_a_million_tokens() -> None:
    # Published: 9.62 GiB a sequence in bf16, with indexers' keys in bf16 too (moesim: fp8, 132
    # bytes for 128, as engines keep them); 1 / 8.7 of DeepSeek-V3.2's, counted in the same way.
    tokens, gib = 1 << 20, 2**30
    pro, v32 = load_model("DeepSeek-V4-Pro"), load_model("DeepSeek-V3.2")
    own = pro.kv_bytes(tokens) + 30 * tokens // 4 * (256 - 132)
    assert own / gib == pytest.approx(9.62, rel=0.002)
    theirs = v32.kv_bytes(tokens) + 61 * tokens * (256 - 132)
    assert theirs / own == pytest.approx(8.7, rel=0.005)


def test_expert_sizes_by_hand() -> None:
    mixtral = load_model("Mixtral-8x7B")
    assert mixtral.expert_params == 3 * 4096 * 14336 == 176_160_768
    assert mixtral.expert_bytes() == 2 * 176_160_768
    assert mixtral.expert_flops_per_token == 2 * 176_160_768
    assert mixtral.expert_bytes("fp32") == 4 * 176_160_768
    oss = load_model("GPT-OSS-20B")
    # 3 x 2880 x 2880 weights of 4 bits, one byte of scale for each 32
    assert oss.expert_params == 24_883_200
    assert oss.expert_bytes() == 24_883_200 // 2 + 24_883_200 // 32 == 13_219_200
    v3 = load_model("DeepSeek-V3")
    # gate, up and down of 7168 x 2048: 56 x 16 blocks of 128 x 128 each, 4 bytes of scale a block
    assert v3.expert_bytes() == 3 * (7168 * 2048 + 4 * 56 * 16) == 44_050_944
    assert v3.expert_bytes("int4") == v3.expert_params // 2 + 2 * v3.expert_params // 32


def test_hidden_state_and_kv_sizes_by_hand() -> None:
    v3 = load_model("DeepSeek-V3")
    assert v3.token_bytes() == 2 * 7168
    assert v3.token_bytes("fp8") == 7168 + 4 * 7168 // 128 == 7392
    # latent 512 + rotary 64, in 61 layers, 2 bytes
    assert v3.kv_bytes_per_token() == 61 * (512 + 64) * 2 == 70_272
    mixtral = load_model("Mixtral-8x7B")
    assert mixtral.kv_bytes_per_token() == 32 * 2 * 8 * 128 * 2 == 131_072
    assert mixtral.kv_bytes_per_token("fp8") == 65_536
    assert mixtral.kv_bytes(1000) == 131_072_000


def test_sliding_windows_bound_the_kv_cache() -> None:
    oss = load_model("GPT-OSS-20B")
    assert oss.attention.window_tokens == 128
    assert oss.attention.window_layer_ids == tuple(range(0, 24, 2))
    per_layer = 2 * 8 * 64 * 2
    assert oss.kv_bytes(100) == 24 * 100 * per_layer
    assert oss.kv_bytes(1000) == (12 * 1000 + 12 * 128) * per_layer
    with pytest.raises(InputError, match="context_tokens"):
        oss.kv_bytes(-1)


def test_latent_attention_weights_by_hand() -> None:
    lite = load_model("DeepSeek-V2-Lite")
    query = 2048 * 16 * (128 + 64)
    compress, expand = 2048 * (512 + 64), 512 * 16 * (128 + 128)
    assert lite.attention.layer_params(2048) == query + compress + expand + 16 * 128 * 2048
    v3 = load_model("DeepSeek-V3")
    query = 7168 * 1536 + 1536 * 128 * 192
    compress, expand = 7168 * 576, 512 * 128 * 256
    assert v3.attention.layer_params(7168) == query + compress + expand + 128 * 128 * 7168
    assert v3.attention.head_dim == 192


def test_totals_of_a_small_model_by_hand() -> None:
    spec = ModelSpec(
        name="toy",
        source="by hand",
        num_hidden_layers=3,
        moe_layer_ids=(1, 2),
        hidden_size=10,
        moe_intermediate_size=7,
        num_experts=4,
        top_k=2,
        vocab_size=100,
        attention=AttentionSpec("gqa", num_heads=4, num_kv_heads=2, head_dim=5),
        num_shared_experts=2,
        shared_intermediate_size=14,
        dense_intermediate_size=20,
    )
    attention = 10 * 20 + 2 * 10 * 10 + 20 * 10  # q, k and v, o
    expert, shared, dense, router, table = 3 * 10 * 7, 3 * 10 * 14, 3 * 10 * 20, 10 * 4, 1000
    rest = 3 * attention + dense + 2 * (shared + router) + 2 * table
    assert spec.non_expert_params == rest
    assert spec.total_params == rest + 2 * 4 * expert
    assert spec.active_params == rest + 2 * 2 * expert
    assert spec.weight_bytes() == 2 * spec.total_params
    tied = dataclasses.replace(spec, tie_word_embeddings=True)
    assert tied.total_params == spec.total_params - table
    # fp8 for the experts alone, then for all projections; tables and routers stay at 16 bits
    scale = WEIGHT_BYTES["fp8"]
    assert dataclasses.replace(spec, expert_dtype="fp8").non_expert_bytes() == 2 * rest
    both = dataclasses.replace(spec, expert_dtype="fp8", dense_dtype="fp8")
    wide = 2 * table + 2 * router
    assert both.non_expert_bytes() == round((rest - wide) * scale + 2 * wide)


def test_layers_with_experts() -> None:
    assert load_model("Llama-4-Maverick").moe_layer_ids == tuple(range(1, 48, 2))
    assert load_model("Llama-4-Scout").moe_layer_ids == tuple(range(48))
    assert load_model("DeepSeek-V3").moe_layer_ids == tuple(range(3, 61))
    assert load_model("GLM-4.5").num_moe_layers == 89
    assert load_model("GLM-4.5-Air").num_moe_layers == 45


def test_groups_and_shared_experts() -> None:
    v3, v2, lite = (load_model(f"DeepSeek-{name}") for name in ("V3", "V2", "V2-Lite"))
    assert (v3.n_group, v3.topk_group) == (8, 4)
    assert (v2.n_group, v2.topk_group) == (8, 3)
    assert (lite.n_group, lite.topk_group) == (1, 1)
    assert (lite.num_shared_experts, lite.shared_intermediate_size) == (2, 2816)
    qwen2 = load_model("Qwen2-57B-A14B")
    assert (qwen2.num_shared_experts, qwen2.shared_intermediate_size) == (8, 20480)
    assert load_model("Qwen3-30B-A3B").shared_intermediate_size == 0


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_by_every_name(name: str) -> None:
    spec = load_model(name)
    assert spec.name == name
    assert spec.source
    assert "is not known" not in spec.note
    for known in (name, *preset_aliases(name)):
        assert load_model(known) is spec
        assert load_model(known.upper()) is spec
        assert load_model(known.lower()) is spec


def test_presets_cover_the_common_models() -> None:
    wanted = (
        "Mixtral-8x7B Mixtral-8x22B OLMoE-1B-7B Qwen3-30B-A3B Qwen3-235B-A22B Qwen2-57B-A14B "
        "DeepSeek-V2-Lite DeepSeek-V2 DeepSeek-V3 DeepSeek-R1 GPT-OSS-20B GPT-OSS-120B "
        "Llama-4-Scout Llama-4-Maverick Kimi-K2 GLM-4.5 GLM-4.5-Air MiniMax-M2 PhiMoE debian-moe"
    )
    for name in wanted.split():
        load_model(name)
    assert load_model("DeepSeek-R1") is load_model("deepseek-ai/DeepSeek-V3")


@pytest.mark.parametrize("file", ["debian-moe.npz", "gpt-oss-20b.npz", "deepseek-v2-lite.npz"])
def test_the_model_of_each_real_trace_is_a_preset_of_its_shape(file: str) -> None:
    path = SHARED_DATA / file
    if not path.exists():
        pytest.skip(f"{file} is not in ../shared/data")
    with np.load(path, allow_pickle=False) as arrays:
        meta = json.loads(str(arrays["meta"]))
    spec = load_model(meta["model"])
    assert (spec.num_experts, spec.top_k) == (meta["num_experts"], meta["top_k"])
    assert list(spec.moe_layer_ids) == meta["layer_ids"]


def test_debian_moe_follows_its_description_and_says_what_is_assumed() -> None:
    spec = load_model("debian-moe")
    assert (spec.num_hidden_layers, spec.hidden_size, spec.num_experts) == (12, 768, 64)
    assert (spec.moe_intermediate_size, spec.top_k) == (384, 8)
    assert "assumed" in spec.note


def test_an_unknown_name_proposes_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_model("mixtral-8x8b")
    assert caught.value.nearest == "Mixtral-8x7B"
    with pytest.raises(UnknownNameError):
        preset_aliases("no such model")


@pytest.mark.parametrize("name", ["", "x\x00y", "a" * 5000, "../" * 2000, "\n"])
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises((UnknownNameError, InputError)):
        load_model(name)


def test_unknown_dtypes_are_refused_by_name() -> None:
    spec = load_model("Mixtral-8x7B")
    with pytest.raises(UnknownNameError, match="fp9"):
        spec.expert_bytes("fp9")
    with pytest.raises(UnknownNameError, match="mxfp4"):
        spec.kv_bytes_per_token("mxfp4")
    with pytest.raises(UnknownNameError, match="int4"):
        spec.token_bytes("int4")
    with pytest.raises(UnknownNameError, match="q9_k"):
        dataclasses.replace(spec, expert_dtype="q9_k")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"top_k": 9}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"num_experts": 40_000}, "num_experts"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"hidden_size": 4096.0}, "hidden_size"),
        ({"hidden_size": float("nan")}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"moe_layer_ids": ()}, "layer"),
        ({"moe_layer_ids": (0, 0)}, "moe_layer_ids"),
        ({"moe_layer_ids": (0, 32)}, "moe_layer_ids"),
        ({"moe_layer_ids": [0, 1]}, "moe_layer_ids"),
        ({"moe_layer_ids": (0, 1)}, "dense_intermediate_size"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 8, "topk_group": 1}, "topk_group"),
        ({"topk_group": 2}, "topk_group"),
        ({"num_shared_experts": 1}, "shared_intermediate_size"),
        ({"ffn_matrices": 4}, "ffn_matrices"),
    ],
)
def test_impossible_specs_are_refused_with_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(FormatError, match=field) as caught:
        dataclasses.replace(load_model("Mixtral-8x7B"), **changes)
    assert "\n" not in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": "mha"}, "kind"),
        ({"num_heads": 7, "num_kv_heads": 2}, "num_kv_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"kind": "mla"}, "kv_lora_rank"),
        ({"window_tokens": 128}, "window_layer_ids"),
    ],
)
def test_impossible_attention_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(FormatError, match=field):
        dataclasses.replace(load_model("Mixtral-8x7B").attention, **changes)


def test_specs_are_frozen_and_hashable() -> None:
    spec = load_model("Mixtral-8x7B")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.top_k = 3  # type: ignore[misc]
    assert hash(spec) == hash(dataclasses.replace(spec))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the specs have tuples, of tuples in `stored`."""
    return {
        key: tuple(tuple(v) if isinstance(v, list) else v for v in value)
        if isinstance(value, list)
        else value
        for key, value in fields.items()
    }


@pytest.mark.parametrize("name", preset_names())
def test_to_dict_survives_json_and_rebuilds_the_spec(name: str) -> None:
    spec = load_model(name)
    fields = json.loads(json.dumps(spec.to_dict()))
    derived = fields.pop("derived")
    attention = fields.pop("attention")
    fields["mtp_caches"] = tuple(Cache(**cache) for cache in fields["mtp_caches"])
    attention["kinds"] = [
        LayerKind(**{**_tuples(kind), "caches": tuple(Cache(**cache) for cache in kind["caches"])})
        for kind in attention["kinds"]
    ]
    assert ModelSpec(attention=AttentionSpec(**_tuples(attention)), **_tuples(fields)) == spec
    assert derived["total_params"] == spec.total_params
    assert derived["expert_bytes"][spec.expert_dtype] == spec.expert_bytes()
    assert derived["kv_bytes_per_token"].keys() == KV_BYTES.keys()
    assert derived["token_bytes"].keys() == TOKEN_BYTES.keys()


@given(
    experts=st.integers(1, 512),
    width=st.integers(1, 4096),
    layers=st.integers(1, 60),
    top_k=st.integers(1, 16),
)
def test_active_is_total_exactly_when_every_expert_is_chosen(
    experts: int, width: int, layers: int, top_k: int
) -> None:
    spec = dataclasses.replace(
        load_model("Mixtral-8x7B"),
        num_hidden_layers=layers,
        moe_layer_ids=tuple(range(layers)),
        num_experts=experts,
        top_k=min(top_k, experts),
        moe_intermediate_size=width,
    )
    idle = (experts - spec.top_k) * layers * 3 * 4096 * width
    assert spec.total_params - spec.active_params == idle
    assert spec.expert_bytes("mxfp4") < spec.expert_bytes("fp8") < spec.expert_bytes("bf16")
