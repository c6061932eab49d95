"""vLLM with --cpu-offload-gb and transformers with accelerate: weights in host memory that the GPU
reads or copies while it computes; nothing runs on the CPU.

vLLM maps the offloaded weights into the GPU's address space (vllm-project/vllm,
model_executor/offloader/uva.py): a token reads over the host link what it uses, at ZERO_COPY_SHARE
of the link. `--cpu-offload-gb` is GiB per GPU, `--cpu-offload-params experts` picks the tensors
that have that segment in their names (config/offload.py of vLLM 0.31): routed experts alone.
accelerate's hooks (huggingface/accelerate, hooks.py) copy every module of an offloaded layer
before it runs, from pageable memory, expert by expert, at PER_TENSOR_S each. Both load the
checkpoint's own types. The three constants are assumed, set on MoE-Infinity's comparison
(EfficientMoE/MoE-Infinity, README.md).
"""

from __future__ import annotations

import json

import numpy as np

from moesim.errors import InfeasibleError, MismatchError
from moesim.offloading.rates import ALL_REDUCES_S, MARGIN_BYTES, host_bytes, maker
from moesim.offloading.task import (
    EnginePlan,
    GpuMemory,
    Task,
    distinct_share,
    kv_layer_bytes,
    needs_checkpoint,
    prompt_flops,
)

ZERO_COPY_SHARE = 0.4
VLLM_LAYER_S = 40e-6
VLLM_UTILISATION = 0.9
VLLM_RUNTIME_BYTES = 2_000_000_000
PER_TENSOR_S = 5e-3
PAGEABLE_GB_PER_S = 3.0
EAGER_LAYER_S = 1.2e-3
ACCELERATE_RUNTIME_BYTES = 1_500_000_000
PREFILL_CHUNK = 2048


def vllm(task: Task, *, experts_only: bool = True) -> EnginePlan:
    """vLLM with as little offloaded as fits. Raises MismatchError and InfeasibleError.

    experts_only: with --cpu-offload-params experts, of which a token reads those that it chose;
    without, as before vLLM 0.17, tensors leave as they come, and their share of all else too.
    """
    spec, weights, gpus = task.checkpoint.spec, task.checkpoint, task.gpus
    needs_checkpoint(task, "vLLM")
    if any(maker(gpu) == "Apple" for gpu in task.machine.gpus):
        raise MismatchError("vLLM has no kernels for this GPU", "use llama.cpp")
    tp = len(gpus)
    kv = int(kv_layer_bytes(spec, task.context, task.cache_type).sum()) // tp
    usable = min(gpu.memory + MARGIN_BYTES for gpu in gpus) * VLLM_UTILISATION
    room = usable - kv - VLLM_RUNTIME_BYTES
    own, experts = weights.num_bytes / tp, float(weights.layer_bytes(experts=True).sum()) / tp
    away = max(0.0, own - room)
    least = own - experts
    if room < least or (away and task.machine.host.unified):
        raise InfeasibleError(f"{weights.source} does not fit", "take fewer bits or more memory")
    _check_host(task, away * tp)
    used = spec.num_moe_layers * spec.real_top_k * float(spec.expert_bytes()) / tp
    rest = least - (0 if spec.tie_word_embeddings else weights.embedding_bytes) / tp
    read_away = used * away / experts if experts_only else (used + rest) * away / own
    read_near = used + rest - read_away
    kv_read = float(kv_layer_bytes(spec, task.mean_context, task.cache_type).sum()) / tp
    layer = VLLM_LAYER_S + (ALL_REDUCES_S if tp > 1 else 0.0)
    token = spec.num_hidden_layers * layer + (read_near + kv_read) / gpus[0].read
    token += read_away / (gpus[0].link * ZERO_COPY_SHARE)
    chunk = min(task.prompt, PREFILL_CHUNK)
    work = prompt_flops(spec, chunk, task.prompt / 2) / sum(gpu.flops for gpu in gpus)
    moved = away * distinct_share(spec, chunk) / gpus[0].link
    gibibytes = np.ceil(away / 2**30 * 10) / 10
    parts = ["vllm serve MODEL", f"--tensor-parallel-size {tp}", f"--max-model-len {task.context}"]
    parts += ["--max-num-seqs 1", f"--gpu-memory-utilization {VLLM_UTILISATION}"]
    if away:
        parts.append(f"--cpu-offload-gb {gibibytes:g} --cpu-offload-params experts")
    return EnginePlan(
        "vLLM",
        1.0 / token,
        chunk / (work + moved),
        (GpuMemory(round(own - away), kv, VLLM_RUNTIME_BYTES),) * tp,
        round(away * tp),
        1.0 - away / experts,
        {"cpu_offload_gb": float(gibibytes), "context": task.context},
        (" ".join(parts),),
        weights=weights.source,
        notes=("no expert cache of its own; offloaded experts are read over the host link",),
    )


def accelerate(task: Task) -> EnginePlan:
    """transformers with a device_map of whole layers. Raises InfeasibleError."""
    spec, weights = task.checkpoint.spec, task.checkpoint
    needs_checkpoint(task, "accelerate")
    if task.cache_type == "fp8":
        raise MismatchError("accelerate has no KV cache of fp8", "take bf16 or fp16")
    layers = weights.layer_bytes(experts=True) + weights.layer_bytes(experts=False)
    kv = kv_layer_bytes(spec, task.context, "bf16")
    where, memory, at = {"model.embed_tokens": 0}, [], 0
    for index, gpu in enumerate(task.gpus):
        held = (weights.embedding_bytes + weights.output_bytes) if index == 0 else 0
        kept = 0
        while at < len(layers):
            more = held + kept + int(layers[at] + kv[at]) + ACCELERATE_RUNTIME_BYTES
            if more > gpu.memory:
                break
            held, kept = held + int(layers[at]), kept + int(kv[at])
            where[f"model.layers.{at}"] = index
            at += 1
        memory.append(GpuMemory(held, kept, ACCELERATE_RUNTIME_BYTES))
    if not at or (task.machine.host.unified and at < len(layers)):
        raise InfeasibleError(f"{weights.source} does not fit", "take fewer bits or more memory")
    away = int(layers[at:].sum())
    _check_host(task, away)
    where |= {f"model.layers.{x}": "cpu" for x in range(at, len(layers))}  # type: ignore[misc]
    where |= {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    chosen = spec.real_top_k / spec.num_experts
    experts, rest = weights.layer_bytes(experts=True), weights.layer_bytes(experts=False)
    used = rest + chosen * experts
    gpu = task.gpus[0]
    tensors = sum(spec.real_top_k * spec.ffn_matrices + 8 for _ in range(at, len(layers)))
    token = len(layers) * EAGER_LAYER_S + float(used.sum() + weights.output_bytes) / gpu.read
    token += tensors * PER_TENSOR_S + float(used[at:].sum()) / (PAGEABLE_GB_PER_S * 1e9)
    every = (len(layers) - at) * (spec.num_experts * spec.ffn_matrices + 8)
    prompt = prompt_flops(spec, task.prompt, task.prompt / 2) / gpu.flops
    prompt += every * PER_TENSOR_S + away / (PAGEABLE_GB_PER_S * 1e9)
    return EnginePlan(
        "accelerate",
        1.0 / token,
        task.prompt / (prompt + len(layers) * EAGER_LAYER_S),
        tuple(memory),
        away,
        float(experts[:at].sum() / experts.sum()),
        {"gpu_layers": at, "context": task.context},
        ('model = AutoModelForCausalLM.from_pretrained("MODEL", device_map=json.load(open('
         '"device_map.json")))',),
        {"device_map.json": json.dumps(where, indent=1) + "\n"},
        weights.source,
    )  # fmt: skip


def _check_host(task: Task, needed: float) -> None:
    host = task.machine.host
    if needed > host_bytes(host):
        raise InfeasibleError(
            f"{task.checkpoint.source} leaves {needed / 1e9:.1f} GB to {host.name}, which has"
            f" {host.dram_gb:g}",
            "take fewer bits or more memory",
        )
