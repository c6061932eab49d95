"""Schemes of stored weights, and plans of what is stored by which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesim.errors import FormatError
from moesim.model.dtypes import WEIGHT_BYTES
from moesim.model.hf.keys import shown
from moesim.model.hf.patterns import Patterns
from moesim.model.hf.tensors import Named

READ = (
    "auto-round", "awq", "bitsandbytes", "blockwise-int8", "compressed-tensors", "fbgemm-fp8",
    "fp8", "gptq", "modelopt", "mxfp4", "mxfp8", "ptpc-fp8", "quark", "w4afp8", "w8a8-fp8",
    "w8a8-int8",
)  # fmt: skip
"""Methods that are read, as quant_method names them with "-" for "_"; other spellings left out."""
SKIP_KEYS = (
    "modules_to_not_convert",
    "ignore",
    "ignored_layers",
    "exclude_modules",
    "exclude",
    "exclude_layers",
    "llm_int8_skip_modules",
)
_REFUSED = "no engine that moesim knows serves it, or its sizes are not known"


@dataclass(frozen=True)
class Scheme:
    """How weights are stored: the type that kernels know, and bytes per weight with scales."""

    label: str
    bytes_per_weight: float


@dataclass
class StoragePlan:
    """What is stored how. In this order: `skipped` keeps its 16 bits, the first of `own` that names
    a tensor gives its scheme, routed experts have `experts`, all other matrices `default` (None:
    16 bits). Tables and routers keep 16 bits unless `own` names them, or `head` for the head."""

    default: Scheme | None
    skipped: Patterns = field(default_factory=lambda: Patterns(""))
    own: list[tuple[Patterns, Scheme | None]] = field(default_factory=list)
    experts: Scheme | None = None
    only_experts: bool = False
    only: Patterns | None = None
    head: bool = False
    notes: list[str] = field(default_factory=list)

    def scheme(self, tensor: Named) -> Scheme | None:
        """How a tensor is stored; None: in the file's 16 bits."""
        if self.skipped.covers(tensor):
            return None
        for patterns, scheme in self.own:
            if patterns.covers(tensor):
                return scheme
        if not tensor.quantised:
            head = self.head and "lm_head" in tensor.names
            return self.default if head else None
        if tensor.tensor_class == "experts" and self.experts is not None:
            return self.experts
        if self.only_experts and tensor.tensor_class != "experts":
            return None
        if self.only is not None and not self.only.covers(tensor):
            return None
        return self.default

    def unused(self, num_layers: int) -> list[str]:
        """Entries that name nothing known."""
        out = self.skipped.unused(num_layers)
        for patterns, _ in self.own:
            out += patterns.unused(num_layers)
        return out


def refusal(where: str, what: str) -> FormatError:
    """The error for a method or form that is not read."""
    return FormatError(
        f"{where}: quantization_config: {what} is not read: {_REFUSED}",
        f"methods that are read: {', '.join(READ)}; docs/models.md describes them",
    )


def skipped(quant: Mapping[str, Any], where: str) -> Patterns:
    """Modules that keep 16 bits, under whichever key."""
    found: list[object] = []
    for key in SKIP_KEYS:
        value = quant.get(key)
        if value is None:
            continue
        if not isinstance(value, list):
            raise FormatError(
                f"{where}: quantization_config.{key} is {shown(value)}", "it must be a list"
            )
        found += value
    return Patterns.of(found, where)


def weight_bits(quant: Mapping[str, Any], where: str, key: str = "bits") -> int:
    value = quant.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value not in (2, 3, 4, 8, 16):
        raise refusal(where, f"{key} {shown(value)}")
    if value in (2, 3):
        raise refusal(where, f"{value}-bit weights")
    return value


def group_size(value: object, where: str) -> int:
    """Weights per scale; 0: one scale a channel or tensor."""
    if value in (None, -1, 0):
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise refusal(where, f"group_size {shown(value)}")
    return value


def integer(bits: int, group: int, *, zeros: bool, scale_bits: int = 16) -> Scheme:
    """Integers with a scale a group, and with `zeros` a zero point of as many bits."""
    extra = (scale_bits + (bits if zeros else 0)) / group if group else 0.0
    return Scheme("int8" if bits == 8 else "int4", (bits + extra) / 8)


FP8_BLOCK = Scheme("fp8", WEIGHT_BYTES["fp8"])
FP8 = Scheme("fp8", 1.0)
MXFP8 = Scheme("mxfp8", WEIGHT_BYTES["mxfp8"])
MXFP4 = Scheme("mxfp4", WEIGHT_BYTES["mxfp4"])
NVFP4 = Scheme("nvfp4", WEIGHT_BYTES["nvfp4"])
INT8 = Scheme("int8", 1.0)
