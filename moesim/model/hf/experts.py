"""Which layers have experts, which experts every token uses, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moesim.model.checks import MAX_EXPERTS, MAX_LAYERS
from moesim.model.hf.hybrids import nemotron_pattern
from moesim.model.hf.keys import Keys
from moesim.model.hf.shape import Shape, missing


@dataclass
class FeedForward:
    """Layers with experts, with none at all, and those that choose by hash of the token."""

    moe: tuple[int, ...]
    none: tuple[int, ...] = ()
    hashed: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


Placer = Callable[[Keys, Shape], FeedForward]

MLP_TYPES = {"sparse": 1, "moe": 1, "hash_moe": 2, "dense": 0}


def common(keys: Keys, shape: Shape) -> FeedForward:
    """By whichever of these keys are there: mlp_layer_types, moe_layers, first_k_dense_replace,
    moe_layer_freq, decoder_sparse_step, interleave_moe_layer_step, mlp_only_layers."""
    layers = set(range(shape.layers))
    first = keys.optional("first_k_dense_replace", 0, high=MAX_LAYERS)
    if keys.has("mlp_layer_types"):
        # transformers writes mlp_layer_types beside the keys that it was made from
        for name in ("moe_layer_freq", "decoder_sparse_step", "mlp_only_layers"):
            keys.get(name)
        kinds = keys.flags("mlp_layer_types", shape.layers, MLP_TYPES)
        moe = tuple(layer for layer in sorted(layers) if kinds[layer])
        return FeedForward(moe, hashed=tuple(layer for layer in moe if kinds[layer] == 2))
    if keys.has("moe_layers"):
        keys.get("interleave_moe_layer_step")
        return FeedForward(keys.layer_list("moe_layers", shape.layers))
    layers -= set(range(first))
    if isinstance(keys.get("moe_layer_freq"), list):
        sparse = keys.flags("moe_layer_freq", shape.layers, {0: 0, 1: 1})
        layers = {layer for layer in layers if sparse[layer]}
    else:
        every = keys.optional("moe_layer_freq", 1, low=1)
        layers = {layer for layer in layers if layer % every == 0}
    for name in ("decoder_sparse_step", "interleave_moe_layer_step"):
        step = keys.optional(name, 1, low=1)
        layers = {layer for layer in layers if (layer + 1) % step == 0}
    if keys.has("mlp_only_layers"):
        layers -= set(keys.layer_list("mlp_only_layers", shape.layers))
    return FeedForward(tuple(sorted(layers)))


def dense_first(name: str) -> Placer:
    """Experts in all layers but the first ones, whose number is under this key."""

    def place(keys: Keys, shape: Shape) -> FeedForward:
        first = keys.optional(name, 0, high=MAX_LAYERS)
        return FeedForward(tuple(range(min(first, shape.layers), shape.layers)))

    return place


def hashed_first(keys: Keys, shape: Shape) -> FeedForward:
    """DeepSeek-V4: experts in all layers; the first num_hash_layers choose by token id."""
    if keys.has("mlp_layer_types"):
        return common(keys, shape)
    first = keys.optional("num_hash_layers", 3, high=MAX_LAYERS)
    every = tuple(range(shape.layers))
    notes = []
    if not keys.has("num_hash_layers"):
        notes.append("num_hash_layers not given: DeepseekV4Config's 3 taken")
    return FeedForward(every, hashed=every[:first], notes=notes)


def ernie(keys: Keys, shape: Shape) -> FeedForward:
    """ERNIE-4.5 (transformers/ernie4_5_moe): from moe_layer_start_index to moe_layer_end_index,
    every moe_layer_interval-th."""
    if not keys.has("moe_layer_start_index"):
        raise missing(keys, ["moe_layer_start_index"])
    first = keys.first_of(("moe_layer_start_index",), 0, MAX_LAYERS) or 0
    last = keys.data.get("moe_layer_end_index")
    end = shape.layers - 1
    if last not in (None, -1):
        end = keys.first_of(("moe_layer_end_index",), 0, MAX_LAYERS) or 0
    keys.get("moe_layer_end_index")
    every = keys.optional("moe_layer_interval", 1, low=1)
    layers = range(first, min(end, shape.layers - 1) + 1)
    return FeedForward(tuple(layer for layer in layers if (layer + 1) % every == 0))


def step(keys: Keys, shape: Shape) -> FeedForward:
    """Step-3.5: moe_layers_enum, a list or text of numbers with commas."""
    keys.must_be("use_moe", True)
    keys.must_be("moe_every_n_layer", 1)
    if keys.has("moe_layers_enum"):
        entries = keys.data["moe_layers_enum"]
        keys.optional("first_k_dense_replace", 0)
        if isinstance(entries, (str, list)):
            return FeedForward(keys.layer_list("moe_layers_enum", shape.layers, text=True))
        raise keys.error("moe_layers_enum is neither text nor a list", "check the file")
    if not keys.has("first_k_dense_replace", "mlp_layer_types"):
        raise missing(keys, ["moe_layers_enum"])
    return common(keys, shape)


def nemotron(keys: Keys, shape: Shape) -> FeedForward:
    """Nemotron-H: a layer with experts or a dense part has nothing else."""
    pattern = nemotron_pattern(keys, shape)
    layers = range(shape.layers)
    return FeedForward(
        tuple(layer for layer in layers if pattern[layer] == "moe"),
        none=tuple(layer for layer in layers if pattern[layer] in ("mamba", "attention")),
    )


def jamba(keys: Keys, shape: Shape) -> FeedForward:
    """Jamba: layers whose number leaves expert_layer_offset divided by expert_layer_period."""
    absent = [name for name in ("expert_layer_period", "expert_layer_offset") if not keys.has(name)]
    if absent:
        raise missing(keys, absent)
    period = keys.number("expert_layer_period")
    offset = keys.number("expert_layer_offset", 0)
    layers = range(shape.layers)
    return FeedForward(tuple(layer for layer in layers if layer % period == offset))


SHARED_COUNTS = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
)
SHARED_WIDTHS = (
    "shared_expert_intermediate_size",
    "share_expert_dim",
    "share_expert_dims",
    "shared_intermediate_size",
)


def shared(keys: Keys, expert_width: int) -> tuple[int, int]:
    """Number and total width of the shared experts of one layer.

    A count times the experts' width, or the width of one shared expert
    (moe_shared_expert_intermediate_size); or one block of a width of its own (Qwen1.5-MoE: 4 of
    1408 as 5632). Where a file gives both a count and a block (MiniMax-M3, Step-3.7), the block's
    width is the layer's.
    """
    block = keys.first_of(SHARED_WIDTHS, 0, per_layer=True) or 0
    each = keys.optional("moe_shared_expert_intermediate_size", expert_width, low=0)
    count = keys.first_of(SHARED_COUNTS, 0, MAX_EXPERTS, per_layer=True)
    for name in SHARED_COUNTS:
        keys.get(name)
    if count is not None and block:
        return (count, block) if count else (0, 0)
    if count is not None:
        return (count, count * each) if each else (0, 0)
    if keys.has("moe_shared_expert_intermediate_size"):
        return (1, each) if each else (0, 0)
    if not block:
        return 0, 0
    return (block // expert_width if block % expert_width == 0 else 1), block


def one_shared(keys: Keys, expert_width: int) -> tuple[int, int]:
    """One shared expert of the experts' width in every layer (Llama 4)."""
    return 1, expert_width


def dense_beside(keys: Keys, expert_width: int) -> tuple[int, int]:
    """Gemma 4: the dense part beside the experts, which every token uses."""
    width = keys.number("intermediate_size")
    return (width // expert_width if width % expert_width == 0 else 1), width


def hunyuan_shared(keys: Keys, expert_width: int) -> tuple[int, int]:
    """Hunyuan: with use_mixed_mlp_moe, num_shared_expert times intermediate_size."""
    count = keys.first_of(("num_shared_expert",), 0, MAX_EXPERTS, per_layer=True)
    if not keys.flag("use_mixed_mlp_moe") or not count:
        return 0, 0
    return count, count * keys.number("intermediate_size")


def groups(keys: Keys) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may use."""
    # DeepSeek-V2's "greedy" gate looks at all experts, whatever n_group says.
    method = keys.get("topk_method")
    names = ("n_group", "num_expert_group", "num_expert_groups")
    n_group = keys.first_of(names, 1, MAX_EXPERTS) or 1
    limited = keys.first_of(("topk_group", "num_limited_groups"), 1, MAX_EXPERTS)
    return (1, 1) if method == "greedy" else (n_group, limited or n_group)
