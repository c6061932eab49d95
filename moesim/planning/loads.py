"""Plans from expert counts alone, as engines record them.

Counts say how much every expert got in a step, not which experts a token chose together, so there
is balance to plan for and nothing else: no fan-out, bytes or predicted time. Replicas share
equally. Every step counts alike, however many tokens it had.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim import compat
from moesim.errors import InputError
from moesim.figures import count
from moesim.metrics import balancedness, gpu_loads, imbalance
from moesim.placement import Placement
from moesim.planning.case import Case
from moesim.planning.evaluate import NUM_RESAMPLES, Measured, Sample
from moesim.planning.request import PlanRequest, check_memory, slots_of
from moesim.solvers.base import Problem, Stop, never, of_holders
from moesim.trace.batches import Batches
from moesim.trace.format import LoadTrace
from moesim.types import FloatArray, stream

NEEDS_TOKENS = {
    "phase": None,
    "batch_tokens": None,
    "domain": None,
    "all_to_all": None,
    "robust": None,
    "old_plan": None,
    "home_ranks": None,
    "replica_policy": "split",
}
"""Fields of a request that counts cannot serve, with the value that asks for nothing."""

UNEQUAL = 4.0
"""How far apart the 10th and 90th percentile of tokens a step may be before a notice says so."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadSplit:
    """tune, held_out: [S, L, E] counts of steps; held-out is what is shown. `apart` is false where
    one step is all there is, which then serves for both."""

    tune: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    apart: bool


def split_steps(expert_load: npt.NDArray[np.int64]) -> LoadSplit:
    """The first half of the steps tunes, the second half evaluates, so that a load that drifts
    counts against a plan. Steps without any load are left out.

    Raises InputError when no step has load.
    """
    steps = np.asarray(expert_load)
    steps = steps[steps.any(axis=(1, 2))]
    if not len(steps):
        raise InputError("every step of the load trace is empty", "record some traffic")
    if len(steps) == 1:
        return LoadSplit(steps, steps, False)
    half = len(steps) // 2
    return LoadSplit(steps[:half], steps[half:], True)


def measure_loads(
    steps: npt.NDArray[np.int64],
    placement: Placement,
    order: npt.NDArray[np.int64],
    main: int,
    speed: FloatArray,
) -> Measured:
    """Balance of every step [S, L, E] (steps[order], the first `main` are the point figures) over
    GPUs of relative speed [G]."""
    gpus = gpu_loads(steps, placement)
    values = {
        "imbalance": imbalance(gpus, speed)[order],
        "balancedness": balancedness(gpus, speed)[order],
    }
    return Measured(values, gpus[order[:main]].mean(axis=0))


def load_case(request: PlanRequest, stop: Stop = never) -> Case:
    """Balance on the first half of the steps, judged on the second. Raises InputError for what
    counts cannot tell, and what `token_case` raises."""
    work, search = request.workload, request.search
    loads = work.trace
    assert isinstance(loads, LoadTrace)
    _refuse(request)
    split = split_steps(loads.expert_load)
    defaults = {}
    if search.objective is None:
        defaults["objective"] = "balance (counts say nothing of messages)"
    notices = unequal_steps(loads.expert_load)
    if work.model is not None:
        notices += compat.trace_fits_model(loads.meta, work.model)
    capacity = slots_of(loads.expert_load.shape[2], request)
    if work.check_memory and work.model is not None:
        check_memory(work.model, work.cluster, capacity, work.attention_gpus, mtp=work.mtp)
    problem = Problem(
        counts=split.tune.astype(np.float32),
        capacity=capacity,
        num_nodes=work.cluster.num_nodes,
        speed=np.asarray(work.cluster.speed_factor, np.float64),
        num_groups=work.model.n_group if work.model is not None else 1,
        seed=search.seed,
        time_limit_s=search.time_limit_s,
        stop=stop,
    )
    if work.attention_gpus:
        problem = of_holders(problem)
    return Case(
        request,
        loads.meta,
        loads.content_hash(),
        "balance",
        problem,
        lambda case: LoadJudge(case, split),
        defaults,
        notices,
    )


class LoadJudge:
    """Balance over the steps after those tuned on."""

    def __init__(self, case: Case, split: LoadSplit) -> None:
        self.steps, self.speed = split.held_out, case.problem.speed
        self.sample, self.order = _sample(len(split.held_out), case.request.search.seed)
        steps = count(self.sample.num_main, "step")
        self.said = (
            f"held-out: {steps} after those tuned on; 95% bootstrap intervals over runs of steps"
        )
        if not split.apart:
            self.said = "NOT held out: the trace has one step, which the plan was also tuned on"
        self.header = {
            "held_out": split.apart,
            "num_steps": self.sample.num_main,
            "basis": None,
        }

    def measure(self, placement: Placement, homes: Callable[..., Any] | None = None) -> Measured:
        return measure_loads(self.steps, placement, self.order, self.sample.num_main, self.speed)


def _refuse(request: PlanRequest) -> None:
    asked: dict[str, object] = {}
    for part in (request.workload, request.extras):
        for name, nothing in NEEDS_TOKENS.items():
            value = getattr(part, name, nothing)
            if value != nothing:
                asked[name] = value
    if request.search.objective not in (None, "balance"):
        asked = {"objective": request.search.objective, **asked}
    if asked:
        name, value = next(iter(asked.items()))
        shown = f" {value}" if isinstance(value, (str, int)) else ""
        raise InputError(
            f"`{name}`{shown} needs token-level routing, and the trace has expert counts only",
            "leave it out, or give a trace with expert_ids (moesim trace capture)",
        )


def unequal_steps(expert_load: npt.NDArray[np.int64]) -> list[str]:
    """A notice where steps differ much in size: a balanced step is a matter of its size too."""
    sizes = expert_load.sum(axis=2, dtype=np.float64).max(axis=1)
    low, high = np.percentile(sizes[sizes > 0], (10, 90)) if sizes.any() else (1.0, 1.0)
    if high < UNEQUAL * low:
        return []
    return [
        f"steps differ in size ({low:.0f} to {high:.0f} choices per layer, 10th and 90th"
        " percentile) and count alike: small ones are never even"
    ]


def _sample(num_steps: int, seed: int) -> tuple[Sample, npt.NDArray[np.int64]]:
    """The held-out steps, then resamples of them: what each row of the measures is.

    Steps that follow each other serve the same requests, so runs of steps are drawn, about as long
    as there are many of them, going round at the end.
    """
    length = math.isqrt(num_steps)
    runs = -(-num_steps // length)
    rng = stream(seed, 0x10AD)
    starts = rng.integers(0, num_steps, (NUM_RESAMPLES, runs, 1))
    drawn = (starts + np.arange(length)) % num_steps
    drawn = drawn.reshape(NUM_RESAMPLES, -1)[:, :num_steps]
    order = np.concatenate([np.arange(num_steps), drawn.ravel()]).astype(np.int64)
    nothing = Batches(np.zeros(0, np.int64), np.zeros(len(order) + 1, np.int64), "decode", 0)
    return Sample(nothing, num_steps, NUM_RESAMPLES, num_steps), order
