"""Evaluators by name; each module is imported when it is asked for."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

from moesim.errors import UnknownNameError
from moesim.studies.evaluator import Evaluator

EVALUATORS: dict[str, tuple[str, str]] = {
    "plan": ("plan", "PlanEvaluator"),
    "step": ("step", "StepEvaluator"),
    "static": ("static", "StaticEvaluator"),
    "requests": ("requests", "RequestsEvaluator"),
    "cache": ("cache", "CacheEvaluator"),
}
"""Name: (module of moesim.studies.evaluators, class)."""


@lru_cache(maxsize=16)
def get_evaluator(name: str) -> Evaluator:
    """The evaluator called `name`. Raises UnknownNameError for another name."""
    if name not in EVALUATORS:
        raise UnknownNameError("evaluator", name, EVALUATORS)
    module, kind = EVALUATORS[name]
    found = getattr(import_module(f"moesim.studies.evaluators.{module}"), kind)
    return found()  # type: ignore[no-any-return]
