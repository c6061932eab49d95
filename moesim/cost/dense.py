"""Time of what is not routed: dense GEMMs, attention, and whole attention layers, per home rank.

Everything here is one rank's own work in one layer: no tensor parallelism, no communication, no
norms, rotary embedding, router or sampling. Batches are of equal lengths; for unequal ones pass the
mean context (decode) or sum over lengths (prefill).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim.choices import Phase as Phase
from moesim.cost.curves import (
    BYTES_PER_US_AT_1_GB_PER_S,
    FLOPS_PER_US_AT_1_TFLOPS,
    Basis,
    power_mean_max,
    weakest,
)
from moesim.errors import UnknownNameError
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.model.attention import AttentionSpec

KV_ELEMENT_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
GEMM_SHARPNESS = 2.0


@dataclass(frozen=True)
class GemmModel:
    """`[m, k] x [k, n]`: launch + pmax(pmax(bytes / rate, 2 m n k / flop rate), k / k_per_us),
    plus m k / row rate where activations are quantised first.

    The k term is the depth of one output tile's loop, which no parallelism shortens.
    """

    dtype: str
    weight_bytes_per_param: float
    launch_us: float
    gb_per_s: float
    tflops: float
    sharpness: float
    k_per_us: float
    k_sharpness: float = 1.0
    row_gb_per_s: float | None = None
    basis: Basis = "measured"
    source: str = ""

    def time_us(self, m: npt.ArrayLike, n: npt.ArrayLike, k: npt.ArrayLike) -> FloatArray:
        """Microseconds, in the broadcast shape of the three; 0 where one of them is 0."""
        rows, cols, depth = (np.asarray(x, dtype=np.float64) for x in (m, n, k))
        weights = cols * depth * self.weight_bytes_per_param
        moved = weights + rows * depth * self.weight_bytes_per_param + 2.0 * rows * cols
        memory = moved / (self.gb_per_s * BYTES_PER_US_AT_1_GB_PER_S)
        flops = 2.0 * rows * cols * depth / (self.tflops * FLOPS_PER_US_AT_1_TFLOPS)
        bound = power_mean_max(memory, flops, self.sharpness)
        loop = np.broadcast_to(depth / self.k_per_us, bound.shape)
        time = self.launch_us + power_mean_max(bound, loop, self.k_sharpness)
        if self.row_gb_per_s is not None:
            time = time + rows * depth / (self.row_gb_per_s * BYTES_PER_US_AT_1_GB_PER_S)
        return np.where(flops > 0, time, 0.0)


@dataclass(frozen=True)
class AttentionKernel:
    """Grouped-query attention over a cache (decode) or over the prompt itself (prefill, causal).

    launch + pmax(bytes / rate, flops / flop rate). Decode reads the keys and values of context +
    `extra_tokens`, an offset that stands for the fixed work a sequence. Prefill reads and writes
    16-bit rows once; a window limits the keys of either.
    """

    phase: Phase
    head_dim: int
    kv_dtype: str
    launch_us: float
    gb_per_s: float
    tflops: float
    sharpness: float
    extra_tokens: float = 0.0
    basis: Basis = "measured"
    source: str = ""

    def time_us(
        self,
        batch: npt.ArrayLike,
        tokens: npt.ArrayLike,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        window: int = 0,
    ) -> FloatArray:
        """Microseconds for `batch` sequences of `tokens` context (decode) or prompt tokens.

        `head_dim` other than the kernel's own scales bytes and flops. `window` 0 means none.
        """
        count = np.asarray(batch, dtype=np.float64)
        length = np.asarray(tokens, dtype=np.float64)
        width = self.head_dim if head_dim is None else head_dim
        if self.phase == "decode":
            seen = (np.minimum(length, window) if window else length) + self.extra_tokens
            moved = 2.0 * count * num_kv_heads * width * seen * KV_ELEMENT_BYTES[self.kv_dtype]
            pairs = seen
        else:
            moved = 4.0 * count * length * width * (num_heads + num_kv_heads)
            pairs = causal_pairs(length, window)
        flops = 4.0 * count * num_heads * width * pairs
        time = self.launch_us + power_mean_max(
            moved / (self.gb_per_s * BYTES_PER_US_AT_1_GB_PER_S),
            flops / (self.tflops * FLOPS_PER_US_AT_1_TFLOPS),
            self.sharpness,
        )
        return np.where(count * length > 0, time, 0.0)


@dataclass(frozen=True)
class MlaModule:
    """A whole multi-head latent attention layer: projections and attention.

    launch + pmax(W / weight rate, 2 rows W / dense flop rate) + pmax(attention bytes / kv rate,
    attention flops / attention flop rate), W the layer's weights. Decode attends in the latent
    space, 2 heads (2 latent + rope) operations a cached token; prefill expands keys and values,
    2 heads (nope + rope + value) operations a pair.
    """

    phase: Phase
    dense_dtype: str
    kv_dtype: str
    weight_bytes_per_param: float
    launch_us: float
    weight_gb_per_s: float
    dense_tflops: float
    kv_gb_per_s: float
    attention_tflops: float
    sharpness: float
    extra_tokens: float = 0.0
    basis: Basis = "measured"
    source: str = ""

    def time_us(
        self, batch: npt.ArrayLike, tokens: npt.ArrayLike, spec: AttentionSpec, hidden_size: int
    ) -> FloatArray:
        """Microseconds of one layer for `batch` sequences of `tokens` context or prompt tokens."""
        count = np.asarray(batch, dtype=np.float64)
        length = np.asarray(tokens, dtype=np.float64)
        heads, latent, rope = spec.num_heads, spec.kv_lora_rank, spec.qk_rope_head_dim
        if self.phase == "decode":
            rows = np.broadcast_to(count, np.broadcast(count, length).shape)
            seen = count * (length + self.extra_tokens)
            moved = seen * (latent + rope) * KV_ELEMENT_BYTES[self.kv_dtype]
            flops = 2.0 * heads * seen * (2 * latent + rope)
        else:
            rows = count * length
            width = spec.qk_nope_head_dim + rope + spec.v_head_dim
            moved = rows * (4.0 * heads * width + 4.0 * hidden_size)
            flops = 2.0 * count * heads * causal_pairs(length, 0) * width
        weights = float(spec.layer_params(hidden_size))
        weight_us = weights * self.weight_bytes_per_param / (self.weight_gb_per_s * 1e3)
        dense_us = 2.0 * rows * weights / (self.dense_tflops * FLOPS_PER_US_AT_1_TFLOPS)
        projections = power_mean_max(np.full_like(dense_us, weight_us), dense_us, GEMM_SHARPNESS)
        attention = power_mean_max(
            moved / (self.kv_gb_per_s * BYTES_PER_US_AT_1_GB_PER_S),
            flops / (self.attention_tflops * FLOPS_PER_US_AT_1_TFLOPS),
            self.sharpness,
        )
        return np.where(rows > 0, self.launch_us + projections + attention, 0.0)


@dataclass(frozen=True)
class IndexedModule:
    """What a latent attention layer takes where an indexer chooses its keys (DeepSeek-V3.2,
    arXiv:2512.02556, section 2.1), beside its projections.

    Decode: a latent attention layer's time for the chosen keys, and for the indexer launch +
    2 index heads x width operations per cached token / index rate. Prefill of more tokens than are
    chosen: launch + row_us per row + the same operations per pair / index rate + attention in the
    latent space over all chosen keys, 2 heads (2 latent + rope) operations each, heads padded to
    `min_heads` / attention rate; shorter prompts see all keys, as a latent attention layer does.
    """

    phase: Phase
    kv_dtype: str
    launch_us: float
    index_tflops: float
    attention_tflops: float | None = None
    row_us: float = 0.0
    min_heads: int = 1
    basis: Basis = "measured"
    source: str = ""

    def index_us(self, spec: AttentionSpec) -> float:
        """Microseconds of one query and one key."""
        flops = 2.0 * spec.index_heads * spec.index_head_dim
        return flops / (self.index_tflops * FLOPS_PER_US_AT_1_TFLOPS)

    def chosen_us(self, spec: AttentionSpec, heads: int) -> float:
        """Microseconds of a prompt's row with the keys that it attends to."""
        width = 2 * spec.kv_lora_rank + spec.qk_rope_head_dim
        flops = 2.0 * max(heads, self.min_heads) * width * spec.chosen_keys
        rate = self.attention_tflops or self.index_tflops
        return self.row_us + flops / (rate * FLOPS_PER_US_AT_1_TFLOPS)


def causal_pairs(length: npt.ArrayLike, window: int) -> FloatArray:
    """Query-key pairs of a causal prompt; with a window w each query sees at most w keys."""
    n = np.asarray(length, dtype=np.float64)
    seen = np.minimum(n, window) if window else n
    return np.asarray(seen * (seen + 1) / 2 + (n - seen) * seen, dtype=np.float64)


@dataclass(frozen=True)
class DenseModel:
    """All dense models of one GPU type, and whole attention layers from them.

    Keys: `gemms` by dtype; `attention` by (phase, head_dim, kv_dtype); `mla` by (phase, dense
    dtype, kv dtype); `indexed` by (phase, kv dtype). A dtype without an entry is
    answered by "bf16", a head_dim by the nearest.
    """

    gemms: Mapping[str, GemmModel] = field(default_factory=dict)
    attention: Mapping[tuple[str, int, str], AttentionKernel] = field(default_factory=dict)
    mla: Mapping[tuple[str, str, str], MlaModule] = field(default_factory=dict)
    indexed: Mapping[tuple[str, str], IndexedModule] = field(default_factory=dict)

    @property
    def basis(self) -> Basis:
        """The weakest basis of all entries."""
        bases: list[Basis] = [model.basis for model in self.gemms.values()]
        bases += [model.basis for model in self.attention.values()]
        bases += [model.basis for model in self.mla.values()]
        return weakest(*bases) if bases else "assumed"

    def gemm(self, dtype: str) -> GemmModel:
        """The GEMM of weights of `dtype`. Raises UnknownNameError where there is none at all."""
        for name in (dtype, "bf16"):
            if name in self.gemms:
                return self.gemms[name]
        raise UnknownNameError("gemm dtype", dtype, self.gemms)

    def gemm_us(
        self, m: npt.ArrayLike, n: npt.ArrayLike, k: npt.ArrayLike, dtype: str = "bf16"
    ) -> FloatArray:
        """`gemm(dtype).time_us(m, n, k)`."""
        return self.gemm(dtype).time_us(m, n, k)

    def attention_kernel(self, phase: Phase, head_dim: int, kv_dtype: str) -> AttentionKernel:
        """The kernel of the nearest measured head size. Raises UnknownNameError without any."""
        for dtype in (kv_dtype, "bf16"):
            sizes = [key[1] for key in self.attention if key[0] == phase and key[2] == dtype]
            if sizes:
                near = min(sizes, key=lambda size: (abs(size - head_dim), size))
                return self.attention[phase, near, dtype]
        raise UnknownNameError(f"{phase} attention dtype", kv_dtype, ())

    def mla_module(self, phase: Phase, dense_dtype: str, kv_dtype: str) -> MlaModule:
        """The latent-attention layer. Raises UnknownNameError where none was given."""
        for dense in (dense_dtype, "bf16"):
            for kv in (kv_dtype, "bf16"):
                if (phase, dense, kv) in self.mla:
                    return self.mla[phase, dense, kv]
        raise UnknownNameError(f"{phase} latent attention dtype", dense_dtype, ())

    def indexed_module(self, phase: Phase, kv_dtype: str) -> IndexedModule | None:
        """What an indexer changes; None where nobody measured it."""
        return self.indexed.get((phase, kv_dtype)) or self.indexed.get((phase, "bf16"))

    def decode_us(
        self,
        batch: npt.ArrayLike,
        context: npt.ArrayLike,
        spec: AttentionSpec,
        hidden_size: int,
        *,
        dense_dtype: str = "bf16",
        kv_dtype: str = "bf16",
        window: int = 0,
    ) -> FloatArray:
        """One attention layer of a decode step: `batch` sequences with `context` cached tokens.

        Projections included. `window`: keys a query sees where the layer is windowed, else 0.
        """
        return self._layer(
            "decode", batch, context, spec, hidden_size, dense_dtype, kv_dtype, window
        )

    def prefill_us(
        self,
        batch: npt.ArrayLike,
        length: npt.ArrayLike,
        spec: AttentionSpec,
        hidden_size: int,
        *,
        dense_dtype: str = "bf16",
        kv_dtype: str = "bf16",
        window: int = 0,
    ) -> FloatArray:
        """One attention layer of a prefill step: `batch` whole prompts of `length` tokens."""
        return self._layer(
            "prefill", batch, length, spec, hidden_size, dense_dtype, kv_dtype, window
        )

    def _layer(
        self,
        phase: Phase,
        batch: npt.ArrayLike,
        tokens: npt.ArrayLike,
        spec: AttentionSpec,
        hidden_size: int,
        dense_dtype: str,
        kv_dtype: str,
        window: int,
    ) -> FloatArray:
        if spec.kind == "mla":
            module = self.mla_module(phase, dense_dtype, kv_dtype)
            return module.time_us(batch, tokens, spec, hidden_size)
        count = np.asarray(batch, dtype=np.float64)
        rows = count if phase == "decode" else count * np.asarray(tokens, dtype=np.float64)
        gemm = self.gemm(dense_dtype)
        heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.head_dim
        qkv = gemm.time_us(rows, (heads + 2 * kv_heads) * width, hidden_size)
        out = gemm.time_us(rows, hidden_size, heads * width)
        kernel = self.attention_kernel(phase, width, kv_dtype)
        inner = kernel.time_us(batch, tokens, heads, kv_heads, head_dim=width, window=window)
        return np.asarray(qkv + inner + out, dtype=np.float64)
