"""Few constants an engine, fitted to measured rows through the model itself.

Gauss-Newton on log(predicted / measured) of TPOT and TTFT with a soft-L1 loss: derivatives by
finite differences of the whole load test, every model group of an engine with the same total
weight. Constants stay within `MOST`, what a host can plausibly take. Groups can be left out: what
is left out is never seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from predict import CONSTANTS, Constants, Predictor
from rows import Row
from scipy.optimize import least_squares

START: Constants = {
    "step_host_us": 200.0,
    "layer_us": 10.0,
    "eager_layer_us": 1500.0,
    "request_ms": 20.0,
}
STEP = {"step_host_us": 200.0, "layer_us": 5.0, "eager_layer_us": 500.0, "request_ms": 10.0}
MOST = {"step_host_us": 3000.0, "layer_us": 60.0, "eager_layer_us": 5000.0, "request_ms": 300.0}
LOSS_SCALE = 0.1


@dataclass(frozen=True)
class Linear:
    """TPOT and TTFT of rows around `at`: `base` [2, rows], `slope` [constants, 2, rows]."""

    rows: list[Row]
    at: np.ndarray
    base: np.ndarray
    slope: np.ndarray

    def times(self, constants: np.ndarray) -> np.ndarray:
        change = np.tensordot(constants - self.at, self.slope, axes=1)
        return np.maximum(self.base + change, 0.05 * self.base)


def linearise(predictor: Predictor, rows: list[Row], at: Constants) -> Linear:
    """The model around `at`, one evaluation a constant and one more."""

    def evaluate(constants: Constants) -> np.ndarray:
        found = predictor.predict_all(rows, constants)
        both = [(found[r.number].tpot_ms, found[r.number].ttft_ms) for r in rows]
        return np.array(both).T

    base = evaluate(at)
    slope = [
        (evaluate({**at, name: at[name] + STEP[name]}) - base) / STEP[name] for name in CONSTANTS
    ]
    return Linear(rows, np.array([at[name] for name in CONSTANTS]), base, np.array(slope))


def fit(linear: Linear, leave_out: str | None = None) -> Constants:
    """Constants from all groups but `leave_out`."""
    kept = np.array([row.group != leave_out for row in linear.rows])
    counts = Counter(row.group for row in linear.rows)
    measured = np.array([(row.tpot_ms, row.ttft_ms) for row in linear.rows]).T
    weight = np.array([counts[row.group] ** -0.5 for row in linear.rows])
    scale = np.array([STEP[name] for name in CONSTANTS])

    def residuals(x: np.ndarray) -> np.ndarray:
        log = np.log(linear.times(x * scale) / measured)[:, kept] / LOSS_SCALE
        # The square root of soft-L1, so that weights multiply the robust loss.
        robust = np.sqrt(2.0 * (np.sqrt(1.0 + log**2) - 1.0))
        return np.asarray((robust * weight[kept]).ravel())

    found = least_squares(
        residuals,
        np.maximum(linear.at / scale, 1e-3),
        bounds=(0.0, [MOST[name] / STEP[name] for name in CONSTANTS]),
    )
    return dict(zip(CONSTANTS, (found.x * scale).tolist(), strict=True))
