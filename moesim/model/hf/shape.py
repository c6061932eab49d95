"""What every architecture has, whatever its keys are called."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.model.checks import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE
from moesim.model.hf.keys import Keys

LAYERS = ("num_hidden_layers", "num_layers", "n_layers")
HIDDEN = ("hidden_size", "d_model")
HEADS = ("num_attention_heads", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_attention_groups")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = (
    "num_experts_per_tok",
    "experts_per_token",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
LAYER_LISTS = ("hybrid_override_pattern", "layers_block_type")
"""Keys of which the number of layers is the length, where no key gives it (nemotron_h)."""


@dataclass(frozen=True)
class Shape:
    """Layers, widths and heads of one model."""

    layers: int
    hidden: int
    heads: int
    vocab: int

    @classmethod
    def of(cls, keys: Keys) -> Shape:
        """Read from whichever names the file uses; FormatError names those that are missing."""
        layers = keys.first_of(LAYERS, high=MAX_LAYERS)
        for name in LAYER_LISTS:
            entries = keys.data.get(name)
            if layers is None and isinstance(entries, (str, list)):
                layers = max(1, min(MAX_LAYERS, len(entries)))
        found = {
            LAYERS[0]: layers,
            HIDDEN[0]: keys.first_of(HIDDEN),
            HEADS[0]: keys.first_of(HEADS),
            "vocab_size": keys.first_of(("vocab_size",)),
        }
        values = [value for value in found.values() if value is not None]
        if len(values) < len(found):
            raise missing(keys, [name for name, value in found.items() if value is None])
        return cls(*values)


def missing(keys: Keys, names: list[str], architecture: str = "") -> Exception:
    """The error for keys that a file must have."""
    plural = "s" if len(names) > 1 else ""
    kind = f" (architecture {architecture!r})" if architecture else ""
    listed = ", ".join(keys.path + name for name in names)
    return keys.error(
        f"missing key{plural} {listed}{kind}",
        "take the config.json that the model's maker published: a guessed value gives wrong sizes",
    )


def kv_heads(keys: Keys, shape: Shape) -> int:
    """KV heads; as many as there are heads where the file gives none (transformers' default)."""
    return keys.first_of(KV_HEADS) or shape.heads


def head_dim(keys: Keys, shape: Shape) -> int:
    """Width of a head: `head_dim`, or an equal share of the hidden size."""
    found = keys.first_of(("head_dim", "attention_head_dim"))
    if not found and shape.hidden % shape.heads:
        raise keys.error(
            f"hidden_size {shape.hidden} is no multiple of num_attention_heads {shape.heads}, "
            "and head_dim is missing",
            "take the config.json that the model's maker published",
        )
    return found or shape.hidden // shape.heads


def is_latent(keys: Keys) -> bool:
    """Whether attention is latent: kv_lora_rank is there, and use_mla does not say otherwise."""
    return keys.has("kv_lora_rank") and keys.flag("use_mla", True)


def num_experts(keys: Keys) -> int | None:
    return keys.first_of(EXPERTS, 1, MAX_EXPERTS)


def top_k(keys: Keys) -> int | None:
    return keys.first_of(TOP_K, 1, MAX_SIZE, per_layer=True)
