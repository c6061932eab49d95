"""Bytes per number of every stored, sent and cached type."""

from __future__ import annotations

from collections.abc import Mapping

from moesim.errors import UnknownNameError
from moesim.model.ggml import CACHE_BYTES, QUANTISED_BYTES

TENSOR_CLASSES = ("experts", "attention", "shared", "dense", "latent", "router", "tables", "other")
"""Classes of weights that a checkpoint stores each in its own way: routed experts; attention and
what stands in its place; shared experts; dense feed-forward parts; projections into and out of the
experts' latent space; routers; embedding table and output head; the rest."""

WEIGHT_BYTES: Mapping[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0 + 4 / (128 * 128),
    "mxfp8": 1.0 + 1 / 32,
    "int8": 1.0 + 2 / 128,
    "mxfp4": (4 + 8 / 32) / 8,
    "nvfp4": (4 + 8 / 16) / 8,
    "int4": (4 + 16 / 32) / 8,
    "nf4": (4 + 32 / 64) / 8,
}
"""Bytes per weight with its scales, where a checkpoint does not say otherwise (`ModelSpec.stored`
does): fp8 has one fp32 scale for each 128 x 128 block (DeepSeek-V3 report, arXiv:2412.19437,
section 3.3), mxfp8 and mxfp4 one 8-bit scale for 32 weights (OCP Microscaling Formats v1.0, section
5), nvfp4 one 8-bit scale for 16 (its one fp32 scale a tensor is ignored), int8 one 16-bit scale for
128, int4 one 16-bit scale for 32 (as Kimi-K2.5's config.json), nf4 one fp32 scale for 64 (QLoRA,
arXiv:2305.14314, section 3)."""

TOKEN_BYTES: Mapping[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0 + 4 / 128,
    "nvfp4": (4 + 8 / 16) / 8,
}
"""Bytes per element of a hidden state on the wire: fp8 carries one fp32 scale for 128 channels, as
DeepEP's dispatch (vLLM quantises its input in chunks of 128: DEEPEP_QUANT_BLOCK_SIZE)."""

KV_BYTES: Mapping[str, float] = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
"""Bytes per element of the KV cache; an fp8 cache with one scale a tensor."""


def bytes_per(table: Mapping[str, float], dtype: str) -> float:
    """Bytes per element of `dtype` in one of the tables above, or of a type of GGUF files where
    weights or KV caches may have it; UnknownNameError otherwise."""
    known: Mapping[str, float] = {}
    if table is WEIGHT_BYTES:
        known = QUANTISED_BYTES
    elif table is KV_BYTES:
        known = CACHE_BYTES
    if dtype not in table and dtype not in known:
        raise UnknownNameError("dtype", str(dtype), (*table, *known))
    return table[dtype] if dtype in table else known[dtype]
