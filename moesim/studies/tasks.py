"""One point, evaluated wherever a backend runs it."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from moesim.errors import InfeasibleError, MismatchError, MoesimError
from moesim.studies.evaluator import Outcome, Scalar
from moesim.studies.inputs import code_hash
from moesim.studies.registry import get_evaluator
from moesim.studies.space import Point


@dataclass(frozen=True, slots=True)
class PointTask:
    """What a worker is told."""

    evaluator: str
    key: str
    params: Mapping[str, Scalar]
    inputs: Mapping[str, str]
    code: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A point that stopped with an internal error. It is not journaled, so that it is tried again
    by the next run."""

    key: str
    error: str
    trace: str


def make_task(evaluator: str, point: Point) -> PointTask:
    """The task of a point."""
    return PointTask(evaluator, point.key, point.params, point.inputs, code_hash())


def run_task(task: PointTask) -> Outcome | Failure:
    """Evaluate a point.

    Raises MismatchError where this process has other code or other inputs than the one that asks:
    that is a matter of the whole study, not of the point.
    """
    if task.code != code_hash():
        raise MismatchError(
            "a worker runs another moesim than this one",
            "install the same version on all workers and start them again",
        )
    evaluator = get_evaluator(task.evaluator)
    found = evaluator.inputs(task.params)
    other = [name for name, value in task.inputs.items() if found.get(name) != value]
    if other:
        raise MismatchError(
            f"a worker sees another {other[0]} than this process ({task.params.get(other[0])!r})",
            "let the file be until the study is done, and the same on every worker",
        )
    try:
        result = evaluator.evaluate(task.params)
    except MoesimError as error:
        return refused(task.key, task.params, task.inputs, error)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Failure(task.key, text, traceback.format_exc()[-4000:])
    return Outcome(
        key=task.key,
        params=dict(task.params),
        status="ok",
        figures={name: _plain(value) for name, value in result.figures.items()},
        basis=result.basis,
        notes=tuple(result.notes),
        engines=result.engines,
        inputs=dict(task.inputs),
    )


def refused(
    key: str, params: Mapping[str, Scalar], inputs: Mapping[str, str], error: MoesimError
) -> Outcome:
    """The outcome of a point that cannot be evaluated."""
    return Outcome(
        key=key,
        params=dict(params),
        status="infeasible" if isinstance(error, InfeasibleError) else "refused",
        cause=error.cause,
        remedy=error.remedy,
        inputs=dict(inputs),
    )


def _plain(value: float | None) -> float | None:
    """A float that JSON can hold; None for what is not finite."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None
