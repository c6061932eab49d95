"""Predicted beside measured: errors by component, order of the plans, speed-ups, and a verdict.

Above the cost model, so never imported by the part that runs in an engine's container.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError, MismatchError
from moesim.replay.predict import PHASES, LayerPredictor
from moesim.replay.record_schema import check_measured
from moesim.replay.records import read_record
from moesim.replay.shape import parse_shape
from moesim.types import FloatArray

FORMAT = "moesim-measured"
BASELINE = "linear"
MIN_ORDERED = 3
Key = tuple[int, str, str, int]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a validation must meet: errors are |predicted / measured - 1| of layer times."""

    median_error: float = 0.10
    p90_error: float = 0.20
    spearman: float = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Layer times of one plan, batch and mode: [L] medians over repetitions, in microseconds.

    Marks between the phases take time of their own, 5 to 10 us each in a CUDA graph. The replay
    therefore also times the step without any. `mark_us` is what is left of a layer's marked time
    when the unmarked step is taken off, and `measured_us` is the marked time less `mark_us`, so
    that the layers add up to the unmarked step. Where marked steps run after a pause and unmarked
    ones back to back on a throttled GPU, `mark_us` may be negative. Where it exceeds a layer's
    time, as on a host that others use, every layer is shortened in proportion instead.
    `measured_phases`, `predicted_phases`: [L, 5], each measured one less its share of `mark_us`; of
    ranks that wait in a collective the last one's time counts, of other phases the slowest rank's.
    """

    plan: str
    tokens_per_rank: int
    mode: str
    batch: int
    measured_us: FloatArray
    predicted_us: FloatArray
    measured_phases: FloatArray
    predicted_phases: FloatArray
    mark_us: float
    noise: float

    @property
    def errors(self) -> FloatArray:
        """[L]: |predicted / measured - 1|."""
        return np.abs(self.predicted_us / self.measured_us - 1.0)


@dataclass(frozen=True, slots=True)
class PhaseError:
    """One phase over the layers of a group: median times, and the difference between predicted and
    measured as a share of the layer's measured time, median and 90th percentile."""

    measured_us: float
    predicted_us: float
    median_of_layer: float
    p90_of_layer: float


@dataclass(frozen=True, slots=True)
class Group:
    """All plans of one batch size and mode.

    `spearman` is over the plans that measurably differ (`num_distinct` of them, each further from
    the one before than the noise), None below three; `spearman_all` over all plans. `noise`: 90th
    percentile over plans and batches of the relative difference between two measurements of a step
    (of half its spread over repetitions where the run was not repeated). `speedup`: plan ->
    (measured, predicted) time of the linear plan over this one's.
    """

    tokens_per_rank: int
    mode: str
    num_plans: int
    num_distinct: int
    median_error: float
    p90_error: float
    phases: dict[str, PhaseError]
    mark_us: float
    noise: float
    spread: float
    spearman: float | None
    spearman_all: float | None
    mean_us: dict[str, tuple[float, float]]
    speedup: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Everything that was compared for one model, and whether it is within tolerance."""

    model: str
    cases: list[Case]
    groups: list[Group]
    tolerance: Tolerance
    notes: tuple[str, ...] = field(default=())

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(case.mode for case in self.cases))

    def errors(self, mode: str | None = None) -> FloatArray:
        """|predicted / measured - 1| of every layer of every case (of a mode)."""
        return np.concatenate([c.errors for c in self.cases if mode in (None, c.mode)])

    def failures(self) -> list[str]:
        """What is out of tolerance, mode by mode, in words; empty when all is well."""
        out = []
        for mode in self.modes:
            median, p90 = (float(np.percentile(self.errors(mode), q)) for q in (50, 90))
            if not median <= self.tolerance.median_error:
                limit = self.tolerance.median_error
                out.append(f"{mode}: median error {median:.1%} above {limit:.0%}")
            if not p90 <= self.tolerance.p90_error:
                out.append(f"{mode}: p90 error {p90:.1%} above {self.tolerance.p90_error:.0%}")
        out += [
            f"{g.mode}: order of plans at {g.tokens_per_rank} tokens per rank: Spearman"
            f" {g.spearman:.2f} below {self.tolerance.spearman:g}"
            for g in self.groups
            if g.spearman is not None and not g.spearman >= self.tolerance.spearman
        ]
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain data: verdict, groups, and layer times of every case."""
        failures = self.failures()
        return {
            "format": "moesim-validation",
            "version": 1,
            "model": self.model,
            "within_tolerance": not failures,
            "failures": failures,
            "tolerance": asdict(self.tolerance),
            "errors": {
                mode: {
                    "median": float(np.median(self.errors(mode))),
                    "p90": float(np.percentile(self.errors(mode), 90)),
                }
                for mode in self.modes
            },
            "groups": [asdict(g) for g in self.groups],
            "cases": [
                {
                    "plan": c.plan,
                    "tokens_per_rank": c.tokens_per_rank,
                    "mode": c.mode,
                    "batch": c.batch,
                    "mark_us": round(c.mark_us, 2),
                    "measured_us": c.measured_us.round(2).tolist(),
                    "predicted_us": c.predicted_us.round(2).tolist(),
                }
                for c in self.cases
            ],
            "notes": list(self.notes),
        }


def load_measured(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a record of `moesim.replay validate`, also gzipped.

    Raises InputError, or FormatError for a field that is wrong and for a run that did not come to
    its end.
    """
    raw = read_record(path, FORMAT, _REMEDY)
    if raw.get("results") == []:
        raise FormatError(f"{path}: holds no results", "see its notes for the reason")
    check_measured(raw, str(path), _REMEDY)
    if list(raw.get("phases", [])) != list(PHASES):
        raise FormatError(f"{path}: phases are not {', '.join(PHASES)}", _REMEDY)
    return raw


def compare(
    record: Mapping[str, Any],
    predictor: LayerPredictor,
    tolerance: Tolerance | None = None,
    repeat: Mapping[str, Any] | None = None,
    modes: Sequence[str] = ("graph", "eager"),
) -> Comparison:
    """Compare a measured record with the cost model.

    repeat: a second record of the same run, which gives the noise. modes: what to compare of it.
    Raises MismatchError when `repeat` is of another model, InputError when no result is left.
    """
    if repeat is not None and repeat["model"] != record["model"]:
        raise MismatchError("the repeated run is of another model", "give runs of one command")
    again = {_key(r): r for r in repeat["results"]} if repeat is not None else {}
    results = [r for r in record["results"] if r["mode"] in modes]
    if not results:
        raise InputError(
            f"the record holds nothing in mode {' or '.join(modes)}", "compare another `mode`"
        )
    cases = [_case(r, predictor, again.get(_key(r))) for r in results]
    found: dict[tuple[int, str], list[Case]] = {}
    for case in cases:
        found.setdefault((case.tokens_per_rank, case.mode), []).append(case)
    groups = [_group(*key, some) for key, some in sorted(found.items())]
    name = parse_shape(record["model"]).name
    return Comparison(name, cases, groups, tolerance or Tolerance(), tuple(record["notes"]))


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties sharing their mean rank; None where one side is constant."""
    x, y = _ranks(np.asarray(a)), _ranks(np.asarray(b))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / scale) if scale > 0 else None


def distinct(values: Sequence[float], noise: float) -> list[int]:
    """Indices, in ascending order of value, of values each more than `noise` (relative) above the
    one kept before."""
    kept: list[int] = []
    for i in np.argsort(values, kind="stable").tolist():
        if not kept or values[i] > values[kept[-1]] * (1.0 + noise):
            kept.append(i)
    return kept


def _key(result: Mapping[str, Any]) -> Key:
    return (result["tokens_per_rank"], result["mode"], result["plan"], result["batch"])


def _case(
    result: Mapping[str, Any], predictor: LayerPredictor, again: Mapping[str, Any] | None
) -> Case:
    phases = np.asarray(result["phase_us"], np.float64)
    predicted = predictor.predict(result, result["mode"])
    marked = np.asarray(result["layer_us"]["median"], np.float64)
    step = {name: float(values[0]) for name, values in result["step_us"].items()}
    mark_us = (float(marked.sum()) - step["median"]) / len(marked)
    measured = marked - mark_us
    if measured.min() <= 0.0:
        measured = marked * (step["median"] / marked.sum())
    if again is not None:
        noise = abs(float(again["step_us"]["median"][0]) / step["median"] - 1.0)
    else:
        noise = (step["p90"] - step["p10"]) / 2 / step["median"]
    return Case(
        plan=result["plan"],
        tokens_per_rank=result["tokens_per_rank"],
        mode=result["mode"],
        batch=result["batch"],
        measured_us=measured,
        predicted_us=predicted.layer_us,
        measured_phases=_of_ranks(phases) - mark_us / len(PHASES),
        predicted_phases=_of_ranks(predicted.phase_us),
        mark_us=mark_us,
        noise=noise,
    )


def _of_ranks(phases: FloatArray) -> FloatArray:
    """[L, 5] from [L, G, 5]: the slowest rank, and in collectives the one that waits least."""
    waits = np.array([p in ("dispatch", "combine") for p in PHASES])
    return np.where(waits, phases.min(axis=1), phases.max(axis=1))


def _group(tokens: int, mode: str, cases: list[Case]) -> Group:
    plans = list(dict.fromkeys(c.plan for c in cases))
    measured = [_mean(c.measured_us for c in cases if c.plan == p) for p in plans]
    predicted = [_mean(c.predicted_us for c in cases if c.plan == p) for p in plans]
    errors = np.concatenate([c.errors for c in cases])
    noise = float(np.percentile([c.noise for c in cases], 90))
    kept = distinct(measured, noise)
    ordered = None
    if len(kept) >= MIN_ORDERED:
        ordered = spearman([measured[i] for i in kept], [predicted[i] for i in kept])
    base = plans.index(BASELINE) if BASELINE in plans else 0
    both = list(zip(plans, measured, predicted, strict=True))
    return Group(
        tokens_per_rank=tokens,
        mode=mode,
        num_plans=len(plans),
        num_distinct=len(kept),
        median_error=float(np.median(errors)),
        p90_error=float(np.percentile(errors, 90)),
        phases=_phase_errors(cases),
        mark_us=float(np.median([c.mark_us for c in cases])),
        noise=noise,
        spread=(max(measured) - min(measured)) / min(measured),
        spearman=ordered,
        spearman_all=spearman(measured, predicted) if len(plans) >= MIN_ORDERED else None,
        mean_us={p: (m, q) for p, m, q in both},
        speedup={p: (measured[base] / m, predicted[base] / q) for p, m, q in both},
    )


def _phase_errors(cases: list[Case]) -> dict[str, PhaseError]:
    layers = np.concatenate([c.measured_us for c in cases])
    out = {}
    for i, name in enumerate(PHASES):
        ours = np.concatenate([c.predicted_phases[:, i] for c in cases])
        real = np.concatenate([c.measured_phases[:, i] for c in cases])
        of_layer = np.abs(ours - real) / layers
        out[name] = PhaseError(
            float(np.median(real)),
            float(np.median(ours)),
            float(np.median(of_layer)),
            float(np.percentile(of_layer, 90)),
        )
    return out


def _mean(times: Iterable[FloatArray]) -> float:
    return float(np.mean([t.mean() for t in times]))


def _ranks(values: npt.NDArray[np.float64]) -> FloatArray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2.0)[inverse]


_REMEDY = "give the JSON that moesim validate or moesim.replay validate wrote"
