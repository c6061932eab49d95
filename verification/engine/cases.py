"""The models and steps of the study: what is predicted, measured and compared.

Plain Python, so that the script on the GPU machine reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_BATCH_TOKENS = 16384
MAX_SEQUENCES = 512
MAX_MODEL_LEN = 16384 + 512
MEMORY_FRACTION = 0.9
ROUNDS = 10
STEPS = 8
"""Decode steps of one routing in one round; the first two are not counted."""
WARM_STEPS = 2
ROUTINGS = ("trace", "uniform", "same")
"""The recorded routing; K distinct experts at random; the same K experts for every token."""


@dataclass(frozen=True)
class Model:
    """One run: preset, layers that are kept (None: all), the trace, how it is stretched, and the
    set of steps that it is timed in ("later": none was used for fitting, models and sizes new)."""

    key: str
    preset: str
    trace: str
    layers: int | None = None
    repeat_layers: bool = False
    compile: bool = False
    set: str = "first"


MODELS = {
    m.key: m
    for m in (
        Model("qwen3-30b", "Qwen3-30B-A3B", "synth:qwen3-30b"),
        Model("qwen3-30b-compile", "Qwen3-30B-A3B", "synth:qwen3-30b", compile=True),
        Model("gpt-oss-20b", "GPT-OSS-20B", "shared:gpt-oss-20b"),
        Model("dsv2-lite", "DeepSeek-V2-Lite", "shared:deepseek-v2-lite"),
        Model("olmoe", "OLMoE-1B-7B", "sample:debian-olmoe", repeat_layers=True),
        Model(
            "olmoe-compile",
            "OLMoE-1B-7B",
            "sample:debian-olmoe",
            repeat_layers=True,
            compile=True,
        ),
        Model("qwen3-235b-16", "Qwen3-235B-A22B", "synth:qwen3-30b", layers=16),
        Model("mixtral-8x7b", "Mixtral-8x7B", "synth:Mixtral-8x7B", set="later"),
        Model("granite-3b", "Granite-3.0-3B-A800M", "synth:Granite-3.0-3B-A800M", set="later"),
        Model("glm-4.5-air-17", "GLM-4.5-Air", "synth:qwen3-30b", layers=17, set="later"),
    )
}
RANK_MODELS = ("qwen3-30b", "gpt-oss-20b", "dsv2-lite", "olmoe")
"""Those whose expert-parallel ranks are timed one after the other."""


@dataclass(frozen=True)
class Case:
    """One step: `requests` prompts of `prompt` tokens (prefill), or `requests` sequences with
    `prompt` cached tokens (decode)."""

    phase: str
    requests: int
    prompt: int

    @property
    def key(self) -> str:
        """Name in the records."""
        return f"{self.phase}-{self.requests}x{self.prompt}"


PREFILL = tuple(
    Case("prefill", n, p)
    for n, p in ((1, 512), (1, 1024), (2, 1024), (4, 1024), (8, 1024), (16, 1024), (1, 16384))
)
DECODE = tuple(
    Case("decode", n, p)
    for n, p in (
        (1, 512),
        (8, 512),
        (32, 512),
        (128, 512),
        (256, 512),
        (512, 512),
        (1, 4096),
        (8, 4096),
        (32, 4096),
        (128, 4096),
        (8, 16000),
    )
)

LATER_PREFILL = tuple(
    Case("prefill", n, p)
    for n, p in ((1, 700), (3, 700), (1, 3000), (5, 1000), (7, 1500), (4, 4000))
)
LATER_DECODE = tuple(
    Case("decode", n, p)
    for n, p in (
        (2, 1000),
        (12, 1000),
        (24, 1000),
        (48, 1000),
        (100, 1000),
        (200, 700),
        (400, 400),
        (20, 6000),
    )
)
CASES = {"first": (*PREFILL, *DECODE), "later": (*LATER_PREFILL, *LATER_DECODE)}
GRAPHS = {
    "first": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "later": [1, 2, 4, 8, 16, 24, 48, 104, 200, 400],
}
"""Sizes of CUDA graphs; of vLLM's own those that the later steps are padded to."""
ROUTINGS_OF = {"first": ROUTINGS, "later": ("trace", "same")}


def context_of(case: Case, name: str = "first") -> int:
    """Cached tokens per sequence in the middle of a decode case's timed steps."""
    return case.prompt + (ROUNDS * STEPS * len(ROUTINGS_OF[name]) + ROUNDS * 5) // 2
