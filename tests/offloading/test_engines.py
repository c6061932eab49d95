"""Engines on one's own machine: memory and speed by hand, plans within what they can express."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cluster import Machine, load_machine
from moesim.errors import InfeasibleError, UnknownNameError
from moesim.model.weights import Weights, load_weights
from moesim.offloading.engines import ENGINES, engine_name, plan_engines
from moesim.offloading.ktransformers import at_experts
from moesim.offloading.llama_cpp import fixed, llama_cpp
from moesim.offloading.rates import MARGIN_BYTES
from moesim.offloading.task import EnginePlan, Task, distinct_share, kv_layer_bytes, prompt_flops

MIB = 1 << 20


@pytest.fixture(scope="module")
def qwen() -> Weights:
    return load_weights("Qwen3-30B-A3B", "Q4_K_M")


@pytest.fixture(scope="module")
def gpt() -> Weights:
    return load_weights("GPT-OSS-120B", "MXFP4_MOE")


def task(weights: Weights, machine: str = "rtx-4090+ddr5-2ch", **changed: object) -> Task:
    return Task(weights, weights, load_machine(machine), **changed)  # type: ignore[arg-type]


def test_buffers_are_those_of_published_logs() -> None:
    """Qwen3-235B-A22B with 16,384 tokens of q8_0 and -ub 512: KV 1,598.00 MiB in all, compute
    312.75 MiB where the output head is and 144.00 MiB on the other GPU; with experts on the CPU in
    Q6_K 774.00 (ikawrakow/ik_llama.cpp, discussion 357)."""
    weights = load_weights("Qwen3-235B-A22B", "Q4_K_M")
    machine = load_machine("8xrtx-4090+ddr5-12ch")
    plan = fixed(Task(weights, weights, machine, 16384, cache_type="q8_0"), 0, 512)
    assert sum(gpu.kv for gpu in plan.gpus) / MIB == pytest.approx(1598.0)
    assert plan.gpus[0].compute / MIB == pytest.approx(144.0)
    assert plan.gpus[-1].compute / MIB == pytest.approx(312.75)
    mixed = load_weights("Qwen3-235B-A22B", "Q6_K")
    one = load_machine("rtx-3090+ddr5-12ch")
    partly = fixed(Task(mixed, mixed, one, 16384, cache_type="q8_0"), 90, 512)
    assert partly.gpus[0].compute / MIB == pytest.approx(774.0)


def test_the_model_buffer_of_a_partial_offload(qwen: Weights) -> None:
    """30 of 48 layers of Qwen3-30B-A3B in Q4_K_M: 10,750.86 MiB on the GPU, 6,940.48 on the CPU
    (ggml-org/llama.cpp#13729), within 0.1%."""
    layers = qwen.layer_bytes(experts=True) + qwen.layer_bytes(experts=False)
    assert layers[-30:].sum() / MIB == pytest.approx(10750.86, rel=1e-3)
    assert (qwen.num_bytes - layers[-30:].sum()) / MIB == pytest.approx(6940.48, rel=1e-3)


def test_windows_keep_window_and_ubatch_tokens(gpt: Weights) -> None:
    """gpt-oss-120b: 8 KV heads x 64 x 2 x 2 bytes = 2,048 a token and layer; 18 full layers keep
    32,768 tokens, 18 windows 128 + 512 = 640, rounded up to 768."""
    kv = kv_layer_bytes(gpt.spec, 32768, "fp16", 512)
    assert kv.sum() == 2048 * 18 * (32768 + 768)


def test_a_token_by_hand(gpt: Weights) -> None:
    """An RTX 3090 reads 0.75 x 936 = 702 GB/s, a layer's launches take 45 us; DDR5-5600 in two
    channels gives 0.65 x 89.6 = 58.24 GB/s, 16 cores of 4.5 GHz 1.7 weights a cycle: 122.4 G/s.
    4 of 128 experts of 3 x 2880 x 2880 weights in 17/32 bytes are 52.88 MB a layer; they take
    max(52.88 MB / 58.24 GB/s, 99.5 M / 122.4 G/s) = 908 us on the CPU, and 120 us for the call."""
    machine = load_machine("rtx-3090+ddr5-2ch")
    plan = fixed(Task(gpt, gpt, machine, 4096, prompt=2048, output=512), 36, 512)
    used = 4 * 3 * 2880 * 2880
    on_cpu = max(used * 17 / 32 / 58.24e9, used / 122.4e9) + 120e-6
    kv = 2048 * 18 * (2304 + 128)
    near = gpt.layer_bytes(experts=False).sum() + gpt.output_bytes + kv
    token = 36 * (on_cpu + 45e-6) + near / 702e9
    assert plan.decode_tokens_per_s == pytest.approx(1 / token, rel=1e-6)
    assert plan.gpu_share == 0
    assert plan.settings["n_cpu_moe"] == 36


def test_the_fewest_layers_that_fit(gpt: Weights) -> None:
    """The plan fits, and with one layer's experts more on the GPU it would not."""
    plan = llama_cpp(task(gpt, "rtx-3090+ddr5-2ch"))
    room = 24 * 2**30 - MARGIN_BYTES
    assert plan.gpus[0].total <= room
    number = plan.settings["n_cpu_moe"]
    with pytest.raises(InfeasibleError):
        fixed(task(gpt, "rtx-3090+ddr5-2ch"), number - 1, plan.settings["ubatch"])
    assert f"--n-cpu-moe {number}" in plan.launch[0]


def test_several_gpus_take_layers_in_order(gpt: Weights) -> None:
    """-ts counts layers, the output head as one more on the last GPU."""
    plan = llama_cpp(task(gpt, "2xrtx-3090+ddr5-2ch"))
    found = re.search(r"-ts ([\d,]+)", plan.launch[0])
    assert found is not None
    counts = [int(x) for x in found[1].split(",")]
    assert sum(counts) == gpt.spec.num_hidden_layers + 1
    assert all(gpu.total <= 24 * 2**30 - MARGIN_BYTES for gpu in plan.gpus)
    one = llama_cpp(task(gpt, "rtx-3090+ddr5-2ch"))
    assert plan.decode_tokens_per_s > one.decode_tokens_per_s


def test_tensors_of_one_layer_go_where_they_fit(gpt: Weights) -> None:
    """A layer whose experts fit in part has the rest named by -ot."""
    plan = llama_cpp(task(gpt, "2xrtx-3090+ddr5-2ch"))
    away = plan.settings["cpu_tensors"]
    assert away
    pattern = re.search(r'-ot "(.*)=CPU"', plan.launch[0])
    assert pattern is not None
    matched = {p.tensor.name for p in gpt.tensors if re.search(pattern[1], p.tensor.name)}
    assert matched == set(away)


def test_unified_memory_holds_all_or_nothing(gpt: Weights) -> None:
    plan = llama_cpp(task(gpt, "dgx-spark"))
    assert (plan.gpu_share, plan.settings["n_cpu_moe"]) == (1.0, 0)
    big = load_weights("DeepSeek-V3", "Q4_K_M")
    with pytest.raises(InfeasibleError, match="404"):
        llama_cpp(task(big, "dgx-spark"))


@settings(max_examples=25, deadline=None)
@given(
    gb=st.floats(6, 30),
    more=st.floats(0.1, 8),
    context=st.sampled_from([1024, 8192, 32768]),
)
def test_more_memory_is_never_slower(gb: float, more: float, context: int) -> None:
    """INV-9, at the request that the plan is made for."""
    weights = load_weights("Qwen3-30B-A3B", "Q4_K_M")

    def seconds(memory: float) -> float:
        asked = task(weights, context=context, memory_gb=memory)
        plan = plan_engines(asked, ("llama.cpp",))[0]
        assert plan.problem or plan.gpus[0].total <= memory * 1e9 - MARGIN_BYTES
        return plan.request_s(asked.prompt, asked.output)

    assert seconds(gb + more) <= seconds(gb) * (1 + 1e-9)


def test_context_and_experts_share_the_memory(gpt: Weights) -> None:
    short, long = (
        llama_cpp(task(gpt, "rtx-3090+ddr5-2ch", context=context)) for context in (4096, 131072)
    )
    assert long.gpus[0].kv > short.gpus[0].kv
    assert long.gpu_share < short.gpu_share


def test_experts_that_tokens_choose_together(gpt: Weights) -> None:
    """4 of 128: one token chooses 1/32; 512 choose each expert 16 times on average, 16/17 of them;
    never more than uniform routing would."""
    assert distinct_share(gpt.spec, 1) == pytest.approx(1 / 32)
    assert distinct_share(gpt.spec, 512) == pytest.approx(16 / 17)
    uniform = [1 - (31 / 32) ** n for n in (1, 2, 64, 512, 4096)]
    shares = [distinct_share(gpt.spec, n) for n in (1, 2, 64, 512, 4096)]
    assert all(s <= u + 1e-12 for s, u in zip(shares, uniform, strict=True))


def test_a_prompt_of_llama_cpp_by_hand() -> None:
    """DeepSeek-V2-Lite Q4_0 wholly on an RTX 3090, one ubatch of 256: 24 choices of each of 64
    experts, 24/25 of them chosen by 25 tokens each, filled up to tiles by 16 more."""
    weights = load_weights("DeepSeek-V2-Lite", "Q4_0")
    task = Task(weights, weights, load_machine("rtx-3090+ddr5-2ch"), 512, 256, 1)
    gpu, spec = task.gpus[0], weights.spec
    experts = 2 * 256 * 26 * 6 * spec.expert_params
    work = prompt_flops(spec, 256, 128) + experts * 16 / 25
    read = float(weights.layer_bytes(experts=False).sum())
    read += 24 / 25 * float(weights.layer_bytes(experts=True).sum())
    seconds = work / (71e12 * 0.36) + read / (936e9 * 0.75) + 27 * 45e-6
    assert gpu.quant_flops == pytest.approx(71e12 * 0.36)
    assert fixed(task, 0, 256).prompt_tokens_per_s == pytest.approx(256 / seconds)


def test_copies_of_a_prompt_hide_by_half(gpt: Weights) -> None:
    """All experts on the CPU: the longer of copying and computing, and half of the shorter."""
    task = Task(gpt, gpt, load_machine("rtx-4090+ddr5-2ch"), 2048, 512, 1)
    slow = replace(task.machine.gpus[0], pcie_gb_per_s=1.0)
    crawl = replace(task, machine=replace(task.machine, gpus=(slow,)))
    copied = 16 / 17 * float(gpt.layer_bytes(experts=True).sum()) / 0.75e9
    found = 512 / fixed(crawl, 36, 512).prompt_tokens_per_s
    fast = replace(task.machine.gpus[0], pcie_gb_per_s=1e6)
    alone = (
        512
        / fixed(
            replace(task, machine=replace(task.machine, gpus=(fast,))), 36, 512
        ).prompt_tokens_per_s
    )
    assert found == pytest.approx(copied + alone / 2, rel=1e-3)


@pytest.fixture(scope="module")
def fp8() -> Task:
    weights = load_weights("Qwen3-30B-A3B-FP8")
    return Task(weights, weights, load_machine("4xrtx-4090+ddr5-8ch"))


def test_ktransformers_by_hand(fp8: Task) -> None:
    """No expert on the GPUs: 48 layers of 130 us, two all-reduces of 15 us and a synchronisation
    of 50 us; 48 x 8 experts of 4.72 M weights in one byte and a scale at
    min(0.65 x 307.2 GB/s, 32 x 2.8 GHz x 2.3 = 206.1 G weights/s) on the CPU; the rest over four
    GPUs of 756 GB/s."""
    spec, weights = fp8.checkpoint.spec, fp8.checkpoint
    used = 48 * 8
    on_cpu = max(
        used * spec.expert_bytes() / (0.65 * 307.2e9), used * spec.expert_params / 206.08e9
    )
    rest = weights.layer_bytes(experts=False).sum() + weights.output_bytes
    rest += kv_layer_bytes(spec, fp8.mean_context, "fp16").sum()
    token = 48 * (130e-6 + 30e-6 + 50e-6) + on_cpu + rest / 756e9 / 4
    assert at_experts(fp8, 0).decode_tokens_per_s == pytest.approx(1 / token, rel=1e-6)


def test_frequent_experts_beat_random_ones(fp8: Task) -> None:
    """With a routing where half of the experts have 80% of the choices."""
    hot = np.interp(np.arange(129), [0, 64, 128], [0, 0.8, 1.0])
    known = replace(fp8, hot=hot)
    uniform = at_experts(known, 64, "uniform").decode_tokens_per_s
    assert at_experts(known, 64, "frequency").decode_tokens_per_s > uniform
    assert at_experts(fp8, 64).settings["strategy"] == "uniform"
    assert at_experts(fp8, 128).decode_tokens_per_s > uniform


def test_every_engine_answers_or_says_why(gpt: Weights) -> None:
    plans = plan_engines(task(gpt, "rtx-3090+ddr5-2ch"))
    assert {plan.engine for plan in plans} == set(ENGINES)
    runs = [plan for plan in plans if not plan.problem]
    assert [p.request_s(2048, 512) for p in runs] == sorted(p.request_s(2048, 512) for p in runs)
    assert plans[-1] == EnginePlan(
        "KTransformers", problem="KTransformers has no CPU kernels for a checkpoint of mxfp4"
    )


def test_accelerate_maps_whole_layers(qwen: Weights) -> None:
    weights = load_weights("Qwen3-30B-A3B")
    plan = next(p for p in plan_engines(task(weights), ("accelerate",)))
    where = json.loads(plan.files["device_map.json"])
    layers = [where[f"model.layers.{x}"] for x in range(48)]
    kept = plan.settings["gpu_layers"]
    assert layers == [0] * kept + ["cpu"] * (48 - kept)
    assert where["lm_head"] == 0


def test_vllm_offloads_what_does_not_fit() -> None:
    """24 GiB x 0.9 less KV cache and 2 GB of runtime; the rest is offloaded, in 0.1 GiB, and is of
    experts: a token reads 8 of 128 of that over 32 GB/s x 0.75 x 0.4, all else at 0.75 x 1008."""
    weights = load_weights("Qwen3-30B-A3B-FP8")
    plan = plan_engines(task(weights), ("vLLM",))[0]
    kv = int(kv_layer_bytes(weights.spec, 4096, "fp16").sum())
    away = weights.num_bytes - (24 * 2**30 * 0.9 - kv - 2e9)
    assert plan.settings["cpu_offload_gb"] == pytest.approx(away / 2**30, abs=0.1)
    assert plan.host_bytes == pytest.approx(away, rel=1e-6)
    assert plan.launch[0].endswith("--cpu-offload-params experts")
    experts, every = int(weights.layer_bytes(experts=True).sum()), weights.num_bytes
    used = 8 / 128 * experts
    near = used * (1 - away / experts) + every - experts - weights.embedding_bytes
    kv = kv_layer_bytes(weights.spec, 2048 + 256, "fp16").sum()
    token = 48 * 40e-6 + (near + kv) / 756e9 + used * away / experts / 9.6e9
    assert plan.decode_tokens_per_s == pytest.approx(1 / token, rel=1e-3)


def test_layers_wholly_on_the_gpu_lose_their_cuda_graphs(gpt: Weights) -> None:
    """One layer's experts on the CPU take the CUDA graphs of the 35 others: 90 us each, beside what
    that layer itself costs. AMD's builds have none to lose."""
    for machine, lost in (("rtx-pro-6000+ddr5-4ch", 90e-6), ("strix-halo", 0.0)):
        plans = [fixed(task(gpt, machine), number, 512) for number in (0, 1, 2)]
        none, one, two = (1 / plan.decode_tokens_per_s for plan in plans)
        layer = two - one + lost
        assert one - none == pytest.approx(layer + 35 * lost, rel=1e-6)


def test_apples_gpus_pay_for_each_chosen_expert(qwen: Weights) -> None:
    """30 us and 22 more for each of 8 experts, in 48 layers: 9.888 ms beside the reading."""
    near = fixed(task(qwen, "m3-ultra"), 0, 512)
    read = (
        qwen.layer_bytes(experts=False).sum()
        + 8 / 128 * qwen.layer_bytes(experts=True).sum()
        + kv_layer_bytes(qwen.spec, 2048 + 256, "fp16").sum()
        + qwen.output_bytes
    )
    token = read / (0.6 * 819e9) + 48 * (30e-6 + 8 * 22e-6)
    assert near.decode_tokens_per_s == pytest.approx(1 / token, rel=1e-6)


def test_machines_without_kernels_or_memory() -> None:
    weights = load_weights("Qwen3-30B-A3B-FP8")
    why = {p.engine: p.problem for p in plan_engines(task(weights, "m4-max"))}
    assert "NVIDIA" in why["KTransformers"]
    assert "no kernels" in why["vLLM"]
    assert not why["llama.cpp"]
    small = replace(load_machine("rtx-3090+ddr4-2ch"))
    assert isinstance(small, Machine)
    big = load_weights("Qwen3-235B-A22B", "Q4_K_M")
    assert all(p.problem for p in plan_engines(Task(big, big, small)))


def test_engine_names() -> None:
    assert engine_name("LLAMA.CPP") == "llama.cpp"
    with pytest.raises(UnknownNameError, match="ollama"):
        engine_name("ollama")
