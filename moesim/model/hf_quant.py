"""Stored weight types of a Hugging Face model, from `dtype` and `quantization_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesim.errors import FormatError

_FLOATS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_KNOWN = (
    "known: fp8, mxfp4, modelopt FP8 or NVFP4, compressed-tensors fp8, nvfp4 and int4 in groups of "
    "32; remove quantization_config to read the unquantised model"
)


def stored_dtypes(
    config: Mapping[str, Any], outer: Mapping[str, Any], where: str
) -> tuple[str, str]:
    """Types of the routed experts and of the other projections, as WEIGHT_BYTES names them.

    `outer` is the whole file where `config` is its nested text part. Routed experts have the
    quantised type; the rest too, unless the modules left out name an attention projection, as in
    GPT-OSS. Missing `dtype` and `torch_dtype` mean bfloat16. Raises FormatError for a type or
    method that is not known.
    """

    def either(key: str) -> Any:
        value = config.get(key)
        return outer.get(key) if value is None else value

    key = "torch_dtype" if either("dtype") is None else "dtype"
    value = "bfloat16" if either(key) is None else either(key)
    if not isinstance(value, str) or value not in _FLOATS:
        raise FormatError(f"{where}: {key} is {value!r:.60}", "give bfloat16, float16 or float32")
    base = _FLOATS[value]
    quant = either("quantization_config")
    if quant is None:
        return base, base
    if not isinstance(quant, dict):
        raise FormatError(
            f"{where}: quantization_config is not an object", "remove it for unquantised weights"
        )
    expert = _method(quant)
    if expert is None:
        raise FormatError(
            f"{where}: quantization_config.quant_method {quant.get('quant_method')!r:.60} is not "
            "known in this form",
            _KNOWN,
        )
    return expert, base if _keeps_attention(quant) else expert


def _method(quant: Mapping[str, Any]) -> str | None:
    method = quant.get("quant_method")
    if method in ("fp8", "mxfp4"):
        return str(method)
    if method == "modelopt":
        return {"FP8": "fp8", "NVFP4": "nvfp4"}.get(str(quant.get("quant_algo")))
    groups = quant.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, dict) or len(groups) != 1:
        return None
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        return None
    kind, bits, size = weights.get("type"), weights.get("num_bits"), weights.get("group_size")
    if (kind, bits) == ("float", 8):
        return "fp8"
    known = {("int", 4, 32): "int4", ("float", 4, 16): "nvfp4"}
    return next((name for form, name in known.items() if form == (kind, bits, size)), None)


def _keeps_attention(quant: Mapping[str, Any]) -> bool:
    """Whether the modules left out of quantisation name an attention projection."""
    for key in ("modules_to_not_convert", "ignore", "exclude_modules"):
        entries = quant.get(key)
        for entry in entries if isinstance(entries, list) else []:
            text = str(entry)
            if "attn" in text and "norm" not in text and "indexer" not in text:
                return True
    return False
