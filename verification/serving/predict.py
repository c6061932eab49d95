"""Predicted TTFT and TPOT of the measured rows under given engine constants."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from rows import Row, deployment_of, launch_of, load_test_of, speculation_of

from moesim.serving.engines import ENGINES, EngineProfile
from moesim.serving.static import run_load_test
from moesim.serving.step_cost import EngineStepCost

CONSTANTS = ("kernel_us", "eager_layer_us", "request_ms", "request_rank_ms")
FIXED = {"step_host_us": 0.0, "sequence_host_us": 0.0, "prompt_token_us": 0.0}
Constants = Mapping[str, float]
NONE: Constants = {
    "kernel_us": 2.0,
    "eager_layer_us": 0.0,
    "request_ms": 0.0,
    "request_rank_ms": 0.0,
}
"""Nothing fitted: no host time; small kernels of 2 us, which is assumed."""


def profile(engine: str, constants: Constants) -> EngineProfile:
    """The engine's profile with its fitted constants replaced."""
    return replace(ENGINES[engine], **FIXED, **{name: float(constants[name]) for name in CONSTANTS})


@dataclass(frozen=True)
class Prediction:
    """Mean TTFT and TPOT of one row, milliseconds."""

    ttft_ms: float
    tpot_ms: float


class Predictor:
    """Keeps the step cost of every deployment; constants may change from call to call."""

    def __init__(self) -> None:
        self._costs: dict[tuple[object, ...], EngineStepCost] = {}

    def predict(self, row: Row, constants: Constants) -> Prediction:
        """One row; two rows of the same deployment share its tables."""
        deployment = deployment_of(row, ENGINES[row.engine])
        key = (row.engine, row.model, row.system, row.tp, row.dp, row.ep, row.moe_tp)
        key += (deployment.max_batch_tokens, deployment.max_sequences)
        if key not in self._costs:
            self._costs[key] = EngineStepCost(deployment)
        cost = self._costs[key].with_engine(profile(row.engine, constants))
        test = load_test_of(row)
        steps = launch_of(row).balance_steps if row.dp > 1 else 0
        result = run_load_test(cost, test, speculation_of(row), steps)
        return Prediction(result.mean_ttft_ms, result.mean_tpot_ms)

    def predict_all(
        self, rows: Iterable[Row], constants: Mapping[str, Constants] | Constants
    ) -> dict[int, Prediction]:
        """By row number; rows that differ in nothing but their number are computed once.

        `constants`: of every engine, or one set for all.
        """
        done: dict[tuple[object, ...], Prediction] = {}
        out = {}
        for row in rows:
            own = constants.get(row.engine, constants)  # type: ignore[call-overload]
            key = (row.engine, row.model, row.system, row.tp, row.dp, row.ep, row.moe_tp)
            key += (row.isl, row.osl, row.concurrency, row.drafts)
            if key not in done:
                done[key] = self.predict(row, own)
            out[row.number] = done[key]
        return out


def errors(rows: list[Row], predictions: Mapping[int, Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """Relative errors predicted / measured - 1 of TPOT and of TTFT, in the order of `rows`."""
    tpot = [predictions[r.number].tpot_ms / r.tpot_ms - 1.0 for r in rows]
    ttft = [predictions[r.number].ttft_ms / r.ttft_ms - 1.0 for r in rows]
    return np.array(tpot), np.array(ttft)
