"""`ilp`: the joint integer program, whole layers where they fit, a few GPUs at a time elsewhere."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import comb

import numpy as np

from moesim.solvers.base import Problem, Solution, pack_table
from moesim.solvers.ilp.engine import Outcome
from moesim.solvers.ilp.joint import JointLayer, LayerResult, as_table, fits
from moesim.solvers.ilp.neighbourhood import regroup
from moesim.solvers.kernels.layer_state import LayerState, draw_gpus
from moesim.solvers.methods.local_search import LocalSearch
from moesim.solvers.objective import PlacementCost
from moesim.types import IntArray, Progress, stream

START_SHARE = 0.3
"""Of the time limit, at most, for the local search that gives the start."""
WHOLE_SHARE = 0.6
"""Of a layer's time for the whole-layer model; neighbourhoods have the rest."""
FREED_ITEMS = 28
"""Slots to free at once, about; two GPUs at least, four at most."""
NEIGHBOURHOOD_S = 4.0


class JointIlp:
    """The project's objective by integer programming, from the local search's placement.

    Each layer by itself (under C5 layers do not trade off). Where the model of
    `moesim.solvers.ilp.joint` fits an engine, it is solved and gives a bound; then, and in layers
    too large for it, programs of two to four GPUs (`moesim.solvers.ilp.neighbourhood`) improve the
    placement until none of all choices of GPUs does (status feasible) or the time is up. Only exact
    improvements are taken, so that the result is never worse than the start. `optimal` means that
    every layer was proven so. What was found by the time limit depends on the machine's speed: of
    all solvers this is the one for which the same seed need not give the same plan.
    """

    name = "ilp"

    def __init__(self, engine: str | None = None) -> None:
        self.engine = engine

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        started = time.monotonic()
        limit = problem.time_limit_s
        begin = LocalSearch().solve(replace(problem, time_limit_s=limit * START_SHARE))
        objective = PlacementCost(problem)
        num_layers = problem.num_layers
        workers = min(os.cpu_count() or 1, num_layers)
        left = max(0.0, limit - (time.monotonic() - started))
        each = left * workers / num_layers
        whole = fits(problem)

        def run(layer: int) -> LayerResult:
            slots = objective.layer_slots(begin.placement, layer)
            return self._layer(objective, layer, slots, each, whole)

        found: list[LayerResult] = []
        with ThreadPoolExecutor(workers) as pool:
            for result in pool.map(run, range(num_layers)):
                found.append(result)
                if progress is not None:
                    progress(len(found), num_layers)
        table = as_table(problem, np.stack([r.slots for r in found]))
        proven = sum(r.proven for r in found)
        notes = [f"{proven} of {num_layers} layers proven optimal by the integer program"]
        if not whole:
            notes = ["a layer is too large for one program: a few GPUs were solved at a time"]
        bounds = np.array([r.bound for r in found])
        late = any(not r.proven and r.outcome == Outcome.TIME_LIMIT for r in found)
        return Solution(
            pack_table(problem, table),
            "optimal" if proven == num_layers else "time_limit" if late else "feasible",
            objective_value=float(np.mean([r.value for r in found])),
            bound=float(bounds.mean()) if np.isfinite(bounds).all() else None,
            seconds=time.monotonic() - started,
            notes=tuple(notes),
            layer_bounds=bounds,
        )

    def _layer(
        self, objective: PlacementCost, layer: int, slots: IntArray, seconds: float, whole: bool
    ) -> LayerResult:
        ends = time.monotonic() + seconds
        seed = objective.problem.seed + layer
        value = objective.layer_value(slots, layer)
        result = LayerResult(slots, value, -np.inf, Outcome.FEASIBLE)
        model = JointLayer(objective, layer) if whole else None
        if model is not None:
            result = model.solve(slots, seconds * WHOLE_SHARE, engine=self.engine, seed=seed)
        if result.proven or objective.problem.num_gpus < 2:
            return result
        state = LayerState(objective, layer, result.slots)
        exhausted = self._neighbourhoods(state, ends, seed)
        value = objective.layer_value(state.slots, layer)
        if value < result.value:
            result = replace(result, slots=state.slots, value=value)
        if not exhausted:
            return replace(result, outcome=Outcome.TIME_LIMIT)
        if model is not None and result.outcome == Outcome.TIME_LIMIT:
            left = max(0.0, ends - time.monotonic())
            again = model.solve(result.slots, left, engine=self.engine, seed=seed)
            return replace(again, bound=max(again.bound, result.bound))
        return replace(result, outcome=Outcome.FEASIBLE)

    def _neighbourhoods(self, state: LayerState, ends: float, seed: int) -> bool:
        """Programs of GPUs drawn by how often they are the costliest, until time is up or, which
        is returned as true, each choice of GPUs was tried since the last improvement."""
        problem = state.objective.problem
        rng = stream(seed, 0x11F)
        mean_slots = problem.num_slots / problem.num_gpus
        size = int(np.clip(round(FREED_ITEMS / mean_slots), 2, min(4, problem.num_gpus)))
        choices = comb(problem.num_gpus, size)
        tried: set[tuple[int, ...]] = set()
        while (left := ends - time.monotonic()) > 0 and not problem.stop():
            gpus = draw_gpus(state, size, rng)
            improved, _ = regroup(
                state,
                gpus,
                time_limit_s=min(left, NEIGHBOURHOOD_S),
                engine=self.engine,
                seed=seed,
                stop=problem.stop,
            )
            if improved:
                tried.clear()
            tried.add(tuple(sorted(gpus.tolist())))
            if len(tried) == choices:
                return True
        return False
