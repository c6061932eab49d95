"""Running a study: points through a backend into the journal, then the answer and how it stands.

Nothing is assumed about how figures depend on parameters. What is skipped is skipped by the
definition of the question alone: where GPUs or dollars are to be few, a point that costs more than
one that keeps the promises cannot be the answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.backend import Backend
from moesim.cluster.prices import check_names
from moesim.errors import InputError
from moesim.studies.evaluator import Outcome
from moesim.studies.file import Search
from moesim.studies.inputs import code_hash
from moesim.studies.journal import StudyJournal
from moesim.studies.question import COST, best
from moesim.studies.runner import Results as Results
from moesim.studies.runner import Runner, groups, levels
from moesim.studies.runner import Study as Study
from moesim.studies.runner import make_study as make_study
from moesim.studies.sensitivity import sensitivity
from moesim.studies.space import Point, distinct
from moesim.studies.tasks import Failure
from moesim.types import Progress


def run_study(
    study: Study,
    backend: Backend,
    *,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """Evaluate the study, find the answer, and see whether it holds when the inputs change.

    journal: where finished points are kept; those it already holds are not computed again. Raises
    InputError where no point can be evaluated at all, or a price is asked for and not known.
    """
    if journal is None:
        return _run(study, Runner(study, backend, None, progress), [])
    with StudyJournal(journal, study.hash) as opened:
        notices = _changes(study, opened)
        return _run(study, Runner(study, backend, opened, progress), notices)


def _run(study: Study, runner: Runner, notices: list[str]) -> Results:
    search = study.file.search
    num_grid = study.space.num_points
    if search is not None and search.points < num_grid:
        points, outcomes = _search(study, runner, search)
        notices.append(
            f"search: {len(points)} of {num_grid:,} points of the grid; the best of these is not"
            " proven to be the best of all"
        )
    else:
        points = distinct([runner.point(raw) for raw in study.space.combinations()])
        if len(points) < num_grid:
            notices.append(f"{num_grid - len(points)} points are the same as others")
        _note_stale(runner, points, notices)
        outcomes = _by_level(study, runner, points)
    found = [o for o in outcomes if o is not None]
    _check_any(found, runner.failures)
    _check_prices(study, found)
    of_key = {o.key: o for o in found}
    by_value = {
        value: [(p, of_key[p.key]) for p in own if p.key in of_key]
        for value, own in groups(study, points).items()
    }
    answers = {
        value: best(study.question, [o for _, o in own], study.evaluator.throughput)
        for value, own in by_value.items()
    }
    results = Results(study, points, outcomes, num_grid, answers, notices=notices)
    if study.file.sensitivity is not False:
        for value, answer in answers.items():
            if answer is not None:
                rows, over = sensitivity(study, runner, by_value[value], answer)
                results.sensitivity += (
                    rows if value is None else [{"per": value, **row} for row in rows]
                )
                results.sensitivity_over = over
    results.failures = runner.failures
    results.num_computed, results.num_reused = len(runner.computed), len(runner.reused)
    return results


def _by_level(study: Study, runner: Runner, points: list[Point]) -> list[Outcome | None]:
    """Outcomes of all points, or with `stop_early` of those up to the first level that keeps the
    promises."""
    if not study.file.stop_early:
        return runner.evaluate(points)
    found: dict[str, Outcome | None] = {}
    for own in groups(study, points).values():
        for group in levels(study, own):
            outcomes = runner.evaluate(group)
            found.update({p.key: o for p, o in zip(group, outcomes, strict=True)})
            if any(o is not None and study.question.keeps(o) for o in outcomes):
                break
    return [found.get(point.key) for point in points]


def _search(
    study: Study, runner: Runner, search: Search
) -> tuple[list[Point], list[Outcome | None]]:
    """A seeded search of at most `search.points` points. The order of the points, and so what is
    found, does not depend on the backend."""
    rng = random.Random(search.seed)
    axes: dict[str, Sequence[Any]] = dict(study.space.axes)
    cases: Sequence[Mapping[str, Any]] = study.space.cases or [{}]
    seen: dict[str, tuple[Point, Outcome | None]] = {}

    def raw(choice: Mapping[str, int]) -> dict[str, Any]:
        own = {name: axes[name][choice[name]] for name in axes}
        return {**study.space.fixed, **cases[choice[""]], **own}

    def evaluate(choices: Sequence[Mapping[str, int]]) -> None:
        points = distinct([runner.point(raw(c)) for c in choices])
        new = [p for p in points if p.key not in seen][: search.points - len(seen)]
        for point, outcome in zip(new, runner.evaluate(new), strict=True):
            seen[point.key] = (point, outcome)

    def score(choice: Mapping[str, int]) -> tuple[float, float]:
        outcome = seen.get(runner.point(raw(choice)).key, (None, None))[1]
        if outcome is None:
            return float("inf"), float("inf")
        return max(0.0, study.question.violation(outcome)), study.question.value(outcome)

    sizes = {"": len(cases), **{name: len(values) for name, values in axes.items()}}
    if search.method == "random":
        total = study.space.num_points
        flats = rng.sample(range(total), min(search.points, total))
        evaluate([_unflatten(flat, sizes) for flat in flats])
    while search.method == "coordinate" and len(seen) < search.points:
        before = len(seen)
        current = {name: rng.randrange(size) for name, size in sizes.items()}
        evaluate([current])
        moved = True
        while moved and len(seen) < search.points:
            moved = False
            for name, size in sizes.items():
                line = [{**current, name: i} for i in range(size)]
                evaluate(line)
                better = min(line, key=score)
                if score(better) < score(current):
                    current, moved = better, True
        if len(seen) == before and len(seen) >= study.space.num_points // 2:
            break
    ordered = list(seen.values())
    return [p for p, _ in ordered], [o for _, o in ordered]


def _unflatten(flat: int, sizes: Mapping[str, int]) -> dict[str, int]:
    out = {}
    for name, size in reversed(list(sizes.items())):
        flat, out[name] = divmod(flat, size)
    return out


def _check_any(outcomes: Sequence[Outcome], failures: Sequence[Failure]) -> None:
    """Raise InputError where nothing was evaluated for reasons that are no verdict."""
    if any(o.status != "refused" for o in outcomes):
        return
    first = next(iter(outcomes), None)
    if first is not None:
        raise InputError(
            f"none of the {len(outcomes)} points can be evaluated; the first: {first.cause}",
            first.remedy,
        )
    if failures:
        raise RuntimeError(f"{failures[0].error}\n{failures[0].trace}")


def _check_prices(study: Study, outcomes: Sequence[Outcome]) -> None:
    check_names(study.prices.given, set(study.prices.used) or set(study.prices.given))
    if study.question.goal != COST:
        return
    unknown = [n for n, used in study.prices.used.items() if used["usd_per_gpu_hour"] is None]
    if unknown:
        raise InputError(
            f"minimize cost: the price of {unknown[0]} is not known",
            f"give dollars per GPU-hour: `price` {unknown[0]}=... or prices: in the study file",
        )


def _changes(study: Study, journal: StudyJournal) -> list[str]:
    """What is different from the runs that the journal is from."""
    notices = []
    if journal.num_damaged:
        notices.append(
            f"{journal.num_damaged} lines of {journal.path.name} are damaged: their points are"
            " computed again"
        )
    if journal.studies and study.hash != journal.studies[-1]:
        notices.append(
            f"the study has changed since {journal.path.name} was begun: points that both have are"
            " taken from it"
        )
    return notices


def _note_stale(runner: Runner, points: Sequence[Point], notices: list[str]) -> None:
    """Say which points the journal holds for other inputs or other code."""
    if runner.journal is None or not runner.known:
        return
    wanted = {p.key for p in points}
    of_params = {_settings(p.params): p for p in points if p.key not in runner.known}
    changed: dict[str, int] = {}
    for outcome in runner.known.values():
        point = of_params.get(_settings(outcome.params))
        if point is None or outcome.key in wanted:
            continue
        differ = [n for n, v in point.inputs.items() if outcome.inputs.get(n) != v]
        for name in differ or ["code of moesim"]:
            changed[name] = changed.get(name, 0) + 1
    for name, count in changed.items():
        notices.append(f"the {name} has changed since {count} points were computed: computed again")


def _settings(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def provenance(study: Study, points: Sequence[Point]) -> dict[str, Any]:
    """Hashes of what the results rest on."""
    inputs: dict[str, set[str]] = {}
    for point in points:
        for name, value in point.inputs.items():
            inputs.setdefault(name, set()).add(value)
    from importlib.metadata import version

    return {
        "study": study.hash,
        "code": code_hash(),
        "moesim": version("moesim"),
        "inputs": {name: sorted(values) for name, values in sorted(inputs.items())},
    }
