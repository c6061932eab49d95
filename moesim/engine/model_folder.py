"""A model folder for an engine: the config.json of a real model, its weights left to the engine.

Engines make random weights themselves (vLLM: `--load-format dummy`), so the folder is one file. The
time of a step depends on shapes and routing, not on what the weights say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.errors import InputError, UnknownNameError
from moesim.model.hf_config import spec_from_config
from moesim.model.names import preset_config
from moesim.model.spec import ModelSpec

ARCHITECTURES: Mapping[str, str] = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phimoe": "PhiMoEForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""Class names that Hugging Face configs give under `architectures`, by `model_type`."""
COMMON = {"max_position_embeddings": 32768, "hidden_act": "silu", "rms_norm_eps": 1e-6}
BY_TYPE: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"scoring_func": "softmax", "norm_topk_prob": False},
    "qwen3_moe": {"norm_topk_prob": True, "attention_bias": False},
}
"""Keys that engines read and presets do not hold. Rotary embeddings are the model type's default;
their scaling for long contexts is left out, which costs no time."""
PER_LAYER = ("layer_types", "mlp_layer_types", "moe_layer_freq")


def hf_config(model: str, num_hidden_layers: int | None = None) -> dict[str, Any]:
    """The config of a preset, or of a config.json or its folder, in bf16, cut to its first
    `num_hidden_layers`.

    Quantisation is left out (random bf16 weights), and said so under `moesim_note`. Raises
    UnknownNameError for a model type whose class is not known, InputError for a file that cannot
    be read or more layers than the model has.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        config = _read(path)
        where = str(path)
    else:
        config, where = dict(preset_config(model)), f"preset {model}"
    kind = str(config.get("model_type", ""))
    if "architectures" not in config:
        if kind not in ARCHITECTURES:
            raise UnknownNameError(
                f"model_type of {where} for an engine",
                kind,
                ARCHITECTURES,
                "give the model's own config.json, which names its architecture",
            )
        config = {
            **COMMON,
            **BY_TYPE.get(kind, {}),
            **config,
            "architectures": [ARCHITECTURES[kind]],
        }
    config["torch_dtype"] = "bfloat16"
    if config.pop("quantization_config", None) is not None:
        config["moesim_note"] = "quantization_config left out: random weights in bf16"
    if num_hidden_layers is not None:
        _cut(config, num_hidden_layers, where)
    return config


def spec_of(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The shapes of a config that `hf_config` made."""
    return spec_from_config(config, where=f"config of {name}", name=name)


def write_model_folder(config: Mapping[str, Any], folder: Path) -> None:
    """`folder`/config.json; the folder is made. Raises InputError where it cannot be written."""
    from moesim.files import atomic_write

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}", "name another folder") from None
    atomic_write(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def _cut(config: dict[str, Any], layers: int, where: str) -> None:
    has = config.get("num_hidden_layers")
    if not isinstance(has, int) or not 1 <= layers <= has:
        raise InputError(
            f"{where}: {layers} layers of a model that has {has}", f"give 1 to {has} layers"
        )
    config["num_hidden_layers"] = layers
    for key in PER_LAYER:
        if isinstance(config.get(key), list):
            config[key] = config[key][:layers]


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read {path}: {error}", "name a Hugging Face config.json"
        ) from None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no mapping", "name a Hugging Face config.json")
    return config
