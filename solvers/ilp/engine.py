"""What runs the integer programs: a PuLP model, HiGHS or CBC, and a typed answer.

HiGHS (through highspy) is the default, CBC (which PuLP brings) the fallback. PuLP's HiGHS class
takes no start, so the start is handed to the highspy object that PuLP has built; CBC takes it
through PuLP's `warmStart`. Both run on one thread with a fixed seed, so that a solve that ends by
itself or at a node limit gives the same answer every time; one that ends at the time limit does
not, because what it got to depends on the machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.solvers.base import never
from moesim.types import FloatArray

ENGINES = ("highs", "cbc")
RELATIVE_GAP = 1e-6
Terms = list[tuple[Any, float]]
_BANNER_LOCK = threading.Lock()
_banner_taken = False


class Outcome(StrEnum):
    """How a solve ended. OPTIMAL: proven within the gap asked for. FEASIBLE: stopped at a node
    limit. TIME_LIMIT: stopped by the clock or on request, with or without a solution. INFEASIBLE:
    proven that there is none."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    TIME_LIMIT = "time_limit"
    INFEASIBLE = "infeasible"


@dataclass(frozen=True, slots=True, eq=False)
class IlpSolution:
    """values: [variables] in the order they were made, None where no solution is known.
    objective: of `values`, infinite without. bound: proven, -infinite where the engine gave none.
    """

    outcome: Outcome
    values: FloatArray | None
    objective: float
    bound: float
    seconds: float
    engine: str

    @property
    def gap(self) -> float:
        """(objective - bound) / |objective|; infinite without a solution or a bound."""
        if not (math.isfinite(self.objective) and math.isfinite(self.bound)):
            return math.inf
        return max(0.0, self.objective - self.bound) / max(abs(self.objective), 1e-12)


def default_engine() -> str:
    """`highs` where highspy is installed, else `cbc`."""
    return "highs" if importlib.util.find_spec("highspy") else "cbc"


class IlpModel:
    """A minimisation problem. Variables are PuLP's; `column` of one is its place in `values`."""

    def __init__(self, name: str = "model") -> None:
        import pulp

        self._pulp = pulp
        self.problem = pulp.LpProblem(name, pulp.LpMinimize)
        self.variables: list[Any] = []
        self._column: dict[int, int] = {}
        self._cost: list[tuple[Any, float]] = []
        self._start: dict[int, float] = {}
        self._maxima: list[tuple[int, float, list[tuple[Terms, float]]]] = []

    @property
    def num_variables(self) -> int:
        return len(self.variables)

    def binary(self, cost: float = 0.0) -> Any:
        return self._variable(0.0, 1.0, "Integer", cost)

    def integer(self, low: float, high: float, cost: float = 0.0) -> Any:
        return self._variable(low, high, "Integer", cost)

    def continuous(self, low: float = 0.0, high: float | None = None, cost: float = 0.0) -> Any:
        return self._variable(low, high, "Continuous", cost)

    def _variable(self, low: float, high: float | None, kind: str, cost: float) -> Any:
        name = f"v{len(self.variables):07d}"
        if hasattr(self.problem, "add_variable"):
            made = self.problem.add_variable(name, low, high, cat=kind)
        else:
            made = self._pulp.LpVariable(name, low, high, cat=kind)
        self._column[id(made)] = len(self.variables)
        self.variables.append(made)
        if cost:
            self._cost.append((made, float(cost)))
        return made

    def cost(self, variable: Any, value: float) -> None:
        """Add `value` a unit of `variable` to the objective."""
        self._cost.append((variable, float(value)))

    def column(self, variable: Any) -> int:
        return self._column[id(variable)]

    def at_most(self, terms: Terms, limit: float) -> None:
        self.problem += self._pulp.LpAffineExpression(terms) <= float(limit)

    def at_least(self, terms: Terms, limit: float) -> None:
        self.problem += self._pulp.LpAffineExpression(terms) >= float(limit)

    def equal(self, terms: Terms, value: float) -> None:
        self.problem += self._pulp.LpAffineExpression(terms) == float(value)

    def largest(self, of: list[tuple[Terms, float]], *, low: float = 0.0, cost: float = 0.0) -> Any:
        """A continuous variable that is at least `low` and at least each of `of`, linear terms
        plus a constant. Minimised, it is their maximum; that is also its value in a start."""
        made = self.continuous(low, cost=cost)
        for terms, constant in of:
            self.at_least([(made, 1.0), *((v, -c) for v, c in terms)], constant)
        self._maxima.append((self.column(made), low, of))
        return made

    def start(self, variable: Any, value: float) -> None:
        """Where the search begins. Every variable but those of `largest` needs a value, else the
        start is not used."""
        self._start[self.column(variable)] = float(value)

    def solve(
        self,
        *,
        time_limit_s: float = 60.0,
        engine: str | None = None,
        gap: float = RELATIVE_GAP,
        node_limit: int | None = None,
        seed: int = 0,
        stop: Callable[[], bool] = never,
    ) -> IlpSolution:
        """Minimise. Never raises for a model without solution: the outcome says so.

        engine: `highs` or `cbc`, by default what is installed. stop: asked now and then by HiGHS,
        and by CBC not at all, which ends at its time limit only. Raises InputError for an unknown
        engine.
        """
        engine = engine or default_engine()
        if engine not in ENGINES:
            raise InputError(f"there is no engine {engine!r}", f"use {' or '.join(ENGINES)}")
        terms: dict[Any, float] = {}
        for variable, value in self._cost:
            terms[variable] = terms.get(variable, 0.0) + value
        self.problem += self._pulp.LpAffineExpression(list(terms.items()))
        started = time.monotonic()
        run = self._highs if engine == "highs" else self._cbc
        outcome, values, bound = run(max(time_limit_s, 0.01), gap, node_limit, seed, stop)
        objective = math.inf
        if values is not None:
            objective = float(
                sum(value * values[self.column(variable)] for variable, value in self._cost)
            )
        return IlpSolution(outcome, values, objective, bound, time.monotonic() - started, engine)

    def _full_start(self) -> FloatArray | None:
        if not self._start or len(self._start) + len(self._maxima) < len(self.variables):
            return None
        values = np.zeros(len(self.variables))
        for column, value in self._start.items():
            values[column] = value
        for column, low, of in self._maxima:
            sums = [c + sum(k * values[self.column(v)] for v, k in terms) for terms, c in of]
            values[column] = max([low, *sums])
        return values

    def _highs(
        self,
        time_limit_s: float,
        gap: float,
        node_limit: int | None,
        seed: int,
        stop: Callable[[], bool],
    ) -> tuple[Outcome, FloatArray | None, float]:
        import highspy

        take_banner(highspy)
        options: dict[str, Any] = {"random_seed": seed}
        if node_limit is not None:
            options["mip_max_nodes"] = node_limit
        solver = self._pulp.HiGHS(
            msg=False, timeLimit=time_limit_s, gapRel=gap, threads=1, **options
        )
        solver.createAndConfigureSolver(self.problem)
        solver.buildSolverModel(self.problem)
        highs = self.problem.solverModel
        start = self._full_start()
        place = np.array([v.index for v in self.variables], np.int64)
        if start is not None:
            given = highspy.HighsSolution()
            column = np.empty(len(start))
            column[place] = start
            given.col_value = list(column)
            highs.setSolution(given)
        if stop is not never:
            _listen(highs, highspy, stop)
        highs.run()
        status, info = highs.getModelStatus(), highs.getInfo()
        kinds = highspy.HighsModelStatus
        if status in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible):
            return Outcome.INFEASIBLE, None, math.inf
        whole = any(v.cat == "Integer" for v in self.variables)
        done = status in (kinds.kOptimal, kinds.kModelEmpty)
        bound = info.mip_dual_bound if whole else info.objective_function_value
        if not whole and not done:
            bound = -math.inf
        known = info.primal_solution_status == 2 or status == kinds.kModelEmpty
        values = np.array(highs.getSolution().col_value)[place] if known else None
        if done:
            return Outcome.OPTIMAL, values, float(bound)
        nodes = status in (kinds.kSolutionLimit, kinds.kIterationLimit)
        outcome = Outcome.FEASIBLE if nodes and known else Outcome.TIME_LIMIT
        return outcome, values, float(bound)

    def _cbc(
        self,
        time_limit_s: float,
        gap: float,
        node_limit: int | None,
        seed: int,
        _stop: Callable[[], bool],
    ) -> tuple[Outcome, FloatArray | None, float]:
        """CBC says infeasible, too, when it runs out of time before its first relaxation is solved;
        that is believed only of models without a start that ended before their time."""
        pulp = self._pulp
        began = time.monotonic()
        start = self._full_start()
        if start is not None:
            for variable, value in zip(self.variables, start, strict=True):
                variable.setInitialValue(value)
        with tempfile.TemporaryDirectory(prefix="moesim-cbc-") as folder:
            log = Path(folder) / "log"
            self.problem.solve(
                pulp.COIN_CMD(
                    path=_cbc_path(pulp),
                    msg=False,
                    timeLimit=time_limit_s,
                    gapRel=gap,
                    threads=1,
                    maxNodes=node_limit,
                    warmStart=start is not None,
                    logPath=str(log),
                    options=[f"randomCbcSeed {seed + 1}", f"randomSeed {seed + 1}"],
                )
            )
            text = log.read_text(errors="replace")
        if self.problem.status == pulp.LpStatusInfeasible:
            if start is not None or time.monotonic() - began >= time_limit_s:
                return Outcome.TIME_LIMIT, start, -math.inf
            return Outcome.INFEASIBLE, None, math.inf
        whole = any(v.cat == "Integer" for v in self.variables)
        found = self.problem.sol_status in (
            pulp.LpSolutionOptimal,
            pulp.LpSolutionIntegerFeasible,
        )
        values = None
        if found:
            values = np.array([v.value() or 0.0 for v in self.variables])
        stopped = "Stopped on" in text
        if found and not stopped:
            objective = float(self.problem.objective.value())
            slack = gap * abs(objective) if whole else 0.0
            return Outcome.OPTIMAL, values, objective - slack
        bounds = re.findall(r"Lower bound:\s+(\S+)", text)
        bound = float(bounds[-1]) if bounds else -math.inf
        nodes = found and "Stopped on node" in text
        return (Outcome.FEASIBLE if nodes else Outcome.TIME_LIMIT), values, bound


def take_banner(highspy: Any) -> None:
    """HiGHS prints its name and version to standard output, where results go, as the first model
    of a process is made, and has no option against it: that first one is made here, unheard."""
    global _banner_taken
    with _BANNER_LOCK:
        if _banner_taken:
            return
        _banner_taken = True
        sys.stdout.flush()
        kept = os.dup(1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 1)
            highspy.Highs()
            ctypes.CDLL(None).fflush(None)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            os.close(nowhere)


def _cbc_path(pulp: Any) -> str | None:
    """CBC on the search path, else the one that PuLP brings."""
    found = shutil.which("cbc")
    return found or getattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", None)


def _listen(highs: Any, highspy: Any, stop: Callable[[], bool]) -> None:
    """Let HiGHS ask `stop` while it works."""

    def ask(_kind: Any, _text: str, _out: Any, back: Any, _data: Any) -> None:
        if stop():
            back.user_interrupt = True

    highs.setCallback(ask, None)
    for kind in ("kCallbackMipInterrupt", "kCallbackSimplexInterrupt", "kCallbackIpmInterrupt"):
        highs.startCallback(getattr(highspy.cb.HighsCallbackType, kind))
