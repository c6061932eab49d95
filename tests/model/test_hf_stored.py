"""How checkpoints store their weights: bytes per weight by class, methods read and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import FormatError
from moesim.model.hf_config import spec_from_config
from moesim.model.names import load_model
from moesim.model.spec import ModelSpec

SHAPE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 12,
    "hidden_size": 64,
    "intermediate_size": 200,
    "moe_intermediate_size": 48,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mlp_only_layers": [0],
    "vocab_size": 1000,
    "torch_dtype": "bfloat16",
}


def read(quant: dict[str, Any], **changes: Any) -> ModelSpec:
    config = {**SHAPE, **changes, "quantization_config": quant}
    return spec_from_config(config, where="here", name="toy")


def bits(spec: ModelSpec, tensor_class: str) -> float:
    return 8 * spec.bytes_per_weight(tensor_class)


def group(kind: str, num_bits: int, size: int | None, **more: Any) -> dict[str, Any]:
    return {"weights": {"type": kind, "num_bits": num_bits, "group_size": size, **more}}


CT = {"quant_method": "compressed-tensors"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("quant", "dtype", "expected"),
    [
        # 16-bit scale and packed zero point of 4 bits for 128 weights
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4", 4 + 20 / 128),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "int4", 4 + 20 / 64),
        (GPTQ, "int4", 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "int8", 8 + 24 / 32),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "int4", 4),
        ({"quant_method": "gptq_marlin", "bits": 4, "group_size": 32}, "int4", 4 + 20 / 32),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "int4", 4 + 20 / 128),
        ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "mxfp4", 4.25),
        ({"quant_method": "auto_round", "bits": 4, "data_type": "nv_fp"}, "nvfp4", 4.5),
        # a 32-bit scale for 64 weights, or 8 bits for 64 and 32 for 256 of those
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4", 4.5),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            "nf4",
            4 + 8 / 64 + 32 / (64 * 256),
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", 8),
        ({**CT, "config_groups": {"a": group("int", 4, 128)}}, "int4", 4 + 16 / 128),
        ({**CT, "config_groups": {"a": group("int", 4, 32, symmetric=False)}}, "int4", 4 + 20 / 32),
        ({**CT, "config_groups": {"a": group("int", 8, None, strategy="channel")}}, "int8", 8),
        ({**CT, "config_groups": {"a": group("float", 8, None, strategy="channel")}}, "fp8", 8),
        (
            {**CT, "config_groups": {"a": group("float", 8, None, strategy="block")}},
            "fp8",
            8 + 32 / 16384,
        ),
        ({**CT, "config_groups": {"a": group("float", 8, 32)}}, "mxfp8", 8.25),
        ({**CT, "config_groups": {"a": group("float", 4, 16)}}, "nvfp4", 4.5),
        ({**CT, "config_groups": {"a": group("float", 4, 32)}}, "mxfp4", 4.25),
        ({"quant_method": "fp8"}, "fp8", 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8 + 32 / 16384),
        ({"quant_method": "fbgemm_fp8"}, "fp8", 8),
        ({"quant_method": "mxfp8"}, "mxfp8", 8.25),
        ({"quant_method": "w8a8_int8"}, "int8", 8),
        (
            {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]},
            "int8",
            8 + 32 / 16384,
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8", 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", 4.5),
        ({"quant_algo": "FP8_PB_WO"}, "fp8", 8 + 32 / 16384),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "int4", 4 + 16 / 128),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}},
            },
            "mxfp4",
            4.25,
        ),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}},
            "fp8",
            8,
        ),
    ],
)
def test_a_method_by_itself_covers_all_projections(
    quant: dict[str, Any], dtype: str, expected: float
) -> None:
    spec = read(quant)
    assert (spec.expert_dtype, spec.dense_dtype) == (dtype, dtype)
    for tensor_class in ("experts", "attention", "dense"):
        assert bits(spec, tensor_class) == pytest.approx(expected, abs=1e-6)
    assert bits(spec, "router") == 16
    assert spec.expert_bytes() == pytest.approx(3 * 64 * 48 * expected / 8, abs=0.51)


def test_mxfp4_covers_experts_alone() -> None:
    spec = read({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert (bits(spec, "experts"), bits(spec, "attention")) == (4.25, 16)


def test_w4afp8_experts_and_the_rest() -> None:
    spec = read({"quant_method": "w4afp8"})
    assert (spec.expert_dtype, spec.dense_dtype) == ("int4", "fp8")
    assert bits(spec, "experts") == pytest.approx(4 + 16 / 128)


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("re:.*self_attn.*", {"attention"}),
        ("model.layers.*.self_attn", {"attention"}),
        ("*self_attn*", {"attention"}),
        ("self_attn", {"attention"}),
        ("re:.*mlp\\.(gate|up|gate_up|down)_proj.*", {"dense"}),
        ("re:.*mlp.experts.*", {"experts"}),
        ("mlp.gate", set()),
        ("re:.*mlp.gate$", set()),
        ("lm_head", set()),
        ("model.visual*", set()),
        ("mtp.layers.0*", set()),
    ],
)
def test_modules_left_out_keep_sixteen_bits(entry: str, kept: set[str]) -> None:
    quant = {**CT, "config_groups": {"a": group("int", 4, 128)}, "ignore": ["lm_head", entry]}
    spec = read(quant)
    for tensor_class in ("experts", "attention", "dense"):
        wanted = 16 if tensor_class in kept else 4 + 16 / 128
        assert bits(spec, tensor_class) == pytest.approx(wanted, abs=1e-6)
    assert not spec.note


def test_a_layer_left_out_is_one_layer() -> None:
    # 12 layers: "1*" is layers 1, 10 and 11, "1.*" layer 1 alone, "0*" layer 0.
    for entry, layers in (("model.layers.1*", 3), ("model.layers.1.*", 1), ("layers.0*", 1)):
        spec = read({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [entry]})
        share = layers / 12
        assert bits(spec, "attention") == pytest.approx(16 * share + 4.5 * (1 - share), abs=1e-6)


def test_part_of_attention_left_out_counts_by_its_weights() -> None:
    # Of queries 64 x 128, keys and values 64 x 64 each, output 128 x 64: queries are a third.
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(12)]
    spec = read({"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": names})
    assert bits(spec, "attention") == pytest.approx((16 + 2 * 4.5) / 3, abs=1e-6)


def test_mixed_groups_and_lists() -> None:
    groups = {
        "a": {"targets": ["re:.*self_attn.*"], **group("float", 8, None, strategy="channel")},
        "b": {"targets": ["re:.*mlp.experts.*"], **group("float", 4, 16)},
    }
    spec = read({**CT, "config_groups": groups, "ignore": ["lm_head"]})
    assert (spec.expert_dtype, spec.dense_dtype) == ("nvfp4", "fp8")
    assert [bits(spec, name) for name in ("experts", "attention", "dense")] == [4.5, 8, 16]
    layers = {f"model.layers.{i}.mlp.experts": {"quant_algo": "NVFP4"} for i in range(12)}
    layers |= {
        f"model.layers.{i}.self_attn.{p}_proj": {"quant_algo": "FP8"}
        for i in range(12)
        for p in "qkvo"
    }
    layers["lm_head"] = {"quant_algo": "W4A16_NVFP4"}
    listed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    spec = read({**listed, "quantized_layers": layers})
    assert [bits(spec, name) for name in ("experts", "attention", "dense")] == [4.5, 8, 16]
    assert bits(spec, "tables") == pytest.approx((16 + 4.5) / 2)
    assert spec.non_expert_bytes() == round(
        11 * 64 * 16 * 2 + 12 * 2 * 64 * 32 * 6 + 3 * 64 * 200 * 2 + 64_000 * 2 + 64_000 * 0.5625
    )


def test_gptq_modules_of_their_own() -> None:
    spec = read({**GPTQ, "dynamic": {"-:.*self_attn.*": {}, "+:.*experts.*": {"bits": 8}}})
    assert bits(spec, "attention") == 16
    assert bits(spec, "experts") == pytest.approx(8 + 24 / 128)
    spec = read({**GPTQ, "modules_in_block_to_quantize": [["mlp.experts"]]})
    assert (bits(spec, "attention"), bits(spec, "dense")) == (16, 16)
    assert bits(spec, "experts") == pytest.approx(4 + 20 / 128)
    round_to = {"quant_method": "auto-round", "bits": 4, "group_size": 128}
    extra = {"model.layers.3.self_attn.q_proj": {"bits": 16}, ".*o_proj.*": {"bits": 8}}
    spec = read({**round_to, "extra_config": extra})
    # Queries and output are a third each: of 12 layers' queries one keeps 16 bits, output has 8.
    low, high = 4 + 20 / 128, 8 + 24 / 128
    queries = (16 + 11 * low) / 12
    assert bits(spec, "attention") == pytest.approx((queries + high + low) / 3, abs=1e-6)


def test_quark_schemes_by_pattern() -> None:
    quant = {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}},
        "layer_quant_config": {"*self_attn*": {"weight": {"dtype": "fp8_e4m3"}}},
        "exclude": ["lm_head"],
    }
    spec = read(quant)
    assert (spec.expert_dtype, spec.dense_dtype) == ("mxfp4", "fp8")


def test_quark_stages_end_in_what_is_stored() -> None:
    stages = [{"dtype": "fp8_e4m3"}, {"dtype": "int4", "qscheme": "per_channel"}]
    spec = read({"quant_method": "quark", "global_quant_config": {"weight": stages}})
    assert (spec.expert_dtype, bits(spec, "experts")) == ("int4", 4)
    experts = {"*mlp.experts": {"weight": {"dtype": "fp4", "qscheme": "per_group"}}}
    spec = read({"quant_method": "quark", "global_quant_config": {}, "layer_quant_config": experts})
    assert (spec.expert_dtype, spec.dense_dtype) == ("mxfp4", "bf16")


def test_deepseek_v4_experts_have_a_type_of_their_own() -> None:
    config = {
        **{key: value for key, value in SHAPE.items() if key != "mlp_only_layers"},
        "model_type": "deepseek_v4",
        "n_shared_experts": 1,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "compress_ratios": [0] * 12,
    }
    quant = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for expert_dtype, wanted in (("fp4", "mxfp4"), ("fp8", "fp8"), (None, "fp8")):
        spec = spec_from_config(
            {**config, "quantization_config": quant, "expert_dtype": expert_dtype}, "here", "toy"
        )
        assert (spec.expert_dtype, spec.dense_dtype) == (wanted, "fp8")
    mixed = {
        **quant,
        "quant_algo": "MIXED_PRECISION",
        "ignore": ["*.attn.*", "mtp.*"],
        "quantized_layers": {f"layers.{i}.ffn.experts": {"quant_algo": "NVFP4"} for i in range(12)},
    }
    spec = spec_from_config({**config, "quantization_config": mixed}, "here", "toy")
    assert (spec.expert_dtype, spec.dense_dtype) == ("nvfp4", "fp8")
    assert bits(spec, "attention") < 9
    with pytest.raises(FormatError, match="expert_dtype"):
        spec_from_config({**config, "expert_dtype": "fp6"}, "here", "toy")


@pytest.mark.parametrize(
    ("quant", "what"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "3-bit"),
        ({"quant_method": "gptq"}, "bits None"),
        ({"quant_method": "gptq", "bits": True}, "bits True"),
        ({"quant_method": "awq", "bits": 4, "group_size": "all"}, "group_size"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "modelopt", "quant_algo": "INT3"}, "INT3"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
        ({**CT, "config_groups": {}}, "config_groups"),
        (
            {**CT, "config_groups": {"a": group("int", 4, 128)}, "sparsity_config": {"x": 1}},
            "spars",
        ),
        ({**CT, "config_groups": {"a": group("float", 6, 32)}}, "6 bits"),
        ({**CT, "config_groups": {"a": group("int", 4, 128)}, "ignore": "lm_head"}, "ignore"),
        ({**CT, "config_groups": {"a": group("int", 4, 128)}, "ignore": [3]}, "hold 3"),
        ({**CT, "config_groups": {"a": group("int", 4, 128)}, "ignore": ["re:(a+)+$"]}, "repeats"),
        ({**CT, "config_groups": {"a": group("int", 4, 128)}, "ignore": ["re:("]}, "regular"),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp3"}}}, "fp3"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size"),
    ],
)
def test_what_is_not_read_is_refused_by_name(quant: dict[str, Any], what: str) -> None:
    with pytest.raises(FormatError, match=what) as caught:
        read(quant)
    assert "remove" not in caught.value.remedy
    assert len(caught.value.cause) < 400


def test_entries_that_name_nothing_known_are_said() -> None:
    quant = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    spec = read({**quant, "exclude_modules": ["model.layers.3.block.attn_mixer"]})
    assert "1 entries" in spec.note or "attn_mixer" in spec.note


def test_the_second_file_of_modelopt_is_read_for_nested_configs_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": SHAPE}))
    quant = {"quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quant))
    assert load_model(str(tmp_path)).expert_dtype == "fp8"
    inner = {**SHAPE, "quantization_config": GPTQ}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": inner}))
    assert load_model(str(tmp_path)).expert_dtype == "int4"


def test_what_a_quantisation_says_of_modules_is_read_or_named() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    found = read({**awq, "layers_to_keep": ["mlp"]})
    assert "not understood, and not counted: layers_to_keep" in found.note
    assert read({**awq, "modules_to_fuse": {"mlp": ["up"]}}).note == ""


def test_a_cache_of_fewer_bits_is_named() -> None:
    quant = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    assert "KV cache of fewer bits" in read(quant).note


def test_modelopt_nested_in_the_config() -> None:
    """As vLLM's reader takes it: hf_quant_config.json's content under quant_method."""
    inner = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    assert read({"quant_method": "modelopt", "quantization": inner}).expert_dtype == "fp8"


def test_two_widths_of_bitsandbytes_are_refused() -> None:
    quant = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": True}
    with pytest.raises(FormatError, match="load_in_8bit and load_in_4bit"):
        read(quant)
