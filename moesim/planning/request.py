"""What is asked of a plan: the workload, the search, and extras beyond one solve."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.cost.library import check_library
from moesim.cost.routing import POLICY_CODES, Dedup
from moesim.errors import InfeasibleError, InputError, UnknownNameError
from moesim.placement import Plan, ReplicaPolicy
from moesim.planning.migration import DEFAULT_STEPS
from moesim.planning.mtp import mtp_bytes
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
    network_scale: all links are taken as so many times faster, for what-if studies. expert_gpus:
    so many of the last GPUs hold the experts and nothing else; None where all do both. mtp: layers
    for multi-token prediction are placed and held too.
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
    expert_gpus: int | None = None
    mtp: bool = False

    @property
    def attention_gpus(self) -> int:
        """GPUs without experts; 0 where attention is on the experts' GPUs."""
        return 0 if self.expert_gpus is None else self.cluster.num_gpus - self.expert_gpus


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
        if work.expert_gpus is not None:
            out["expert_gpus"] = work.expert_gpus
        if work.mtp:
            out["mtp"] = True
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
    if work.all_to_all is not None:
        check_library(work.all_to_all)
    if search.seed < 0:
        raise InputError(f"seed {search.seed} is negative", "give a seed of 0 or more")
    _check_apart(request)
    limit = search.time_limit_s
    if not (math.isfinite(limit) and 0 <= limit <= MAX_TIME_LIMIT_S):
        raise InputError(f"a time limit of {limit} seconds", "give seconds, such as 60")


def _check_apart(request: PlanRequest) -> None:
    """Raise InputError for pools that cannot be, and for what is not worked out for two."""
    work, extras = request.workload, request.extras
    if work.expert_gpus is None:
        return
    if min(work.expert_gpus, work.attention_gpus) < 1:
        raise InputError(
            f"`expert_gpus` {work.expert_gpus} of {work.cluster.num_gpus} GPUs",
            "leave at least one GPU to each of attention and experts",
        )
    asked = {
        "`old_plan`": extras.old_plan is not None,
        "`home_ranks`": extras.home_ranks is not None,
        "`robust`": extras.robust is not None,
        f"{request.solver.name}, whose tokens stay with their experts,": getattr(
            request.solver, "schedule", "sequential"
        )
        != "sequential",
    }
    for name, given in asked.items():
        if given:
            raise InputError(f"{name} with experts on GPUs of their own", "leave one of them out")


def slots_of(num_experts: int, request: PlanRequest) -> IntArray:
    """[G] slots of each GPU in a layer, 0 of those of attention alone. Raises InputError when they
    do not come out even."""
    first = request.workload.attention_gpus
    holders = request.workload.cluster.num_gpus - first
    return np.concatenate(
        [np.zeros(first, np.int64), _holders_slots(num_experts, request, holders)]
    )


def _holders_slots(num_experts: int, request: PlanRequest, num_gpus: int) -> IntArray:
    work = request.workload
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


def check_memory(
    model: ModelSpec,
    cluster: Cluster,
    capacity: IntArray,
    attention_gpus: int = 0,
    *,
    mtp: bool = False,
    layers_per_pool: int = 1,
) -> None:
    """Raise InfeasibleError when a GPU's experts and its copy of all other weights exceed 95 % of
    its memory (attention data-parallel, so that every GPU holds the other weights whole, or with
    `attention_gpus` the first so many alone). mtp: with the layers for multi-token prediction.
    layers_per_pool: so many layers share a GPU's experts."""
    more, rest = mtp_bytes(model) if mtp else (0.0, 0.0)
    layers = model.num_moe_layers // layers_per_pool + (model.mtp_moe_layers if mtp else 0)
    expert = model.expert_bytes() * (model.num_moe_layers // layers_per_pool) + more
    what = "layer" if layers_per_pool == 1 else "pool"
    for gpu, slots in enumerate(capacity):
        own = 0.0 if attention_gpus and gpu >= attention_gpus else model.non_expert_bytes() + rest
        need = int(slots) * expert + own
        have = cluster.gpus[gpu].hbm_gb * 1e9 * HBM_USABLE
        if need > have:
            raise InfeasibleError(
                f"{model.name} needs {need / 1e9:.1f} GB on GPU {gpu} ({int(slots)} experts per"
                f" {what} x {layers} {what}s x {model.expert_bytes() / 1e6:.1f} MB +"
                f" {own / 1e9:.1f} GB of other weights), it has"
                f" {have / 1e9:.1f} GB usable",
                "use more GPUs or GPUs with more memory, or `ignore_memory` to plan all the same",
            )
