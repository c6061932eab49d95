"""Further checkpoints of the presets' models in narrower precisions, published by the maker or by
NVIDIA; each is a model's name wherever one is asked for.

Precisions as moesim reads them from the checkpoints' config.json and hf_quant_config.json, copies
of which are in github.com/ai-dynamo/aiconfigurator @095f58a, model_configs/. Other checkpoints are
read from their own config.json.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """name: Hugging Face repository. base: the preset whose sizes it has. Types and `stored` as in
    `ModelSpec`; kv_dtype: what its files say of the KV cache, None where nothing."""

    name: str
    base: str
    expert_dtype: str
    dense_dtype: str
    kv_dtype: str | None = None
    stored: tuple[tuple[str, float], ...] = ()

    @property
    def short(self) -> str:
        """The name without the account."""
        return self.name.partition("/")[2]

    @property
    def publisher(self) -> str:
        """Who published it, by its account."""
        return self.name.partition("/")[0]


FP8, NVFP4 = "fp8", "nvfp4"
CHECKPOINTS = (
    Checkpoint("Qwen/Qwen3-30B-A3B-FP8", "Qwen3-30B-A3B", FP8, FP8),
    Checkpoint("Qwen/Qwen3-235B-A22B-FP8", "Qwen3-235B-A22B", FP8, FP8),
    Checkpoint("nvidia/Qwen3-235B-A22B-NVFP4", "Qwen3-235B-A22B", NVFP4, NVFP4, FP8),
    Checkpoint(
        "nvidia/DeepSeek-V3.1-NVFP4", "DeepSeek-V3", NVFP4, NVFP4, FP8, (("attention", 1.097723),)
    ),
    Checkpoint(
        "nvidia/DeepSeek-V3.2-NVFP4", "DeepSeek-V3.2", NVFP4, NVFP4, FP8, (("attention", 1.160365),)
    ),
    Checkpoint("zai-org/GLM-5-FP8", "GLM-5", FP8, FP8, None, (("attention", 1.001371),)),
    Checkpoint("zai-org/GLM-5.2-FP8", "GLM-5.2", FP8, FP8, None, (("attention", 1.00056),)),
)


def published(model: str) -> tuple[Checkpoint, ...]:
    """The further checkpoints of a preset, by its name."""
    return tuple(one for one in CHECKPOINTS if one.base == model)


def checkpoint(name: str) -> Checkpoint | None:
    """The checkpoint of that name, with or without its account; None where none is."""
    folded = name.casefold()
    known = (one for one in CHECKPOINTS if folded in (one.name.casefold(), one.short.casefold()))
    return next(known, None)
