"""Costs of hardware that is some factor faster: rates are multiplied, latencies stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moesim.cost.calibration import Calibration
from moesim.cost.collective import CollectiveCurve, CollectiveModel
from moesim.cost.copies import CopyModel
from moesim.cost.curves import SizeCurve
from moesim.cost.dense import DenseModel
from moesim.cost.step import StepModel
from moesim.types import FloatArray

_RATES = ("gb_per_s", "tflops", "k_per_us")
_M = TypeVar("_M")


@dataclass(frozen=True)
class FasterCurve:
    """A size curve whose bytes take 1 / `factor` of the time; its latency stays."""

    curve: SizeCurve
    factor: float

    @property
    def latency_us(self) -> float:
        return self.curve.latency_us

    def time_us(self, num_bytes: npt.ArrayLike) -> FloatArray:
        return self.curve.time_us(np.asarray(num_bytes, dtype=np.float64) / self.factor)


class FasterCollectives(CollectiveModel):
    """The collectives of `model` on links that are `factor` faster."""

    def __init__(self, model: CollectiveModel, factor: float) -> None:
        super().__init__(model.curves)
        self._model = model
        self._factor = factor

    def curve(self, *args: Any, **options: Any) -> CollectiveCurve:
        """As `CollectiveModel.curve`."""
        return faster_collective(self._model.curve(*args, **options), self._factor)


def faster_collective(curve: CollectiveCurve, factor: float) -> CollectiveCurve:
    """`curve` on links that are `factor` faster."""
    nic = None if curve.nic is None else FasterCurve(curve.nic, factor)
    return replace(curve, nvlink=FasterCurve(curve.nvlink, factor), nic=nic)


def faster_step(step: StepModel, network: float) -> StepModel:
    """`step` on links, of every kind, that are `network` faster."""
    if network == 1.0:
        return step
    return replace(
        step,
        dispatch=faster_collective(step.dispatch, network),
        combine=faster_collective(step.combine, network),
        other_gb_per_s=step.other_gb_per_s * network,
    )


def faster_calibration(
    calibration: Calibration,
    *,
    network: float = 1.0,
    compute: float = 1.0,
    host_link: float = 1.0,
) -> Calibration:
    """`calibration` with links between GPUs `network` faster, arithmetic and HBM `compute` faster,
    and copies between host and GPU `host_link` faster."""
    out = calibration
    if host_link != 1.0:
        copies = {
            name: copy if name in ("permute", "reduce") else _faster_copy(copy, host_link)
            for name, copy in out.copies.items()
        }
        every = tuple(_faster_copy(copy, host_link) for copy in out.host_copies)
        out = replace(out, copies=copies, host_copies=every)
    if network != 1.0:
        out = replace(out, collectives=FasterCollectives(out.collectives, network))
    if compute != 1.0:
        dense = out.dense
        out = replace(
            out,
            experts=_all(out.experts, compute),
            dense=DenseModel(
                _all(dense.gemms, compute),
                _all(dense.attention, compute),
                _all(dense.mla, compute),
                _all(dense.indexed, compute),
            ),
        )
    return out


def _faster_copy(copy: CopyModel, factor: float) -> CopyModel:
    return replace(copy, curve=FasterCurve(copy.curve, factor))


def _all(models: Mapping[Any, _M], factor: float) -> dict[Any, _M]:
    return {key: _faster(model, factor) for key, model in models.items()}


def _faster(model: _M, factor: float) -> _M:
    """A model whose fields that are rates are multiplied."""
    changed: dict[str, Any] = {}
    for field in fields(model):  # type: ignore[arg-type]
        value = getattr(model, field.name)
        if field.name.endswith(_RATES) and value is not None:
            changed[field.name] = value * factor
    return replace(model, **changed)  # type: ignore[type-var]
