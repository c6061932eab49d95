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
    power_mean_max,
)
from moesim.cost.tile_waves import Tile, TileWaves
from moesim.types import FloatArray

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

    `waves`: a kernel whose waves of thread blocks are known instead. A wave of w tiles
    (`waves.at_once`) of r rows and s columns, of a GEMM of depth k, takes
    pmax(w s k x bytes per weight / weight_rate, 2 w r s k / flop_rate; q); an expert of n tokens
    has ceil(n / r) rows of tiles in each of its two GEMMs, c - 1 matrices wide and one. The tile
    depends on the layer's mean tokens a
    slot, idle slots included, so such a kernel can take less time for one token more; and waves are
    a layer's, not an expert's: `slots_time_us` counts them, a sum of `expert_time_us` has their
    fractions. `tile_tokens`, `half_tokens` and `token_gb_per_s` have no part in it.

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
    waves: TileWaves | None = None
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
    ) -> FloatArray:
        """Time of each expert by itself, launch excluded.

        `tokens`: routed rows of each expert, any shape, fractions allowed; the result has the same
        shape and is 0 where `tokens` is 0. It never decreases in them: of a kernel with `waves` the
        expert's own tokens choose the tile, and every last tile counts as half full.
        """
        n = np.asarray(tokens, dtype=np.float64)
        sizes = (hidden, intermediate, num_matrices)
        if self.waves is not None:
            time = self._tiled_time_us(n, sizes, self.waves)
        else:
            time = self._plain_time_us(n, sizes)
        return np.where(n > 0, time + self._rows_us(n, sizes), 0.0)

    def slots_time_us(
        self,
        tokens: npt.ArrayLike,
        hidden: int,
        intermediate: int,
        num_matrices: int = NUM_MATRICES,
        *,
        mean_tokens: npt.ArrayLike | None = None,
    ) -> FloatArray:
        """Time of all experts of a layer on one GPU, launch excluded: over the last axis of
        `tokens` [..., slots], idle slots too. With `waves` the last wave is counted as such.
        `mean_tokens` [...]: where `tokens` has padding; default the mean of the last axis."""
        n = np.asarray(tokens, dtype=np.float64)
        mean = n.mean(axis=-1) if mean_tokens is None else np.asarray(mean_tokens, np.float64)
        if self.waves is None:
            return np.asarray(
                self.expert_time_us(n, hidden, intermediate, num_matrices).sum(axis=-1), np.float64
            )
        served = n.sum(axis=-1)
        time = np.zeros_like(served)
        for tile, taken in self.waves.tiles_by_mean(mean):
            row_tiles = np.ceil(n / tile.rows).sum(axis=-1)
            empty = 1.0 - served / np.maximum(row_tiles * tile.rows, 1.0)
            own = np.zeros_like(served)
            for columns, depth in _gemms(hidden, intermediate, num_matrices):
                waves = self.waves.waves(row_tiles, tile, columns)
                own += self.waves.counted(waves) * self._wave_us(self.waves, tile, depth)
            time = np.where(taken, own * (1.0 + tile.empty_adds * empty), time)
        return time + self._rows_us(served, (hidden, intermediate, num_matrices))

    def _plain_time_us(self, n: FloatArray, sizes: tuple[int, int, int]) -> FloatArray:
        hidden, intermediate, num_matrices = sizes
        params = num_matrices * hidden * intermediate
        padded = np.ceil(n / self.tile_tokens) * self.tile_tokens if self.tile_tokens > 1 else n
        return self._bound_us(
            np.full_like(n, params * self.weight_bytes_per_param),
            2.0 * params * (padded + self.half_tokens),
        )

    def _tiled_time_us(
        self, n: FloatArray, sizes: tuple[int, int, int], waves: TileWaves
    ) -> FloatArray:
        time, least = np.zeros_like(n), 0.0
        for tile, taken in waves.tiles_by_mean(n):
            row_us = sum(
                float(waves.waves(1.0, tile, columns)) * self._wave_us(waves, tile, depth)
                for columns, depth in _gemms(*sizes)
            )
            added = 0.5 * tile.empty_adds
            each = row_us * (np.ceil(n / tile.rows) + added)
            time = np.where(taken, np.maximum(each, least), time)
            if tile.up_to_mean is not None:
                least = max(least, row_us * (np.ceil(tile.up_to_mean / tile.rows) + added))
        return time

    def _wave_us(self, waves: TileWaves, tile: Tile, depth: int) -> float:
        """Time of one full wave of tiles of a GEMM of this depth."""
        weights = float(waves.at_once * tile.columns * depth)
        bytes_read = np.asarray(weights * self.weight_bytes_per_param)
        return float(self._bound_us(bytes_read, np.asarray(2.0 * tile.rows * weights)))

    def _bound_us(self, num_bytes: FloatArray, flops: FloatArray) -> FloatArray:
        return power_mean_max(
            num_bytes / (self.weight_gb_per_s * BYTES_PER_US_AT_1_GB_PER_S),
            flops / (self.tflops * FLOPS_PER_US_AT_1_TFLOPS),
            self.sharpness,
        )

    def _rows_us(self, n: FloatArray, sizes: tuple[int, int, int]) -> FloatArray:
        """Activations of `n` rows read and written."""
        if self.row_gb_per_s is None:
            return np.zeros_like(n)
        hidden, intermediate, num_matrices = sizes
        row_bytes = ACTIVATION_BYTES * (2 * hidden + num_matrices * intermediate)
        return n * row_bytes / (self.row_gb_per_s * BYTES_PER_US_AT_1_GB_PER_S)

    def time_table_us(
        self,
        max_tokens: int,
        hidden: int,
        intermediate: int,
        num_matrices: int = NUM_MATRICES,
    ) -> FloatArray:
        """`expert_time_us` of 0 .. max_tokens tokens, shape `[max_tokens + 1]`, for lookups."""
        return self.expert_time_us(np.arange(max_tokens + 1), hidden, intermediate, num_matrices)

    def token_overhead_us(self, num_tokens: float, top_k: int, hidden: int) -> float:
        """Reduction over the top-k rows of the layer's input tokens, local or not."""
        if self.token_gb_per_s is None:
            return 0.0
        num_bytes = float(num_tokens) * top_k * hidden * ACTIVATION_BYTES
        return num_bytes / (self.token_gb_per_s * BYTES_PER_US_AT_1_GB_PER_S)

    def layer_time_us(
        self, tokens: npt.ArrayLike, hidden: int, intermediate: int, *, eager: bool = False
    ) -> FloatArray:
        """Launch plus `slots_time_us`."""
        total = self.slots_time_us(tokens, hidden, intermediate)
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


def _gemms(hidden: int, intermediate: int, num_matrices: int) -> tuple[tuple[int, int], ...]:
    """(columns, depth) of an expert's two GEMMs."""
    return ((num_matrices - 1) * intermediate, hidden), (hidden, intermediate)
