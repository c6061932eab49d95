"""`study`: many deployments at once, and a question about them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.backend import open_backend
from moesim.cluster.prices import parse_prices
from moesim.errors import InputError
from moesim.jobs.result import Result
from moesim.studies.file import read_study
from moesim.studies.result import to_json
from moesim.studies.run import Results, make_study, run_study
from moesim.studies.text import summary
from moesim.types import Progress

log = logging.getLogger("moesim")

if TYPE_CHECKING:
    import pandas as pd

    from moesim.draw import Picture

DEFAULT_ROWS = 20


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StudyResult(Result):
    """results: points, outcomes and the answer; data: the same as JSON."""

    results: Results
    data: Mapping[str, Any]

    @property
    def answered(self) -> bool:
        """Whether a point answers the question, for each value of `per`."""
        answers = self.results.answers
        return all(a is not None for a in answers.values()) and bool(answers)

    def line(self) -> str:
        study, answer = self.results.study, self.results.answer
        said = f"{len(self.results.evaluated)} of {self.results.num_grid} points evaluated"
        if study.file.per is not None:
            found = sum(a is not None for a in self.results.answers.values())
            many = f"{found} of {len(self.results.answers)} answers, one per {study.file.per}"
            return f"{said}; {study.question}: {many}"
        if answer is None:
            return f"{said}; no answer to: {study.question}"
        shown = ", ".join(f"{name} {answer.params[name]}" for name in self.data["varied"])
        return f"{said}; {study.question}: {shown or 'the one point'}"

    def summary(self, rows: int = DEFAULT_ROWS) -> str:
        return summary(dict(self.data), rows)

    def to_json(self) -> dict[str, Any]:
        return dict(self.data)

    def to_frame(self) -> pd.DataFrame:
        """One row per evaluated point: its parameters, engines, status and figures in their base
        units."""
        import pandas as pd

        rows = [
            {
                **outcome.params,
                "engines": outcome.engines,
                "status": outcome.status,
                **outcome.figures,
            }
            for outcome in self.results.evaluated
        ]
        return pd.DataFrame(rows)

    def picture(self) -> Picture:
        from moesim.draw.study import study_poster

        return study_poster(self.data)


def study(
    file: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    evaluator: str | None = None,
    fixed: Mapping[str, Any] | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    slo: str | None = None,
    minimize: str | None = None,
    maximize: str | None = None,
    per: str | None = None,
    price: Sequence[str] = (),
    sensitivity: float | None = None,
    search: int | None = None,
    stop_early: bool = False,
    max_points: int = 2000,
    backend: str = "local",
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> StudyResult:
    """Evaluate a grid of deployments, answer a question about it, and see whether the answer holds
    when the inputs change: what `moesim whatif` does.

    file: a study file, or its content; the other arguments add to it and override it. fixed, vary:
    parameters of the evaluator by name (`trace`, `model`, `cluster`, `gpus`, `requests`, ...), one
    value or several. evaluator: `requests` where there are any, else `static`. per: a parameter, an
    answer for each value of which is wanted. journal: finished points, from which a stopped study
    goes on; without one nothing is kept.

    Raises FormatError, InputError and UnknownNameError that name the key.
    """
    content: dict[str, Any] = {}
    if isinstance(file, Mapping):
        content = dict(file)
    elif file is not None:
        content = read_study(Path(file))
    _parameters(content, dict(fixed or {}), dict(vary or {}))
    if minimize is not None or maximize is not None:
        content.pop("minimize", None)
        content.pop("maximize", None)
    asked = {
        "evaluator": evaluator,
        "slo": slo,
        "minimize": minimize,
        "maximize": maximize,
        "per": per,
        "prices": parse_prices(list(price)) if price else None,
        "sensitivity": None if sensitivity is None else (sensitivity or False),
        "stop_early": stop_early or None,
        "search": None if search is None else {**(content.get("search") or {}), "points": search},
    }
    content.update({name: value for name, value in asked.items() if value is not None})
    if "evaluator" not in content and "requests" in {**content["fixed"], **content["grid"]}:
        content["evaluator"] = "requests"
    made = make_study(content, max_points=max_points)
    with open_backend(backend) as opened:
        kept = Path(journal) if journal is not None else None
        results = run_study(made, opened, journal=kept, progress=progress)
    for failure in results.failures:
        log.warning("a point failed: %s", failure.error)
    return StudyResult(results, to_json(results))


def _parameters(
    content: dict[str, Any], fixed: dict[str, Any], varied: dict[str, Sequence[Any]]
) -> None:
    if any(not isinstance(content.get(k, {}), dict) for k in ("fixed", "grid")):
        return
    fix = content["fixed"] = dict(content.get("fixed") or {})
    grid = content["grid"] = dict(content.get("grid") or {})
    for name in fixed.keys() & varied.keys():
        raise InputError(f"{name} is both fixed and varied", "give each parameter once")
    for name, value in fixed.items():
        grid.pop(name, None)
        fix[name] = value
    for name, values in varied.items():
        if isinstance(values, str) or not len(values):
            raise InputError(f"{name} is to vary, but not over a list", "give its values")
        fix.pop(name, None)
        grid.pop(name, None)
        if len(values) == 1:
            fix[name] = values[0]
        else:
            grid[name] = list(values)
