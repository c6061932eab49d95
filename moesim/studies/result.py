"""The result of a study as one JSON file: points, front, answer, sensitivity, what it rests on."""

from __future__ import annotations

import json
from typing import Any

from moesim.cost.curves import weakest
from moesim.files import atomic_write
from moesim.studies.evaluator import Outcome
from moesim.studies.question import COST, nearest, pareto
from moesim.studies.run import Results, provenance
from moesim.studies.sensitivity import front_axes

FORMAT = "moesim-study"
VERSION = 1
PER_TOKEN = "cost_usd_per_million_tokens"


def to_json(results: Results) -> dict[str, Any]:
    """Plain data, the same bytes for the same study, inputs and code. docs/whatif.md says what
    every key means."""
    study, question = results.study, results.study.question
    found = results.evaluated
    axes = front_axes(study)
    front = pareto([o for o in found if question.keeps(o)] or found, axes)
    on_front = {o.key for o in front}
    answer = results.answer
    close = nearest(question, found) if answer is None else None
    bases = sorted({o.basis for o in found if o.basis})
    prices = study.prices.used
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": study.file.name,
        "evaluator": study.evaluator.name,
        "about": study.evaluator.about,
        "question": {
            "text": str(question),
            "asked": question.asked,
            "slo": [
                {"figure": b.figure, "sign": b.sign, "limit": b.limit, "text": str(b)}
                for b in question.bounds
            ],
            "goal": question.goal,
            "better": question.better,
        },
        "fixed": dict(study.space.fixed),
        "axes": {name: list(values) for name, values in study.space.axes.items()},
        "cases": [dict(case) for case in study.space.cases],
        "varied": study.space.varied(),
        "figures": _figures(results),
        "num_grid": results.num_grid,
        "num_points": len(results.points),
        "points": [
            _point(p.key, p.params, o, results, on_front)
            for p, o in zip(results.points, results.outcomes, strict=True)
        ],
        "pareto": {
            "axes": [{"figure": name, "better": better} for name, better in axes],
            "points": [o.key for o in front],
        },
        "answer": _answer(results, answer),
        "nearest": None
        if close is None
        else {
            "point": close.key,
            "violation": question.violation(close),
            "missed": [str(b) for b in question.bounds if not b.kept(close.figures)],
        },
        "sensitivity": {"over": results.sensitivity_over, "rows": results.sensitivity},
        "prices": prices,
        "basis": weakest(*bases) if bases else None,  # type: ignore[arg-type]
        "failures": [{"point": f.key, "error": f.error} for f in results.failures],
        "notices": results.notices,
        "provenance": provenance(study, results.points),
    }


def save(data: dict[str, Any], path: str | Any) -> None:
    """Write the result; old file or none if that fails."""
    atomic_write(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def _figures(results: Results) -> dict[str, dict[str, str]]:
    out = {
        f.name: {"label": f.label, "unit": f.unit, "better": f.better}
        for f in results.study.evaluator.figures
    }
    out["gpus"] = {"label": "GPUs", "unit": "", "better": "low"}
    out[COST] = {"label": "dollars per hour", "unit": "", "better": "low"}
    if results.study.evaluator.throughput:
        out[PER_TOKEN] = {"label": "dollars per million tokens", "unit": "", "better": "low"}
    return out


def _point(
    key: str,
    params: dict[str, Any],
    outcome: Outcome | None,
    results: Results,
    on_front: set[str],
) -> dict[str, Any]:
    question = results.study.question
    if outcome is None:
        failed = any(f.key == key for f in results.failures)
        return {"key": key, "params": params, "status": "failed" if failed else "not evaluated"}
    row: dict[str, Any] = {"key": key, "params": params, "status": outcome.status}
    if outcome.ok:
        row |= {
            "figures": outcome.figures,
            "keeps": question.keeps(outcome),
            "pareto": key in on_front,
            "basis": outcome.basis,
        }
        if question.bounds:
            row["missed"] = [str(b) for b in question.bounds if not b.kept(outcome.figures)]
    else:
        row |= {"cause": outcome.cause, "remedy": outcome.remedy}
    if outcome.notes:
        row["notes"] = list(outcome.notes)
    return row


def _answer(results: Results, answer: Outcome | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    varied = results.study.space.varied()
    return {
        "point": answer.key,
        "value": answer.figures.get(results.study.question.goal),
        "params": {name: answer.params[name] for name in varied},
        "figures": answer.figures,
        "robust": not any(row["changed"] for row in results.sensitivity)
        if results.sensitivity
        else None,
    }
