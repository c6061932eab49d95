"""Quantisation mixes of llama.cpp (`Q4_K_M` and others): the type of every tensor.

Rules of ggml-org/llama.cpp (src/llama-quant.cpp, llama_tensor_get_type_impl and
tensor_type_fallback), as far as they are fixed by a tensor's kind, layer and shape. Mixes of other
makers (`UD-Q4_K_XL`) follow no published rule: read their file. Types of IQ4_XS and IQ4_NL are
those that quantising with an importance matrix gives, as published files have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from moesim.errors import UnknownNameError
from moesim.model.ggml import GGML_BY_NAME

Kind = Literal["embedding", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_down",
               "experts_down", "experts", "other"]  # fmt: skip

BASE: Mapping[str, str] = {
    "F16": "f16",
    "BF16": "bf16",
    "Q8_0": "q8_0",
    "Q6_K": "q6_k",
    "Q5_K_M": "q5_k",
    "Q5_K_S": "q5_k",
    "Q4_K_M": "q4_k",
    "Q4_K_S": "q4_k",
    "IQ4_XS": "iq4_xs",
    "IQ4_NL": "iq4_nl",
    "Q4_0": "q4_0",
    "Q3_K_L": "q3_k",
    "Q3_K_M": "q3_k",
    "Q3_K_S": "q3_k",
    "Q2_K": "q2_k",
    "MXFP4_MOE": "mxfp4",
}
"""Mixes by name, with the type that most of their tensors have."""
_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
             "iq4_xs": "iq4_nl"}  # fmt: skip
_EIGHT_EXPERTS = 8


def mix_named(name: str) -> str:
    """The mix's name as BASE has it, whatever its case. Raises UnknownNameError."""
    found = {known.casefold(): known for known in BASE}.get(name.casefold())
    if found is None:
        raise UnknownNameError(
            "quantisation mix",
            name[:60],
            BASE,
            f"known: {', '.join(BASE)}; for another, give the .gguf file as the model",
        )
    return found


def type_in_mix(
    mix: str,
    kind: Kind,
    columns: int,
    place: tuple[int, int],
    num_experts: int,
    queries_per_key: int,
    *,
    tied: bool = False,
) -> str:
    """The type of one matrix.

    columns: its contiguous dimension. place: index and number, of layers for feed-forward parts, of
    layers with attention for attention. queries_per_key: query heads for each KV head. tied: the
    embedding is the output too.
    """
    base = BASE[mix]
    if base in ("f16", "bf16"):
        return base
    if kind == "output" or (kind == "embedding" and tied):
        fits = columns % GGML_BY_NAME[base].weights == 0
        wanted = "q6_k" if fits and base not in ("q8_0", "mxfp4") else "q8_0"
    elif mix == "MXFP4_MOE":
        wanted = "mxfp4" if kind in ("experts", "experts_down") else "q8_0"
    else:
        wanted = _wanted(mix, kind, place, num_experts, queries_per_key) or base
    return _fitting(wanted, columns)


def _wanted(
    mix: str, kind: Kind, place: tuple[int, int], num_experts: int, queries_per_key: int
) -> str | None:
    """What the rule of a mix says of a kind, None where it is the mix's base type."""
    index, number = place
    eight = num_experts == _EIGHT_EXPERTS
    if kind in ("attn_k", "attn_v") and eight:
        return "q8_0"
    if kind == "attn_v":
        return _of_values(mix, index, number, queries_per_key)
    if kind in ("ffn_down", "experts_down"):
        return _of_down(mix, index, number)
    if kind != "attn_output":
        return None
    if eight:
        small = mix in ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")
        return "q5_k" if small else None
    return {"Q2_K": "q3_k", "Q3_K_M": "q4_k", "Q3_K_L": "q5_k"}.get(mix)


def _of_values(mix: str, index: int, number: int, queries_per_key: int) -> str | None:
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "q6_k" if _more_bits(index, number) else None
    if mix == "Q4_K_S":
        return "q5_k" if index < 4 else None
    if mix in ("IQ4_NL", "IQ4_XS"):
        return "q5_k" if queries_per_key >= 4 else None
    if mix == "Q3_K_M":
        return "q5_k" if index < 2 else "q4_k"
    if mix == "Q2_K":
        return "q4_k" if queries_per_key >= 4 else "q3_k"
    return "q5_k" if mix == "Q3_K_L" else None


def _of_down(mix: str, index: int, number: int) -> str | None:
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "q6_k" if _more_bits(index, number) else None
    if mix == "Q4_K_S":
        return "q5_k" if index < number // 8 else None
    if mix == "Q3_K_M":
        return "q5_k" if index < number // 16 else "q4_k"
    return {"Q2_K": "q3_k", "Q3_K_L": "q5_k"}.get(mix)


def _more_bits(index: int, number: int) -> bool:
    eighth = number // 8
    return index < eighth or index >= 7 * number // 8 or (index - eighth) % 3 == 2


def _fitting(name: str, columns: int) -> str:
    """The type, or the one that stands in where a row is no whole number of its blocks."""
    if columns % GGML_BY_NAME[name].weights == 0:
        return name
    other = _FALLBACK.get(name, "f16")
    return other if columns % GGML_BY_NAME[other].weights == 0 else "f16"
