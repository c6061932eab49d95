"""Time of one GPU's local experts in one MoE layer: a grouped SwiGLU as a sum over experts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesim.cost.curves import (
    BYTES_PER_US_AT_1_GB_PER_S,
    FLOPS_PER_US_AT_1_TFLOPS,
    Basis,
    Evaluation,
    FloatArray,
    power_mean_max,
)

NUM_MATRICES = 3  # gate, up and down projection of a gated expert
ACTIVATION_BYTES = 2  # rows move as 16-bit values whatever the weights are


@dataclass(frozen=True)
class ExpertGemmModel:
    """Additive cost of the routed experts of one layer on one GPU.

    An expert that receives n > 0 tokens costs

        t(n) = pmax(W / weight_rate, 2 c h i (ceil_tile(n) + half_tokens) / flop_rate; q) + n r

    with W = c h i x bytes per weight, c = 3 matrices (2 for an expert without a gate), h the
    hidden and i the intermediate size, pmax the smooth maximum of exponent q = `sharpness`, and r
    the time to read and write one routed row's activations, (2 h + c i) 16-bit values at
    `row_gb_per_s`. An idle expert costs nothing. A
    layer costs `launch_us` plus the sum, plus `token_gb_per_s`'s share for the final reduction
    over each input token's top-k rows where the kernel does it (`token_overhead_us`).

    The sum over experts is exact for a kernel bound by memory or arithmetic as a whole and
    ignores how thread blocks of several experts pack into the last wave.

    `pad_share`: the share of the rounding up to a tile that costs time (1: all of it). Rows beyond
    an expert's own are computed on zeros, which takes the tile's time but little power.

    `few`: another fit for layers whose mean tokens a slot, idle slots included, are at most
    `few_up_to`, for kernels that choose their tile by that mean, as torch's grouped GEMM does
    (pytorch aten/src/ATen/native/cuda/GroupMM.cu: 64 rows a block up to a mean of 128, then 128,
    two blocks side by side). Such a kernel can take less time for one token more.

    `shape`: (hidden, intermediate) of the only shape that the fit is for, None for any.

    `ranges` has inclusive bounds of `tokens_per_expert` and of `params_per_expert` (3 h i);
    outside them `evaluate` answers with `in_range` False.
    """

    dtype: str
    kernel: str
    weight_bytes_per_param: float
    launch_us: float
    weight_gb_per_s: float
    tflops: float
    half_tokens: float = 0.0
    tile_tokens: int = 1
    sharpness: float = 2.0
    row_gb_per_s: float | None = None
    token_gb_per_s: float | None = None
    eager_launch_us: float | None = None
    pad_share: float = 1.0
    few: ExpertGemmModel | None = None
    few_up_to: float = 0.0
    shape: tuple[int, int] | None = None
    basis: Basis = "measured"
    source: str = ""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    def layer_launch_us(self, *, eager: bool = False) -> float:
        """Cost of a layer before any expert is counted.

        `eager`: launched call by call from the host rather than replayed from a CUDA graph; the
        graph figure is returned where no eager one was measured.
        """
        if eager and self.eager_launch_us is not None:
            return self.eager_launch_us
        return self.launch_us

    def expert_time_us(
        self,
        tokens: npt.ArrayLike,
        hidden: int,
        intermediate: int,
        num_matrices: int = NUM_MATRICES,
        *,
        mean_tokens: npt.ArrayLike | None = None,
    ) -> FloatArray:
        """Time of each expert by itself, launch excluded.

        `tokens`: routed rows of each expert, any shape, fractions allowed; the result has the same
        shape and is 0 where `tokens` is 0. `mean_tokens`: the layer's mean over its slots, which
        broadcasts to `tokens` and picks between `few` and this fit. Where it is None the expert's
        own tokens stand for it, and the time never decreases in them.
        """
        n = np.asarray(tokens, dtype=np.float64)
        time = self._own_time_us(n, hidden, intermediate, num_matrices)
        if self.few is None:
            return time
        few = self.few.expert_time_us(n, hidden, intermediate, num_matrices)
        if mean_tokens is not None:
            mean = np.asarray(mean_tokens, dtype=np.float64)
            return np.where(np.floor(mean) <= self.few_up_to, few, time)
        last = self.few.expert_time_us(self.few_up_to, hidden, intermediate, num_matrices)
        return np.where(n <= self.few_up_to, few, np.maximum(time, last))

    def _own_time_us(
        self, n: FloatArray, hidden: int, intermediate: int, num_matrices: int
    ) -> FloatArray:
        weight_us = np.full_like(
            n,
            num_matrices
            * hidden
            * intermediate
            * self.weight_bytes_per_param
            / (self.weight_gb_per_s * BYTES_PER_US_AT_1_GB_PER_S),
        )
        padded = n
        if self.tile_tokens > 1:
            whole = np.ceil(n / self.tile_tokens) * self.tile_tokens
            padded = n + self.pad_share * (whole - n)
        flops = 2.0 * num_matrices * hidden * intermediate * (padded + self.half_tokens)
        time = power_mean_max(
            weight_us, flops / (self.tflops * FLOPS_PER_US_AT_1_TFLOPS), self.sharpness
        )
        if self.row_gb_per_s is not None:
            row_bytes = ACTIVATION_BYTES * (2 * hidden + num_matrices * intermediate)
            time = time + n * row_bytes / (self.row_gb_per_s * BYTES_PER_US_AT_1_GB_PER_S)
        return np.where(n > 0, time, 0.0)

    def time_table_us(
        self,
        max_tokens: int,
        hidden: int,
        intermediate: int,
        num_matrices: int = NUM_MATRICES,
        *,
        mean_tokens: float | None = None,
    ) -> FloatArray:
        """`expert_time_us` of 0 .. max_tokens tokens, shape `[max_tokens + 1]`, for lookups."""
        return self.expert_time_us(
            np.arange(max_tokens + 1), hidden, intermediate, num_matrices, mean_tokens=mean_tokens
        )

    def token_overhead_us(self, num_tokens: float, top_k: int, hidden: int) -> float:
        """Reduction over the top-k rows of the layer's input tokens, local or not."""
        if self.token_gb_per_s is None:
            return 0.0
        num_bytes = float(num_tokens) * top_k * hidden * ACTIVATION_BYTES
        return num_bytes / (self.token_gb_per_s * BYTES_PER_US_AT_1_GB_PER_S)

    def layer_time_us(
        self, tokens: npt.ArrayLike, hidden: int, intermediate: int, *, eager: bool = False
    ) -> FloatArray:
        """Launch plus the sum over the last axis of `tokens` (`[..., slots]`, idle ones too)."""
        n = np.asarray(tokens, dtype=np.float64)
        mean = n.mean(axis=-1, keepdims=True)
        total = self.expert_time_us(n, hidden, intermediate, mean_tokens=mean).sum(axis=-1)
        return np.asarray(total + self.layer_launch_us(eager=eager), dtype=np.float64)

    def evaluate(self, tokens: npt.ArrayLike, hidden: int, intermediate: int) -> Evaluation:
        """`expert_time_us` with its basis and whether all of it lies in the measured range."""
        n = np.asarray(tokens, dtype=np.float64)
        active = n[n > 0]
        inside = self._within("params_per_expert", float(NUM_MATRICES * hidden * intermediate))
        if active.size:
            inside = inside and self._within("tokens_per_expert", float(active.min()))
            inside = inside and self._within("tokens_per_expert", float(active.max()))
        time = self.expert_time_us(n, hidden, intermediate)
        return Evaluation(time, self.basis, inside, self.source)

    def _within(self, name: str, value: float) -> bool:
        if name not in self.ranges:
            return True
        low, high = self.ranges[name]
        return low <= value <= high
