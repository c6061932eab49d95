"""What is asked of a study: bounds to keep, and what to make as small or large as possible."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moesim import numerals
from moesim.errors import InputError, UnknownNameError
from moesim.serving.slo import UNITS_S
from moesim.studies.evaluator import Evaluator, Outcome

COST = "cost_usd_per_hour"
_BOUND = re.compile(r"^\s*([a-z][a-z0-9_]*)\s*(<|>)=?\s*([0-9.eE+-]+)\s*([a-z%]*)\s*$")
_REMEDY = 'write "tpot_p99<50ms,ttft_p99<2s", or a figure with > for at least'
_OF_FIGURE = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True, slots=True)
class Promise:
    """A figure that has to stay on one side of `limit`, in the figure's own unit."""

    figure: str
    unit: str
    sign: Literal["<", ">"]
    limit: float

    def kept(self, figures: Mapping[str, float | None]) -> bool:
        """Whether a point keeps the bound. A figure that it does not have keeps none."""
        return self.violation(figures) <= 0

    def violation(self, figures: Mapping[str, float | None]) -> float:
        """How far off, relative to the limit; 0 or less is kept, infinity is no figure."""
        value = figures.get(self.figure)
        if value is None:
            return math.inf
        off = value - self.limit if self.sign == "<" else self.limit - value
        if off == 0:
            return 1e-12
        return off / max(abs(self.limit), 1e-300)

    def __str__(self) -> str:
        if self.unit not in _OF_FIGURE:
            return f"{self.figure}{self.sign}{self.limit:g}"
        seconds = self.limit * _OF_FIGURE[self.unit]
        unit = next((u for u in ("s", "ms") if seconds >= UNITS_S[u]), "us")
        name = self.figure.removesuffix(f"_{self.unit}")
        return f"{name}{self.sign}{seconds / UNITS_S[unit]:g}{unit}"


@dataclass(frozen=True, slots=True)
class Question:
    """bounds to keep; `goal`: a figure, `gpus` or COST, to make small (`low`) or large (`high`)."""

    bounds: tuple[Promise, ...]
    goal: str
    better: Literal["low", "high"]
    asked: bool = True

    def keeps(self, outcome: Outcome) -> bool:
        """Whether a point is feasible and keeps every bound."""
        return outcome.ok and all(bound.kept(outcome.figures) for bound in self.bounds)

    def violation(self, outcome: Outcome) -> float:
        """The largest relative violation of any bound, 0 where all are kept."""
        if not outcome.ok:
            return math.inf
        return max((b.violation(outcome.figures) for b in self.bounds), default=0.0)

    def value(self, outcome: Outcome) -> float:
        """The goal's figure, so that smaller is better; infinity where there is none."""
        value = outcome.figures.get(self.goal)
        if value is None:
            return math.inf
        return value if self.better == "low" else -value

    def __str__(self) -> str:
        keep = f" with {', '.join(str(b) for b in self.bounds)}" if self.bounds else ""
        return f"{'least' if self.better == 'low' else 'most'} {self.goal}{keep}"


def parse_bounds(text: str, evaluator: Evaluator) -> tuple[Promise, ...]:
    """Bounds from text such as "tpot_p99<50ms,throughput_tokens_per_s>1000".

    A figure may be named with or without its unit; times need one. Raises InputError for text that
    is no bound or a figure bound twice on one side, UnknownNameError for a figure that the
    evaluator does not give.
    """
    if not text.strip():
        return ()
    out: list[Promise] = []
    for part in text.split(","):
        found = _BOUND.match(part)
        if found is None:
            raise InputError(f"slo: {part.strip()[:80]!r} is no bound", _REMEDY)
        name, sign, number, unit = found.groups()
        figure = evaluator.figure(name)
        if figure is None:
            known = [f.name.removesuffix(f"_{f.base}") for f in evaluator.figures]
            raise UnknownNameError(
                f"figure of evaluator {evaluator.name}", name, known,
            )  # fmt: skip
        try:
            limit = numerals.number(number)
        except ValueError:
            raise InputError(f"slo: {number!r} in {part.strip()!r} is no number", _REMEDY) from None
        if figure.base in _OF_FIGURE:
            if unit not in UNITS_S:
                raise InputError(
                    f"slo: {part.strip()[:80]!r} has no unit of time",
                    f"write one of {', '.join(UNITS_S)}",
                )
            limit *= UNITS_S[unit] / _OF_FIGURE[figure.base]
        elif unit == "%":
            limit /= 100
        elif unit not in ("", figure.base):
            raise InputError(
                f"slo: {figure.name} is not measured in {unit}",
                "leave the unit out: the figure's name says it",
            )
        if not math.isfinite(limit) or limit <= 0:
            raise InputError(f"slo: {part.strip()[:80]!r}: the bound is not above 0", _REMEDY)
        if any(b.figure == figure.name and b.sign == sign for b in out):
            raise InputError(f"slo: {name} is bound twice", "keep one of the two")
        out.append(Promise(figure.name, figure.base, sign, limit))  # type: ignore[arg-type]
    for low in out:
        for high in out:
            crossed = (low.sign, high.sign) == (">", "<") and low.limit >= high.limit
            if low.figure == high.figure and crossed:
                raise InputError(
                    f"slo: nothing is both {low} and {high}", "correct one of the two bounds"
                )
    return tuple(out)


def make_question(
    evaluator: Evaluator, slo: str, minimize: str | None, maximize: str | None
) -> Question:
    """The question of a study; without one, the evaluator's own goal.

    Raises InputError and UnknownNameError as `parse_bounds`, and for a goal that is not known.
    """
    bounds = parse_bounds(slo, evaluator)
    if minimize is not None and maximize is not None:
        raise InputError("both minimize and maximize are asked", "ask one of the two")
    asked = minimize or maximize
    if asked is None:
        name, better, given = evaluator.goal, "", bool(bounds)
        figure = evaluator.figure(name)
        better = figure.better if figure is not None else "low"
    else:
        name, better, given = asked, "low" if minimize else "high", True
        if name in ("gpus", "cost", COST):
            if maximize:
                raise InputError(f"maximize {name}", f"ask `minimize` {name}")
            name = COST if name.startswith("cost") else name
        elif name == "throughput":
            name = evaluator.throughput
            if not name:
                raise InputError(
                    f"evaluator {evaluator.name} gives no throughput",
                    f"ask one of its figures: {', '.join(f.name for f in evaluator.figures)}",
                )
        else:
            figure = evaluator.figure(name)
            if figure is None:
                known = ("gpus", "cost", "throughput", *(f.name for f in evaluator.figures))
                raise UnknownNameError("goal", name, known)
            name = figure.name
    return Question(bounds, name, "high" if better == "high" else "low", given)


def best(question: Question, outcomes: Sequence[Outcome], tie: str = "") -> Outcome | None:
    """The best of the points that keep all bounds; None where none does.

    Equal ones are told apart by the figure `tie` (largest first), then by their order.
    """
    keeping = [o for o in outcomes if question.keeps(o) and math.isfinite(question.value(o))]
    if not keeping:
        return None

    def rank(outcome: Outcome) -> tuple[float, float]:
        second = outcome.figures.get(tie)
        return question.value(outcome), -second if second is not None else math.inf

    return min(keeping, key=rank)


def nearest(question: Question, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The point that misses the bounds by least, where none keeps them."""
    able = [o for o in outcomes if math.isfinite(question.violation(o))]
    if not able:
        return None
    return min(able, key=lambda o: (question.violation(o), question.value(o)))


def pareto(
    outcomes: Sequence[Outcome], axes: Sequence[tuple[str, Literal["low", "high"]]]
) -> list[Outcome]:
    """The points that no other beats: at least as good in every axis, and better in one.

    Of points that are equal in every axis all are kept. Points that lack a figure are left out.
    """

    def values(outcome: Outcome) -> tuple[float, ...] | None:
        out = []
        for name, better in axes:
            value = outcome.figures.get(name)
            if value is None:
                return None
            out.append(value if better == "low" else -value)
        return tuple(out)

    placed = [(v, o) for o in outcomes if o.ok and (v := values(o)) is not None]
    front: list[tuple[tuple[float, ...], Outcome]] = []
    for v, outcome in sorted(placed, key=lambda pair: pair[0]):
        beaten = any(all(a <= b for a, b in zip(w, v, strict=True)) and w != v for w, _ in front)
        if not beaten:
            front.append((v, outcome))
    return [outcome for _, outcome in front]
