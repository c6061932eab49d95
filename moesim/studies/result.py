"""The result of a study as one JSON file: points, front, answer, sensitivity, what it rests on."""

from __future__ import annotations

import json
from typing import Any

from moesim.cost.curves import weakest
from moesim.files import atomic_write
from moesim.studies.evaluator import Outcome
from moesim.studies.question import COST, nearest, pareto
from moesim.studies.run import Results, provenance
from moesim.studies.runner import PER_INPUT, groups, per_token
from moesim.studies.sensitivity import front_axes

FORMAT = "moesim-study"
VERSION = 1


def to_json(results: Results) -> dict[str, Any]:
    """Plain data, the same bytes for the same study, inputs and code. docs/whatif.md says what
    every key means."""
    study, question = results.study, results.study.question
    found = results.evaluated
    axes = front_axes(study)
    front = pareto([o for o in found if question.keeps(o)] or found, axes)
    on_front = {o.key for o in front}
    answer = results.answer
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
        "defaults": _defaults(results),
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
        "nearest": _nearest(results, found) if answer is None else None,
        "per": study.file.per,
        "answers": _answers(results) if study.file.per is not None else [],
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


MORE_OF = {"micro_batches": "expert_gpus", "drafts": "speculate", "fixed_drafts": "speculate"}
"""A parameter, and the one without which it says nothing."""


def _defaults(results: Results) -> dict[str, Any]:
    """Parameters that nobody gave and that are the same at every point, without those that are
    switched off, scale by 1 or say more of something not asked for."""
    space = results.study.space
    given = {*space.fixed, *space.axes, *(name for case in space.cases for name in case)}
    out = {}
    for name, field in results.study.evaluator.params.model_fields.items():
        off = field.is_required() or field.default in (None, False, 0, "off")
        off = off or (name in MORE_OF and MORE_OF[name] not in given)
        if name not in given and not off and not name.endswith("_scale"):
            out[name] = field.default
    return out


def _figures(results: Results) -> dict[str, dict[str, str]]:
    out = {
        f.name: {"label": f.label, "unit": f.base, "better": f.better}
        for f in results.study.evaluator.figures
    }
    out["gpus"] = {"label": "GPUs", "unit": "", "better": "low"}
    out[COST] = {"label": "dollars per hour", "unit": "", "better": "low"}
    if results.study.evaluator.throughput:
        name = per_token(results.study.evaluator)
        kind = "output tokens" if "output" in name else "tokens"
        out[name] = {"label": f"dollars per million {kind}", "unit": "", "better": "low"}
    if "decode_gpus" in results.study.evaluator.params.model_fields:
        label = "dollars per million input tokens"
        out[PER_INPUT] = {"label": label, "unit": "", "better": "low"}
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
    if outcome.engines:
        row["engines"] = outcome.engines
    if outcome.notes:
        row["notes"] = list(outcome.notes)
    return row


def _nearest(results: Results, outcomes: list[Outcome]) -> dict[str, Any] | None:
    question = results.study.question
    close = nearest(question, outcomes)
    if close is None:
        return None
    return {
        "point": close.key,
        "violation": question.violation(close),
        "missed": [str(b) for b in question.bounds if not b.kept(close.figures)],
    }


def _answers(results: Results) -> list[dict[str, Any]]:
    """The answer, or the nearest point, of every value of `per`."""
    own = {o.key: o for o in results.evaluated}
    out = []
    for value, points in groups(results.study, results.points).items():
        answer = _answer(results, results.answers[value])
        close = None
        if answer is None:
            close = _nearest(results, [own[p.key] for p in points if p.key in own])
        out.append({"value": value, "answer": answer, "nearest": close})
    return out


def _answer(results: Results, answer: Outcome | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    varied, per = results.study.space.varied(), results.study.file.per
    own = answer.params[per] if per is not None else None
    rows = [row for row in results.sensitivity if row.get("per") == own]
    return {
        "point": answer.key,
        "value": answer.figures.get(results.study.question.goal),
        "params": {name: answer.params[name] for name in varied},
        "figures": answer.figures,
        "robust": not any(row["changed"] for row in rows) if rows else None,
    }
