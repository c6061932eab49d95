"""Expert entries of a calibration file, fitted to the grouped FFN cases of a raw record.

One entry for all shapes together, then one a shape. Above the cost model, so never imported by the
part that runs in an engine's container.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.fitting import ExpertFit
from moesim.cost.fitting_tiles import TileCases, fit_tiles
from moesim.cost.tile_waves import TileWaves
from moesim.types import FloatArray

WEIGHT_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
TILED_KERNEL = "grouped_mm"
MIN_ROWS = 6
DIGITS = 4
Rows = list[dict[str, Any]]


def expert_entries(rows: Rows, alone: Rows, source: str, num_sms: int = 0) -> list[dict[str, Any]]:
    """Entries of every element type with enough cases. `alone`: cases of the bare kernel in both
    modes, which tell what a call takes longer outside of a CUDA graph. `num_sms`: the GPU's
    multiprocessors, 0 on a CPU, whose kernels have no known tiles.

    Each is fitted to every case. Its stated error is that of a fit to every other case for the
    cases between, which that fit did not see.
    """
    shapes: dict[tuple[str, int, int], Rows] = {}
    for row in rows:
        key = (str(row["dtype"]), int(row["hidden"]), int(row["intermediate"]))
        shapes.setdefault(key, []).append(row)
    out = []
    for dtype in sorted({key[0] for key in shapes}):
        own = {key: r for key, r in shapes.items() if key[0] == dtype and len(r) >= MIN_ROWS}
        if not own:
            continue
        together = [row for r in own.values() for row in r]
        kernel = f"torch {together[0]['kernel']}"
        out.append(_entry(together, alone, dtype, kernel, source, num_sms))
        if len(own) > 1:
            for (_, hidden, width), some in own.items():
                name = f"{kernel} {hidden}x{width}"
                entry = _entry(some, alone, dtype, name, source, num_sms)
                out.append({**entry, "shape": [hidden, width]})
    return out


def _entry(
    rows: Rows, alone: Rows, dtype: str, kernel: str, source: str, num_sms: int
) -> dict[str, Any]:
    fitter = _Fitter(rows, dtype, kernel, num_sms)
    model = fitter.fit(np.ones(len(rows), bool))
    params = [3 * r["hidden"] * r["intermediate"] for r in rows]
    entry: dict[str, Any] = {
        "dtype": dtype,
        "kernel": kernel,
        "basis": "measured",
        "source": source,
        "weight_bytes_per_param": WEIGHT_BYTES[dtype],
        "launch_us": model.launch_us,
        "weight_gb_per_s": model.weight_gb_per_s,
        "tflops": model.tflops,
        "half_tokens": model.half_tokens,
        "tile_tokens": model.tile_tokens,
        "sharpness": model.sharpness,
        "row_gb_per_s": model.row_gb_per_s,
        "ranges": {
            "tokens_per_expert": [1.0, float(max(r["max_tokens"] for r in rows))],
            "params_per_expert": [float(min(params)), float(max(params))],
        },
    }
    if model.waves is not None:
        del entry["half_tokens"], entry["tile_tokens"]
        entry["waves"] = _waves(model.waves)
    shapes = {(r["hidden"], r["intermediate"]) for r in rows}
    adds = _eager_adds([r for r in alone if (r["hidden"], r["intermediate"]) in shapes], dtype)
    if adds is not None:
        entry["eager_launch_us"] = round(model.launch_us + adds, 2)
    half = np.arange(len(rows)) % 2 == 0
    if half.sum() >= MIN_ROWS:
        errors = fitter.errors(fitter.fit(half), ~half)
        entry["fit"] = [
            {
                "points": int((~half).sum()),
                "median_error": round(float(np.median(errors)), DIGITS),
                "p90_error": round(float(np.percentile(errors, 90)), DIGITS),
                "held_out": "every other case",
            }
        ]
    return {name: value for name, value in entry.items() if value is not None}


def _waves(waves: TileWaves) -> dict[str, Any]:
    tiles = []
    for tile in waves.tiles:
        own: dict[str, Any] = {"rows": tile.rows, "columns": tile.columns}
        if tile.up_to_mean is not None:
            own["mean_tokens"] = tile.up_to_mean
        tiles.append({**own, "empty_adds": tile.empty_adds})
    return {"at_once": waves.at_once, "wave_share": waves.wave_share, "tiles": tiles}


@dataclass(frozen=True)
class _Fitter:
    """Fits the kernel's own form to some of the rows and states errors on others."""

    rows: Rows
    dtype: str
    kernel: str
    num_sms: int

    def fit(self, keep: npt.NDArray[np.bool_]) -> ExpertGemmModel:
        if not self._tiled:
            return _fit_plain(self._plain.subset(keep), self.dtype, self.kernel)
        like = ExpertGemmModel(self.dtype, self.kernel, WEIGHT_BYTES[self.dtype], 1.0, 1.0, 1.0)
        return fit_tiles(self._tiles.subset(keep), like, self.num_sms)

    def errors(self, model: ExpertGemmModel, keep: npt.NDArray[np.bool_]) -> FloatArray:
        """|predicted / measured - 1| of the rows kept."""
        if not self._tiled:
            some = self._plain.subset(keep)
            return np.abs(some.predict_us(model) / some.times_us - 1.0)
        cases = self._tiles.subset(keep)
        return np.abs(cases.predict_us(model) / cases.times_us - 1.0)

    @property
    def _tiled(self) -> bool:
        return TILED_KERNEL in self.kernel and self.num_sms > 0

    @property
    def _tiles(self) -> TileCases:
        return TileCases.of(
            [r["counts"] for r in self.rows],
            [r["hidden"] for r in self.rows],
            [r["intermediate"] for r in self.rows],
            [r["us"] for r in self.rows],
        )

    @property
    def _plain(self) -> ExpertFit:
        point, tokens, weight = [], [], []
        for i, row in enumerate(self.rows):
            sizes, times = np.unique([c for c in row["counts"] if c > 0], return_counts=True)
            point += [i] * len(sizes)
            tokens += sizes.tolist()
            weight += times.tolist()
        return ExpertFit(
            point_idx=np.array(point, np.float64),
            tokens=np.array(tokens, np.float64),
            weight=np.array(weight, np.float64),
            hidden=np.array([r["hidden"] for r in self.rows], np.float64),
            intermediate=np.array([r["intermediate"] for r in self.rows], np.float64),
            times_us=np.array([r["us"] for r in self.rows], np.float64),
            token_rows=np.zeros(len(self.rows)),
            weight_bytes_per_param=WEIGHT_BYTES[self.dtype],
        )


def _fit_plain(fit: ExpertFit, dtype: str, kernel: str) -> ExpertGemmModel:
    params = 3 * fit.hidden * fit.intermediate
    rows = np.bincount(fit.point_idx, fit.tokens * fit.weight, len(params))
    active = np.bincount(fit.point_idx, fit.weight, len(params))
    rate = float((2 * params * rows / fit.times_us).max()) / 1e6
    moved = float((params * fit.weight_bytes_per_param * active / fit.times_us).max()) / 1e3
    return fit.fit(
        dtype=dtype,
        kernel=kernel,
        start_tflops=max(rate * 1.1, 1e-3),
        start_gb_per_s=max(moved * 1.1, 1e-3),
    )


def _eager_adds(alone: Sequence[Mapping[str, Any]], dtype: str) -> float | None:
    """What a call takes longer outside of a CUDA graph; None where that was not measured."""
    rows = [r for r in alone if r["dtype"] == dtype]
    graph = {_case(r): r["us"] for r in rows if r["mode"] == "graph"}
    adds = [r["us"] - graph[_case(r)] for r in rows if r["mode"] == "eager" and _case(r) in graph]
    return max(0.0, float(np.median(adds))) if adds else None


def _case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("hidden", "intermediate", "active", "tokens", "max_tokens"))
