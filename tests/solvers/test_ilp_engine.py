"""The engine: outcomes, bounds, starts that count, limits, and stopping."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.solvers.ilp import engine as module
from moesim.solvers.ilp.engine import ENGINES, IlpModel, Outcome, default_engine


def schedule(jobs: int, machines: int, *, start: bool) -> tuple[IlpModel, float]:
    """Jobs of random length to machines; the start deals them in turn. Returns its makespan."""
    length = np.random.default_rng(1).integers(1, 1000, jobs)
    model = IlpModel()
    on = [[model.binary() for _ in range(machines)] for _ in range(jobs)]
    for row in on:
        model.equal([(v, 1.0) for v in row], 1.0)
    loads = [
        ([(row[m], float(w)) for row, w in zip(on, length, strict=True)], 0.0)
        for m in range(machines)
    ]
    model.largest(loads, cost=1.0)
    if start:
        for j, row in enumerate(on):
            for m, variable in enumerate(row):
                model.start(variable, float(j % machines == m))
    return model, float(max(length[m::machines].sum() for m in range(machines)))


@pytest.mark.parametrize("engine", ENGINES)
def test_knapsack(engine: str) -> None:
    """Values 6, 5, 4 of weight 3, 2, 2 in 4: the last two are worth 9."""
    model = IlpModel()
    take = [model.binary(cost=-v) for v in (6, 5, 4)]
    model.at_most([(v, w) for v, w in zip(take, (3, 2, 2), strict=True)], 4)
    found = model.solve(engine=engine)
    assert found.outcome is Outcome.OPTIMAL
    assert found.objective == pytest.approx(-9)
    assert found.bound <= found.objective
    assert found.gap <= 1e-5
    assert found.values is not None
    assert [round(x) for x in found.values] == [0, 1, 1]
    assert found.engine == engine


@pytest.mark.parametrize("engine", ENGINES)
def test_no_solution(engine: str) -> None:
    model = IlpModel()
    model.at_least([(model.binary(), 1.0)], 2.0)
    found = model.solve(engine=engine)
    assert found.outcome is Outcome.INFEASIBLE
    assert found.values is None
    assert math.isinf(found.gap)


@pytest.mark.parametrize("engine", ENGINES)
def test_continuous(engine: str) -> None:
    """x + y >= 2.5 with y at most 1 and twice as dear as x."""
    model = IlpModel()
    x, y = model.continuous(cost=1.0), model.continuous(0.0, 1.0, cost=2.0)
    model.at_least([(x, 1.0), (y, 1.0)], 2.5)
    found = model.solve(engine=engine)
    assert found.objective == pytest.approx(2.5)
    assert found.bound == pytest.approx(2.5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_start_is_honoured(engine: str) -> None:
    """With no time to search, what comes back is never worse than the start, and CBC, which does
    not get to anything else, returns just that. Without a start it may have nothing."""
    model, makespan = schedule(60, 8, start=True)
    found = model.solve(engine=engine, time_limit_s=0.01)
    assert found.outcome is Outcome.TIME_LIMIT
    assert found.values is not None
    assert found.objective <= makespan + 1e-6
    assert found.bound <= found.objective


def test_highs_takes_the_start_itself() -> None:
    """A subset-sum that no heuristic meets: without search, only the start satisfies it."""
    numbers = np.random.default_rng(4).integers(10**6, 10**7, 60)
    picked = np.random.default_rng(5).random(60) < 0.5
    answers = []
    for start in (False, True):
        model = IlpModel()
        take = [model.binary() for _ in numbers]
        target = float(numbers[picked].sum())
        model.equal([(v, float(n)) for v, n in zip(take, numbers, strict=True)], target)
        if start:
            for v, on in zip(take, picked, strict=True):
                model.start(v, float(on))
        answers.append(model.solve(engine="highs", time_limit_s=0.01))
    assert answers[0].values is None
    assert answers[1].values is not None
    assert (answers[1].values > 0.5).tolist() == picked.tolist()


def test_an_incomplete_start_is_not_used() -> None:
    model = IlpModel()
    x, y = model.binary(cost=1.0), model.binary(cost=1.0)
    model.at_least([(x, 1.0), (y, 1.0)], 1.0)
    model.start(x, 1.0)
    assert model.solve().objective == pytest.approx(1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_node_limits_give_the_same_answer_every_time(engine: str) -> None:
    """INV-6 as far as it goes: a solve that ends at a node limit, not at the clock."""
    runs = [
        schedule(40, 5, start=False)[0].solve(engine=engine, node_limit=20, time_limit_s=60)
        for _ in range(2)
    ]
    assert runs[0].objective == runs[1].objective
    assert runs[0].values is not None
    assert runs[1].values is not None
    assert runs[0].values.tobytes() == runs[1].values.tobytes()


def test_highs_stops_when_asked() -> None:
    model, makespan = schedule(60, 8, start=True)
    ends = time.monotonic() + 0.5
    found = model.solve(time_limit_s=60, stop=lambda: time.monotonic() > ends)
    assert found.outcome is Outcome.TIME_LIMIT
    assert found.objective <= makespan
    assert found.seconds < 20


def test_largest_fills_its_own_start() -> None:
    """t >= 2 a + 1 and t >= 3 b: with a = b = 1 it is 3; the optimum has both at 0 and t = 1."""
    model = IlpModel()
    a, b = model.binary(cost=-0.5), model.binary(cost=-0.5)
    t = model.largest([([(a, 2.0)], 1.0), ([(b, 3.0)], 0.0)], cost=1.0)
    model.start(a, 1.0)
    model.start(b, 1.0)
    start = model._full_start()
    assert start is not None
    assert start[model.column(t)] == 3.0
    assert model.solve().objective == pytest.approx(1.0)


def test_no_deprecation_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for engine in ENGINES:
            schedule(4, 2, start=True)[0].solve(engine=engine)


def test_cbc_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_engine() == "highs"
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    assert default_engine() == "cbc"
    model, _ = schedule(4, 2, start=False)
    assert model.solve().engine == "cbc"


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(InputError, match="no engine 'gurobi'"):
        IlpModel().solve(engine="gurobi")


def test_highs_keeps_standard_output_clean() -> None:
    """HiGHS 1.16 prints a banner as a process makes its first model; `--json` has nothing else on
    standard output."""
    program = (
        "from moesim.solvers.ilp.engine import IlpModel\n"
        "print('before')\n"
        "model = IlpModel()\n"
        "model.at_least([(model.binary(1.0), 1.0)], 1)\n"
        "print(model.solve(engine='highs').objective)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "before\n1.0\n"
