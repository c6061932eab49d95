"""The question that every engine is asked, and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.cluster import Machine
from moesim.errors import MismatchError
from moesim.model.dtypes import KV_BYTES, bytes_per
from moesim.model.ggml import CACHE_BYTES
from moesim.model.spec import ModelSpec
from moesim.model.weights import Weights
from moesim.offloading.rates import GpuRates, gpu_rates
from moesim.types import FloatArray, IntArray

KV_PADDING = 256
"""Tokens that llama.cpp rounds a KV cache up to (src/llama-context.cpp)."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One conversation of `context` tokens at most on a machine.

    weights: as engines of GGUF files load them; checkpoint: as those of safetensors do. prompt,
    output: tokens of the request whose time decides between settings. cache_type: of the KV cache.
    memory_gb: GB of each GPU that may be used, None for its own. hot: [E + 1] share of a token's
    choices that the n most frequent experts of each layer have; None for uniform routing, which is
    assumed then.
    """

    weights: Weights
    checkpoint: Weights
    machine: Machine
    context: int = 4096
    prompt: int = 2048
    output: int = 512
    cache_type: str = "fp16"
    memory_gb: float | None = None
    hot: FloatArray | None = None

    @property
    def gpus(self) -> tuple[GpuRates, ...]:
        """Rates of the GPUs, in order."""
        unified = self.machine.host.unified
        return tuple(gpu_rates(gpu, unified, self.memory_gb) for gpu in self.machine.gpus)

    @property
    def mean_context(self) -> int:
        """Tokens that the KV cache holds at half of the output."""
        return min(self.context, self.prompt + self.output // 2)

    def hit_rate(self, experts_per_layer: float) -> float:
        """Share of choices that so many experts of each layer serve, the most frequent first."""
        every = self.weights.spec.num_experts
        if self.hot is None:
            return experts_per_layer / every
        return float(np.interp(experts_per_layer, np.arange(every + 1), self.hot))


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes on one GPU by use, as an engine accounts for them."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.kv + self.compute


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The best that one engine can do.

    gpu_share: of the routed experts' bytes, those in GPU memory. settings: the placement, as data;
    launch: lines that start the engine with it, MODEL for the file or folder; files: name and text
    of those that the lines name. problem: why it does not run, empty where it does; nothing else
    but `engine` is set then.
    """

    engine: str
    decode_tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    gpus: tuple[GpuMemory, ...] = ()
    host_bytes: int = 0
    gpu_share: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    launch: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    notes: tuple[str, ...] = ()
    problem: str = ""

    def request_s(self, prompt: int, output: int) -> float:
        """Seconds of a request; infinite where the engine does not run."""
        if self.problem:
            return float("inf")
        return prompt / self.prompt_tokens_per_s + output / self.decode_tokens_per_s


def needs_checkpoint(task: Task, engine: str) -> None:
    """Raise MismatchError where all that is known is a GGUF file, or the KV cache is to have a type
    of such engines."""
    if task.cache_type in CACHE_BYTES:
        raise MismatchError(
            f"{engine} has no KV cache of {task.cache_type}", "take fp16, bf16 or fp8"
        )
    if task.checkpoint.from_file:
        raise MismatchError(
            f"{engine} loads safetensors, and a GGUF file is all that is known",
            "name the checkpoint as the model",
        )


def kv_layer_bytes(spec: ModelSpec, tokens: int, cache_type: str, extra: int = 0) -> IntArray:
    """[num_hidden_layers] bytes of KV cache and state of one sequence of `tokens` tokens; a window
    keeps `extra` tokens more."""
    element = bytes_per(KV_BYTES, cache_type)
    out = np.zeros(spec.num_hidden_layers, np.int64)
    for kind in spec.layer_kinds:
        size = kind.state_bytes
        for cache in kind.caches:
            kept = min(tokens, cache.window + extra) if cache.window else tokens
            kept = -(-kept // KV_PADDING) * KV_PADDING if extra else kept
            size += round(kept // cache.tokens_per_entry * cache.entry_bytes(element))
        out[list(kind.layer_ids)] = size
    return out


def distinct_share(spec: ModelSpec, tokens: float) -> float:
    """Share of a layer's experts that `tokens` tokens of a prompt choose together.

    With n choices per expert on average, n / (1 + n): what experts have whose popularity is
    exponentially distributed. DeepSeek-V2-Lite's trace has 0.97, 0.98 and 1.00 at 128, 256 and 512
    tokens (0.92, 0.96, 0.98 by this), uniform routing 1.00 of each.
    """
    each = tokens * spec.real_top_k / spec.num_experts
    return max(each / (1.0 + each), spec.real_top_k / spec.num_experts)


def expert_flops(spec: ModelSpec, tokens: float) -> float:
    """Operations of the routed experts of `tokens` tokens."""
    return 2.0 * tokens * spec.num_moe_layers * spec.real_top_k * spec.expert_params


def prompt_flops(spec: ModelSpec, tokens: float, context: float) -> float:
    """Operations of `tokens` tokens of a prompt, each seeing `context` others: 2 per weight used,
    tables left out, and attention's own."""
    a = spec.attention
    matrices = spec.active_params - spec.embedding_params - spec.lm_head_params
    per_key = 2.0 * a.num_heads * (a.head_dim + (a.v_head_dim or a.head_dim))
    seen = sum(
        len(kind.layer_ids) * min(context, kind.caches[0].window or context)
        for kind in spec.layer_kinds
        if kind.caches
    )
    return tokens * (2.0 * matrices + per_key * seen)
