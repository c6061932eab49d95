"""What an engine adds to the GPU's own work: host time, scheduling, memory it keeps for itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moesim.cost.curves import Basis
from moesim.errors import UnknownNameError

PrefillPolicy = Literal["mixed", "prefill_first"]


@dataclass(frozen=True)
class EngineProfile:
    """Constants of one serving engine.

    step_host_us: host time of a step that the GPU waits for (scheduling, input preparation,
    sampling, output), whatever the batch. sequence_host_us: the same for every sequence of it.
    kernel_us: GPU time of one small kernel (norm, rotary embedding, quantisation, cache write) at a
    single row; what it moves is counted apart.
    rotary_gb_per_s, cache_write_ns: rate at which rotary embedding reads and writes queries and
    keys, and a token's cache write in one layer; both of grouped attention, beyond `kernel_us`, and
    not counted where None and 0.
    eager_layer_us: host time to enqueue one layer where no CUDA graph is replayed; a step with
    prompt tokens takes at least that many microseconds per layer.
    request_ms, prompt_token_us: time of a request outside the engine's steps (HTTP, scheduler
    queues, first answer back), and of tokenising, a prompt token.
    steps_ahead: steps already decided on when a request arrives (1 where scheduling overlaps the
    GPU's work).
    prefill_policy: "mixed" puts prompt chunks and decodes into one step (chunked prefill),
    "prefill_first" runs waiting prompts in steps of their own while decodes wait.
    max_batch_tokens, max_sequences: the engine's defaults for a DP rank.
    runtime_gb: memory of a GPU that neither weights, KV cache nor activations use (CUDA context,
    NCCL buffers, CUDA graphs). memory_fraction: share of the GPU's memory that the engine uses.
    """

    name: str
    step_host_us: float
    sequence_host_us: float
    kernel_us: float
    eager_layer_us: float
    request_ms: float
    prompt_token_us: float
    steps_ahead: int
    prefill_policy: PrefillPolicy
    max_batch_tokens: int
    max_sequences: int
    runtime_gb: float
    memory_fraction: float
    rotary_gb_per_s: float | None = None
    cache_write_ns: float = 0.0
    basis: Basis = "assumed"
    source: str = ""


FITTED = (
    "kernel_us, eager_layer_us and request_ms fitted to measured serving rows of "
    "github.com/ai-dynamo/aiconfigurator @095f58a (reports/serving-accuracy); the rest assumed"
)

ENGINES: Mapping[str, EngineProfile] = {
    engine.name: engine
    for engine in (
        EngineProfile(
            name="vllm",
            step_host_us=0.0,
            sequence_host_us=0.0,
            kernel_us=3.8,
            eager_layer_us=480.0,
            request_ms=56.0,
            prompt_token_us=0.0,
            steps_ahead=1,
            prefill_policy="mixed",
            max_batch_tokens=8192,
            max_sequences=1024,
            runtime_gb=3.0,
            memory_fraction=0.9,
            rotary_gb_per_s=1900.0,
            cache_write_ns=8.2,
            basis="measured",
            source=f"{FITTED}; rotary_gb_per_s, cache_write_ns: kernels of vLLM 0.23.0 on an H200"
            " (reports/engine-vllm)",
        ),
        EngineProfile(
            name="sglang",
            step_host_us=0.0,
            sequence_host_us=0.0,
            kernel_us=3.8,
            eager_layer_us=480.0,
            request_ms=262.0,
            prompt_token_us=0.0,
            steps_ahead=1,
            prefill_policy="prefill_first",
            max_batch_tokens=8192,
            max_sequences=1024,
            runtime_gb=3.0,
            memory_fraction=0.88,
            basis="measured",
            source=FITTED,
        ),
        EngineProfile(
            name="trtllm",
            step_host_us=0.0,
            sequence_host_us=0.0,
            kernel_us=3.8,
            eager_layer_us=480.0,
            request_ms=101.0,
            prompt_token_us=0.0,
            steps_ahead=1,
            prefill_policy="mixed",
            max_batch_tokens=8192,
            max_sequences=2048,
            runtime_gb=3.0,
            memory_fraction=0.9,
            basis="measured",
            source=FITTED,
        ),
    )
}


def engine_profile(name: str) -> EngineProfile:
    """The profile of "vllm", "sglang" or "trtllm". Raises UnknownNameError for another name."""
    if name not in ENGINES:
        raise UnknownNameError("engine", name, ENGINES)
    return ENGINES[name]
