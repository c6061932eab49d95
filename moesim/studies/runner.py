"""A study made ready, what it found, and how its points are evaluated."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moesim.backend import Backend
from moesim.cluster.prices import Prices
from moesim.errors import InputError, MoesimError, UnknownNameError
from moesim.studies.evaluator import Evaluator, Outcome, Scalar
from moesim.studies.file import StudyFile, check_study
from moesim.studies.journal import StudyJournal
from moesim.studies.question import COST, Question, best, make_question
from moesim.studies.registry import get_evaluator
from moesim.studies.space import DEFAULT_MAX_POINTS, Point, Space, distinct, make_point
from moesim.studies.tasks import Failure, make_task, refused, run_task
from moesim.types import Progress

RENTED = "gpus"
PER_INPUT = "cost_usd_per_million_input_tokens"


@dataclass(eq=False)
class Study:
    """A study made ready: evaluator, space, question; and the raw file it is from."""

    content: dict[str, Any]
    file: StudyFile
    evaluator: Evaluator
    space: Space
    question: Question
    prices: Prices
    max_points: int = DEFAULT_MAX_POINTS

    @property
    def hash(self) -> str:
        """sha256 of the study's content."""
        text = json.dumps(self.content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def make_study(content: dict[str, Any], *, max_points: int = DEFAULT_MAX_POINTS) -> Study:
    """A study from the content of its file (`read_study`), ready to run.

    Raises FormatError, InputError and UnknownNameError that name the key.
    """
    file = check_study(content, "the study")
    evaluator = get_evaluator(file.evaluator)
    space = Space(file.fixed, file.axes(), file.cases)
    if file.search is None:
        space.check_size(max_points)
    elif file.search.points > max_points:
        raise InputError(
            f"search.points {file.search.points:,} is more than {max_points:,}",
            f"`max_points` {file.search.points}",
        )
    if file.per is not None and file.per not in evaluator.params.model_fields:
        raise UnknownNameError("parameter of `per`", file.per, evaluator.params.model_fields)
    if file.per is not None and file.search is not None:
        raise InputError("per with search", "a search looks for one answer: leave out one of them")
    question = make_question(evaluator, file.slo, file.minimize, file.maximize)
    if file.stop_early and question.goal not in (RENTED, COST):
        raise InputError(
            f"stop_early with {question}",
            "it is for minimize gpus or cost, where what costs more cannot be the answer",
        )
    for name in file.front or ():
        if name not in (RENTED, "cost", COST) and evaluator.figure(name) is None:
            make_question(evaluator, "", name, None)
    return Study(content, file, evaluator, space, question, Prices(file.prices), max_points)


@dataclass(eq=False)
class Results:
    """What a run found. points, outcomes: of the grid, in its order; None where not evaluated.

    answers: by each value of the parameter `per`; without one, the answer by None.
    num_computed, num_reused: points evaluated now, and taken from the journal. rows: sensitivity.
    """

    study: Study
    points: list[Point]
    outcomes: list[Outcome | None]
    num_grid: int
    answers: dict[Scalar, Outcome | None]
    failures: list[Failure] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)
    sensitivity_over: str = ""
    num_computed: int = 0
    num_reused: int = 0

    @property
    def evaluated(self) -> list[Outcome]:
        """The outcomes that there are."""
        return [outcome for outcome in self.outcomes if outcome is not None]

    @property
    def answer(self) -> Outcome | None:
        """The best of the answers."""
        found = [o for o in self.answers.values() if o is not None]
        return best(self.study.question, found, self.study.evaluator.throughput)


def groups(study: Study, points: Sequence[Point]) -> dict[Scalar, list[Point]]:
    """`points` by their value of `per`; all of them by None where nothing is asked per."""
    out: dict[Scalar, list[Point]] = {}
    for point in points:
        out.setdefault(point.params[study.file.per] if study.file.per else None, []).append(point)
    return out


class Runner:
    """Evaluates points of one study, each at most once."""

    def __init__(
        self,
        study: Study,
        backend: Backend,
        journal: StudyJournal | None,
        progress: Progress | None = None,
    ) -> None:
        self.study = study
        self.backend = backend
        self.journal = journal
        self.progress = progress
        self.known: dict[str, Outcome] = dict(journal.outcomes) if journal is not None else {}
        self.failures: list[Failure] = []
        self.computed: set[str] = set()
        self.reused: set[str] = set()
        self._of_raw: dict[str, Point] = {}
        self._done = 0
        self._total = 0

    def point(self, raw: Mapping[str, Any]) -> Point:
        """`make_point`, remembered."""
        name = json.dumps(raw, sort_keys=True, default=str)
        if name not in self._of_raw:
            self._of_raw[name] = make_point(self.study.evaluator, raw)
        return self._of_raw[name]

    def evaluate(self, points: Sequence[Point]) -> list[Outcome | None]:
        """Outcomes of `points` in their order, with price; None for one that failed."""
        todo = []
        for point in distinct(points):
            if point.key in self.known:
                if point.key not in self.computed:
                    self.reused.add(point.key)
            elif point.error is not None:
                self._keep(refused(point.key, point.params, point.inputs, point.error))
            else:
                todo.append(make_task(self.study.evaluator.name, point))
        self._total += len(todo)
        self._tick()
        for _, result in self.backend.run(run_task, todo):
            self._done += 1
            if isinstance(result, Failure):
                self.failures.append(result)
            else:
                self._keep(result)
            self._tick()
        return [self._priced(point, self.known.get(point.key)) for point in points]

    def _keep(self, outcome: Outcome) -> None:
        if self.journal is not None:
            self.journal.add(outcome)
        self.known[outcome.key] = outcome
        self.computed.add(outcome.key)

    def _tick(self) -> None:
        if self.progress is not None:
            self.progress(self._done, self._total)

    def _priced(self, point: Point, outcome: Outcome | None) -> Outcome | None:
        """The outcome with the figures that follow from its parameters: GPUs and dollars."""
        if outcome is None or not outcome.ok:
            return outcome
        return with_price(self.study, self.study.prices, point, outcome)


def with_price(study: Study, prices: Prices, point: Point, outcome: Outcome) -> Outcome:
    """`outcome` with `gpus`, dollars per hour and, given a throughput, per million tokens.

    A service's are per million output tokens; where GPUs decode only, those bear the output tokens
    and the others the input tokens.
    """
    figures = dict(outcome.figures)
    figures[RENTED] = float(str(point.params["gpus"]))
    each = prices.each_per_hour(study.evaluator.cluster(point.params))
    figures[COST] = cost = None if each is None else sum(each)
    name, throughput = per_token(study.evaluator), study.evaluator.throughput
    if each is None or cost is None or not throughput:
        return replace(outcome, figures=figures)
    decoding = point.params.get("decode_gpus")
    if decoding is not None:
        front = len(each) - int(str(decoding))
        cost, prompts = sum(each[front:]), figures.get("prompt_tokens_per_s")
        if prompts:
            figures[PER_INPUT] = sum(each[:front]) / (prompts * 3600) * 1e6
    rate = figures.get(throughput)
    if rate:
        figures[name] = cost / (rate * 3600) * 1e6
    return replace(outcome, figures=figures)


def per_token(evaluator: Evaluator) -> str:
    """Name of the figure in dollars per million of the tokens of the evaluator's throughput."""
    kind = "output_" if evaluator.throughput.startswith("output_") else ""
    return f"cost_usd_per_million_{kind}tokens"


def levels(study: Study, points: Sequence[Point]) -> list[list[Point]]:
    """`points` grouped by what the question makes small, where that is known without evaluating,
    smallest first; one group otherwise."""
    goal = study.question.goal
    if goal not in (RENTED, COST):
        return [list(points)]

    def size(point: Point) -> float:
        if goal == RENTED:
            return float(str(point.params["gpus"]))
        try:
            cost = study.prices.per_hour(study.evaluator.cluster(point.params))
        except MoesimError:
            cost = None
        return float("inf") if cost is None else cost

    ranked = sorted(points, key=size)
    return [list(group) for _, group in itertools.groupby(ranked, key=size)]
