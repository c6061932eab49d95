"""Fit of a grouped GEMM whose waves of thread blocks are known: torch's on Hopper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moesim.cost.expert_gemm import NUM_MATRICES, ExpertGemmModel
from moesim.cost.fitting import robust_fit, round_significant
from moesim.cost.tile_waves import Tile, TileWaves
from moesim.types import FloatArray

SMALL = Tile(rows=128, columns=128, up_to_mean=128.0)
LARGE = Tile(rows=256, columns=256)
BLOCKS_A_CLUSTER = 2
"""torch's grouped GEMM on Hopper: blocks of 64 x 128 up to a mean of 128 tokens per slot, then of
128 x 256, in clusters of two along the rows, one block a multiprocessor
(pytorch aten/src/ATen/native/cuda/GroupMM.cu @06c0cf0)."""

SHARPNESS = 64.0
MIN_CASES = 6
_FREE = 1e6  # GB/s: a row rate beyond this is no bound at all


@dataclass(frozen=True, slots=True, eq=False)
class TileCases:
    """Measured layers: tokens [C, S] of every slot (0: idle), num_slots [C] (the columns beyond are
    padding), hidden and intermediate [C], times_us [C]."""

    tokens: FloatArray
    num_slots: FloatArray
    hidden: FloatArray
    intermediate: FloatArray
    times_us: FloatArray

    @classmethod
    def of(
        cls,
        counts: Sequence[Sequence[int]],
        hidden: Sequence[int],
        intermediate: Sequence[int],
        times_us: Sequence[float],
    ) -> TileCases:
        """From the tokens of every slot of each case."""
        tokens = np.zeros((len(counts), max(len(row) for row in counts)))
        for i, row in enumerate(counts):
            tokens[i, : len(row)] = row
        return cls(
            tokens,
            np.array([len(row) for row in counts], np.float64),
            np.asarray(hidden, np.float64),
            np.asarray(intermediate, np.float64),
            np.asarray(times_us, np.float64),
        )

    def subset(self, keep: npt.NDArray[np.bool_]) -> TileCases:
        """The cases where `keep` is True."""
        fields = (self.tokens, self.num_slots, self.hidden, self.intermediate, self.times_us)
        return TileCases(*(values[keep] for values in fields))

    def __len__(self) -> int:
        return len(self.times_us)

    def predict_us(self, model: ExpertGemmModel) -> FloatArray:
        """[C] layer times of a model."""
        out = np.empty(len(self))
        shapes = np.stack([self.hidden, self.intermediate], axis=1)
        mean = self.tokens.sum(axis=1) / self.num_slots
        for shape in np.unique(shapes, axis=0):
            mine = (shapes == shape).all(axis=1)
            sizes = (int(shape[0]), int(shape[1]), NUM_MATRICES)
            out[mine] = model.slots_time_us(self.tokens[mine], *sizes, mean_tokens=mean[mine])
        return out + model.launch_us


def fit_tiles(cases: TileCases, like: ExpertGemmModel, num_sms: int) -> ExpertGemmModel:
    """The model that fits best; `like` gives dtype, kernel and weight bytes, `num_sms` the GPU's
    multiprocessors.

    Six parameters: launch; the rates at which tiles read weights and compute, of which the slower
    counts; the rate of rows; what an unfilled last wave costs; and what an empty small tile adds.
    They describe times, not the hardware one by one. Deterministic.
    """
    weights = NUM_MATRICES * cases.hidden * cases.intermediate
    rate = float((2 * weights * cases.tokens.sum(axis=1) / cases.times_us).max()) / 1e6
    moved = weights * like.weight_bytes_per_param * (cases.tokens > 0).sum(axis=1)
    memory = float((moved / cases.times_us).max()) / 1e3
    launch = max(1.0, 0.2 * float(cases.times_us.min()))

    def residuals(parameters: FloatArray) -> FloatArray:
        model = _model(parameters, like, num_sms)
        return np.asarray(np.log(cases.predict_us(model) / cases.times_us))

    starts = [
        [*np.log([launch, memory * 1.1, rate * 1.1, 3000.0, 0.3]), share] for share in (-0.5, 2.0)
    ]
    best, _ = robust_fit(residuals, starts)
    return _rounded(_model(best, like, num_sms))


def _model(parameters: FloatArray, like: ExpertGemmModel, num_sms: int) -> ExpertGemmModel:
    launch, memory, rate, row, adds = np.exp(parameters[:5])
    tiles = (replace(SMALL, empty_adds=float(min(adds, 4.0))), LARGE)
    share = float(1.0 / (1.0 + np.exp(-parameters[5])))
    return replace(
        like,
        launch_us=float(launch),
        weight_gb_per_s=float(memory),
        tflops=float(rate),
        row_gb_per_s=float(row),
        sharpness=SHARPNESS,
        waves=TileWaves(max(1, num_sms // BLOCKS_A_CLUSTER), tiles, share),
    )


def _rounded(model: ExpertGemmModel) -> ExpertGemmModel:
    row, waves = model.row_gb_per_s or 0.0, model.waves
    if waves is not None:
        tiles = tuple(replace(t, empty_adds=round(t.empty_adds, 3)) for t in waves.tiles)
        waves = replace(waves, tiles=tiles, wave_share=round(waves.wave_share, 3))
    return replace(
        model,
        launch_us=round_significant(model.launch_us),
        weight_gb_per_s=round_significant(model.weight_gb_per_s),
        tflops=round_significant(model.tflops),
        row_gb_per_s=round_significant(row) if row < _FREE else None,
        waves=waves,
    )
