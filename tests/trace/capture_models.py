"""Tiny randomly initialised models for the capture tests, saved as Hugging Face folders, and the
routing rule of each family written out on the router's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

torch.set_num_threads(1)  # threads only wait for each other over models this small
Array = npt.NDArray[Any]
VOCAB = 260
EXPERTS, TOP_K, LAYERS = 8, 3, 3
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def largest(scores: Array, k: int) -> Array:
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def softmax_then_top_k(
    logits: Array, bias: Array, renormalise: bool = False
) -> tuple[Array, Array]:
    probs = softmax(logits)
    ids = largest(probs, TOP_K)
    weights = np.take_along_axis(probs, ids, -1)
    return ids, weights / weights.sum(-1, keepdims=True) if renormalise else weights


def softmax_renormalised(logits: Array, bias: Array) -> tuple[Array, Array]:
    return softmax_then_top_k(logits, bias, renormalise=True)


def softmax_of_top_k(logits: Array, bias: Array) -> tuple[Array, Array]:
    ids = largest(logits, TOP_K)
    return ids, softmax(np.take_along_axis(logits, ids, -1))


def sigmoid_of_top_k(logits: Array, bias: Array) -> tuple[Array, Array]:
    ids = largest(logits, TOP_K)
    return ids, 1 / (1 + np.exp(-np.take_along_axis(logits, ids, -1)))


def two_of_four_groups_by_their_best(logits: Array, bias: Array) -> tuple[Array, Array]:
    """DeepSeek-V2: softmax, the 2 of 4 groups with the best expert, top-k, times 1.5."""
    scores = softmax(logits)
    return _grouped(scores, scores, scores.reshape(-1, 4, 2).max(-1), 0.0, 1.5, normalise=False)


def two_of_four_groups_by_their_two_best(logits: Array, bias: Array) -> tuple[Array, Array]:
    """DeepSeek-V3 and GLM-4-MoE: sigmoid, chosen with a bias that the weights lack, the 2 of 4
    groups with the best sum of two, normalised, times 2.5."""
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + bias
    return _grouped(scores, choice, choice.reshape(-1, 4, 2).sum(-1), -np.inf, 2.5, normalise=True)


def _grouped(
    scores: Array, choice: Array, groups: Array, masked: float, scale: float, normalise: bool
) -> tuple[Array, Array]:
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, largest(groups, 2), True, -1)
    ids = largest(np.where(np.repeat(kept, 2, axis=1), choice, masked), TOP_K)
    weights = np.take_along_axis(scores, ids, -1)
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return ids, weights * scale


def sparse_mixer(logits: Array, bias: Array) -> tuple[Array, Array]:
    """PhiMoE, evaluated: the best expert, then the best of the others; the weight of each is a
    softmax over the experts within 2 x jitter (0.01) of it, relative to the larger magnitude."""
    rest, ids, weights = logits.astype(np.float64).copy(), [], []
    for _ in range(2):
        best = rest.argmax(-1)
        top = np.take_along_axis(rest, best[:, None], -1)
        far = (top - logits) / np.maximum(np.abs(logits), top) > 0.02
        near = np.where(far, -np.inf, rest)
        ids.append(best)
        weights.append(np.take_along_axis(softmax(near), best[:, None], -1)[:, 0])
        np.put_along_axis(rest, best[:, None], -np.inf, -1)
    return np.stack(ids, -1), np.stack(weights, -1)


@dataclass(frozen=True)
class Family:
    """config and model class, settings, routing rule, and which output of the router is logits."""

    config: str
    model: str
    settings: dict[str, Any]
    rule: Callable[[Array, Array], tuple[Array, Array]]
    logits_at: int = 0
    first_moe_layer: int = 0


_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": TOP_K,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
_QWEN = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 16,
    "intermediate_size": 32,
}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size": 16}

FAMILIES: dict[str, Family] = {
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", _LOCAL, softmax_renormalised),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_QWEN, "shared_expert_intermediate_size": 16, "norm_topk_prob": False},
        softmax_then_top_k,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_QWEN, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [0]},
        softmax_renormalised,
        first_moe_layer=1,
    ),
    "olmoe": Family(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size": 16},
        softmax_then_top_k,
    ),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**_MLA, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
        two_of_four_groups_by_their_best,
        first_moe_layer=1,
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**_MLA, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        two_of_four_groups_by_their_two_best,
        first_moe_layer=1,
    ),
    "gpt_oss": Family(
        "GptOssConfig", "GptOssForCausalLM", {**_LOCAL, "head_dim": 8}, softmax_of_top_k
    ),
    "granitemoe": Family("GraniteMoeConfig", "GraniteMoeForCausalLM", _LOCAL, softmax_of_top_k),
    "phimoe": Family(
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {**_LOCAL, "num_experts_per_tok": 2, "router_jitter_noise": 0.01},
        sparse_mixer,
    ),
    "llama4": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **_LOCAL,
            "head_dim": 8,
            "intermediate_size_mlp": 32,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 64,
        },
        sigmoid_of_top_k,
        logits_at=1,
    ),
    "glm4_moe": Family(
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "moe_intermediate_size": 16,
            "intermediate_size": 32,
            "head_dim": 8,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
        },
        two_of_four_groups_by_their_two_best,
        first_moe_layer=1,
    ),
}


def byte_tokenizer() -> Any:
    """One token a byte, ids as in ByteLevel's sorted alphabet; <pad> 256, <end> 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {ch: i for i, ch in enumerate(alphabet)} | {"<pad>": 256, "<end>": 257}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>"
    )


def save_model(model: Any, folder: Path) -> Path:
    """Give the routers weights that set experts apart, and save model and tokenizer."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("gate.weight", "router.weight", "classifier.weight")):
                tensor.normal_(0, 1)
            elif name.endswith(("e_score_correction_bias", "router.bias")):
                tensor.normal_(0, 0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_family(name: str, folder: Path) -> Path:
    """A tiny model of a family, seeded."""
    family = FAMILIES[name]
    torch.manual_seed(7)
    config = getattr(transformers, family.config)(**{**SMALL, **family.settings})
    return save_model(getattr(transformers, family.model)(config), folder)


def reference(name: str, model: Any, token_ids: Array) -> tuple[Array, Array]:
    """Ids and weights [T, L, K] of one request by the family's rule, from the logits that the
    routers give when the whole request passes the model at once, alone and without padding."""
    family = FAMILIES[name]
    routers = [m for n, m in model.named_modules() if n.endswith((".gate", ".router"))]
    seen: list[tuple[Array, Array]] = []

    def note(module: Any, args: Any, output: Any) -> None:
        bias = getattr(module, "e_score_correction_bias", torch.zeros(EXPERTS))
        seen.append((output[family.logits_at].float().numpy(), bias.float().numpy()))

    hooks = [router.register_forward_hook(note) for router in routers]
    with torch.inference_mode():
        model(input_ids=torch.tensor(token_ids[None].astype(np.int64)), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(routers) == LAYERS - family.first_moe_layer
    routed = [family.rule(logits.reshape(-1, EXPERTS), bias) for logits, bias in seen]
    return np.stack([r[0] for r in routed], 1), np.stack([r[1] for r in routed], 1)


def router_scores(name: str, model: Any, token_ids: Array) -> Array:
    """[T, L, E] softmax, or sigmoid for the families that use it, of the routers' logits when the
    request passes the model alone."""
    family = FAMILIES[name]
    sigmoid = family.rule in (sigmoid_of_top_k, two_of_four_groups_by_their_two_best)
    seen: list[Array] = []
    hooks = [
        m.register_forward_hook(
            lambda _, args, out: seen.append(out[family.logits_at].float().numpy())
        )
        for n, m in model.named_modules()
        if n.endswith((".gate", ".router"))
    ]
    with torch.inference_mode():
        model(input_ids=torch.tensor(token_ids[None].astype(np.int64)), use_cache=False)
    for hook in hooks:
        hook.remove()
    logits = [block.reshape(-1, EXPERTS) for block in seen]
    return np.stack([1 / (1 + np.exp(-x)) if sigmoid else softmax(x) for x in logits], 1)
