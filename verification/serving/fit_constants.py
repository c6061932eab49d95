"""Few engine constants, fitted to measured rows through the model itself.

Time of a small kernel and of enqueuing a layer are the same for all engines, a request's time
outside the steps is each engine's own: five numbers. Gauss-Newton on log(predicted / measured) of
TPOT and TTFT: derivatives by finite differences of the whole load test, every model of an engine
with the same total weight. The loss grows with the logarithm of an error's square (Cauchy's), so
that rows which nothing here explains do not drag the others. Constants stay within `MOST`, what a
host can plausibly take. A model can be left out, of all engines: it is never seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from predict import CONSTANTS, Constants, Predictor
from rows import Row
from scipy.optimize import least_squares

SHARED = ("kernel_us", "eager_layer_us")
START: Constants = {"kernel_us": 2.5, "eager_layer_us": 800.0, "request_ms": 50.0}
STEP = {"kernel_us": 1.0, "eager_layer_us": 500.0, "request_ms": 20.0}
MOST = {"kernel_us": 6.0, "eager_layer_us": 5000.0, "request_ms": 300.0}
LOSS_SCALE = 0.1


@dataclass(frozen=True)
class Linear:
    """TPOT and TTFT of rows around the constants `at` [rows, constants]: `base` [2, rows], `slope`
    [constants, 2, rows]."""

    rows: list[Row]
    at: np.ndarray
    base: np.ndarray
    slope: np.ndarray

    def times(self, constants: np.ndarray) -> np.ndarray:
        change = np.einsum("rc,ckr->kr", constants - self.at, self.slope)
        return np.maximum(self.base + change, 0.05 * self.base)


def linearise(predictor: Predictor, rows: list[Row], at: dict[str, Constants]) -> Linear:
    """The model around `at`, constants by engine: one evaluation a constant and one more."""

    def evaluate(constants: dict[str, Constants]) -> np.ndarray:
        found = predictor.predict_all(rows, constants)
        both = [(found[r.number].tpot_ms, found[r.number].ttft_ms) for r in rows]
        return np.array(both).T

    def moved(name: str) -> dict[str, Constants]:
        return {engine: {**own, name: own[name] + STEP[name]} for engine, own in at.items()}

    base = evaluate(at)
    slope = [(evaluate(moved(name)) - base) / STEP[name] for name in CONSTANTS]
    values = np.array([[at[row.engine][name] for name in CONSTANTS] for row in rows])
    return Linear(rows, values, base, np.array(slope))


def fit(linear: Linear, leave_out: str | None = None) -> dict[str, Constants]:
    """Constants by engine from all models but `leave_out`."""
    engines = sorted({row.engine for row in linear.rows})
    unknowns = [
        (name, engine) for name in CONSTANTS for engine in ([""] if name in SHARED else engines)
    ]
    kept = np.array([row.group != leave_out for row in linear.rows])
    counts = Counter((row.engine, row.group) for row in linear.rows)
    measured = np.array([(row.tpot_ms, row.ttft_ms) for row in linear.rows]).T
    weight = np.array([counts[row.engine, row.group] ** -0.5 for row in linear.rows])

    def by_engine(x: np.ndarray) -> dict[str, Constants]:
        found: dict[str, dict[str, float]] = {engine: {} for engine in engines}
        for (name, own), value in zip(unknowns, x, strict=True):
            for engine in [own] if own else engines:
                found[engine][name] = float(value * STEP[name])
        return dict(found)

    def residuals(x: np.ndarray) -> np.ndarray:
        own = by_engine(x)
        values = np.array([[own[row.engine][name] for name in CONSTANTS] for row in linear.rows])
        log = np.log(linear.times(values) / measured)[:, kept] / LOSS_SCALE
        return np.asarray((np.sqrt(np.log1p(log**2)) * weight[kept]).ravel())

    found = least_squares(
        residuals,
        [START[name] / STEP[name] for name, _ in unknowns],
        bounds=(0.0, [MOST[name] / STEP[name] for name, _ in unknowns]),
    )
    return by_engine(found.x)
