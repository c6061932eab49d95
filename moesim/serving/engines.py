"""What an engine adds to the GPU's own work: host time, scheduling, memory it keeps for itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2
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
    prompt_step_us: what a step with prompt tokens adds, whatever its layers: the GPU waits for its
    first kernel and for its answers' way back. enqueue_layer_us: the least that a layer of such a
    step takes, since the host enqueues it that fast. Both are a machine's, measured on it; 0 where
    nobody did.
    request_ms, request_rank_ms, prompt_token_us: time of a request outside the engine's steps: of
    itself (HTTP, scheduler queues, first answer back), of handing it to the engine's ranks (as
    often as their number doubles, and once more), and of tokenising, per prompt token.
    steps_ahead: steps already decided on when a request arrives (1 where scheduling overlaps the
    GPU's work).
    prefill_policy: "mixed" puts prompt chunks and decodes into one step (chunked prefill),
    "prefill_first" runs waiting prompts in steps of their own while decodes wait.
    admission: "prompt" starts a request when the KV cache has room for its prompt, and preempts the
    last one admitted when the cache is full; "whole" starts it when there is room for its prompt
    and all of its answer, and never preempts.
    graph_rows: steps of up to so many rows are replayed as CUDA graphs and padded to their size
    (`moesim.serving.graphs`), so that the host enqueues no layers; 0 where steps with prompts are
    not, or nothing is known of padding.
    max_batch_tokens, max_sequences: the engine's defaults for a DP rank.
    runtime_gb: memory of a GPU that neither weights, KV cache nor activations use (CUDA context,
    CUDA graphs); group_gb: the same for communication among several GPUs. sampler_bytes: memory per
    sequence and word of the vocabulary that is kept for sampling.
    balancer_gb, balancer_layers: the same where experts have replicas: of its load balancer, and in
    copies of one layer's experts of the GPU, through which it moves weights.
    dispatch_tokens: rows per GPU that buffers of DeepEP's low-latency kernels hold.
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
    dispatch_tokens: int = 256
    sampler_bytes: float = 4.0
    balancer_gb: float = 0.0
    balancer_layers: int = 0
    request_rank_ms: float = 0.0
    prompt_step_us: float = 0.0
    enqueue_layer_us: float = 0.0
    rotary_gb_per_s: float | None = None
    cache_write_ns: float = 0.0
    graph_rows: int = 0
    basis: Basis = "assumed"
    source: str = ""

    def to_file(self) -> dict[str, Any]:
        """What a file of a refitted engine holds."""
        keys = (
            *FILE_KEYS,
            *(k for k in HOST_KEYS if getattr(self, k) != getattr(ENGINES[self.name], k)),
        )
        return {key: getattr(self, key) for key in keys}

    def prompt_added_us(self, num_layers: int) -> float:
        """What a step with prompt tokens adds to the GPU's work."""
        return self.prompt_step_us + self.eager_layer_us * num_layers

    def prompt_least_us(self, num_layers: int) -> float:
        """What such a step takes at least: enqueueing its layers."""
        return self.enqueue_layer_us * num_layers

    def outside_us(self, num_gpus: int, prompt_tokens: _Tokens) -> _Tokens:
        """Microseconds of requests of so many prompt tokens outside the steps of an engine of
        `num_gpus`."""
        fixed = 1e3 * (self.request_ms + self.request_rank_ms * (1.0 + log2(num_gpus)))
        return fixed + self.prompt_token_us * prompt_tokens  # type: ignore[return-value]


FITTED = (
    "kernel_us (2 is assumed) and, where not 0, eager_layer_us, request_ms, request_rank_ms fitted "
    "to measured rows "
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
            balancer_gb=1.02,
            balancer_layers=1,
            rotary_gb_per_s=1900.0,
            cache_write_ns=8.2,
            graph_rows=512,
            basis="measured",
            source=f"{FITTED}; rotary_gb_per_s, cache_write_ns: kernels of vLLM 0.23.0 on an H200"
            " (reports/engine-vllm); balancer: memory of DeepSeek-V2-Lite (reports/engine-vllm-x2)",
        ),
        EngineProfile(
            name="sglang",
            dispatch_tokens=128,
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
            request_ms=0.0,
            request_rank_ms=30.0,
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
HOST_KEYS = ("eager_layer_us", "prompt_step_us", "enqueue_layer_us")
"""What a file may say of its machine's host besides."""


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

    remedy = "`moesim recommend --measured` and `moesim engine host` write such files"
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", remedy) from None
    except (yaml.YAMLError, RecursionError, ValueError):
        raise FormatError(f"{path}: no YAML", remedy) from None
    fitting = isinstance(raw, dict) and set(FILE_KEYS) <= set(raw) <= {*FILE_KEYS, *HOST_KEYS}
    if not fitting or str(raw["name"]) not in ENGINES:
        raise FormatError(f"{path}: no engine's constants, {', '.join(FILE_KEYS)}", remedy)
    for key in ("request_ms", "kernel_us", *(k for k in HOST_KEYS if k in raw)):
        value = raw[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
            raise FormatError(f"{path}: {key} is {value!r:.40}", remedy)
    if raw["basis"] not in get_args(Basis):
        raise FormatError(f"{path}: basis is {raw['basis']!r:.40}", remedy)
    known = {"request_rank_ms": 0.0} | {key: raw[key] for key in raw if key != "name"}
    return replace(ENGINES[str(raw["name"])], **known | {"source": str(raw["source"])[:400]})
