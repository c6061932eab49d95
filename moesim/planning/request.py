"""What is asked of a plan: the workload, the search, and extras beyond one solve."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.cost.routing import POLICY_CODES, Dedup
from moesim.cost.step import KINDS_OF
from moesim.errors import InfeasibleError, InputError, UnknownNameError
from moesim.placement import Plan, ReplicaPolicy
from moesim.planning.migration import DEFAULT_STEPS
from moesim.planning.robust import Robust
from moesim.solvers.base import OBJECTIVES, Objective, Solver
from moesim.solvers.registry import find_solver
from moesim.trace.batches import Phase
from moesim.trace.format import LoadTrace, Trace
from moesim.types import IntArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec

DEFAULT_SOLVER = "local_search"
DEFAULT_BATCH_TOKENS: dict[str, int] = {"prefill": 4096, "decode": 256}
DEFAULT_TIME_LIMIT_S = 60.0
MAX_TIME_LIMIT_S = 1e6
HBM_USABLE = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """What is served, and where. None means the stated default.

    slots: one total, or one number per GPU; None for (experts + redundant) / GPUs each.
    network_scale: all links are taken as so many times faster, for what-if studies.
    """

    trace: Trace | LoadTrace
    cluster: Cluster
    model: ModelSpec | None
    phase: Phase | None = None
    batch_tokens: int | None = None
    domain: str | None = None
    redundant_experts: int = 0
    slots: tuple[int, ...] | None = None
    replica_policy: ReplicaPolicy = "split"
    dedup: Dedup | None = None
    all_to_all: str | None = None
    network_scale: float = 1.0
    check_memory: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """How the placement is found. solver: a name, or an object with `solve`."""

    solver: str | Solver = DEFAULT_SOLVER
    objective: Objective | None = None
    seed: int = 0
    time_limit_s: float = DEFAULT_TIME_LIMIT_S


@dataclass(frozen=True, slots=True, eq=False)
class Extras:
    """Beyond one solve. robust: make the worst small instead of the mean. old_plan: what runs now,
    to be moved away from where that is worth it over steps_between_moves. home_ranks: contiguous
    (None), or how to predict them (see `moesim.planning.home_ranks`), in further rows. proof:
    bound the objective by the co-location relaxation too, and judge plans on unseen domains;
    studies, which show neither, leave both out."""

    robust: Robust | None = None
    old_plan: Plan | None = None
    steps_between_moves: float = DEFAULT_STEPS
    home_ranks: str | None = None
    proof: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class PlanRequest:
    """The three together; `of` and `but` take the fields of all of them by name."""

    workload: Workload
    search: Search = field(default_factory=Search)
    extras: Extras = field(default_factory=Extras)

    @classmethod
    def of(
        cls,
        trace: Trace | LoadTrace,
        cluster: Cluster,
        model: ModelSpec | None,
        **changes: Any,
    ) -> PlanRequest:
        """A request with `changes` of any field of its parts. Raises TypeError for another."""
        return cls(Workload(trace, cluster, model)).but(**changes)

    def but(self, **changes: Any) -> PlanRequest:
        """The request with some fields of its parts changed. Raises TypeError for another name."""
        parts: dict[str, Any] = {}
        for name in ("workload", "search", "extras"):
            part = getattr(self, name)
            own = {f.name: changes.pop(f.name) for f in fields(part) if f.name in changes}
            parts[name] = replace(part, **own)
        if changes:
            raise TypeError(f"a plan request has no {', '.join(changes)}")
        return PlanRequest(**parts)

    @property
    def solver(self) -> Solver:
        """The solver asked for."""
        return find_solver(self.search.solver)

    def options(self) -> dict[str, Any]:
        """What was asked, for the plan's provenance."""
        work, search, extras = self.workload, self.search, self.extras
        out: dict[str, Any] = {"objective": search.objective, "solver": self.solver.name}
        for name in ("redundant_experts", "slots", "phase", "batch_tokens", "domain"):
            out[name] = getattr(work, name)
        for name in ("replica_policy", "dedup", "all_to_all"):
            out[name] = getattr(work, name)
        out |= {"seed": search.seed, "time_limit_s": search.time_limit_s}
        if extras.robust is not None:
            out["robust"] = str(extras.robust)
        if extras.home_ranks is not None:
            out["home_ranks"] = extras.home_ranks
        if extras.old_plan is not None:
            table = extras.old_plan.placement.physical_to_logical
            out["from"] = hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()[:16]
            out["steps_between_moves"] = extras.steps_between_moves
        return out


def check_options(request: PlanRequest) -> None:
    """Raise InputError for names and numbers that are wrong whatever the trace is."""
    work, search = request.workload, request.search
    find_solver(search.solver)
    if search.objective is not None and search.objective not in OBJECTIVES:
        raise UnknownNameError("objective", search.objective, OBJECTIVES)
    if work.replica_policy not in POLICY_CODES:
        raise UnknownNameError("replica policy", work.replica_policy, POLICY_CODES)
    if work.all_to_all is not None and work.all_to_all not in KINDS_OF:
        raise UnknownNameError("all-to-all library", work.all_to_all, KINDS_OF)
    if search.seed < 0:
        raise InputError(f"seed {search.seed} is negative", "give a seed of 0 or more")
    limit = search.time_limit_s
    if not (math.isfinite(limit) and 0 <= limit <= MAX_TIME_LIMIT_S):
        raise InputError(f"a time limit of {limit} seconds", "give seconds, such as 60")


def slots_of(num_experts: int, request: PlanRequest) -> IntArray:
    """[G] slots of each GPU in a layer. Raises InputError when they do not come out even."""
    work = request.workload
    num_gpus = work.cluster.num_gpus
    if work.slots is not None:
        return _given_slots(work.slots, num_gpus)
    if work.redundant_experts < 0:
        raise InputError("the number of redundant experts is negative", "give 0 or more")
    total = num_experts + work.redundant_experts
    if total % num_gpus:
        more = work.redundant_experts + num_gpus - total % num_gpus
        if total < num_gpus:
            raise InputError(
                f"{num_gpus} GPUs for {total} experts per layer: some would hold none",
                f"use at most {total} GPUs, or `redundant_experts` {more}",
            )
        raise InputError(
            f"{num_experts} experts + {work.redundant_experts} redundant = {total} slots do not"
            f" divide over {num_gpus} GPUs",
            f"use `redundant_experts` {more}, or another number of GPUs",
        )
    return np.full(num_gpus, total // num_gpus, np.int64)


def _given_slots(given: tuple[int, ...], num_gpus: int) -> IntArray:
    if len(given) == 1 and num_gpus > 1:
        total = given[0]
        if total % num_gpus:
            raise InputError(
                f"{total} slots do not divide over {num_gpus} GPUs",
                f"use `slots` {total - total % num_gpus + num_gpus}, or name every GPU's slots:"
                " `slots` 5,5,4,...",
            )
        return np.full(num_gpus, total // num_gpus, np.int64)
    if len(given) != num_gpus:
        raise InputError(
            f"`slots` names {len(given)} GPUs, there are {num_gpus}",
            "give one total, or one number for every GPU",
        )
    return np.array(given, np.int64)


def check_memory(model: ModelSpec, cluster: Cluster, capacity: IntArray) -> None:
    """Raise InfeasibleError when a GPU's experts and its copy of all other weights exceed 95 % of
    its memory (attention data-parallel, so that every GPU holds the other weights whole)."""
    expert = model.expert_bytes() * model.num_moe_layers
    for gpu, slots in enumerate(capacity):
        need = int(slots) * expert + model.non_expert_bytes()
        have = cluster.gpus[gpu].hbm_gb * 1e9 * HBM_USABLE
        if need > have:
            raise InfeasibleError(
                f"{model.name} needs {need / 1e9:.1f} GB on GPU {gpu} ({int(slots)} experts per"
                f" layer x {model.num_moe_layers} layers x {model.expert_bytes() / 1e6:.1f} MB +"
                f" {model.non_expert_bytes() / 1e9:.1f} GB of other weights), it has"
                f" {have / 1e9:.1f} GB usable",
                "use more GPUs or GPUs with more memory, or `ignore_memory` to plan all the same",
            )
