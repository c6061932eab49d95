"""Layers of models that mix softmax attention with linear attention or state spaces."""

from __future__ import annotations

from moesim.model.hf import mixers
from moesim.model.hf.keys import Keys, shown
from moesim.model.hf.layers import Layers, latent_mixer
from moesim.model.hf.mixers import STATE_DTYPES, Mixer
from moesim.model.hf.shape import Shape, head_dim, is_latent, kv_heads, missing

NEMOTRON = {
    "M": "mamba", "*": "attention", "E": "moe", "-": "mlp",
    "mamba": "mamba", "attention": "attention", "moe": "moe", "mlp": "mlp",
}  # fmt: skip
"""Letters of hybrid_override_pattern and words of layers_block_type."""


def softmax(keys: Keys, shape: Shape, **more: object) -> Mixer:
    """Plain grouped or latent attention, as the file's keys say."""
    if is_latent(keys):
        return latent_mixer(keys, shape)
    return mixers.grouped(
        shape.hidden,
        shape.heads,
        kv_heads(keys, shape),
        head_dim(keys, shape),
        **more,  # type: ignore[arg-type]
    )


def state_element(keys: Keys, *names: str) -> int:
    """Bytes per element of the recurrent state: 4, or what one of these keys says."""
    for name in names:
        value = keys.get(name)
        if isinstance(value, str) and value in STATE_DTYPES:
            return STATE_DTYPES[value]
        if value not in (None, "auto"):
            raise keys.error(f"{name} is {value!r:.40}", f"known: {', '.join(STATE_DTYPES)}")
    return STATE_DTYPES["float32"]


def delta_net(keys: Keys, shape: Shape, _: str) -> Layers:
    """Qwen3-Next, 3.5 and 3.6: Gated DeltaNet but for every full_attention_interval-th layer, or as
    layer_types says; the softmax layers gate their output."""
    names = [f"linear_num_{part}_heads" for part in ("key", "value")]
    names += ["linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"]
    absent = [name for name in names if not keys.has(name)]
    if not keys.has("layer_types", "full_attention_interval"):
        absent.append("layer_types")
    if absent:
        raise missing(keys, absent)
    linear = mixers.gated_delta(
        shape.hidden,
        key_heads=keys.number("linear_num_key_heads"),
        value_heads=keys.number("linear_num_value_heads"),
        key_dim=keys.number("linear_key_head_dim"),
        value_dim=keys.number("linear_value_head_dim"),
        kernel=keys.number("linear_conv_kernel_dim"),
        state_element=state_element(keys, "mamba_ssm_dtype"),
    )
    gate = keys.flag("attn_output_gate", True)
    full = softmax(keys, shape, gate_in_query=gate)
    interval = keys.optional("full_attention_interval", 0)
    if keys.has("layer_types"):
        known = {"linear_attention": linear, "full_attention": full}
        return Layers(keys.flags("layer_types", shape.layers, known), mtp=full)
    every = [linear if (i + 1) % max(1, interval) else full for i in range(shape.layers)]
    return Layers(list(every), mtp=full)


def kimi_linear(keys: Keys, shape: Shape, _: str) -> Layers:
    """Kimi-Linear and Kimi-K3: linear_attn_config numbers its layers from 1."""
    config = keys.inner("linear_attn_config")
    names = ("kda_layers", "full_attn_layers", "num_heads", "head_dim", "short_conv_kernel_size")
    absent = [name for name in names if not config.has(name)]
    if absent:
        raise missing(config, absent)
    gated = keys.get("mla_use_output_gate")
    notes = []
    full_rank = config.flag("use_full_rank_gate")
    if gated is None and full_rank:  # Kimi-K3's file as published says true
        notes.append("mla_use_output_gate not given: read as true, as in Kimi-K3")
    gate = full_rank if gated is None else keys.flag("mla_use_output_gate")
    full = latent_mixer(
        keys, shape, gate_width=shape.heads * keys.optional("v_head_dim", 0) if gate else 0
    )
    config.get("gate_lower_bound")
    linear = mixers.kimi_delta(
        shape.hidden,
        config.number("num_heads"),
        config.number("head_dim"),
        config.number("short_conv_kernel_size"),
        full_gate=full_rank,
    )
    chosen = set(config.layer_list("kda_layers", shape.layers, base=1))
    others = set(config.layer_list("full_attn_layers", shape.layers, base=1))
    if chosen & others or len(chosen | others) != shape.layers:
        raise keys.error(
            "linear_attn_config's kda_layers and full_attn_layers do not share out all layers",
            "take the config.json that the model's maker published",
        )
    every = [linear if layer in chosen else full for layer in range(shape.layers)]
    return Layers(list(every), mtp=full, notes=notes)


def lightning(keys: Keys, shape: Shape, _: str) -> Layers:
    """MiniMax-Text-01, MiniMax-M1: attn_type_list has 1 for softmax, layer_types their names."""
    full = softmax(keys, shape)
    linear = mixers.lightning(shape.hidden, shape.heads, head_dim(keys, shape))
    keys.get("block_size"), keys.get("postnorm"), keys.get("shared_moe_mode")
    if keys.has("attn_type_list"):
        keys.get("layer_types")
        return Layers(keys.flags("attn_type_list", shape.layers, {0: linear, 1: full}))
    if not keys.has("layer_types"):
        raise missing(keys, ["layer_types"])
    known = {"linear_attention": linear, "full_attention": full}
    return Layers(keys.flags("layer_types", shape.layers, known))


def grouped_layers(keys: Keys, shape: Shape, _: str) -> Layers:
    """Ling and Ring (vllm: models/bailing_moe_linear.py): in every group of layer_group_size
    layers, and in what is left at the end, the last is softmax, the others linear attention with as
    many KV heads as heads: lightning attention up to 2.6, Kimi Delta Attention in 3.0."""
    gates = {None: 0, "head_wise": shape.heads}
    granularity = keys.get("gated_attention_proj_granularity_type")
    if not isinstance(granularity, str | None) or granularity not in gates:
        raise keys.error(
            f"gated_attention_proj_granularity_type is {shown(granularity)}, not head_wise",
            "docs/models.md lists what is read of each architecture",
        )
    latent = keys.has("kv_lora_rank")
    gate = gates[granularity]
    full = (
        latent_mixer(keys, shape, gate_width=gate)
        if latent
        else softmax(keys, shape, gate_width=gate)
    )
    size = keys.optional("layer_group_size", 1, low=1)
    if size == 1:
        return Layers([full] * shape.layers)
    width = head_dim(keys, shape)
    if keys.has("short_conv_kernel_size"):
        whole_rank = keys.flag("no_kda_lora")
        keys.get("kda_safe_gate"), keys.get("kda_lower_bound")
        kernel = keys.number("short_conv_kernel_size")
        linear = mixers.kimi_delta(
            shape.hidden, shape.heads, width, kernel, full_gate=whole_rank, full_decay=whole_rank
        )
    else:
        linear = mixers.lightning(shape.hidden, shape.heads, width, "attention")
    whole = shape.layers // size * size
    every = [full if (i + 1) % size == 0 or i >= whole else linear for i in range(shape.layers)]
    return Layers(list(every), mtp=full)


def nemotron_pattern(keys: Keys, shape: Shape) -> list[str]:
    """What each layer is: "mamba", "attention", "moe" or "mlp"."""
    for name in ("hybrid_override_pattern", "layers_block_type"):
        entries = keys.get(name)
        if entries is not None:
            listed = Keys({name: list(entries)}, keys.where) if isinstance(entries, str) else keys
            return listed.flags(name, shape.layers, NEMOTRON)
    raise missing(keys, ["layers_block_type"])


def nemotron(keys: Keys, shape: Shape, _: str) -> Layers:
    """Nemotron-H and 3 (transformers/nemotron_h): a layer is a Mamba-2 block, an attention, a dense
    feed-forward part or experts, and nothing else."""
    keys.optional("expand", 0)
    mamba = None
    pattern = nemotron_pattern(keys, shape)
    if "mamba" in pattern:
        names = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
        absent = [name for name in names if not keys.has(name)]
        if absent:
            raise missing(keys, absent)
        mamba = mixers.mamba2(
            shape.hidden,
            heads=keys.number("mamba_num_heads"),
            head_dim=keys.number("mamba_head_dim"),
            groups=keys.number("n_groups"),
            state_size=keys.number("ssm_state_size"),
            kernel=keys.number("conv_kernel"),
            state_element=state_element(keys, "mamba_ssm_cache_dtype"),
            module="mixer",
        )
    window = keys.optional("sliding_window", 0)
    full = mixers.grouped(
        shape.hidden,
        shape.heads,
        kv_heads(keys, shape),
        head_dim(keys, shape),
        window=window,
        module="mixer",
    )
    kinds = {"mamba": mamba, "attention": full}
    return Layers([kinds.get(kind) for kind in pattern], mtp=full)


def granite(keys: Keys, shape: Shape, _: str) -> Layers:
    """Granite 4 (transformers/granitemoehybrid): layer_types names "mamba" and "attention"."""
    full = softmax(keys, shape)
    kinds = keys.get("layer_types") or keys.get("layers_block_type")
    if kinds is None:
        return Layers([full] * shape.layers)
    name = "layer_types" if keys.has("layer_types") else "layers_block_type"
    each = keys.flags(name, shape.layers, {"mamba": "mamba", "attention": "full"})
    if "mamba" not in each:
        return Layers([full] * shape.layers)
    needed = ["mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv"]
    absent = [name for name in needed if not keys.has(name)]
    if absent:
        raise missing(keys, absent)
    heads = keys.number("mamba_n_heads")
    inner = keys.optional("mamba_expand", 2, low=1) * shape.hidden
    width = keys.get("mamba_d_head")
    mamba = mixers.mamba2(
        shape.hidden,
        heads=heads,
        head_dim=width if isinstance(width, int) and width > 0 else max(1, inner // heads),
        groups=keys.number("mamba_n_groups"),
        state_size=keys.number("mamba_d_state"),
        kernel=keys.number("mamba_d_conv"),
        state_element=4,
        module="mamba",
    )
    return Layers([mamba if kind == "mamba" else full for kind in each])


def convolutions(keys: Keys, shape: Shape, _: str) -> Layers:
    """LFM2 (transformers/lfm2_moe): layer_types names "conv" and "full_attention"."""
    full = softmax(keys, shape)
    if not keys.has("layer_types"):
        raise missing(keys, ["layer_types"])
    conv = mixers.short_convolution(shape.hidden, keys.number("conv_L_cache"))
    known = {"conv": conv, "full_attention": full}
    return Layers(keys.flags("layer_types", shape.layers, known))


def jamba(keys: Keys, shape: Shape, _: str) -> Layers:
    """Jamba (transformers/jamba): softmax in layers whose number leaves attn_layer_offset when
    divided by attn_layer_period, Mamba in the others."""
    names = ["attn_layer_period", "attn_layer_offset", "mamba_d_state", "mamba_d_conv"]
    names += ["mamba_expand", "mamba_dt_rank"]
    absent = [name for name in names if not keys.has(name)]
    if absent:
        raise missing(keys, absent)
    rank = keys.get("mamba_dt_rank")
    mamba = mixers.mamba1(
        shape.hidden,
        inner=keys.number("mamba_expand") * shape.hidden,
        state_size=keys.number("mamba_d_state"),
        kernel=keys.number("mamba_d_conv"),
        rank=-(-shape.hidden // 16) if rank == "auto" else keys.number("mamba_dt_rank"),
        module="mamba",
    )
    full = softmax(keys, shape)
    period, offset = keys.number("attn_layer_period"), keys.number("attn_layer_offset", 0)
    if offset >= period:
        raise keys.error("attn_layer_offset is not below attn_layer_period", "check the file")
    every = [full if i % period == offset else mamba for i in range(shape.layers)]
    return Layers(list(every))
