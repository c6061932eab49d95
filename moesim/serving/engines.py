"""What an engine adds to the GPU's own work: host time, scheduling, memory it keeps for itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from moesim.cost.curves import Basis
from moesim.errors import FormatError, InputError, UnknownNameError
from moesim.types import FloatArray

PrefillPolicy = Literal["mixed", "prefill_first"]
MemoryRule = Literal["all", "weights_and_cache", "free"]
Admission = Literal["prompt", "whole"]
_Tokens = TypeVar("_Tokens", float, FloatArray)


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
    eager_layer_us: what a layer adds to a step with prompt tokens beside its kernels: gaps between
    them while the host enqueues, where no CUDA graph is replayed.
    request_ms, request_layer_us, prompt_token_us: time of a request outside the engine's steps: of
    itself (HTTP, scheduler queues, first answer back), per layer of the model (enqueuing its prompt
    while the GPU is busy with other steps), and of tokenising, per prompt token.
    steps_ahead: steps already decided on when a request arrives (1 where scheduling overlaps the
    GPU's work).
    prefill_policy: "mixed" puts prompt chunks and decodes into one step (chunked prefill),
    "prefill_first" runs waiting prompts in steps of their own while decodes wait.
    admission: "prompt" starts a request when the KV cache has room for its prompt, and preempts the
    last one admitted when the cache is full; "whole" starts it when there is room for its prompt
    and all of its answer, and never preempts.
    max_batch_tokens, max_sequences: the engine's defaults for a DP rank.
    runtime_gb: memory of a GPU that neither weights, KV cache nor activations use (CUDA context,
    CUDA graphs); group_gb: the same for communication among several GPUs. sampler_bytes: memory per
    sequence and word of the vocabulary that is kept for sampling.
    memory_fraction: a share of the GPU's memory, and memory_rule what it bounds. "all": everything
    (gpu_memory_utilization). "weights_and_cache": weights and KV cache, of the memory beside the
    runtime; activations come out of the rest (mem_fraction_static). "free": the KV cache, of what
    weights, activations and runtime leave (free_gpu_memory_fraction).
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
    memory_rule: MemoryRule = "all"
    admission: Admission = "prompt"
    group_gb: float = 1.2
    sampler_bytes: float = 4.0
    request_layer_us: float = 0.0
    rotary_gb_per_s: float | None = None
    cache_write_ns: float = 0.0
    basis: Basis = "assumed"
    source: str = ""

    def to_file(self) -> dict[str, Any]:
        """What a file of a refitted engine holds."""
        return {key: getattr(self, key) for key in FILE_KEYS}

    def outside_us(self, num_layers: int, prompt_tokens: _Tokens) -> _Tokens:
        """Microseconds of requests of so many prompt tokens outside the engine's steps."""
        fixed = self.request_ms * 1e3 + self.request_layer_us * num_layers
        return fixed + self.prompt_token_us * prompt_tokens  # type: ignore[return-value]


FITTED = (
    "kernel_us (2 is assumed), eager_layer_us and request_ms, where not 0, fitted to measured rows "
    "of github.com/ai-dynamo/aiconfigurator @095f58a (reports/serving-accuracy); the rest assumed"
)

ENGINES: Mapping[str, EngineProfile] = {
    engine.name: engine
    for engine in (
        EngineProfile(
            name="vllm",
            step_host_us=0.0,
            sequence_host_us=0.0,
            kernel_us=2.9,
            eager_layer_us=850.0,
            request_ms=0.0,
            prompt_token_us=0.0,
            steps_ahead=1,
            prefill_policy="mixed",
            max_batch_tokens=8192,
            max_sequences=1024,
            runtime_gb=0.9,
            memory_fraction=0.9,
            sampler_bytes=13.0,
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
            kernel_us=6.0,
            eager_layer_us=0.0,
            request_ms=256.0,
            prompt_token_us=0.0,
            steps_ahead=1,
            prefill_policy="prefill_first",
            max_batch_tokens=8192,
            max_sequences=1024,
            runtime_gb=0.9,
            memory_fraction=0.88,
            memory_rule="weights_and_cache",
            basis="measured",
            source=FITTED,
        ),
        EngineProfile(
            name="trtllm",
            step_host_us=0.0,
            sequence_host_us=0.0,
            kernel_us=2.0,
            eager_layer_us=0.0,
            request_ms=103.0,
            prompt_token_us=0.0,
            steps_ahead=1,
            prefill_policy="mixed",
            max_batch_tokens=8192,
            max_sequences=2048,
            runtime_gb=0.9,
            memory_fraction=0.9,
            memory_rule="free",
            admission="whole",
            basis="measured",
            source=FITTED,
        ),
    )
}


FILE_KEYS = ("name", "request_ms", "kernel_us", "basis", "source")


def engine_profile(name: str) -> EngineProfile:
    """The profile of "vllm", "sglang" or "trtllm", or of a file that refitting wrote (.yaml).

    Raises UnknownNameError for another name, FormatError for a file that is none.
    """
    if name.endswith((".yaml", ".yml")):
        return _of_file(name)
    if name not in ENGINES:
        raise UnknownNameError("engine", name, ENGINES)
    return ENGINES[name]


def _of_file(path: str) -> EngineProfile:
    import yaml

    remedy = "`moesim recommend --measured` writes such files"
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", remedy) from None
    except (yaml.YAMLError, RecursionError, ValueError):
        raise FormatError(f"{path}: no YAML", remedy) from None
    if not isinstance(raw, dict) or set(raw) != set(FILE_KEYS) or str(raw["name"]) not in ENGINES:
        raise FormatError(f"{path}: no engine's constants, {', '.join(FILE_KEYS)}", remedy)
    for key in ("request_ms", "kernel_us"):
        value = raw[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
            raise FormatError(f"{path}: {key} is {value!r:.40}", remedy)
    if raw["basis"] not in get_args(Basis):
        raise FormatError(f"{path}: basis is {raw['basis']!r:.40}", remedy)
    known = {key: raw[key] for key in FILE_KEYS if key != "name"}
    return replace(ENGINES[str(raw["name"])], **known | {"source": str(raw["source"])[:400]})
