"""Memory of one GPU of a deployment, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesim.cluster import load_cluster
from moesim.errors import InfeasibleError
from moesim.model.names import load_model
from moesim.serving.deployment import deploy
from moesim.serving.engines import engine_profile
from moesim.serving.memory import gpu_memory, kv_bytes_per_token_per_gpu, require_fit


def test_latent_cache_of_deepseek_v3_is_whole_on_every_tensor_parallel_rank() -> None:
    # 61 layers x (512 latent + 64 rotary) elements x 2 bytes.
    for tp in (1, 2, 8):
        deployment = deploy("DeepSeek-V3", tp=tp, dp=8 // tp)
        assert kv_bytes_per_token_per_gpu(deployment) == 61 * 576 * 2 == 70_272
    fp8 = deploy("DeepSeek-V3", tp=8, kv_dtype="fp8")
    assert kv_bytes_per_token_per_gpu(fp8) == 35_136


@pytest.mark.parametrize(("tp", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1), (16, 1)])
def test_grouped_query_cache_is_cut_by_heads_and_replicated_beyond_them(
    tp: int, heads: int
) -> None:
    # Qwen3-30B-A3B: 48 layers, 4 KV heads of 128; keys and values of 2 bytes.
    deployment = deploy("Qwen3-30B-A3B", tp=tp)
    assert kv_bytes_per_token_per_gpu(deployment) == 48 * 2 * heads * 128 * 2


def test_pipeline_stages_share_the_layers_of_the_cache() -> None:
    # 61 layers over 4 stages: the fullest has 16.
    deployment = deploy("DeepSeek-V3", tp=2, pp=4)
    assert kv_bytes_per_token_per_gpu(deployment) == 16 * 576 * 2


def test_weights_of_mixtral_by_hand() -> None:
    # Mixtral-8x7B on 2 GPUs, bf16: experts 32 x 8 x 3 x 4096 x 14336, cut in two either way;
    # attention 32 x 2 x 4096 x 128 x (32 + 8), two tables of 32000 x 4096; routers are whole.
    experts = 32 * 8 * 3 * 4096 * 14336 * 2
    attention = 32 * 2 * 4096 * 128 * 40 * 2
    tables = 2 * 32000 * 4096 * 2
    routers = 32 * 4096 * 8 * 2
    cut = gpu_memory(deploy("Mixtral-8x7B", tp=2))
    whole = gpu_memory(deploy("Mixtral-8x7B", tp=2, ep=2, moe_tp=1))
    for memory in (cut, whole):
        assert memory.expert_weight_bytes == experts / 2
        assert memory.other_weight_bytes == attention / 2 + tables / 2 + routers
    # Attention DP holds attention and tables twice over, experts once.
    dp = gpu_memory(deploy("Mixtral-8x7B", dp=2))
    assert dp.expert_weight_bytes == experts / 2
    assert dp.other_weight_bytes == attention + tables + routers


def test_all_gpus_of_deepseek_v3_hold_its_671_billion_parameters() -> None:
    # Tensor parallel over 8: each GPU an eighth of about 671 GB at fp8, and tables of 16 bits.
    memory = gpu_memory(deploy("DeepSeek-V3", tp=8))
    assert memory.weight_bytes * 8 == pytest.approx(675e9, rel=0.005)


def test_capacity_is_what_is_left_over_the_bytes_of_a_token() -> None:
    memory = gpu_memory(deploy("DeepSeek-V3", "h200-sxm-ib", tp=8, memory_fraction=0.9))
    assert memory.total_bytes == 0.99 * 141 * 2**30
    left = memory.usable_bytes - memory.weight_bytes
    left -= memory.activation_bytes + memory.runtime_bytes
    assert memory.kv_token_capacity == int(left // 70_272)
    assert 400_000 < memory.kv_token_capacity < 800_000


def test_deepseek_v3_does_not_fit_eight_h100s_and_the_error_has_the_numbers() -> None:
    with pytest.raises(InfeasibleError) as error:
        require_fit(deploy("DeepSeek-V3", "h100-sxm-ib", tp=8, max_batch_tokens=8192))
    assert "76.5 GB for the engine" in error.value.cause  # 80 x 2**30 x 0.99 x 0.9 = 76.5e9
    assert "weights take 84.3" in error.value.cause
    assert "more GPUs" in error.value.remedy


def test_require_fit_wants_room_for_the_tokens_asked_for() -> None:
    deployment = deploy("DeepSeek-V3", tp=8)
    capacity = gpu_memory(deployment).kv_token_capacity
    assert require_fit(deployment, capacity).kv_token_capacity == capacity
    with pytest.raises(InfeasibleError, match=f"{capacity + 1:,} are needed"):
        require_fit(deployment, capacity + 1)


def test_more_memory_holds_more_and_narrower_weights_leave_more() -> None:
    h100 = gpu_memory(deploy("Qwen3-235B-A22B-FP8", "h100-sxm-ib", tp=8))
    h200 = gpu_memory(deploy("Qwen3-235B-A22B-FP8", "h200-sxm-ib", tp=8))
    assert h200.kv_token_capacity > h100.kv_token_capacity > 0
    wide = gpu_memory(deploy("Qwen3-235B-A22B", "h200-sxm-ib", tp=8))
    assert h200.kv_token_capacity > wide.kv_token_capacity


def test_the_smallest_gpu_of_a_mixed_cluster_counts() -> None:
    cluster = load_cluster("h200-sxm-ib", 8)
    small = load_cluster("h100-sxm-ib", 8).gpus[0]
    mixed = replace(cluster, gpus=(small, *cluster.gpus[1:]))
    memory = gpu_memory(deploy("Qwen3-30B-A3B", mixed, tp=8))
    assert memory.total_bytes == 0.99 * 80 * 2**30
    assert load_model("Qwen3-30B-A3B").kv_bytes_per_token() == 98_304


def test_states_of_linear_attention_are_set_aside_before_the_cache() -> None:
    # Qwen3.5-35B-A3B: 30 layers of convolution (8192 channels x 3 x 2 bytes) and 32 heads of
    # 128 x 128 in 4 bytes; 10 layers of 2 KV heads of 256. 64 sequences, cut over 2 GPUs.
    state = 30 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)
    deployment = deploy("Qwen3.5-35B-A3B", "h200-sxm-ib", tp=2, max_sequences=64)
    memory = gpu_memory(deployment)
    assert memory.state_bytes == 64 * state / 2
    assert memory.kv_bytes_per_token == 10 * 2 * 1 * 256 * 2
    taken = memory.weight_bytes + memory.activation_bytes + memory.runtime_bytes
    assert memory.kv_cache_bytes == memory.usable_bytes - taken - memory.state_bytes
    # However many sequences, states take at most half of what is left.
    wide = {"max_sequences": 100_000, "max_batch_tokens": 100_000}
    many = gpu_memory(deploy("Qwen3.5-35B-A3B", "h200-sxm-ib", tp=2, **wide))
    assert many.state_bytes == pytest.approx(many.kv_cache_bytes)


def test_windows_beside_compressed_entries_are_part_of_the_states() -> None:
    # DeepSeek-V4-Flash: windows of 128 x 512 elements in 41 layers that have compressed entries
    # too; 2 layers have the window alone, and count in full.
    memory = gpu_memory(deploy("DeepSeek-V4-Flash", "h200-sxm-ib", tp=8, max_sequences=16))
    assert memory.state_bytes == 16 * 41 * 128 * 512 * 2
    growing = 2 * 1024 + 20 * 1024 / 128 + 21 * (1024 + 132) / 4
    assert memory.kv_bytes_per_token == pytest.approx(growing)


def test_stored_bytes_by_class_and_another_type_for_all() -> None:
    # Half of attention's weights in 8 bits, the other half in 16: 1.5 bytes a weight.
    model = load_model("Mixtral-8x7B")
    mixed = replace(model, stored=(("attention", 1.5),))
    plain = gpu_memory(deploy(model, tp=2))
    attention = 32 * 2 * 4096 * 128 * 40
    less = plain.other_weight_bytes - gpu_memory(deploy(mixed, tp=2)).other_weight_bytes
    assert less == attention * 0.5 / 2
    other = gpu_memory(deploy(mixed, tp=2, dense_dtype="fp32"))
    assert other.other_weight_bytes > plain.other_weight_bytes * 1.9


def test_latent_experts_and_layers_without_feed_forward_part() -> None:
    # Nemotron-3-Super: 40 MoE layers of 512 experts of 2 x 1024 x 2688 in fp8 without block scales.
    memory = gpu_memory(deploy("Nemotron-3-Super", "h200-sxm-ib", tp=2))
    assert memory.expert_weight_bytes == 40 * 512 * 2 * 1024 * 2688 / 2
    assert memory.kv_bytes_per_token == 8 * 2 * 1 * 128 * 2


def test_caches_that_engines_logged() -> None:
    """github.com/vllm-project/vllm/issues/21348: Qwen3-235B-A22B-FP8 on 4 H100s. vLLM of July 2025
    sorted logits to sample, about 36 bytes per sequence and word of the vocabulary; the profile
    has what 0.23.0 takes."""
    sorting = replace(engine_profile("vllm"), sampler_bytes=36.0)
    where = {"cluster": "h100-sxm-ib", "tp": 4}
    vllm = gpu_memory(deploy("Qwen3-235B-A22B-FP8", engine=sorting, **where))
    assert vllm.kv_token_capacity == pytest.approx(178_880, rel=0.03)
    sglang = gpu_memory(
        deploy("Qwen3-235B-A22B-FP8", engine="sglang", memory_fraction=0.93, **where)
    )
    assert sglang.kv_token_capacity == pytest.approx(367_404, rel=0.03)


def test_replicas_take_the_balancers_memory() -> None:
    """DeepSeek-V2-Lite on two GPUs, 36 slots of 3 x 2048 x 1408 bf16 weights: one layer's once
    more, and 1.02 GB; both none of the weights."""
    plain, balanced = (
        gpu_memory(
            deploy("DeepSeek-V2-Lite", "h200-sxm-ib", dp=2, expert_dtype="bf16",
                   redundant_experts=extra)
        )
        for extra in (None, 8)
    )  # fmt: skip
    layer = 36 * 3 * 2048 * 1408 * 2
    assert balanced.runtime_bytes == pytest.approx(plain.runtime_bytes + layer + 1.02e9)
    assert balanced.expert_weight_bytes == 26 * layer


def test_what_a_memory_fraction_bounds() -> None:
    """Mixtral-8x7B on 4 GPUs of 79.2 GiB, fraction 0.8: of everything (vLLM), of weights and cache
    beside the runtime (SGLang), of what is left for the cache (TensorRT-LLM)."""
    total = 0.99 * 80 * 2**30

    def of(engine: str) -> tuple[float, float, float, float]:
        m = gpu_memory(deploy("Mixtral-8x7B", engine=engine, tp=4, memory_fraction=0.8))
        return m.kv_cache_bytes, m.weight_bytes, m.activation_bytes, m.runtime_bytes

    cache, weights, activations, runtime = of("vllm")
    assert runtime == pytest.approx(2.1e9)
    assert cache == pytest.approx(0.8 * total - weights - activations - runtime)
    cache, weights, activations, runtime = of("sglang")
    assert cache == pytest.approx(0.8 * (total - runtime) - weights)
    cache, weights, activations, runtime = of("trtllm")
    assert cache == pytest.approx(0.8 * (total - weights - activations - runtime))
