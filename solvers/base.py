"""What a solver is given, what it returns, and the protocol between the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moesim.choices import Objective as Objective
from moesim.errors import InfeasibleError, InputError
from moesim.placement import EMPTY, Placement, Status
from moesim.types import Progress

OBJECTIVES: tuple[Objective, ...] = ("balance", "traffic", "time")
Stop = Callable[[], bool]
FloatArray = npt.NDArray[np.floating[Any]]


def never() -> bool:
    """The `stop` of a search that nobody interrupts."""
    return False


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Tuning tokens and what their messages cost, for objectives that see traffic.

    expert_ids: [T, L, K] integers; home: [T] int32, the GPU of each token's attention;
    batch_idx:  [T] int32, ascending from 0.
    indptr, link_idx: routes in CSR form, row s * G + d lists the links from GPU s to GPU d.
    link_group: [links] int8, the row of `time_us` that a link is looked up in.
    link_scale: [links], bytes time of the link relative to the group's reference link.
    time_us:    [2, groups, M + 1]: dispatch and combine time when the busiest link of the group
                carries m messages; a collective takes the largest over groups.
    dedup:      0 none, 1 per GPU, 2 per node (C2).
    """

    expert_ids: npt.NDArray[Any]
    home: npt.NDArray[np.int32]
    batch_idx: npt.NDArray[np.int32]
    indptr: npt.NDArray[np.int64]
    link_idx: npt.NDArray[np.int32]
    link_group: npt.NDArray[np.int8]
    link_scale: npt.NDArray[np.float64]
    time_us: npt.NDArray[np.float64]
    dedup: int

    @property
    def num_batches(self) -> int:
        return int(self.batch_idx[-1]) + 1 if len(self.batch_idx) else 0


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One placement problem.

    counts:   [B, L, E] float32, tokens of each expert in B tuning batches.
    capacity: [G] int64, slots of each GPU in every layer.
    speed:    [G] relative speed of each GPU, 1 nominal.
    gpu_type: [G] int64, row of `expert_us` for each GPU.
    expert_us: [types, N + 1] time of one expert by tokens, at speed 1; needed by objective time.
    num_groups: expert groups of group-limited routing (EPLB's hierarchical policy), 1 if none.
    traffic:  needed by the objectives traffic and time.
    stop:     true once the search is to end with the best it has; asked as the clock is.

    Raises InfeasibleError when experts do not fit the slots, InputError when sizes do not go
    together, counts are not finite or what an objective needs is missing.
    """

    counts: npt.NDArray[np.float32]
    capacity: npt.NDArray[np.int64]
    num_nodes: int
    objective: Objective = "balance"
    speed: npt.NDArray[np.float64] = field(default_factory=lambda: np.ones(0))
    gpu_type: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    expert_us: npt.NDArray[np.float64] | None = None
    num_groups: int = 1
    traffic: Traffic | None = None
    seed: int = 0
    time_limit_s: float = 60.0
    stop: Stop = never

    def __post_init__(self) -> None:
        gpus = len(self.capacity)
        if not len(self.speed):
            object.__setattr__(self, "speed", np.ones(gpus))
        if not len(self.gpu_type):
            object.__setattr__(self, "gpu_type", np.zeros(gpus, np.int64))
        if self.counts.ndim != 3 or min(self.counts.shape) < 1:
            raise InputError(
                f"tuning counts have shape {self.counts.shape}", "give [batches, layers, experts]"
            )
        if not ((self.counts >= 0) & np.isfinite(self.counts)).all():
            raise InputError("tuning counts hold NaN, infinities or negatives", "count tokens")
        if len(self.speed) != gpus or len(self.gpu_type) != gpus or not (self.speed > 0).all():
            raise InputError(
                f"{gpus} GPUs need as many positive speeds and types, not {len(self.speed)} and"
                f" {len(self.gpu_type)}",
                "give one of each for every GPU",
            )
        if gpus and int(self.capacity.min()) < 0:
            raise InputError("a GPU has a negative number of slots", "give 0 or more")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise InputError(
                f"{self.num_experts} experts do not divide into {self.num_groups} groups",
                "expert groups have equal sizes; 1 if there are none",
            )
        if self.num_nodes < 1 or gpus % self.num_nodes:
            raise InputError(
                f"{gpus} GPUs do not divide over {self.num_nodes} nodes",
                "every node holds the same number of GPUs",
            )
        slots = int(self.capacity.sum())
        if slots < self.num_experts:
            raise InfeasibleError(
                f"{self.num_experts} experts do not fit {slots} slots on {gpus} GPUs",
                f"give at least {self.num_experts} slots per layer (`slots`)",
            )
        if int(self.capacity.max()) > self.num_experts:
            raise InfeasibleError(
                f"a GPU has {int(self.capacity.max())} slots for {self.num_experts} experts, so"
                " one would hold an expert twice",
                "give fewer slots or redundant experts",
            )
        if self.objective != "balance" and self.traffic is None:
            raise InputError(
                f"objective {self.objective} needs token-level traffic", "use a token trace"
            )
        if self.objective == "time" and self.expert_us is None:
            raise InputError("objective time needs expert times", "name a model and a cluster")

    @property
    def num_batches(self) -> int:
        return int(self.counts.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.counts.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.counts.shape[2])

    @property
    def num_gpus(self) -> int:
        return len(self.capacity)

    @property
    def num_slots(self) -> int:
        return int(self.capacity.sum())

    @property
    def uniform(self) -> bool:
        """Whether all GPUs have the same slots, speed and type."""
        return all(len(np.unique(a)) == 1 for a in (self.capacity, self.speed, self.gpu_type))

    @property
    def mean_load(self) -> npt.NDArray[np.float64]:
        """[L, E]: tokens of each expert, averaged over the tuning batches."""
        return self.counts.mean(axis=0, dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A placement and how it was come by.

    `objective_value` is on tuning data, in the unit of the objective (balance: mean max/mean
    load; traffic and time: microseconds a layer); `bound` is a proven lower bound on it.
    `layer_bounds` [L] are proven lower bounds of each layer, whose mean bounds the objective.
    """

    placement: Placement
    status: Status
    objective_value: float | None = None
    bound: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    layer_bounds: npt.NDArray[np.float64] | None = None

    @property
    def gap(self) -> float | None:
        """Relative distance from the bound, or None where there is none."""
        if self.bound is None or self.objective_value is None or self.objective_value <= 0:
            return None
        return max(0.0, (self.objective_value - self.bound) / self.objective_value)


Need = Literal["equal slots", "no replicas", "tokens"]
"""What a method may need of a problem: as many slots on every GPU; one slot per expert; sampled
tokens, which objective balance leaves out."""


class Solver(Protocol):
    """A placement method. `name` is what the command line calls it; a class may also declare
    `needs`, a tuple of `Need`, which `run_solver` checks, `about`, a line for listings, and
    `schedule`, the simulator's schedule that it is made for, if not the sequential one."""

    name: str

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        """Return a valid placement of `problem`; `progress(done, total)` counts layers."""
        ...


def run_solver(solver: Solver, problem: Problem, *, progress: Progress | None = None) -> Solution:
    """Solve after checking what the method needs; where that is equal slots, among the GPUs that
    have any. Raises InputError for what it cannot do."""
    needs: tuple[Need, ...] = getattr(solver, "needs", ())
    if "equal slots" in needs and not problem.capacity.all():
        return among_holders(solver, problem, progress=progress)
    if "equal slots" in needs and len(np.unique(problem.capacity)) > 1:
        raise InputError(
            f"{solver.name} needs the same number of slots on every GPU",
            "use `solver` greedy or local_search",
        )
    if "no replicas" in needs and problem.num_slots != problem.num_experts:
        raise InputError(
            f"{solver.name} places every expert once, and there are {problem.num_slots} slots for"
            f" {problem.num_experts} experts",
            "leave out `redundant_experts`, or use local_search or ilp",
        )
    if "tokens" in needs and problem.traffic is None:
        raise InputError(
            f"{solver.name} needs to see tokens, which objective {problem.objective} leaves out",
            "use `objective` time or traffic",
        )
    return solver.solve(problem, progress=progress)


def among_holders(
    solver: Solver, problem: Problem, *, progress: Progress | None = None
) -> Solution:
    """A solution for balance by the GPUs that have slots alone, those of the others left empty.

    Methods that want nodes and GPUs alike can so be used where some GPUs hold nothing; nodes that
    have unequal numbers of the others count as one.
    """
    if problem.capacity.all():
        return run_solver(solver, problem, progress=progress)
    found = run_solver(solver, of_holders(problem), progress=progress)
    up = np.flatnonzero(problem.capacity)
    own = found.placement.physical_to_logical.reshape(problem.num_layers, len(up), -1)
    table = np.full((len(own), problem.num_gpus, own.shape[2]), EMPTY, np.int32)
    table[:, up] = own
    placement = Placement(
        table.reshape(len(own), -1), problem.num_gpus, problem.num_nodes, problem.num_experts
    )
    return replace(found, placement=placement)


def of_holders(problem: Problem) -> Problem:
    """The problem of balance for the GPUs that have slots."""
    up = np.flatnonzero(problem.capacity)
    left = np.unique(up // (problem.num_gpus // problem.num_nodes), return_counts=True)[1]
    same = len(set(left.tolist())) == 1
    return replace(
        problem,
        capacity=problem.capacity[up],
        num_nodes=len(left) if same else 1,
        num_groups=problem.num_groups if same else 1,
        speed=problem.speed[up],
        gpu_type=problem.gpu_type[up],
        objective="balance",
        traffic=None,
        expert_us=None,
    )


def pack_table(problem: Problem, slots: npt.NDArray[np.integer[Any]]) -> Placement:
    """Placement from `slots` [L, G, S]: experts of each GPU, -1 beyond its capacity."""
    layers = slots.shape[0]
    return Placement(
        np.ascontiguousarray(slots.reshape(layers, -1), np.int32),
        problem.num_gpus,
        problem.num_nodes,
        problem.num_experts,
    )


def empty_slots(problem: Problem) -> npt.NDArray[np.int32]:
    """[L, G, S] table of empty slots, S the largest capacity."""
    size = int(problem.capacity.max())
    return np.full((problem.num_layers, problem.num_gpus, size), EMPTY, np.int32)
