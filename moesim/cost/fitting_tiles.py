"""Fit of a grouped GEMM that chooses its tile by the mean tokens a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moesim.cost.curves import FloatArray
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.fitting import robust_fit, round_significant

FEW_UP_TO = 128.0
FEW_TILE, TILE = 128, 256
"""torch's grouped GEMM on Hopper: blocks of 64 rows up to a mean of 128 tokens a slot, then of 128,
always two of them side by side (pytorch aten/src/ATen/native/cuda/GroupMM.cu @06c0cf0)."""

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
        for shape in np.unique(shapes, axis=0):
            mine = (shapes == shape).all(axis=1)
            mean = self.tokens[mine].sum(axis=1) / self.num_slots[mine]
            each = model.expert_time_us(
                self.tokens[mine], int(shape[0]), int(shape[1]), mean_tokens=mean[:, None]
            )
            out[mine] = model.launch_us + each.sum(axis=1)
        return out


def fit_tiles(cases: TileCases, like: ExpertGemmModel) -> ExpertGemmModel:
    """The model of both tiles that fits best; `like` gives dtype, kernel and weight bytes.

    Seven parameters: launch, memory rate, row rate, sharpness, an arithmetic rate for each tile,
    and the share of the larger tile's padding that costs time (the smaller's costs all of it).
    They describe times, not the hardware one by one: a rate may exceed the GPU's own where another
    parameter makes up for it. Deterministic.
    """
    weights = 3 * cases.hidden * cases.intermediate
    rate = float((2 * weights * cases.tokens.sum(axis=1) / cases.times_us).max()) / 1e6
    moved = weights * like.weight_bytes_per_param * (cases.tokens > 0).sum(axis=1)
    memory = float((moved / cases.times_us).max()) / 1e3
    launch = max(1.0, 0.7 * float(cases.times_us.min()))

    def residuals(parameters: FloatArray) -> FloatArray:
        model = _model(parameters, like)
        return np.asarray(np.log(cases.predict_us(model) / cases.times_us))

    starts = [
        [*np.log([launch, memory * 1.1, 8000.0, sharp, rate * 1.1, rate]), 1.0]
        for sharp in (0.5, 3.0)
    ]
    best, _ = robust_fit(residuals, starts)
    return _rounded(_model(best, like))


def _model(parameters: FloatArray, like: ExpertGemmModel) -> ExpertGemmModel:
    launch, memory, row, sharp, many, few = np.exp(parameters[:6])
    model = replace(
        like,
        launch_us=float(launch),
        weight_gb_per_s=float(memory),
        row_gb_per_s=float(row),
        sharpness=1.0 + min(float(sharp), 63.0),
        tflops=float(many),
        tile_tokens=TILE,
        pad_share=float(1.0 / (1.0 + np.exp(-parameters[6]))),
        few=None,
    )
    small = replace(model, tflops=float(few), tile_tokens=FEW_TILE, pad_share=1.0)
    return replace(model, few=small, few_up_to=FEW_UP_TO)


def _rounded(model: ExpertGemmModel) -> ExpertGemmModel:
    def digits(m: ExpertGemmModel) -> ExpertGemmModel:
        row = m.row_gb_per_s or 0.0
        return replace(
            m,
            launch_us=round_significant(m.launch_us),
            weight_gb_per_s=round_significant(m.weight_gb_per_s),
            row_gb_per_s=round_significant(row) if row < _FREE else None,
            sharpness=round_significant(m.sharpness),
            tflops=round_significant(m.tflops),
            pad_share=round(m.pad_share, 3),
        )

    few = None if model.few is None else digits(model.few)
    return replace(digits(model), few=few)
