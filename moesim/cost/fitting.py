"""Robust fits of the calibration models to measured points. Deterministic; scipy is imported late.

All fits minimise a soft-L1 loss of the logarithm of predicted over measured time, so that a spike
weighs little and a small message weighs as much as a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim.cost.curves import AffineMin
from moesim.cost.expert_gemm import NUM_MATRICES, ExpertGemmModel
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cost.calibration_schema import ExpertEntry

Residuals = Callable[[FloatArray], FloatArray]

LOSS_SCALE = 0.05
_BOUND = 60.0  # of a log parameter: anything within exp(+-60) is allowed


def robust_fit(
    residuals: Residuals, starts: Sequence[npt.ArrayLike], *, loss_scale: float = LOSS_SCALE
) -> tuple[FloatArray, float]:
    """Best of several soft-L1 least-squares fits; returns (parameters, cost)."""
    from scipy.optimize import least_squares

    best: tuple[FloatArray, float] | None = None
    for start in starts:
        found = least_squares(
            residuals,
            np.clip(np.asarray(start, dtype=np.float64), -_BOUND, _BOUND),
            loss="soft_l1",
            f_scale=loss_scale,
            max_nfev=400,
            bounds=(-_BOUND - 1.0, _BOUND + 1.0),
        )
        if best is None or found.cost < best[1]:
            best = np.asarray(found.x, dtype=np.float64), float(found.cost)
    if best is None:
        raise ValueError("robust_fit needs at least one start")
    return best


def round_significant(value: float, digits: int = 4) -> float:
    """`value` to so many significant digits, as the calibration files print it."""
    return float(f"{value:.{digits}g}")


def fit_affine_min(
    num_bytes: FloatArray, times_us: FloatArray, max_pieces: int = 3
) -> tuple[AffineMin, float]:
    """Fewest pieces (up to `max_pieces`) whose cost is within a quarter of the best.

    `num_bytes`, `times_us`: shape `[points]`, at least two points. Returns (curve, cost).
    """
    size = np.asarray(num_bytes, dtype=np.float64)
    log_time = np.log(np.asarray(times_us, dtype=np.float64))
    fits = [_fit_pieces(size, log_time, k) for k in range(1, max_pieces + 1) if 2 * k <= len(size)]
    best_cost = min(cost for _, cost in fits)
    return next(fit for fit in fits if fit[1] <= 1.25 * best_cost + 1e-12)


def _fit_pieces(size: FloatArray, log_time: FloatArray, pieces: int) -> tuple[AffineMin, float]:
    def residuals(log_params: FloatArray) -> FloatArray:
        latency, rate = np.exp(log_params[:pieces]), np.exp(log_params[pieces:])
        time = (latency[:, None] + size / (rate[:, None] * 1e3)).min(axis=0)
        return np.log(time) - log_time

    floor = float(log_time.min())
    top = np.log(max(float((size / np.exp(log_time)).max()) / 1e3, 1e-6) * 1.1)
    starts = []
    for spread in (0.3, 0.8, 1.6):
        for drop in (1.5, 3.5):
            latencies = floor + spread * np.linspace(0.0, 1.0, pieces)
            rates = top - drop * np.linspace(1.0, 0.0, pieces) if pieces > 1 else [top]
            starts.append([*latencies, *rates])
    params, cost = robust_fit(residuals, starts)
    order = np.argsort(params[:pieces])
    segments = tuple(
        (round_significant(np.exp(params[i])), round_significant(np.exp(params[pieces + i])))
        for i in order
    )
    return AffineMin(segments), cost


def drop_spikes(num_bytes: FloatArray, times_us: FloatArray, factor: float = 1.15) -> FloatArray:
    """Boolean mask of the points to keep: a smaller message that takes more than `factor` times
    as long as some larger one was disturbed."""
    order = np.argsort(num_bytes, kind="stable")
    later_min = np.minimum.accumulate(times_us[order][::-1])[::-1]
    keep = np.empty(len(order), dtype=bool)
    keep[order] = times_us[order] <= factor * later_min
    return keep


EXPERT_PARAMETERS = (
    "launch_us",
    "weight_gb_per_s",
    "tflops",
    "half_tokens",
    "sharpness_less_one",
    "row_gb_per_s",
    "token_gb_per_s",
)


class ExpertFit:
    """Fits `ExpertGemmModel` to layer times whose per-expert token counts are known.

    Points are described by flat lists of (point, tokens, weight) so that equal experts of a point
    are one entry: `tokens[i]` routed rows on `weight[i]` experts of point `point_idx[i]`. Arrays
    per point: `hidden`, `intermediate`, `times_us`, and `token_rows`, the input tokens x top-k of
    the layer (0 where the kernel reduces nothing).
    """

    def __init__(
        self,
        *,
        point_idx: FloatArray,
        tokens: FloatArray,
        weight: FloatArray,
        hidden: FloatArray,
        intermediate: FloatArray,
        times_us: FloatArray,
        token_rows: FloatArray,
        weight_bytes_per_param: float,
        tile_tokens: int = 1,
    ) -> None:
        self.point_idx = point_idx.astype(np.int64)
        self.tokens = tokens.astype(np.float64)
        self.weight = weight.astype(np.float64)
        self.hidden = hidden.astype(np.float64)
        self.intermediate = intermediate.astype(np.float64)
        self.times_us = times_us.astype(np.float64)
        self.token_rows = token_rows.astype(np.float64)
        self.weight_bytes_per_param = weight_bytes_per_param
        self.tile_tokens = tile_tokens

    def subset(self, keep: npt.NDArray[np.bool_]) -> ExpertFit:
        """The points where `keep` is True."""
        kept = np.flatnonzero(keep)
        new_idx = np.full(len(keep), -1)
        new_idx[kept] = np.arange(len(kept))
        entries = np.asarray(keep, dtype=bool)[self.point_idx]
        return ExpertFit(
            point_idx=new_idx[self.point_idx[entries]],
            tokens=self.tokens[entries],
            weight=self.weight[entries],
            hidden=self.hidden[kept],
            intermediate=self.intermediate[kept],
            times_us=self.times_us[kept],
            token_rows=self.token_rows[kept],
            weight_bytes_per_param=self.weight_bytes_per_param,
            tile_tokens=self.tile_tokens,
        )

    def model(self, log_params: FloatArray, dtype: str, kernel: str) -> ExpertGemmModel:
        """The model of one parameter vector, in the order of `EXPERT_PARAMETERS`."""
        p = dict(zip(EXPERT_PARAMETERS, np.exp(log_params), strict=True))
        has_tokens = bool(self.token_rows.any())
        half = round_significant(p["half_tokens"])
        return ExpertGemmModel(
            dtype=dtype,
            kernel=kernel,
            weight_bytes_per_param=self.weight_bytes_per_param,
            launch_us=round_significant(p["launch_us"]),
            weight_gb_per_s=round_significant(p["weight_gb_per_s"]),
            tflops=round_significant(p["tflops"]),
            half_tokens=half if half > 0.01 else 0.0,
            tile_tokens=self.tile_tokens,
            sharpness=min(64.0, round_significant(1.0 + p["sharpness_less_one"])),
            row_gb_per_s=_rate_or_none(p["row_gb_per_s"]),
            token_gb_per_s=_rate_or_none(p["token_gb_per_s"]) if has_tokens else None,
        )

    def predict_us(self, model: ExpertGemmModel) -> FloatArray:
        """Layer times of all points, shape `[points]`."""
        shapes = np.stack([self.hidden, self.intermediate], axis=1)
        time = np.full(len(self.times_us), model.launch_us)
        _, shape_idx = np.unique(shapes, axis=0, return_inverse=True)
        entry_shape = shape_idx.reshape(-1)[self.point_idx]
        for idx in range(int(shape_idx.max()) + 1):
            entries = entry_shape == idx
            at = int(np.argmax(shape_idx.reshape(-1) == idx))
            each = model.expert_time_us(
                self.tokens[entries], int(self.hidden[at]), int(self.intermediate[at])
            )
            time += np.bincount(
                self.point_idx[entries], self.weight[entries] * each, len(self.times_us)
            )
        if model.token_gb_per_s is not None:
            time += self.token_rows * self.hidden * 2 / (model.token_gb_per_s * 1e3)
        return time

    def residuals(self, log_params: FloatArray) -> FloatArray:
        """Log of predicted over measured time, shape `[points]`."""
        launch, weight_rate, flop_rate, half, sharp, row_rate, token_rate = np.exp(log_params)
        h, i = self.hidden[self.point_idx], self.intermediate[self.point_idx]
        weight_us = 3 * h * i * self.weight_bytes_per_param / (weight_rate * 1e3)
        padded = np.ceil(self.tokens / self.tile_tokens) * self.tile_tokens
        flop_us = 6 * h * i * (padded + half) / (flop_rate * 1e6)
        high = np.maximum(weight_us, flop_us)
        q = 1.0 + min(sharp, 63.0)
        each = high * (1.0 + (np.minimum(weight_us, flop_us) / high) ** q) ** (1.0 / q)
        each = each + self.tokens * 2 * (2 * h + 3 * i) / (row_rate * 1e3)
        time = launch + np.bincount(self.point_idx, self.weight * each, len(self.times_us))
        time = time + self.token_rows * self.hidden * 2 / (token_rate * 1e3)
        return np.log(time / self.times_us)

    def fit(
        self, *, dtype: str, kernel: str, start_tflops: float, start_gb_per_s: float
    ) -> ExpertGemmModel:
        """The best model for all points; the starts need only be of the right order."""
        launch = max(1.0, 0.7 * float(self.times_us.min()))
        starts = [
            np.log([launch, start_gb_per_s, start_tflops, half, sharp, 3000.0, 2000.0])
            for half, sharp in ((16.0, 1.0), (1.0, 4.0))
        ]
        params, _ = robust_fit(self.residuals, starts)
        return self.model(params, dtype, kernel)


def _rate_or_none(rate: float) -> float | None:
    return None if rate > 1e6 else round_significant(rate)


def zipf_like_counts(active: int, tokens: int, max_tokens: int) -> FloatArray:
    """Token counts of `active` experts with a known total and maximum, the rest falling off
    geometrically: an assumption where a table holds only these three numbers."""
    if active == 1:
        return np.array([float(tokens)])
    rest = float(tokens - max_tokens)
    mean = rest / (active - 1)
    if mean >= max_tokens or mean <= 1.0:
        return np.concatenate([[float(tokens) - rest], np.full(active - 1, mean)])
    low, high = 1e-9, 1.0
    ranks = np.arange(active - 1)
    for _ in range(60):  # bisect the ratio whose sum, capped below by one token, is `rest`
        ratio = 0.5 * (low + high)
        total = np.maximum(max_tokens * ratio ** (ranks + 1.0), 1.0).sum()
        low, high = (ratio, high) if total < rest else (low, ratio)
    counts = np.maximum(max_tokens * low ** (ranks + 1.0), 1.0)
    counts *= rest / counts.sum()
    return np.concatenate([[float(max_tokens)], counts])


def fit_expert_table(entry: ExpertEntry) -> ExpertGemmModel:
    """An `ExpertGemmModel` fitted to a file's own table of measured calls.

    Per-expert counts are not in the table and are taken from `zipf_like_counts`.
    """
    from dataclasses import replace

    rows = np.asarray(entry.table, dtype=np.float64)
    counts = [zipf_like_counts(int(r[2]), int(r[3]), int(r[4])) for r in rows]
    fit = ExpertFit(
        point_idx=np.repeat(np.arange(len(rows)), [len(c) for c in counts]),
        tokens=np.concatenate(counts),
        weight=np.ones(sum(len(c) for c in counts)),
        hidden=rows[:, 0],
        intermediate=rows[:, 1],
        times_us=rows[:, 5],
        token_rows=np.zeros(len(rows)),
        weight_bytes_per_param=entry.weight_bytes_per_param,
        tile_tokens=entry.tile_tokens,
    )
    work = fit.tokens * 6 * fit.hidden[fit.point_idx] * fit.intermediate[fit.point_idx]
    done = np.bincount(fit.point_idx, work, len(rows)) / rows[:, 5] / 1e6
    params = NUM_MATRICES * rows[:, 0] * rows[:, 1]
    moved = params * entry.weight_bytes_per_param * rows[:, 2]
    model = fit.fit(
        dtype=entry.dtype,
        kernel=entry.kernel,
        start_tflops=max(float(done.max()) * 1.1, 1e-3),
        start_gb_per_s=max(float((moved / rows[:, 5]).max()) / 1e3 * 1.1, 1e-3),
    )
    ranges = {
        "params_per_expert": (float(params.min()), float(params.max())),
        "tokens_per_expert": (1.0, float(rows[:, 4].max())),
    }
    return replace(
        model,
        basis=entry.basis,
        source=entry.source,
        ranges=ranges,
        eager_launch_us=model.launch_us if entry.eager else None,
    )
