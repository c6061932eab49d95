"""Memory of one GPU of a deployment: weights, activations, and what is left for the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from moesim.errors import InfeasibleError
from moesim.model.dtypes import KV_BYTES, WEIGHT_BYTES

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment

GB = 1e9
HBM_BYTES_PER_GB = float(2**30)
"""A GPU sold with 80 GB has 80 x 2**30 bytes: an H100 reports 81,559 MiB, an H200 143,771 MiB."""
ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of the fullest GPU of a deployment.

    total_bytes: the GPU's memory; usable_bytes: the engine's share of it. expert_weight_bytes,
    other_weight_bytes, activation_bytes, runtime_bytes: what is taken before the KV cache;
    kv_cache_bytes: what is left, not below 0. kv_bytes_per_token: of one cached token on this GPU;
    kv_token_capacity: tokens that one DP rank's cache holds.
    """

    total_bytes: float
    usable_bytes: float
    expert_weight_bytes: float
    other_weight_bytes: float
    activation_bytes: float
    runtime_bytes: float
    kv_bytes_per_token: float

    @property
    def weight_bytes(self) -> float:
        """Weights of the GPU."""
        return self.expert_weight_bytes + self.other_weight_bytes

    @property
    def kv_cache_bytes(self) -> float:
        """Bytes left for the KV cache."""
        taken = self.weight_bytes + self.activation_bytes + self.runtime_bytes
        return max(0.0, self.usable_bytes - taken)

    @property
    def kv_token_capacity(self) -> int:
        """Tokens in the KV cache of one DP rank."""
        return int(self.kv_cache_bytes // self.kv_bytes_per_token)


def kv_bytes_per_token_per_gpu(deployment: Deployment) -> float:
    """Bytes that one cached token takes on each GPU of its DP rank.

    Grouped-query attention: the KV heads are cut over tp, and held more than once where tp exceeds
    them. Latent attention: the latent has no heads to cut, so every tp rank holds it whole. Layers
    are cut over pp. Windowed layers count in full (see `ModelSpec.kv_bytes` for their limit).
    """
    model = deployment.model
    elements = model.attention.kv_elements_per_layer
    if model.attention.kind == "gqa":
        kv_heads = model.attention.num_kv_heads
        elements = elements // kv_heads * ceil(kv_heads / deployment.tp)
    layers = ceil(model.num_kv_layers / deployment.pp)
    return elements * layers * KV_BYTES[deployment.kv_dtype]


def gpu_memory(deployment: Deployment) -> EngineMemory:
    """Memory of the fullest GPU: the stage with most layers, the GPU with most expert slots.

    Weights: experts by slots (of the plan, else experts / ep) and moe_tp; attention, dense and
    shared layers cut by tp (shared experts and dense layers too); routers whole; embedding table
    and head cut by tp, both counted. Activations: the widest layer's rows of a full step, and
    logits of `max_sequences` rows in float32. Ignored: fragmentation and page rounding.
    """
    model, tp, pp = deployment.model, deployment.tp, deployment.pp
    moe_layers = ceil(model.num_moe_layers / pp)
    slots = (
        ceil(model.num_experts / deployment.ep)
        if deployment.plan is None
        else deployment.plan.placement.num_slots // deployment.ep
    )
    experts = moe_layers * slots * model.expert_bytes(deployment.expert_dtype) / deployment.moe_tp
    share = 1.0 / (tp * pp)
    dense = model.attention_params + model.num_moe_layers * model.shared_expert_params
    dense += (model.num_hidden_layers - model.num_moe_layers) * model.dense_ffn_params
    dense_bytes = WEIGHT_BYTES[deployment.dense_dtype]
    wide = max(2.0, dense_bytes)
    tables = (
        max(model.embedding_params, model.lm_head_params)
        if pp > 1
        else (model.embedding_params + model.lm_head_params)
    )
    other = dense * dense_bytes * share + moe_layers * model.router_params * wide
    other += tables * wide / tp
    rows = deployment.max_batch_tokens
    width = 4 * model.hidden_size + max(
        model.top_k * (model.hidden_size + 2 * model.moe_intermediate_size / deployment.moe_tp),
        2 * model.dense_intermediate_size / tp,
    )
    activations = rows * width * ACTIVATION_BYTES
    activations += deployment.max_sequences * model.vocab_size * 4.0 / tp
    total = min(gpu.hbm_gb for gpu in deployment.cluster.gpus) * HBM_BYTES_PER_GB
    return EngineMemory(
        total_bytes=total,
        usable_bytes=total * deployment.memory_fraction,
        expert_weight_bytes=experts,
        other_weight_bytes=other,
        activation_bytes=activations,
        runtime_bytes=deployment.engine.runtime_gb * GB,
        kv_bytes_per_token=kv_bytes_per_token_per_gpu(deployment),
    )


def require_fit(deployment: Deployment, min_tokens: int = 1) -> EngineMemory:
    """`gpu_memory`, or InfeasibleError with the numbers where fewer than `min_tokens` fit."""
    memory = gpu_memory(deployment)
    if memory.kv_token_capacity < min_tokens:
        taken = memory.weight_bytes + memory.activation_bytes + memory.runtime_bytes
        raise InfeasibleError(
            f"{deployment.name}: a GPU has {memory.usable_bytes / GB:.1f} GB for the engine, "
            f"weights take {memory.weight_bytes / GB:.1f}, activations and runtime "
            f"{(taken - memory.weight_bytes) / GB:.1f}; the KV cache holds "
            f"{memory.kv_token_capacity:,} tokens, {min_tokens:,} are needed",
            "use more GPUs, a narrower weight or KV precision, or a smaller max_batch_tokens",
        )
    return memory
