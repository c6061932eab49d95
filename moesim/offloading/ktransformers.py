"""KTransformers (kt-kernel in SGLang): experts by mask on GPUs, the others on the CPU meanwhile.

Placement: `--kt-num-gpu-experts N` of every layer, by strategy `uniform`, or `frequency` where
statistics of the routing exist (kvcache-ai/ktransformers, doc/en/kt-kernel/experts-sched-Tutorial);
a prompt may instead stream all experts through the GPU (`--kt-gpu-prefill-token-threshold`).
Attention and dense layers are cut over the GPUs by tensor parallelism. Weights are the
checkpoint's own: GGUF mixes are not for it.

A layer takes its launches, the slower of CPU and GPU experts, and a synchronisation where any
expert is on the CPU. The constants below are assumed: set on the published run of Qwen3-Coder-Next
on an RTX 5090 (doc/en/kt-kernel/Qwen3-Coder-Next-Tutorial) with both ends of the scheduling
tutorial's table in view.
Ignored: deferred experts, dynamic updates between prompts, NUMA beyond one factor.
"""

from __future__ import annotations

from moesim.errors import InfeasibleError, MismatchError
from moesim.offloading.rates import ALL_REDUCES_S, MARGIN_BYTES, CpuRates, cpu_rates, host_bytes
from moesim.offloading.task import (
    EnginePlan,
    GpuMemory,
    Task,
    kv_layer_bytes,
    needs_checkpoint,
    prompt_flops,
)

METHODS = {"fp8": "FP8", "bf16": "BF16", "int4": "RAWINT4", "mxfp8": "MXFP8"}
"""`--kt-method` by the type of the checkpoint's experts (kt-kernel/README.md)."""
SOCKETS_SHARE = 0.8
LAYER_S = 130e-6
SYNC_S = 50e-6
COUNTS_FILE = "expert_counts.json"
"""Of EnginePlan.files: [num_hidden_layers][num_experts], for torch_counts."""
RUNTIME_BYTES = 2_500_000_000
"""CUDA graphs, activations and kernels' workspaces on each GPU; assumed."""
PREFILL_CHUNK = 4096


def ktransformers(task: Task) -> EnginePlan:
    """The best plan of KTransformers. Raises MismatchError for types or GPUs without kernels and
    InfeasibleError where the model does not fit."""
    spec = task.checkpoint.spec
    needs_checkpoint(task, "KTransformers")
    method = METHODS.get(spec.expert_dtype)
    if method is None:
        raise MismatchError(
            f"KTransformers has no CPU kernels for a checkpoint of {spec.expert_dtype}",
            f"take one of: {', '.join(METHODS)}",
        )
    if any(gpu.title.split()[0] != "NVIDIA" for gpu in task.machine.gpus):
        raise MismatchError("KTransformers is for NVIDIA GPUs", "take another engine")
    if task.machine.host.unified:
        raise InfeasibleError("GPU and CPU share their memory: nothing to divide", "use llama.cpp")
    return at_experts(task, _room(task))


def at_experts(task: Task, per_layer: float, strategy: str = "") -> EnginePlan:
    """The plan with a number of experts of every layer on the GPUs (a fraction is a mean).

    strategy: `frequency`, `uniform` (also for random masks), or `front-loading`, which fills whole
    layers from the first; by default frequency where the task has statistics. Memory is not checked
    beyond what the GPUs' own sum says.
    """
    spec, weights = task.checkpoint.spec, task.checkpoint
    chosen = strategy or ("uniform" if task.hot is None else "frequency")
    share = per_layer / spec.num_experts
    hit = task.hit_rate(per_layer) if chosen == "frequency" else share
    cpu = cpu_rates(task.machine.host, SOCKETS_SHARE)
    tp = len(task.gpus)
    kv = int(kv_layer_bytes(spec, task.context, task.cache_type).sum())
    rest = weights.num_bytes - int(weights.layer_bytes(experts=True).sum())
    experts = float(weights.layer_bytes(experts=True).sum())
    memory = GpuMemory(round((rest + experts * share) / tp), kv // tp, RUNTIME_BYTES)
    token = _token_s(task, hit, cpu, share if chosen == "front-loading" else None)
    prompt, streamed = _prompt_rate(task, share, hit, cpu)
    return EnginePlan(
        "KTransformers",
        1.0 / token,
        prompt,
        (memory,) * tp,
        round(experts * (1 - share)),
        share,
        {
            "num_gpu_experts": int(per_layer),
            "strategy": chosen,
            "method": METHODS.get(spec.expert_dtype, ""),
            "gpu_prefill": streamed,
            "context": task.context,
            "hit_rate": hit,
        },
        _command(task, int(per_layer), chosen, streamed),
        weights=weights.source,
        notes=_notes(task, chosen),
    )


def _notes(task: Task, strategy: str) -> tuple[str, ...]:
    if strategy == "frequency":
        return ("counts of the trace's choices: STATISTICS.pt, which `moesim export` writes",)
    return ("routing assumed uniform: a trace gives the frequency strategy",)


def _room(task: Task) -> int:
    """Experts of every layer that the GPUs hold, all of them at most."""
    weights, spec = task.checkpoint, task.checkpoint.spec
    layers = weights.layer_bytes(experts=True)
    experts = int(layers.sum())
    kv = int(kv_layer_bytes(spec, task.context, task.cache_type).sum())
    fixed = weights.num_bytes - experts + kv
    own = min(gpu.memory for gpu in task.gpus) + MARGIN_BYTES - RUNTIME_BYTES
    left = own * len(task.gpus) - fixed
    if left < 0:
        raise InfeasibleError(
            f"{weights.source} needs {fixed / 1e9:.1f} GB beside its experts and"
            f" {RUNTIME_BYTES / 1e9:.1f} GB of runtime per GPU",
            "shorten the context or take more GPUs",
        )
    if experts > host_bytes(task.machine.host):
        raise InfeasibleError(
            f"{weights.source} has {experts / 1e9:.1f} GB of experts, {task.machine.host.name}"
            f" {task.machine.host.dram_gb:g} GB of memory, and KTransformers keeps all there",
            "take more memory or fewer bits",
        )
    return int(min(spec.num_experts, left * spec.num_experts // experts))


def _token_s(task: Task, hit: float, cpu: CpuRates, whole_layers: float | None) -> float:
    weights, spec = task.checkpoint, task.checkpoint.spec
    tp, gpu, layers = len(task.gpus), task.gpus[0], spec.num_hidden_layers
    rest = float(weights.layer_bytes(experts=False).sum() + weights.output_bytes)
    kv = float(kv_layer_bytes(spec, task.mean_context, task.cache_type).sum())
    used = spec.num_moe_layers * spec.real_top_k
    expert = float(spec.expert_bytes())
    reduce = ALL_REDUCES_S if tp > 1 else 0.0
    away = used * (1 - hit)
    on_cpu = cpu.token_s(away * expert, away * spec.expert_params)
    on_gpu = used * hit * expert / gpu.read / tp
    missing = 1.0 - hit**spec.real_top_k if whole_layers is None else 1.0 - whole_layers
    waits = spec.num_moe_layers * missing * SYNC_S
    shared = max(on_cpu, on_gpu) if whole_layers is None else on_cpu + on_gpu
    return layers * (LAYER_S + reduce) + (rest + kv) / gpu.read / tp + shared + waits


def _prompt_rate(task: Task, share: float, hit: float, cpu: CpuRates) -> tuple[float, bool]:
    """Prompt tokens/s, and whether experts are streamed through the GPUs for it."""
    spec, gpus = task.checkpoint.spec, task.gpus
    chunk = min(task.prompt, PREFILL_CHUNK)
    flops = sum(gpu.flops for gpu in gpus)
    experts = 2.0 * chunk * spec.num_moe_layers * spec.real_top_k * spec.expert_params
    others = prompt_flops(spec, chunk, chunk / 2) - experts
    stored = float(task.checkpoint.layer_bytes(experts=True).sum())
    launches = spec.num_hidden_layers * LAYER_S
    mixed = launches + others / flops + max(experts * hit / flops, experts * (1 - hit) / cpu.flops)
    link = gpus[0].link * len(gpus)
    whole = launches + (others + experts) / flops + stored * (1 - share) / link
    return chunk / min(mixed, whole), whole < mixed


def _command(task: Task, per_layer: int, strategy: str, streamed: bool) -> tuple[str, ...]:
    host, spec = task.machine.host, task.checkpoint.spec
    parts = [
        "python -m sglang.launch_server --model MODEL --kt-weight-path MODEL",
        f"--kt-method {METHODS.get(spec.expert_dtype, 'METHOD')}",
        f"--kt-cpuinfer {host.cores} --kt-threadpool-count {host.sockets}",
        f"--kt-num-gpu-experts {per_layer} --kt-expert-placement-strategy {strategy}",
        f"--tensor-parallel-size {len(task.gpus)} --max-total-tokens {task.context}",
    ]
    if strategy == "frequency":
        parts.append("--init-expert-location STATISTICS.pt")
    if streamed:
        parts.append("--kt-gpu-prefill-token-threshold 512")
    return (" ".join(parts),)
