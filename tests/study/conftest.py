"""A toy evaluator whose figures are worked out by hand, and a small real study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest

from moesim.backend import open_backend
from moesim.errors import InfeasibleError, InputError
from moesim.figures import Figure
from moesim.studies.evaluator import Evaluated, Evaluator, Factor, Number, Params
from moesim.studies.registry import EVALUATORS, get_evaluator
from moesim.studies.run import Results, make_study, run_study


class ToyParams(Params):
    """`work` seconds on one GPU, with a fixed `overhead` a GPU."""

    work: Number = 8.0
    overhead: Number = 0.0
    load_scale: Factor = 1.0


class Toy(Evaluator):
    """time = work load / (gpus compute) + overhead gpus / network; throughput = 1 / time."""

    name: ClassVar = "toy"
    about: ClassVar = "a toy"
    params: ClassVar = ToyParams
    figures: ClassVar = (
        Figure("time_s", "time", "ms", factor=1e3),
        Figure("rate", "rate", better="high"),
    )
    goal: ClassVar = "time_s"
    throughput: ClassVar = "rate"
    front: ClassVar = ("time_s", "gpus")
    scales: ClassVar = {
        "network bandwidth": "network_scale",
        "compute": "compute_scale",
        "load": "load_scale",
    }
    calls: ClassVar[list[dict[str, Any]]] = []

    def inputs(self, params: Mapping[str, Any]) -> dict[str, str]:
        return {"cluster": str(params["cluster"])}

    def evaluate(self, params: Mapping[str, Any]) -> Evaluated:
        Toy.calls.append(dict(params))
        if params["work"] < 0:
            raise InputError("work below 0", "give more")
        if params["gpus"] > 64:
            raise InfeasibleError("too many", "take fewer")
        if params["work"] == 13:
            raise ZeroDivisionError("a bug")
        time = params["work"] * params["load_scale"] / (params["gpus"] * params["compute_scale"])
        time += params["overhead"] * params["gpus"] / params["network_scale"]
        return Evaluated({"time_s": time, "rate": 1 / time}, "assumed", ("a remark",))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Toy]]:
    """The toy evaluator, registered as `toy`; `calls` counts its evaluations."""
    import sys

    module = type(sys)("moesim.studies.evaluators.toy")
    module.Toy = Toy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moesim.studies.evaluators.toy", module)
    monkeypatch.setitem(EVALUATORS, "toy", ("toy", "Toy"))
    Toy.calls.clear()
    get_evaluator.cache_clear()
    yield Toy
    get_evaluator.cache_clear()


@pytest.fixture
def ask(toy: type[Toy]) -> Callable[..., Results]:
    """Run a study of the toy here: keyword arguments are keys of the study file."""

    def run(*, journal: Any = None, max_points: int = 2000, **content: Any) -> Results:
        content = {"evaluator": "toy", "sensitivity": False, **content}
        with open_backend("serial") as backend:
            return run_study(make_study(content, max_points=max_points), backend, journal=journal)

    return run
