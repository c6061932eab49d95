"""Memory of one GPU of a deployment: weights, activations, and what is left for the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from moesim.errors import InfeasibleError
from moesim.model.dtypes import KV_BYTES

if TYPE_CHECKING:
    from moesim.model.attention import Cache
    from moesim.serving.deployment import Deployment

GB = 1e9
HBM_BYTES_PER_GB = 0.99 * 2**30
"""What CUDA reports of a GPU sold with so many GB: 79.2 GiB for 80 (H100), 139.8 for 141 (H200)."""
ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of the fullest GPU of a deployment; with experts on GPUs of their own, of attention's.

    total_bytes: the GPU's memory; usable_bytes: the engine's share of it. expert_weight_bytes,
    other_weight_bytes, activation_bytes, runtime_bytes: what is taken before the KV cache;
    state_bytes: states of linear attention and state spaces; exchange_bytes: buffers of DeepEP's
    low-latency kernels; kv_cache_bytes: what is left, not
    below 0. kv_bytes_per_token: of one cached token on this GPU; kv_token_capacity: tokens that one
    DP rank's cache holds. expert_pool_bytes, expert_pool_usable_bytes: what the fullest GPU of an
    expert pool needs and may use, 0 where there is none.
    """

    total_bytes: float
    usable_bytes: float
    expert_weight_bytes: float
    other_weight_bytes: float
    activation_bytes: float
    runtime_bytes: float
    kv_bytes_per_token: float
    state_bytes: float = 0.0
    expert_pool_bytes: float = 0.0
    expert_pool_usable_bytes: float = 0.0
    exchange_bytes: float = 0.0

    @property
    def weight_bytes(self) -> float:
        """Weights of the GPU."""
        return self.expert_weight_bytes + self.other_weight_bytes

    @property
    def kv_cache_bytes(self) -> float:
        """Bytes left for the KV cache."""
        return max(0.0, self.usable_bytes - self.taken_bytes)

    @property
    def taken_bytes(self) -> float:
        """All that is not the KV cache's."""
        beside = self.activation_bytes + self.runtime_bytes + self.exchange_bytes
        return self.weight_bytes + beside + self.state_bytes

    @property
    def kv_token_capacity(self) -> int:
        """Tokens in the KV cache of one DP rank; 0 where an expert pool cannot hold its experts."""
        if self.expert_pool_bytes > self.expert_pool_usable_bytes:
            return 0
        return int(self.kv_cache_bytes // self.kv_bytes_per_token)


def kv_bytes_per_token_per_gpu(deployment: Deployment) -> float:
    """Bytes that one cached token takes on each GPU of its DP rank.

    Grouped-query attention: the KV heads are cut over tp, and held more than once where tp exceeds
    them. Latent attention: the latent has no heads to cut, so every tp rank holds it whole; so it
    is with indexers' keys and compressed entries. Layers are cut over pp, taken as evenly mixed.
    Layers with nothing but a window count in full (see `ModelSpec.kv_bytes` for their limit);
    windows beside a cache of all the past (DeepSeek-V4) are part of the states.
    """
    model, tp = deployment.model, deployment.tp
    element = KV_BYTES[deployment.kv_dtype]
    total = 0.0
    layers = 0
    for kind in model.layer_kinds:
        layers += len(kind.layer_ids) if kind.caches else 0
        for cache in (cache for cache in kind.caches if cache not in kind.rings):
            total += len(kind.layer_ids) * _kept_bytes(cache, element, tp)
    own = total / layers * ceil(layers / deployment.pp)
    if deployment.mtp:
        each = sum(_kept_bytes(cache, element, tp) for cache in model.mtp_caches)
        own += model.mtp_layers * each
    return own * deployment.kv_scale


def _kept_bytes(cache: Cache, element: float, tp: int) -> float:
    """Of one token on one of `tp` GPUs."""
    cut = ceil(cache.heads / tp) / cache.heads if cache.heads else 1.0
    return cache.entry_bytes(element) / cache.tokens_per_entry * cut


def low_latency_buffer_bytes(deployment: Deployment) -> float:
    """Of DeepEP's low-latency kernels on each GPU: two buffers to send from and two to receive in,
    each with room for `dispatch_tokens` rows of every expert, whoever is chosen, since nothing is
    known of a step's choices beforehand (github.com/deepseek-ai/DeepEP @dd758ca,
    csrc/legacy/config.hpp, `LowLatencyLayout`; a combine message is a bf16 row and 4 bytes for each
    128 channels). Version 2 has no such kernels; its buffers are larger (README) and are not
    modelled."""
    if deployment.moe_comm not in ("deepep_ll", "deepep_auto"):
        return 0.0
    model = deployment.model
    slots = (
        model.num_experts + (deployment.redundant_experts or 0)
        if deployment.plan is None
        else deployment.plan.placement.num_slots
    )
    message = 2 * model.expert_hidden + 4 * (model.expert_hidden // 128)
    return 4.0 * slots * deployment.dispatch_tokens * message


def state_bytes_per_gpu(deployment: Deployment, left: float) -> float:
    """Bytes set aside for states of linear attention and state spaces, of `left` bytes.

    Those of `max_sequences` sequences, heads cut over tp and layers over pp, but at most half of
    what is left (SGLang gives 47%: mamba_full_memory_ratio 0.9); fewer sequences run then. Windows
    beside a cache of all the past are whole on every tp rank.
    """
    model = deployment.model
    element = KV_BYTES[deployment.kv_dtype]
    rings = sum(
        len(kind.layer_ids) * cache.window * cache.entry_bytes(element)
        for kind in model.layer_kinds
        for cache in kind.rings
    )
    own = (model.state_bytes / deployment.tp + rings) / deployment.pp * deployment.max_sequences
    return min(own, max(0.0, left) / 2)


def _usable(
    deployment: Deployment, total: float, weights: float, activations: float, runtime: float
) -> float:
    """Of `total` bytes of a GPU, those that the engine may use by its own rule."""
    share, beside = deployment.memory_fraction, activations + runtime
    rule = deployment.engine.memory_rule
    if rule == "weights_and_cache":
        return min(total, (total - runtime) * share + beside)
    if rule == "free":
        return weights + beside + max(0.0, total - weights - beside) * share
    return total * share


def _balancer_bytes(deployment: Deployment, layer_bytes: float) -> float:
    """What the engine's load balancer takes where experts have replicas; layer_bytes: of a layer's
    experts on the GPU."""
    plan, engine = deployment.plan, deployment.engine
    slots = deployment.model.num_experts if plan is None else plan.placement.num_slots
    if not deployment.redundant_experts and slots <= deployment.model.num_experts:
        return 0.0
    return engine.balancer_gb * GB + engine.balancer_layers * layer_bytes


def _other_weight_bytes(deployment: Deployment, moe_layers: int) -> float:
    """Of all but routed experts, on the stage with `moe_layers` of them."""
    model, tp, pp = deployment.model, deployment.tp, deployment.pp
    share = 1.0 / (tp * pp)
    dtype = deployment.dense_dtype
    params = model.params_by_class
    cut = ("attention", "shared", "dense", "latent", "other")
    dense = sum(params[name] * model.bytes_per_weight(name, dtype) for name in cut)
    wide = model.bytes_per_weight("tables", dtype)
    tables = (
        max(model.embedding_params, model.lm_head_params)
        if pp > 1
        else (model.embedding_params + model.lm_head_params)
    )
    router = model.bytes_per_weight("router", dtype)
    if deployment.mtp:
        rest = model.mtp_params - model.mtp_expert_params
        dense += pp * rest * model.bytes_per_weight("attention", dtype)
    return dense * share + moe_layers * model.router_params * router + tables * wide / tp


def gpu_memory(deployment: Deployment) -> EngineMemory:
    """Memory of the fullest GPU: the stage with most layers, the GPU with most expert slots.

    Weights: experts by slots (of the plan, else experts / ep) and moe_tp; attention, dense and
    shared layers cut by tp (shared experts and dense layers too); routers whole; embedding table
    and head cut by tp, both counted; multi-token-prediction layers, where they draft, on the
    fullest stage, experts by slots and the rest cut by tp, with the model's tables. Activations:
    the widest layer's rows of a full step, and the engine's `sampler_bytes` for `max_sequences`
    rows of the whole vocabulary. What the memory fraction bounds is the engine's (`memory_rule`).
    Ignored: fragmentation and page rounding.
    """
    model, tp, pp = deployment.model, deployment.tp, deployment.pp
    apart = deployment.expert_gpus
    moe_layers = ceil(model.num_moe_layers / pp)
    slots = (
        ceil((model.num_experts + (deployment.redundant_experts or 0)) / deployment.ep)
        if deployment.plan is None
        else deployment.plan.placement.num_slots // deployment.ep
    )
    more = model.mtp_moe_layers if deployment.mtp else 0
    experts = (
        (moe_layers + more)
        * slots
        * model.expert_bytes(deployment.expert_dtype)
        / deployment.moe_tp
    )
    other = _other_weight_bytes(deployment, moe_layers)
    rows = deployment.max_batch_tokens
    routed = model.real_top_k * (
        model.expert_hidden + 2 * model.moe_intermediate_size / deployment.moe_tp
    )
    width = 4 * model.hidden_size + max(
        0.0 if apart else routed, 2 * model.dense_intermediate_size / tp
    )
    engine = deployment.engine
    activations = rows * width * ACTIVATION_BYTES
    activations += deployment.max_sequences * model.vocab_size * engine.sampler_bytes
    total = min(gpu.hbm_gb for gpu in deployment.attention_gpus) * HBM_BYTES_PER_GB
    runtime = (engine.runtime_gb + (engine.group_gb if deployment.num_gpus > 1 else 0.0)) * GB
    runtime += _balancer_bytes(deployment, experts / moe_layers)
    buffers = low_latency_buffer_bytes(deployment)
    pool = pool_usable = 0.0
    if apart is not None:
        moved = rows * deployment.dp / deployment.micro_batches / apart * routed * ACTIVATION_BYTES
        pool = experts + runtime + moved + buffers
        smallest = min(gpu.hbm_gb for gpu in deployment.cluster.gpus[-apart:]) * HBM_BYTES_PER_GB
        pool_usable = _usable(deployment, smallest, experts, moved + buffers, runtime)
        experts = 0.0
    beside = activations + runtime + buffers
    usable = _usable(deployment, total, experts + other, activations + buffers, runtime)
    return EngineMemory(
        total_bytes=total,
        usable_bytes=usable,
        expert_weight_bytes=experts,
        other_weight_bytes=other,
        activation_bytes=activations,
        runtime_bytes=runtime,
        kv_bytes_per_token=kv_bytes_per_token_per_gpu(deployment),
        state_bytes=state_bytes_per_gpu(deployment, usable - experts - other - beside),
        expert_pool_bytes=pool,
        expert_pool_usable_bytes=pool_usable,
        exchange_bytes=buffers,
    )


def require_fit(deployment: Deployment, min_tokens: int = 1) -> EngineMemory:
    """`gpu_memory`, or InfeasibleError with the numbers where fewer than `min_tokens` fit."""
    memory = gpu_memory(deployment)
    if memory.expert_pool_bytes > memory.expert_pool_usable_bytes:
        raise InfeasibleError(
            f"{deployment.name}: a GPU has {memory.expert_pool_usable_bytes / GB:.1f} GB for"
            f" experts of its own, which need {memory.expert_pool_bytes / GB:.1f} with activations"
            " and runtime",
            "give more `expert_gpus`, or narrower experts",
        )
    if memory.kv_token_capacity < min_tokens:
        buffers = (
            f" ({memory.exchange_bytes / GB:.1f} of them buffers of DeepEP's low-latency kernels:"
            " lower `dispatch_tokens`)"
            if memory.exchange_bytes
            else ""
        )
        raise InfeasibleError(
            f"{deployment.name}: a GPU has {memory.usable_bytes / GB:.1f} GB for the engine, "
            f"weights take {memory.weight_bytes / GB:.1f}, activations, states and runtime "
            f"{(memory.taken_bytes - memory.weight_bytes) / GB:.1f}{buffers}; the KV cache holds "
            f"{memory.kv_token_capacity:,} tokens, {min_tokens:,} are needed",
            "use more GPUs, a narrower weight or KV precision, or a smaller max_batch_tokens",
        )
    return memory
