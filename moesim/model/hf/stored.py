"""How a checkpoint stores its weights: bytes per weight by class, from `dtype`, `expert_dtype` and
`quantization_config`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesim.errors import FormatError
from moesim.model.dtypes import WEIGHT_BYTES
from moesim.model.hf.keys import Keys, printable, shown
from moesim.model.hf.methods import METHODS
from moesim.model.hf.schemes import Scheme, StoragePlan, refusal
from moesim.model.hf.tensors import Named
from moesim.model.spec import ModelSpec

_FLOATS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16"}
_KV_CACHE = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_config", "kv_cache_dtype")
_TELLING = re.compile(
    r"layer|(?<!nontext_)module(?!s_to_fuse|_name)|expert|ignore|exclude|skip|keep|convert"
)
_WIDE = ("router", "tables", "other")


@dataclass(frozen=True)
class Stored:
    """Types of the routed experts and of most other projections, and bytes per weight of the
    classes for which these do not say it."""

    expert_dtype: str
    dense_dtype: str
    by_class: tuple[tuple[str, float], ...] = ()
    notes: list[str] = field(default_factory=list)


def stored_types(keys: Keys, outer: Keys, spec: ModelSpec, tensors: list[Named]) -> Stored:
    """Read the stored types of a file whose shapes are `spec` and matrices `tensors`.

    Missing `dtype` and `torch_dtype` mean bfloat16. Scales of one number a channel or tensor are
    left out: under 0.1%. Raises FormatError for a type or method that is not known, by its name.
    """
    base = _float_type(keys, outer)
    quant = next(
        (k.get("quantization_config") for k in (keys, outer) if k.has("quantization_config")), None
    )
    plan = StoragePlan(default=None)
    if quant is not None:
        if not isinstance(quant, dict) or not quant:
            raise FormatError(
                f"{keys.where}: quantization_config is {shown(quant)}, not an object with a method",
                "take the config.json that the checkpoint came with",
            )
        plan = _plan(quant, keys.where)
    expert_type = keys.get("expert_dtype") or outer.get("expert_dtype")
    if expert_type is not None:
        plan = _own_experts(plan, expert_type, keys)
    return _averaged(plan, base, spec, tensors, keys.where)


def _float_type(keys: Keys, outer: Keys) -> str:
    for each in (keys, outer):
        for name in ("dtype", "torch_dtype"):
            value = each.get(name)
            if value is None:
                continue
            text = value.removeprefix("torch.") if isinstance(value, str) else value
            if not isinstance(text, str) or text not in _FLOATS:
                raise FormatError(
                    f"{each.where}: {name} is {shown(value)}",
                    f"known: {', '.join(_FLOATS)}; quantised weights are told by "
                    "quantization_config",
                )
            return _FLOATS[text]
    return "bf16"


def _plan(quant: Mapping[str, Any], where: str) -> StoragePlan:
    method = quant.get("quant_method")
    if method is None and "quant_algo" in quant:
        method = "modelopt"
    name = method.replace("_", "-").lower() if isinstance(method, str) else ""
    if name not in METHODS:
        raise refusal(where, f"quant_method {shown(method)}")
    inner = quant.get("quantization")
    read = _Read({**quant, **inner} if isinstance(inner, dict) else quant)
    plan = METHODS[name](read, where)
    left = [key for key in read if key not in read.asked and _TELLING.search(key) and read[key]]
    if left:
        what = ", ".join(f"{printable(key, 60)} {shown(read[key])}" for key in left[:4])
        plan.notes.append(f"quantization_config: not understood, and not counted: {what}")
    if any(read.get(key) for key in _KV_CACHE):
        plan.notes.append("made for a KV cache of fewer bits than 16: `kv_dtype` chooses it")
    return plan


class _Read(dict[str, Any]):
    """A mapping that remembers the keys that were asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        self.asked.add(key)
        return super().get(key, default)


def _own_experts(plan: StoragePlan, value: object, keys: Keys) -> StoragePlan:
    """DeepSeek-V4's expert_dtype: fp4 in groups of 32, or fp8 like the rest."""
    known = {"fp4": "mxfp4", "mxfp4": "mxfp4", "fp8": "fp8", "nvfp4": "nvfp4", "bf16": "bf16"}
    if not isinstance(value, str) or value not in known:
        raise keys.error(f"expert_dtype is {shown(value)}", f"known: {', '.join(known)}")
    if plan.experts is None and plan.default is not None and known[value] != "fp8":
        plan.experts = Scheme(known[value], WEIGHT_BYTES[known[value]])
    return plan


def _averaged(
    plan: StoragePlan, base: str, spec: ModelSpec, tensors: list[Named], where: str
) -> Stored:
    params: dict[str, float] = {}
    total: dict[str, float] = {}
    labels: dict[str, dict[str, float]] = {}
    own = Scheme(base, WEIGHT_BYTES[base])
    for tensor in tensors:
        scheme = plan.scheme(tensor) or own
        name = tensor.tensor_class
        params[name] = params.get(name, 0) + tensor.params
        total[name] = total.get(name, 0) + tensor.params * scheme.bytes_per_weight
        group = "experts" if name == "experts" else "rest" if name not in _WIDE else "wide"
        of_group = labels.setdefault(group, {})
        of_group[scheme.label] = of_group.get(scheme.label, 0) + tensor.params
    expert = _most(labels.get("experts", {}), base)
    dense = _most(labels.get("rest", {}), base)
    plain = {name: WEIGHT_BYTES[expert if name == "experts" else dense] for name in params}
    for name in _WIDE:
        plain[name] = max(2.0, WEIGHT_BYTES[dense])
    by_class = tuple(
        (name, round(total[name] / count, 9))
        for name, count in params.items()
        if count and abs(total[name] / count - plain[name]) > 1e-9
    )
    notes = list(plan.notes)
    unused = list(plan.unused(spec.num_hidden_layers))
    if unused:
        notes.append(
            f"{len(unused)} entries of quantization_config name modules that are not known, such "
            f"as {unused[0][:60]!r}: check what is quantised"
        )
    return Stored(expert, dense, by_class, notes)


def _most(weights: Mapping[str, float], base: str) -> str:
    return max(weights, key=lambda label: weights[label]) if weights else base
