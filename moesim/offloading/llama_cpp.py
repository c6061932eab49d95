"""llama.cpp and ik_llama.cpp: whole layers' experts on the CPU, tensors by pattern.

Placement: `--n-cpu-moe N` keeps the experts of the first N layers in host memory
(ggml-org/llama.cpp#15077), `-ot` single tensors, `-ts` spreads layers over GPUs. All else is on the
GPU (`-ngl 99`) but the embedding table, which stays with the CPU. Memory is what llama.cpp prints:
model buffers are the tensors, KV buffers by layer (windows keep window + ubatch tokens;
src/llama-kv-cache-iswa.cpp), and the compute buffer the larger of the logits,
4 x ubatch x (vocabulary + 2 x hidden) bytes on the last GPU, and of one MoE layer's activations,
4 x ubatch x (top-k x (2 x width + hidden) + 4 x hidden), with one expert tensor where some are on
the CPU, since prompts copy them over one by one (ggml/src/ggml-backend.cpp). They are those of logs
in ikawrakow/ik_llama.cpp, discussion 357 (312.75, 144.00 and 774.00 MiB for Qwen3-235B-A22B).

Speed: a token reads the weights that it uses where they are. A prompt is computed on the GPU, and
what is on the CPU is copied over for every ubatch: only the experts that its tokens chose, half
hidden behind the GPU's own work. That is reading the ubatch's weights, then arithmetic with every
expert's tokens filled up to tiles.
Ignored: `-sm row` and `graph`, speculative decoding, several requests at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from moesim.errors import InfeasibleError, MismatchError
from moesim.offloading.rates import NO_GRAPH_US, CpuRates, cpu_rates, host_bytes, maker
from moesim.offloading.task import (
    EnginePlan,
    GpuMemory,
    Task,
    distinct_share,
    expert_flops,
    kv_layer_bytes,
    prompt_flops,
)
from moesim.types import IntArray

UBATCHES = (512, 1024, 2048, 4096)
SOCKETS_SHARE = 0.5
"""llama.cpp on two sockets is about as fast as on one."""
IK_CPU = 1.25
"""ik_llama.cpp's CPU kernels beside llama.cpp's where arithmetic decides; assumed."""
TILE = 32
"""Tokens of one expert that llama.cpp's kernels compute together: an expert's last tile is half
empty on average; set on ggml-org/llama.cpp#15525."""
OVERLAP = 0.5
"""Of the shorter of copying and computing a ubatch, hidden behind the longer; set on an RTX 3090's
table of -ub 512 to 8192 and on an RTX 4080's runs, which are nearer to all and to nothing."""
_CACHE_FLAG = {"fp16": "f16", "fp32": "f32"}


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where layers and experts are: `num_cpu_layers` as --n-cpu-moe, `cpu_tensors` further names;
    `cpu_bytes` [L] of experts on the CPU; `layers_of` GPU, first to last."""

    num_cpu_layers: int
    cpu_tensors: tuple[str, ...]
    cpu_bytes: IntArray
    layers_of: tuple[int, ...]
    ubatch: int
    memory: tuple[GpuMemory, ...]


def llama_cpp(task: Task) -> EnginePlan:
    """The best plan of llama.cpp. Raises InfeasibleError where the model does not fit."""
    return _best(task, "llama.cpp", 1.0)


def ik_llama_cpp(task: Task) -> EnginePlan:
    """The best plan of ik_llama.cpp. Raises InfeasibleError where the model does not fit."""
    if task.machine.gpus[0].title.split()[0] in ("AMD", "Apple"):
        raise InfeasibleError("ik_llama.cpp has no kernels for this GPU", "use llama.cpp")
    return _best(task, "ik_llama.cpp", IK_CPU)


def fixed(task: Task, num_cpu_layers: int, ubatch: int, engine: str = "llama.cpp") -> EnginePlan:
    """The plan with a given --n-cpu-moe and -ub. Raises InfeasibleError where that does not fit."""
    layout = _layout(task, num_cpu_layers, (), ubatch)
    if layout is None:
        raise InfeasibleError(
            f"{task.weights.source} does not fit with {num_cpu_layers} layers' experts on the CPU",
            "put more layers on the CPU, or shorten the context",
        )
    return _plan(task, layout, engine, IK_CPU if engine.startswith("ik") else 1.0)


def _best(task: Task, engine: str, cpu_factor: float) -> EnginePlan:
    if task.cache_type == "fp8":
        raise MismatchError(f"{engine} has no KV cache of fp8", "take q8_0 or fp16")
    found = []
    for ubatch in UBATCHES:
        layout = _fewest_on_cpu(task, ubatch)
        if layout is not None:
            found.append(_plan(task, layout, engine, cpu_factor))
    if not found:
        raise InfeasibleError(_shortage(task), "take fewer bits, a shorter context, more memory")
    return min(found, key=lambda plan: plan.request_s(task.prompt, task.output))


def _fewest_on_cpu(task: Task, ubatch: int) -> Layout | None:
    """The fewest layers' experts on the CPU with which all else fits, and of the last of them as
    many tensors on the GPU as fit."""
    layers = task.weights.spec.num_hidden_layers
    unified = task.machine.host.unified
    for number in range(1 if unified else layers + 1):
        layout = _layout(task, number, (), ubatch)
        if layout is None:
            continue
        names = [
            p.tensor.name
            for p in task.weights.tensors
            if p.cls == "experts" and p.layer == number - 1 and not p.tensor.name.endswith("bias")
        ]
        for kept in range(len(names) - 1, 0, -1):
            for away in combinations(names, len(names) - kept):
                finer = _layout(task, number - 1, away, ubatch)
                if finer is not None:
                    return finer
        return layout
    return None


def _layout(task: Task, number: int, away: tuple[str, ...], ubatch: int) -> Layout | None:
    """The layout with `number` layers' experts and the tensors `away` on the CPU; None where it
    does not fit."""
    weights, spec = task.weights, task.weights.spec
    experts, rest = weights.layer_bytes(experts=True), weights.layer_bytes(experts=False)
    cpu = np.where(np.arange(len(experts)) < number, experts, 0)
    for p in weights.tensors:
        if p.tensor.name in away:
            cpu[p.layer] += p.tensor.num_bytes
    host = int(cpu.sum()) + weights.embedding_bytes
    if not task.machine.host.unified and host > host_bytes(task.machine.host):
        return None
    kv = kv_layer_bytes(spec, task.context, task.cache_type, ubatch)
    need = rest + experts - cpu
    compute = _compute_bytes(task, ubatch, bool(cpu.any()))
    memory, layers_of, at = [], [], 0
    for index, gpu in enumerate(task.gpus):
        last = index == len(task.gpus) - 1
        own = weights.output_bytes if last else 0
        buffer = max(compute) if last else compute[0]
        held = kept = 0
        first = at
        left = len(experts) - at
        share = left if last else -(-left // (len(task.gpus) - index)) if not cpu.any() else left
        while at < len(experts) and at - first < share:
            more = held + int(need[at]) + kept + int(kv[at]) + own + buffer
            if more > gpu.memory:
                break
            held, kept, at = held + int(need[at]), kept + int(kv[at]), at + 1
        if last and (at < len(experts) or held + kept + own + buffer > gpu.memory):
            return None
        memory.append(GpuMemory(held + own, kept, buffer))
        layers_of.append(at - first)
    if task.machine.host.unified and host + memory[0].total > task.gpus[0].memory:
        return None
    return Layout(number, away, cpu, tuple(layers_of), ubatch, tuple(memory))


def _compute_bytes(task: Task, ubatch: int, copies: bool) -> tuple[int, int]:
    """Compute buffer by activations of a layer, and by logits; a copied tensor on top."""
    spec = task.weights.spec
    hidden, width = spec.hidden_size, spec.moe_intermediate_size
    layer = spec.top_k * (2 * width + hidden) + 4 * hidden
    copied = task.weights.largest_expert_tensor if copies else 0
    return 4 * ubatch * layer + copied, 4 * ubatch * (spec.vocab_size + 2 * hidden)


def _plan(task: Task, layout: Layout, engine: str, cpu_factor: float) -> EnginePlan:
    cpu = cpu_rates(task.machine.host, SOCKETS_SHARE)
    cpu = replace(cpu, weights=cpu.weights * cpu_factor, flops=cpu.flops * cpu_factor)
    experts = task.weights.layer_bytes(experts=True)
    number = sum(1 for x in layout.cpu_bytes if x)
    return EnginePlan(
        engine,
        1.0 / _token_s(task, layout, cpu),
        _prompt_rate(task, layout),
        layout.memory,
        int(layout.cpu_bytes.sum()) + task.weights.embedding_bytes,
        1.0 - float(layout.cpu_bytes.sum() / experts.sum()),
        {
            "n_cpu_moe": layout.num_cpu_layers,
            "cpu_tensors": list(layout.cpu_tensors),
            "cpu_layers": number,
            "tensor_split": list(layout.layers_of),
            "ubatch": layout.ubatch,
            "context": task.context,
            "cache_type": task.cache_type,
        },
        (_command(task, layout),),
        weights=task.weights.source,
        notes=(task.weights.note,) if task.weights.note else (),
    )


def _token_s(task: Task, layout: Layout, cpu: CpuRates) -> float:
    """Seconds of one token: every layer on its GPU, its chosen experts where they are."""
    weights, spec = task.weights, task.weights.spec
    experts, rest = weights.layer_bytes(experts=True), weights.layer_bytes(experts=False)
    kv = kv_layer_bytes(spec, task.mean_context, task.cache_type)
    chosen = spec.real_top_k / spec.num_experts
    used = spec.real_top_k * spec.expert_params
    nvidia = maker(task.machine.gpus[0]) == "NVIDIA"
    no_graph = NO_GRAPH_US * 1e-6 if nvidia and layout.cpu_bytes.any() else 0.0
    total, layer = 0.0, 0
    for gpu, count in zip(task.gpus, layout.layers_of, strict=True):
        for x in range(layer, layer + count):
            away = float(layout.cpu_bytes[x])
            near = float(rest[x] + kv[x]) + chosen * (float(experts[x]) - away)
            total += near / gpu.read + gpu.layer_s + spec.real_top_k * gpu.choice_s
            if away:
                share = away / float(experts[x])
                total += cpu.call_s + cpu.token_s(chosen * away, used * share)
            else:
                total += no_graph
        layer += count
    return total + weights.output_bytes / task.gpus[-1].read


def _prompt_rate(task: Task, layout: Layout) -> float:
    """Prompt tokens/s: ubatches one after another, the CPU's experts copied for each, partly while
    the GPU computes."""
    spec, gpus = task.weights.spec, task.gpus
    rest = float(task.weights.layer_bytes(experts=False).sum())
    near = float(task.weights.layer_bytes(experts=True).sum() - layout.cpu_bytes.sum())
    link = gpus[0].link
    shares = np.array(layout.layers_of) / sum(layout.layers_of)
    away = float(layout.cpu_bytes.sum())
    left, done, total = task.prompt, 0, 0.0
    while left > 0:
        n = min(left, layout.ubatch)
        used = distinct_share(spec, n)
        rows = n * spec.real_top_k / spec.num_experts / used
        work = prompt_flops(spec, n, done + n / 2) + expert_flops(spec, n) * TILE / 2 / rows
        computed = sum(
            share * (work / g.quant_flops + (rest + used * (near + away)) / g.read)
            + spec.num_hidden_layers * share * g.layer_s
            for g, share in zip(gpus, shares, strict=True)
        )
        copied = used * away / link
        total += max(computed, copied) + (1 - OVERLAP) * min(computed, copied)
        left, done = left - n, done + n
    return task.prompt / total


def _command(task: Task, layout: Layout) -> str:
    parts = ["llama-server -m MODEL -ngl 99", f"-c {task.context}", f"-ub {layout.ubatch}"]
    parts.append(f"-b {max(2048, layout.ubatch)}")
    if layout.cpu_tensors:
        names = "|".join(re.escape(name.removesuffix(".weight")) for name in layout.cpu_tensors)
        parts.append(
            f'-ot "{names}=CPU"' if len(layout.cpu_tensors) == 1 else f'-ot "({names})=CPU"'
        )
    if layout.num_cpu_layers:
        parts.append(f"--n-cpu-moe {layout.num_cpu_layers}")
    if len(task.gpus) > 1:
        counts = [*layout.layers_of[:-1], layout.layers_of[-1] + 1]
        parts.append("-ts " + ",".join(map(str, counts)))
    parts.append("-fa on")
    if task.cache_type != "fp16":
        name = _CACHE_FLAG.get(task.cache_type, task.cache_type)
        parts.append(f"-ctk {name} -ctv {name}")
    return " ".join([*parts, f"-t {task.machine.host.cores}"])


def _shortage(task: Task) -> str:
    memory = sum(gpu.memory for gpu in task.gpus) / 1e9
    host = 0.0 if task.machine.host.unified else task.machine.host.dram_gb
    return (
        f"{task.weights.source} has {task.weights.num_bytes / 1e9:.1f} GB; {task.machine.name} has"
        f" {memory:.1f} GB of GPU memory that may be filled and {host:.0f} GB of host memory"
    )
