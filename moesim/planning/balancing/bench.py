"""What schemes have in common: prices of placements on the judged steps, and of moving weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from moesim.choices import Objective, ReplicaPolicy
from moesim.cost.copies import WeightMove
from moesim.cost.routing import home_ranks, route
from moesim.cost.step import StepModel
from moesim.errors import InputError
from moesim.metrics import imbalance
from moesim.placement import EMPTY, Placement
from moesim.planning.balancing.course import Course
from moesim.sim.links import link_table
from moesim.sim.migrate import build_mover, holdings, plan_moves
from moesim.sim.rearrange import PLAN_US
from moesim.solvers.base import Problem, run_solver
from moesim.solvers.registry import find_solver
from moesim.types import FloatArray, IntArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.cost.routing import Routed
    from moesim.model.spec import ModelSpec

Table = npt.NDArray[np.int32]
CHUNK_CELLS = 20_000_000
PARTS = ("dispatch", "compute", "combine", "weights")


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """The judged steps under one scheme. parts_us: [J] microseconds of each of PARTS, summed over
    layers; compute is that of the slowest GPU of every layer. imbalance: [J] max over mean tokens
    of the GPUs, mean over layers."""

    parts_us: Mapping[str, FloatArray]
    imbalance: FloatArray

    @property
    def step_us(self) -> FloatArray:
        """[J] MoE time, stalls not counted."""
        return np.sum([self.parts_us[name] for name in PARTS], axis=0)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a scheme did. stall_us: serving stopped, in all; slowed_us: steps took longer because
    weights moved beside them, in all. num_plans, num_skipped: plans, and due ones that were
    skipped; moved_experts, moved_bytes: in all. slots: extra ones per GPU and layer; pool:
    experts that a GPU has room for besides, for one layer at a time. switch_us: serving stopped
    once, to get there from a placement in use that was given. enable: how to switch it on."""

    priced: Priced
    stall_us: float = 0.0
    slowed_us: float = 0.0
    num_plans: float = 0.0
    num_skipped: float = 0.0
    moved_experts: float = 0.0
    moved_bytes: float = 0.0
    slots: float = 0.0
    pool: float = 0.0
    switch_us: float = 0.0
    enable: str = ""
    note: str = ""


class Scheme(Protocol):
    """One way to balance."""

    @property
    def name(self) -> str:
        """In tables and on the command line."""
        ...

    @property
    def about(self) -> str:
        """A line on what it does."""
        ...

    def run(self, bench: Bench) -> Outcome:
        """Serve the course."""
        ...


@dataclass(frozen=True, slots=True)
class Costs:
    """Times that no link explains; microseconds. plan_us: computing a placement. stopped, beside:
    moving weights while serving stands still, and beside the steps. batch_us: planning one layer of
    one batch, for schemes that do (assumed)."""

    stopped: WeightMove
    beside: WeightMove
    plan_us: float = PLAN_US
    batch_us: float = 10.0

    def __post_init__(self) -> None:
        for name in ("plan_us", "batch_us"):
            if not 0 <= getattr(self, name) < 1e12:
                raise InputError(f"{name} is {getattr(self, name)}", "give 0 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Weights on their way. link_us: [L, links] time of every link; experts: [L] fetched;
    received: [L] bytes that the busiest GPU gets."""

    link_us: FloatArray
    experts: IntArray
    received: FloatArray
    latency_us: float

    def us(self, move: WeightMove, layers: slice = slice(None)) -> float:
        """Time of the weights of some layers, one after the other: of the busiest link and one
        latency, or at the rate at which a GPU receives them."""
        if move.gb_per_s is not None:
            return float(self.received[layers].sum()) / (move.gb_per_s * 1e3)
        busiest = self.link_us[layers].max(axis=1)
        return float(np.where(busiest > 0, busiest + self.latency_us, 0.0).sum())


@dataclass(eq=False)
class Bench:
    """One course on one cluster. capacity: [G] slots of each GPU without redundant ones. problem:
    of the tuning requests with objective time, which plans are solved from. start: the placement in
    use, linear where None."""

    course: Course
    step: StepModel
    cluster: Cluster
    model: ModelSpec
    capacity: IntArray
    problem: Problem
    costs: Costs
    policy: ReplicaPolicy = "split"
    start: Placement | None = None

    def __post_init__(self) -> None:
        mover = build_mover(self.cluster, link_table(self.cluster, self.step), self.expert_bytes)
        self._us_per_expert = mover.us_per_byte * self.expert_bytes
        self._latency_us = float(self.cluster.routes().latency_us.max(initial=0.0))
        self._placed: dict[tuple[Any, ...], Placement] = {}
        self.notices: list[str] = []
        self.prepare()

    def prepare(self) -> None:
        """Home ranks of the judged tokens, once."""
        self.homes = home_ranks(self.course.trace, self.course.batches, self.num_gpus)

    @property
    def num_gpus(self) -> int:
        return self.cluster.num_gpus

    @property
    def expert_bytes(self) -> float:
        return float(self.model.expert_bytes())

    def room(self, redundant: int) -> IntArray:
        """[G] slots with `redundant` more in all. Raises InputError for an uneven number."""
        if redundant % self.num_gpus:
            more = redundant + self.num_gpus - redundant % self.num_gpus
            raise InputError(
                f"{redundant} redundant slots do not divide over {self.num_gpus} GPUs",
                f"use `redundant_experts` {more}",
            )
        return self.capacity + redundant // self.num_gpus

    def placed(
        self, solver: str, objective: Objective, redundant: int, grouped: bool = False
    ) -> Placement:
        """The placement of `solver` for the tuning requests, made once."""
        key = (solver, objective, redundant, grouped)
        if key not in self._placed:
            problem = replace(
                self.problem,
                capacity=self.room(redundant),
                objective=objective,
                traffic=self.problem.traffic if objective != "balance" else None,
                num_groups=self.model.n_group if grouped else 1,
            )
            found = run_solver(find_solver(solver), problem)
            if found.status == "time_limit":
                self.notices.append(
                    f"{solver} for {objective} with {redundant} more slots stopped at its time"
                    f" limit of {problem.time_limit_s:g} s: a slower machine gives another plan"
                    " (`time_limit`)"
                )
            self._placed[key] = found.placement
        return self._placed[key]

    @property
    def in_use(self) -> Placement:
        """What a service runs with that does nothing."""
        return self.start if self.start is not None else self.placed("linear", "balance", 0)

    def begin(self, redundant: int) -> Placement:
        """What a scheme with so many redundant slots starts from: the placement in use where it has
        as many, all filled, else the linear one."""
        start = self.start
        same = start is not None and start.slots_per_gpu == self.room(redundant)[0]
        if start is not None and same and (start.physical_to_logical != EMPTY).all():
            return start
        return self.placed("linear", "balance", redundant)

    def price(
        self, track: Sequence[tuple[int, Placement]], policy: ReplicaPolicy | None = None
    ) -> Priced:
        """The judged steps, each under the placement that `track` (first step, placement; steps
        ascending from 0) has then."""
        first = np.array([step for step, _ in track])
        jobs = [
            (track[run][1], slice(start, min(start + size, rows.stop)))
            for run, rows in self.course.runs(first)
            for size in [self._chunk(rows)]
            for start in range(rows.start, rows.stop, size)
        ]

        def some(job: tuple[Placement, slice]) -> tuple[FloatArray, FloatArray]:
            placement, rows = job
            routed = self.routed(placement, rows, policy)
            return self.parts(routed), self.imbalance(routed)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(some, jobs))
        parts = np.concatenate([p for p, _ in found], axis=1)
        zero = np.zeros(parts.shape[1])
        return Priced(
            dict(zip(PARTS, (*parts, zero), strict=True)), np.concatenate([i for _, i in found])
        )

    def routed(
        self, placement: Placement, rows: slice, policy: ReplicaPolicy | None = None
    ) -> Routed:
        """Some judged steps through one placement."""
        return route(
            self.course.trace,
            self.course.part(rows),
            placement,
            policy=policy or self.policy,
            dedup=self.step.dedup,
            home=self.home(rows),
        )

    def home(self, rows: slice) -> npt.NDArray[np.int32]:
        """Home ranks of the tokens of some judged steps."""
        indptr = self.course.batches.indptr
        return self.homes[indptr[rows.start] : indptr[rows.stop]]

    def parts(self, routed: Routed) -> FloatArray:
        """[3, B] dispatch, compute and combine."""
        cost = self.step.cost(routed)
        return np.stack(
            [
                cost.dispatch_us.sum(axis=1),
                cost.compute_us.max(axis=2).sum(axis=1),
                cost.combine_us.sum(axis=1),
            ]
        )

    def imbalance(self, routed: Routed) -> FloatArray:
        """[B] of the GPUs' tokens, mean over layers with load."""
        return np.nanmean(imbalance(routed.gpu_tokens(self.num_gpus), self.step.speed), axis=1)

    def moving(self, old: Table, new: Table) -> Moves:
        """From slots `old` to `new`, both [L, G, S]."""
        layers, gpus, _ = new.shape
        node = np.asarray(self.cluster.node_of_gpu)
        pairs = np.zeros((layers, gpus, gpus), np.int32)
        for move in plan_moves(holdings(old), new, node):
            pairs[move.layer, move.source, move.target] += move.num_experts
        received = pairs.sum(axis=1).max(axis=1) * self.expert_bytes
        return Moves(self.link_us(pairs), pairs.sum(axis=(1, 2)), received, self._latency_us)

    def link_us(self, pairs: npt.NDArray[np.int32]) -> FloatArray:
        """[L, links] time on every link of experts sent between GPUs, `pairs` [L, G, G]."""
        return self.step.link_messages(pairs) * self._us_per_expert

    def transfer_us(self, pairs: npt.NDArray[np.int32]) -> FloatArray:
        """[L] time of experts sent between GPUs in each layer alone."""
        busiest = self.link_us(pairs).max(axis=1)
        return np.where(busiest > 0, busiest + self._latency_us, 0.0)

    @property
    def price_us(self) -> float:
        """Time of one expert where many move, evenly spread, over the slowest link into a GPU."""
        if self.num_gpus == 1:
            return 0.0
        far = self.cluster.routes().links(self.num_gpus - 1, 0)
        return float(self._us_per_expert[far].max()) / self.num_gpus

    def _chunk(self, rows: slice) -> int:
        cells = self.course.trace.num_layers * self.num_gpus**2
        workers = os.cpu_count() or 1
        fits = CHUNK_CELLS // cells // workers
        return max(1, min(fits, -(-(rows.stop - rows.start) // (2 * workers))))
