"""Sizes out of the headers of safetensors: files of a small model, written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moesim
from moesim.errors import FormatError
from moesim.model.checkpoint_sizes import checkpoint_sizes, has_safetensors
from moesim.model.names import load_model
from moesim.model.weights import load_weights
from moesim.safetensors_file import TensorInfo, write_header

LAYERS, EXPERTS, HIDDEN, INNER = 3, 4, 64, 48
CONFIG = {
    "model_type": "deepseek_v3", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000,
    "num_experts_per_tok": 2, "intermediate_size": 200, "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
TWO, ONE = 2 * HIDDEN * INNER, HIDDEN * INNER  # a matrix in BF16, and in F8


def names(*, fused: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Expert 3 of layer 2 in F8, everything else in BF16."""
    out = {
        "model.embed_tokens.weight": ("BF16", (1000, HIDDEN)),
        "lm_head.weight": ("BF16", (1000, HIDDEN)),
        "model.norm.weight": ("BF16", (HIDDEN,)),
        "model.layers.3.mtp.weight": ("BF16", (HIDDEN,)),
        "mtp.fc.weight": ("BF16", (HIDDEN,)),
    }
    for layer in range(LAYERS):
        base = f"model.layers.{layer}"
        out[f"{base}.self_attn.o_proj.weight"] = ("BF16", (HIDDEN, 64))
        out[f"{base}.input_layernorm.weight"] = ("BF16", (HIDDEN,))
        if layer == 0:
            out[f"{base}.mlp.up_proj.weight"] = ("BF16", (200, HIDDEN))
            continue
        out[f"{base}.mlp.gate.weight"] = ("BF16", (EXPERTS, HIDDEN))
        out[f"{base}.mlp.shared_experts.up_proj.weight"] = ("BF16", (INNER, HIDDEN))
        if fused:
            out[f"{base}.mlp.experts.gate_up_proj"] = ("BF16", (EXPERTS, HIDDEN, 2 * INNER))
            out[f"{base}.mlp.experts.down_proj"] = ("BF16", (EXPERTS, INNER, HIDDEN))
            continue
        for expert in range(EXPERTS):
            dtype = "F8_E4M3" if (layer, expert) == (2, 3) else "BF16"
            for part in ("gate", "up", "down"):
                name = f"{base}.mlp.experts.{expert}.{part}_proj.weight"
                out[name] = (dtype, (INNER, HIDDEN))
    return out


def write(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], parts: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for part in range(parts):
        infos = {}
        for name in list(tensors)[part::parts]:
            dtype, shape = tensors[name]
            size = 1 if dtype.startswith("F8") else 2
            for length in shape:
                size *= length
            infos[name] = TensorInfo(dtype, shape, 0, size)
        with (folder / f"model-{part}.safetensors").open("wb") as out:
            write_header(out, infos, {})
            out.truncate(out.tell() + sum(info.num_bytes for info in infos.values()))
    return folder


@pytest.mark.parametrize("parts", [1, 3])
def test_expert_by_expert(tmp_path: Path, parts: int) -> None:
    folder = write(tmp_path / "m", names(), parts)
    assert has_safetensors(folder)
    placed, experts = checkpoint_sizes(folder, load_model(str(folder)))
    assert experts.tolist() == [[0] * 4, [3 * TWO] * 4, [3 * TWO] * 3 + [3 * ONE]]
    sizes = {(p.cls, p.layer): p.tensor.num_bytes for p in placed}
    assert sizes["experts", 2] == 9 * TWO + 3 * ONE
    assert sizes["shared", 1] == TWO
    assert sizes["router", 1] == 2 * EXPERTS * HIDDEN
    assert sizes["dense", 0] == 2 * 200 * HIDDEN
    assert sizes["attention", 0] == 2 * 64 * HIDDEN
    assert ("experts", 3) not in sizes
    weights = load_weights(str(folder))
    assert "experts have 0.0 to 0.0 MB" in weights.note
    left_out = 2 * 2 * HIDDEN
    assert sum(p.tensor.num_bytes for p in weights.tensors) == (
        sum((1 if d.startswith("F8") else 2) * _count(s) for d, s in names().values()) - left_out
    )


def _count(shape: tuple[int, ...]) -> int:
    out = 1
    for length in shape:
        out *= length
    return out


def test_all_experts_in_one_tensor(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", names(fused=True))
    _, experts = checkpoint_sizes(folder, load_model(str(folder)))
    assert experts[1:].tolist() == [[3 * TWO] * 4] * 2
    assert load_weights(str(folder)).note == ""


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"model.layers.1.mlp.experts.2.{}_proj.weight": None}, "1 of 4 experts of layer 1"),
        ({"model.layers.1.mlp.experts.4.up_proj.weight": "add"}, "does not have"),
        ({"model.layers.0.mlp.experts.0.up_proj.weight": "add"}, "does not have"),
        ({"model.layers.1.mystery.weight": "add"}, "no kind that is known"),
        ({"classifier.weight": "add"}, "no kind that is known"),
    ],
)
def test_what_does_not_belong_is_refused(
    tmp_path: Path, changed: dict[str, str | None], match: str
) -> None:
    tensors = names()
    for name, what in changed.items():
        if what is None:
            for part in ("gate", "up", "down"):
                del tensors[name.format(part)]
        else:
            tensors[name] = ("BF16", (INNER, HIDDEN))
    folder = write(tmp_path / "m", tensors)
    with pytest.raises(FormatError, match=match):
        load_weights(str(folder))


def test_a_folder_answers_as_a_name_does(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", names())
    job = moesim.cache(model=str(folder), machine="rtx-4090+ddr5-2ch", steps=16, context=64)
    assert job.best_engine is not None
    assert job.best_engine.gpu_share == 1
