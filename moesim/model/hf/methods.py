"""Quantisation methods that engines serve, each read into a plan: which scheme covers what.

Forms are those of vLLM (vllm/model_executor/layers/quantization/) and SGLang
(python/sglang/srt/layers/quantization/), of compressed-tensors (vllm-project/compressed-tensors),
AutoAWQ, GPTQModel, auto-round, AMD Quark and NVIDIA ModelOpt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moesim.model.hf.keys import shown
from moesim.model.hf.patterns import Patterns
from moesim.model.hf.schemes import (
    FP8,
    FP8_BLOCK,
    INT8,
    MXFP4,
    MXFP8,
    NVFP4,
    Scheme,
    StoragePlan,
    group_size,
    integer,
    refusal,
    skipped,
    weight_bits,
)


def _fp8_scheme(quant: Mapping[str, Any], where: str) -> Scheme:
    block = quant.get("weight_block_size")
    if block is None:
        return FP8
    good = isinstance(block, list) and len(block) == 2
    if not good or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in block):
        raise refusal(where, f"weight_block_size {shown(block)}")
    return Scheme("fp8", 1.0 + 4 / (block[0] * block[1]))


def fp8(quant: Mapping[str, Any], where: str) -> StoragePlan:
    """fp8 with one scale a block, channel or tensor. With ModelOpt's quantized_layers the listed
    layers are stored in another way, the others as the model's makers did (DeepSeek-V4-NVFP4: its
    `ignore` speaks of the second step only)."""
    scheme, left_out = _fp8_scheme(quant, where), skipped(quant, where)
    if quant.get("quantized_layers"):
        return StoragePlan(scheme, own=_listed(quant["quantized_layers"], where))
    return StoragePlan(scheme, left_out)


def mxfp4(quant: Mapping[str, Any], where: str) -> StoragePlan:
    """OpenAI's mxfp4: routed experts alone, whatever the list of other modules says."""
    return StoragePlan(MXFP4, skipped(quant, where), only_experts=True)


def mxfp8(quant: Mapping[str, Any], where: str) -> StoragePlan:
    return StoragePlan(MXFP8, skipped(quant, where))


def w4afp8(quant: Mapping[str, Any], where: str) -> StoragePlan:
    """SGLang's W4AFP8: experts of 4-bit integers in groups of 128, the rest fp8 in blocks."""
    group = group_size(quant.get("group_size", 128), where)
    return StoragePlan(FP8_BLOCK, skipped(quant, where), experts=integer(4, group, zeros=False))


def w8a8_int8(quant: Mapping[str, Any], where: str) -> StoragePlan:
    return StoragePlan(INT8, skipped(quant, where))


def block_int8(quant: Mapping[str, Any], where: str) -> StoragePlan:
    scheme = _fp8_scheme(quant, where)
    return StoragePlan(Scheme("int8", scheme.bytes_per_weight), skipped(quant, where))


def awq(quant: Mapping[str, Any], where: str) -> StoragePlan:
    """4-bit integers; 16-bit scale and packed zero point a group, without zero_point too."""
    bits = weight_bits(quant, where, "bits" if "bits" in quant else "w_bit")
    group = group_size(quant.get("group_size", quant.get("q_group_size", 128)), where)
    return StoragePlan(integer(bits, group, zeros=True), skipped(quant, where))


def gptq(quant: Mapping[str, Any], where: str) -> StoragePlan:
    """Integers with a 16-bit scale and a packed zero point a group. `dynamic`: "-:" leaves modules
    out, "+:" or nothing gives them other bits. modules_in_block_to_quantize: these alone."""
    bits, group = weight_bits(quant, where), group_size(quant.get("group_size", -1), where)
    plan = StoragePlan(integer(bits, group, zeros=True), skipped(quant, where))
    plan.head = quant.get("lm_head") is True
    dynamic = quant.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise refusal(where, f"dynamic {shown(dynamic)}")
    for key, value in dynamic.items():
        sign, _, pattern = key.partition(":") if key[:2] in ("-:", "+:") else ("+", "", key)
        if sign == "-":
            plan.skipped.add("re:" + pattern)
            continue
        over = {**quant, **(value if isinstance(value, dict) else {})}
        other = integer(
            weight_bits(over, where), group_size(over.get("group_size"), where), zeros=True
        )
        plan.own.append((Patterns.of(["re:" + pattern], where), other))
    listed = quant.get("modules_in_block_to_quantize")
    if listed:
        flat = [name for part in listed for name in (part if isinstance(part, list) else [part])]
        plan.only = Patterns.of(flat, where)
    return plan


def auto_round(quant: Mapping[str, Any], where: str) -> StoragePlan:
    """Integers as GPTQ packs them, or MX and NV floats; extra_config gives modules other bits."""
    kind = str(quant.get("data_type", "int")).lower()

    def scheme(entry: Mapping[str, Any]) -> Scheme | None:
        bits = weight_bits(entry, where)
        if bits == 16:
            return None
        if kind.startswith(("mx_fp", "mxfp")):
            return MXFP4 if bits == 4 else MXFP8
        if kind.startswith(("nv_fp", "nvfp")):
            return NVFP4
        if kind.startswith("fp"):
            return FP8
        if kind != "int":
            raise refusal(where, f"data_type {shown(kind)}")
        group = group_size(entry.get("group_size", -1), where)
        return integer(bits, group, zeros=True)

    plan = StoragePlan(scheme(quant), skipped(quant, where))
    extra = quant.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise refusal(where, f"extra_config {shown(extra)}")
    for name, entry in extra.items():
        if isinstance(entry, dict) and "bits" in entry:
            pattern = name if not set("^$\\(|+") & set(name) and ".*" not in name else f"re:{name}"
            plan.own.append((Patterns.of([pattern], where), scheme({**quant, **entry})))
    return plan


def bitsandbytes(quant: Mapping[str, Any], where: str) -> StoragePlan:
    """8-bit integers a row, or 4 bits with a 32-bit scale for 64 weights; with
    bnb_4bit_use_double_quant 8 bits for 64 and 32 for 256 of those (QLoRA, arXiv:2305.14314)."""
    eight = quant.get("load_in_8bit") is True
    if eight and quant.get("load_in_4bit") is True:
        raise refusal(where, "bitsandbytes with load_in_8bit and load_in_4bit")
    if eight:
        return StoragePlan(INT8, skipped(quant, where))
    kind = quant.get("bnb_4bit_quant_type", "fp4")
    if quant.get("load_in_4bit") is not True or kind not in ("nf4", "fp4"):
        raise refusal(where, f"bitsandbytes with bnb_4bit_quant_type {shown(kind)}")
    double = quant.get("bnb_4bit_use_double_quant") is True
    scale = (8 + 32 / 256) / 64 if double else 32 / 64
    return StoragePlan(Scheme("nf4", (4 + scale) / 8), skipped(quant, where))


def _weights(weights: object, where: str) -> Scheme | None:
    """A scheme of compressed-tensors: type, bits, group, whether with zero points."""
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise refusal(where, f"weights {shown(weights)}")
    kind, bits, group = weights.get("type"), weights.get("num_bits"), weights.get("group_size")
    strategy = weights.get("strategy")
    if kind == "float" and bits == 8:
        block = weights.get("block_structure")
        if isinstance(block, str) and "x" in block:
            block = [int(part) for part in block.split("x") if part.isdecimal()]
        if strategy == "block":
            return _fp8_scheme({"weight_block_size": block or [128, 128]}, where)
        return MXFP8 if group == 32 else FP8
    if kind == "float" and bits == 4 and group in (16, 32):
        return NVFP4 if group == 16 else MXFP4
    if kind == "int" and bits in (4, 8):
        size = group_size(group if strategy not in ("channel", "tensor") else None, where)
        return integer(bits, size, zeros=weights.get("symmetric") is False)
    raise refusal(
        where, f"weights of type {shown(kind)}, {shown(bits)} bits, groups {shown(group)}"
    )


def compressed_tensors(quant: Mapping[str, Any], where: str) -> StoragePlan:
    """Groups of targets: a module's name or pattern before the class "Linear"."""
    if quant.get("sparsity_config"):
        raise refusal(where, "sparsity_config")
    plan = StoragePlan(None, skipped(quant, where))
    groups = quant.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise refusal(where, f"config_groups {shown(groups)}")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise refusal(where, f"config_groups.{name} {shown(group)}")
        scheme = _weights(group.get("weights"), where)
        targets = group.get("targets", ["Linear"])
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise refusal(where, f"targets {shown(targets)}")
        classes = {"Linear", "FusedMoE", "LinearBase", "ReplicatedLinear"}
        named = Patterns.of([entry for entry in targets if entry not in classes], where)
        if named:
            plan.own.append((named, scheme))
        if "Linear" in targets:
            plan.default, plan.head = scheme, True
        if "FusedMoE" in targets:
            plan.experts = scheme
    return plan


_QUARK = {
    "fp8_e4m3": FP8, "fp8_e5m2": FP8, "int8": INT8, "mxfp4": MXFP4, "mx": MXFP4, "mxfp8": MXFP8,
}  # fmt: skip


def _quark_scheme(entry: object, where: str) -> Scheme | None:
    weight = entry.get("weight") if isinstance(entry, dict) else None
    if isinstance(weight, list):  # stages one after another: the last is what is stored
        weight = weight[-1] if weight else None
    if weight is None:
        return None
    if not isinstance(weight, dict):
        raise refusal(where, f"weight {shown(weight)}")
    kind, group = weight.get("dtype"), weight.get("group_size")
    if kind in ("fp4", "fp4_e2m1") and group in (None, 16, 32):
        return NVFP4 if group == 16 else MXFP4
    if kind in ("int4", "uint4"):
        return integer(4, group_size(group, where), zeros=kind == "uint4")
    if isinstance(kind, str) and kind in _QUARK:
        return _QUARK[kind]
    raise refusal(where, f"quark weights of dtype {shown(kind)}, groups {shown(group)}")


def quark(quant: Mapping[str, Any], where: str) -> StoragePlan:
    """AMD Quark: a global scheme, others by pattern or module class, modules left out."""
    if "global_quant_config" not in quant:
        raise refusal(where, "quark without global_quant_config")
    scheme = _quark_scheme(quant["global_quant_config"], where)
    plan = StoragePlan(scheme, skipped(quant, where), head=scheme is not None)
    if quant.get("layer_type_quant_config"):
        raise refusal(where, "quark's layer_type_quant_config")
    layers = quant.get("layer_quant_config") or {}
    if not isinstance(layers, dict):
        raise refusal(where, f"layer_quant_config {shown(layers)}")
    for pattern, entry in layers.items():
        plan.own.append((Patterns.of([pattern], where), _quark_scheme(entry, where)))
    return plan


_ALGORITHMS: Mapping[str, Scheme] = {
    "FP8": FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8,
    "FP8_PB_WO": FP8_BLOCK,
    "FP8_BLOCK_SCALES": FP8_BLOCK,
    "NVFP4": NVFP4,
    "NVFP4_AWQ": NVFP4,
    "W4A16_NVFP4": NVFP4,
    "W4A8_NVFP4_FP8": NVFP4,
    "MXFP8": MXFP8,
    "W4A8_MXFP4_FP8": MXFP4,
    "MXFP4": MXFP4,
    "W4A16_MXFP4": MXFP4,
    "W4A16_AWQ": integer(4, 128, zeros=False),
    "INT4_AWQ": integer(4, 128, zeros=False),
    "W4A8_AWQ": integer(4, 128, zeros=False),
    "W8A16": INT8,
    "W8A8_SQ_PER_CHANNEL": INT8,
}
"""ModelOpt's algorithms; AWQ's groups are 128 where group_size says nothing."""


def _algorithm(entry: Mapping[str, Any], where: str) -> Scheme:
    name = entry.get("quant_algo")
    found = _ALGORITHMS.get(name.upper()) if isinstance(name, str) else None
    if found is None:
        raise refusal(where, f"quant_algo {shown(name)}")
    if found.label == "int4":
        return integer(4, group_size(entry.get("group_size", 128), where), zeros=False)
    return found


def _listed(layers: object, where: str) -> list[tuple[Patterns, Scheme | None]]:
    """quantized_layers: names, each with its algorithm; gathered by algorithm."""
    if not isinstance(layers, dict):
        raise refusal(where, f"quantized_layers {shown(layers)}")
    found: dict[Scheme, Patterns] = {}
    for name, entry in layers.items():
        if not isinstance(entry, dict):
            raise refusal(where, f"quantized_layers.{name} {shown(entry)}")
        found.setdefault(_algorithm(entry, where), Patterns(where)).add(name)
    return [(patterns, scheme) for scheme, patterns in found.items()]


def modelopt(quant: Mapping[str, Any], where: str) -> StoragePlan:
    """NVIDIA ModelOpt: one algorithm and modules left out, or MIXED_PRECISION with a list."""
    left_out = skipped(quant, where)
    if str(quant.get("quant_algo")).upper() == "MIXED_PRECISION":
        if not quant.get("quantized_layers"):
            if quant.get("config_groups"):
                return compressed_tensors(quant, where)
            raise refusal(where, "MIXED_PRECISION without quantized_layers (hf_quant_config.json)")
        return StoragePlan(None, left_out, own=_listed(quant["quantized_layers"], where))
    return StoragePlan(_algorithm(quant, where), left_out)


Method = Callable[[Mapping[str, Any], str], StoragePlan]
METHODS: Mapping[str, Method] = {
    "fp8": fp8,
    "deepseek-v4-fp8": fp8,
    "fbgemm-fp8": fp8,
    "ptpc-fp8": fp8,
    "w8a8-fp8": fp8,
    "mxfp4": mxfp4,
    "mxfp8": mxfp8,
    "w4afp8": w4afp8,
    "w8a8-int8": w8a8_int8,
    "blockwise-int8": block_int8,
    "awq": awq,
    "awq-marlin": awq,
    "gptq": gptq,
    "gptq-marlin": gptq,
    "auto-round": auto_round,
    "autoround": auto_round,
    "intel/auto-round": auto_round,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "quark": quark,
    "modelopt": modelopt,
    "modelopt-fp4": modelopt,
    "modelopt-mixed": modelopt,
}
"""Values of quant_method, with "-" for "_"."""
