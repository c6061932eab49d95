"""Types of tensors in GGUF files: weights and bytes of one block, scales included.

Numbers and sizes of ggml-org/llama.cpp (ggml/include/ggml.h, gguf-py/gguf/constants.py,
GGML_QUANT_SIZES) and, from 133 on, of ikawrakow/ik_llama.cpp. Types that ik_llama.cpp only makes
while it loads (interleaved `_R4`, `_R8`) have the size of the type they are made from. Types with
one scale per row beside their blocks (IQ2_KS, IQ4_KS and others of ik_llama.cpp) are not here:
the size of their tensors is not a whole number of equal blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgmlType:
    """`name` in lower case; a block of `weights` weights takes `num_bytes`."""

    name: str
    weights: int
    num_bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, block scales included."""
        return 8 * self.num_bytes / self.weights


GGML_TYPES: Mapping[int, GgmlType] = {
    number: GgmlType(name, weights, num_bytes)
    for number, name, weights, num_bytes in (
        (0, "f32", 1, 4),
        (1, "f16", 1, 2),
        (2, "q4_0", 32, 18),
        (3, "q4_1", 32, 20),
        (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24),
        (8, "q8_0", 32, 34),
        (9, "q8_1", 32, 36),
        (10, "q2_k", 256, 84),
        (11, "q3_k", 256, 110),
        (12, "q4_k", 256, 144),
        (13, "q5_k", 256, 176),
        (14, "q6_k", 256, 210),
        (15, "q8_k", 256, 292),
        (16, "iq2_xxs", 256, 66),
        (17, "iq2_xs", 256, 74),
        (18, "iq3_xxs", 256, 98),
        (19, "iq1_s", 256, 50),
        (20, "iq4_nl", 32, 18),
        (21, "iq3_s", 256, 110),
        (22, "iq2_s", 256, 82),
        (23, "iq4_xs", 256, 136),
        (24, "i8", 1, 1),
        (25, "i16", 1, 2),
        (26, "i32", 1, 4),
        (27, "i64", 1, 8),
        (28, "f64", 1, 8),
        (29, "iq1_m", 256, 56),
        (30, "bf16", 1, 2),
        (34, "tq1_0", 256, 54),
        (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17),
        (40, "nvfp4", 64, 36),
        (41, "q1_0", 128, 18),
        (133, "q6_0", 32, 26),
        (137, "iq2_k", 256, 76),
        (138, "iq3_k", 256, 110),
        (139, "iq4_k", 256, 144),
        (140, "iq5_k", 256, 176),
        (141, "iq6_k", 256, 212),
    )
}
GGML_BY_NAME: Mapping[str, GgmlType] = {kind.name: kind for kind in GGML_TYPES.values()}

QUANTISED_BYTES: Mapping[str, float] = {
    name: kind.num_bytes / kind.weights
    for name, kind in GGML_BY_NAME.items()
    if name[0] in "qt" or name.startswith("iq")
}
"""Bytes per weight of the quantised types that other tables do not have."""

CACHE_BYTES: Mapping[str, float] = {
    name: QUANTISED_BYTES[name] for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
}
"""Bytes per element of the quantised KV caches of llama.cpp (--cache-type-k, common/arg.cpp)."""
