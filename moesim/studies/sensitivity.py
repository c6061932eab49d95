"""Whether the answer still holds when an input is different: the question asked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moesim.studies.question import COST, Question, best, pareto
from moesim.studies.runner import Runner, Study, levels, with_price
from moesim.studies.space import Point

if TYPE_CHECKING:
    from moesim.studies.evaluator import Outcome

ALL = "all points"
CONTENDERS = "the Pareto front and the ten best points alone"
MAX_CONTENDERS = 10


def sensitivity(
    study: Study, runner: Runner, pairs: list[tuple[Point, Outcome]], answer: Outcome
) -> tuple[list[dict[str, Any]], str]:
    """Rows, one an input and factor, of `answer`, the best of `pairs`; and over which points the
    question was asked again.

    A row: `input`, `factor`; `answer` and `value`, of the question asked again (None where no
    point keeps the promises any more); `changed`, whether that is another point; `kept`, whether
    the first answer still keeps the promises, with its `figures`. All points are evaluated again
    where that stays within the study's limit, otherwise the contenders alone.
    """
    share = float(study.file.sensitivity)
    over = ALL
    factors = (1 - share, 1 + share)
    scales = study.evaluator.scales
    if len(pairs) * len(factors) * len(scales) > study.max_points or study.file.search is not None:
        pairs, over = _contenders(study, pairs, answer), CONTENDERS
    rows = []
    for label, name in scales.items():
        for factor in factors:
            scaled: dict[str, str] = {}
            varied = []
            for point, _ in pairs:
                value = float(str(point.params[name])) * factor
                other = runner.point({**point.params, name: value})
                scaled[other.key] = point.key
                varied.append(other)
            outcomes: list[Outcome] = []
            for group in levels(study, varied):
                outcomes += [o for o in runner.evaluate(group) if o is not None]
                own_done = any(scaled[o.key] == answer.key for o in outcomes)
                if own_done and any(study.question.keeps(o) for o in outcomes):
                    break
            rows.append(_row(study, study.question, label, factor, outcomes, scaled, answer))
    if study.question.goal == COST:
        rows += _price_rows(study, pairs, answer, factors)
    return rows, over


def _contenders(
    study: Study, pairs: list[tuple[Point, Outcome]], answer: Outcome
) -> list[tuple[Point, Outcome]]:
    outcomes = [o for _, o in pairs]
    front = pareto(outcomes, [(n, b) for n, b in front_axes(study)])
    question = study.question
    near = sorted(
        (o for o in outcomes if o.ok),
        key=lambda o: (max(0.0, question.violation(o)), question.value(o)),
    )
    keys = {o.key for o in (*front, *near[:MAX_CONTENDERS], answer)}
    return [(p, o) for p, o in pairs if o.key in keys]


def front_axes(study: Study) -> list[tuple[str, Any]]:
    """Axes of the Pareto front: (figure, better)."""
    out: list[tuple[str, Any]] = []
    for name in study.file.front or study.evaluator.front:
        figure = study.evaluator.figure(name)
        if figure is not None:
            out.append((figure.name, figure.better or "low"))
        else:
            out.append((COST if name.startswith("cost") else name, "low"))
    return out


def _row(
    study: Study,
    question: Question,
    label: str,
    factor: float,
    outcomes: Sequence[Outcome],
    of_base: dict[str, str],
    answer: Outcome,
) -> dict[str, Any]:
    found = best(question, outcomes, study.evaluator.throughput)
    same = next((o for o in outcomes if of_base[o.key] == answer.key), None)
    return {
        "input": label,
        "factor": round(factor, 6),
        "answer": of_base[found.key] if found is not None else None,
        "value": found.figures.get(question.goal) if found is not None else None,
        "changed": found is None or of_base[found.key] != answer.key,
        "kept": same is not None and question.keeps(same),
        "figures": dict(same.figures) if same is not None else {},
    }


def _price_rows(
    study: Study,
    pairs: Sequence[tuple[Point, Outcome]],
    answer: Outcome,
    factors: Sequence[float],
) -> list[dict[str, Any]]:
    """The same for the price of each GPU type, which needs no evaluation."""
    rows = []
    for gpu in sorted(study.prices.used):
        for factor in factors:
            prices = study.prices.scaled(gpu, factor)
            outcomes = [with_price(study, prices, p, replace(o)) if o.ok else o for p, o in pairs]
            own = {o.key: o.key for o in outcomes}
            rows.append(
                _row(study, study.question, f"price of {gpu}", factor, outcomes, own, answer)
            )
    return rows
