"""Configs retyped from public ones, read in place: the values that their notes give.

The same kinds are in test_hf_families.py and test_hf_stored.py as small inputs; these are whole.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.errors import FormatError
from moesim.model.names import load_model
from moesim.model.spec import ModelSpec

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"


def shared(folder: str) -> ModelSpec:
    path = CASES / folder / "config.json"
    if not path.exists():
        pytest.skip(f"{folder} is not in ../shared/cases")
    return load_model(str(path))


# total, active with both tables (billions), KV bytes per token in bf16, MoE layers, experts, top-k
VALUES = [
    ("cfg_dbrx", 131.6, 36.5, 40 * 2 * 8 * 128 * 2, 40, 16, 4),
    ("cfg_ernie45", 21.8, 3.35, 28 * 2 * 4 * 128 * 2, 27, 64, 6),
    ("cfg_hunyuan_a13b", 80.4, 12.7, 32 * 2 * 8 * 128 * 2, 32, 64, 8),
    ("cfg_kimi_linear", 49.1, 3.48, 7 * 576 * 2, 26, 256, 8),
    ("cfg_longcat", 560.7, 27.9, 28 * 2 * 576 * 2, 28, 512, 12),
    ("cfg_mimo_v2", 308.8, 15.5, 9 * 4 * 320 * 2 + 39 * 8 * 320 * 2, 47, 256, 8),
    ("cfg_qwen35", 396.4, 17.3, 15 * 2 * 2 * 256 * 2, 60, 512, 10),
    ("cfg_qwen3_omni", 30.5, 3.35, 48 * 2 * 4 * 128 * 2, 48, 128, 8),
    ("cfg_qwen3next", 79.7, 3.87, 12 * 2 * 2 * 256 * 2, 48, 512, 10),
    ("cfg_step35", 195.8, 10.9, 45 * 2 * 8 * 128 * 2, 42, 288, 8),
    ("cfg_dsv4_flash", 284.3, 13.8, 50_261, 43, 256, 6),
]


@pytest.mark.parametrize(("folder", "total", "active", "kv", "moe", "experts", "top_k"), VALUES)
def test_sizes(
    folder: str, total: float, active: float, kv: int, moe: int, experts: int, top_k: int
) -> None:
    spec = shared(folder)
    assert spec.total_params / 1e9 == pytest.approx(total, rel=0.002)
    assert spec.active_params / 1e9 == pytest.approx(active, rel=0.004)
    assert spec.kv_bytes_per_token() == kv
    assert (spec.num_moe_layers, spec.num_experts, spec.top_k) == (moe, experts, top_k)
    assert "not understood" not in spec.note


def test_states_of_hybrids() -> None:
    # 36 layers: convolution 8192 channels x 3 in 2 bytes, 32 heads of 128 x 128 in 4 bytes.
    assert shared("cfg_qwen3next").state_bytes == 36 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)
    # 20 layers of 32 heads of 128: three convolutions of 4096 channels.
    assert shared("cfg_kimi_linear").state_bytes == 20 * (3 * 4096 * 3 * 2 + 32 * 128 * 128 * 4)


def test_what_stands_beside_the_experts() -> None:
    assert shared("cfg_dsv4_flash").hash_layer_ids == (0, 1, 2)
    assert shared("cfg_longcat").num_zero_experts == 256
    step = shared("cfg_step35")
    assert (step.attention.num_kv_heads, step.shared_intermediate_size) == (8, 1280)
    assert (step.mtp_layers, shared("cfg_ernie45").mtp_layers) == (3, 1)


def test_a_file_without_the_sizes_of_its_state_spaces_is_refused() -> None:
    with pytest.raises(FormatError, match="mamba_num_heads"):
        shared("cfg_nemotron3")


# expert and dense type, bits per weight of experts, of attention
STORED = [
    ("q_autoround", "int4", "int4", 4 + 20 / 128, 4 + 20 / 128),
    ("q_awq", "int4", "int4", 4 + 20 / 128, 4 + 20 / 128),
    ("q_bnb", "nf4", "nf4", 4.5, 4.5),
    ("q_gptq", "int4", "int4", 4 + 20 / 128, 4 + 20 / 128),
    ("q_mixed", "nvfp4", "fp8", 4.5, 8),
    ("q_quark", "mxfp4", "mxfp4", 4.25, 4.25),
    ("q_w4a16", "int4", "int4", 4 + 16 / 128, 4 + 16 / 128),
    ("q_w8a8", "int8", "int8", 8, 8),
]


@pytest.mark.parametrize(("folder", "expert", "dense", "expert_bits", "attention_bits"), STORED)
def test_stored_types(
    folder: str, expert: str, dense: str, expert_bits: float, attention_bits: float
) -> None:
    spec = shared(folder)
    assert (spec.expert_dtype, spec.dense_dtype) == (expert, dense)
    assert spec.bytes_per_weight("experts") * 8 == pytest.approx(expert_bits, abs=1e-6)
    assert spec.bytes_per_weight("attention") * 8 == pytest.approx(attention_bits, abs=1e-6)
    assert spec.bytes_per_weight("router") == 2
