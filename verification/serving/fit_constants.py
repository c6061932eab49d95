"""Few engine constants, fitted to measured rows through the model itself, each only where it helps.

Gauss-Newton on log(predicted / measured) of TPOT and TTFT: derivatives by finite differences of the
whole load test, every model of an engine with the same total weight. The loss grows with the
logarithm of an error's square (Cauchy's), so that rows which nothing here explains do not drag the
others. Constants stay within `MOST`, what a host can plausibly take.

Every engine is fitted on its own, and has the constants of `choose`: of all subsets the one whose
loss over its models is least, every model predicted by a fit that never saw it. So a constant that
makes an engine's other models worse does not ship, and stays at `NONE`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from predict import CONSTANTS, NONE, Constants, Predictor
from rows import Row
from scipy.optimize import least_squares

START: Constants = {
    "kernel_us": 2.0,
    "eager_layer_us": 900.0,
    "request_ms": 60.0,
    "request_rank_ms": 20.0,
}
STEP = {
    "kernel_us": 1.0,
    "eager_layer_us": 500.0,
    "request_ms": 20.0,
    "request_rank_ms": 10.0,
}
MOST = {
    "kernel_us": 6.0,
    "eager_layer_us": 2000.0,
    "request_ms": 300.0,
    "request_rank_ms": 100.0,
}
"""2 ms per layer is what decode steps without CUDA graphs took (reports/engine-vllm)."""
LOSS_SCALE = 0.1
MARGIN = 0.01
"""A larger subset must lower the loss by this share of it."""
SUBSETS = [s for n in range(len(CONSTANTS) + 1) for s in combinations(CONSTANTS, n)]


@dataclass(frozen=True)
class Linear:
    """TPOT and TTFT of rows around the constants `at` [rows, constants]: `base` [2, rows], `slope`
    [constants, 2, rows]."""

    rows: list[Row]
    at: np.ndarray
    base: np.ndarray
    slope: np.ndarray

    def of(self, engine: str) -> Linear:
        """One engine's rows."""
        mine = np.array([row.engine == engine for row in self.rows])
        rows = [row for row in self.rows if row.engine == engine]
        return Linear(rows, self.at[mine], self.base[:, mine], self.slope[:, :, mine])

    def log_errors(self, constants: Constants) -> np.ndarray:
        """[2, rows]: log(predicted / measured) of TPOT and TTFT."""
        values = np.array([constants[name] for name in CONSTANTS])
        change = np.einsum("rc,ckr->kr", values - self.at, self.slope)
        times = np.maximum(self.base + change, 0.05 * self.base)
        measured = np.array([(row.tpot_ms, row.ttft_ms) for row in self.rows]).T
        return np.asarray(np.log(times / measured))


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


def fit(linear: Linear, fitted: tuple[str, ...], leave_out: str | None = None) -> Constants:
    """The constants `fitted` of one engine from all its models but `leave_out`; others `NONE`."""
    kept = np.array([row.group != leave_out for row in linear.rows])
    if not fitted or not kept.any():
        return NONE
    both = np.tile(_weights(linear)[kept], (2, 1))
    both[1] *= [not row.cold for row in linear.rows if row.group != leave_out]
    weight = both**0.5

    def constants(x: np.ndarray) -> Constants:
        found = {name: float(v * STEP[name]) for name, v in zip(fitted, x, strict=True)}
        return {**NONE, **found}

    def residuals(x: np.ndarray) -> np.ndarray:
        log = linear.log_errors(constants(x))[:, kept] / LOSS_SCALE
        return np.asarray((np.sqrt(np.log1p(log**2)) * weight).ravel())

    start = np.array([START[name] / STEP[name] for name in fitted])
    most = np.array([MOST[name] / STEP[name] for name in fitted])
    tries = [
        least_squares(residuals, np.minimum(start * factor, 0.99 * most), bounds=(0.0, most))
        for factor in (0.3, 1.0, 2.5)
    ]
    return constants(min(tries, key=lambda found: float(found.cost)).x)


def held_out_loss(linear: Linear, fitted: tuple[str, ...]) -> float:
    """Mean loss over an engine's models, each predicted by constants of the others."""
    total = 0.0
    weight = _weights(linear)
    models = sorted({row.group for row in linear.rows})
    for model in models:
        own = np.array([row.group == model for row in linear.rows])
        log = linear.log_errors(fit(linear, fitted, leave_out=model))[:, own] / LOSS_SCALE
        total += float((np.log1p(log**2) * weight[own]).sum())
    return total / len(models)


def loss_of(rows: list[Row], relative: tuple[np.ndarray, np.ndarray]) -> float:
    """`held_out_loss` of predictions, by their relative errors of TPOT and TTFT."""
    counts = Counter(row.group for row in rows)
    weight = np.array([1.0 / counts[row.group] for row in rows]) / len(counts)
    log = np.log1p(np.array(relative)) / LOSS_SCALE
    return float((np.log1p(log**2) * weight).sum())


def choose(linear: Linear) -> tuple[tuple[str, ...], dict[str, float]]:
    """The constants that one engine should have, and the held-out loss of every subset."""
    losses = {subset: held_out_loss(linear, subset) for subset in SUBSETS}
    best = SUBSETS[0]
    for subset in SUBSETS[1:]:
        if losses[subset] < losses[best] * (1 - MARGIN):
            best = subset
    return best, {" + ".join(subset) or "none": loss for subset, loss in losses.items()}


def _weights(linear: Linear) -> np.ndarray:
    counts = Counter(row.group for row in linear.rows)
    return np.array([1.0 / counts[row.group] for row in linear.rows])
