"""Sizes of the routed experts that are replayed, as JSON so that no YAML reader is needed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesim.errors import FormatError, InputError, UnknownNameError

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
NUM_MATRICES = 3
MAX_WIDTH = 1 << 17
MAX_EXPERTS = 1 << 15


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """One MoE layer's routed experts: SwiGLU with gate, up and down projections.

    hidden_size h and moe_intermediate_size i as in a Hugging Face config; an expert has 3 h i
    weights of `dtype` (bf16, fp16 or fp32). Ignored: biases, shared experts, quantised weights.
    """

    name: str
    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        limits = {
            "hidden_size": MAX_WIDTH,
            "moe_intermediate_size": MAX_WIDTH,
            "num_experts": MAX_EXPERTS,
            "top_k": MAX_EXPERTS,
        }
        for field, high in limits.items():
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= high:
                raise FormatError(
                    f"model {self.name!r:.60}: {field} is {value!r:.40}",
                    f"give a whole number from 1 to {high}",
                )
        if self.top_k > self.num_experts:
            raise FormatError(
                f"model {self.name!r:.60}: top_k {self.top_k} exceeds {self.num_experts} experts",
                "give the number of experts that each token chooses",
            )
        if self.dtype not in DTYPE_BYTES:
            raise UnknownNameError("dtype", str(self.dtype), DTYPE_BYTES)

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return NUM_MATRICES * self.hidden_size * self.moe_intermediate_size * self.element_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self.hidden_size * self.element_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_shape(raw: Any) -> ExpertShape:
    """Build a shape from parsed JSON; FormatError names a field that is missing or unknown."""
    if not isinstance(raw, dict):
        raise FormatError("the model shape is not a JSON object", _REMEDY)
    fields = {"name", "hidden_size", "moe_intermediate_size", "num_experts", "top_k", "dtype"}
    unknown = sorted(set(raw) - fields)
    missing = sorted(fields - {"name", "dtype"} - set(raw))
    if unknown or missing:
        what = f"unknown field {unknown[0]!r:.40}" if unknown else f"field {missing[0]} is missing"
        raise FormatError(f"model shape: {what}", _REMEDY)
    name, dtype = raw.get("name", "model"), raw.get("dtype", "bf16")
    if not isinstance(name, str) or not isinstance(dtype, str):
        raise FormatError("model shape: name and dtype must be text", _REMEDY)
    return ExpertShape(
        name=name,
        dtype=dtype,
        **{f: raw[f] for f in fields - {"name", "dtype"}},
    )


def load_shape(text: str) -> ExpertShape:
    """Read a shape from JSON text (starting with a brace) or from a JSON file."""
    source = text
    if not text.lstrip().startswith("{"):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read model shape {text}: {error}", _REMEDY) from None
    try:
        raw = json.loads(source)
    except (ValueError, RecursionError):
        raise FormatError("the model shape is not JSON", _REMEDY) from None
    return parse_shape(raw)


_REMEDY = (
    'give {"name": "olmoe", "hidden_size": 2048, "moe_intermediate_size": 1024,'
    ' "num_experts": 64, "top_k": 8, "dtype": "bf16"}, inline or as a file'
)
