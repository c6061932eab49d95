"""Steps while GPUs, nodes and links fail and come back.

A step that a GPU fails in is lost whole and run again with the same tokens once serving goes on, so
that every token is served exactly once (INV-1). Tokens whose home rank is down go to the others in
turn; what their caches held is taken as recovered by other means (not modelled). Faults that happen
while a recovery is under way are looked at when it is over.

Experts may be placed again on the way (`rebalance`): on the GPUs that are up, from the loads of the
last steps. A fault, or a GPU that is back, ends an asynchronous move that is under way: layers that
have arrived stay, the others are planned again when it is time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from moesim.cost.routing import Routed, home_ranks
from moesim.errors import InfeasibleError, InputError
from moesim.placement import Placement
from moesim.sim.engine import Engine, SpeedModel, StepRun
from moesim.sim.event import Tally, run_step
from moesim.sim.faults import Fault, FaultClock, Recovery, reloaded, without_gpus
from moesim.sim.migrate import Mover, holdings, plan_moves
from moesim.sim.network import on_event
from moesim.sim.outage import Outage, Table, bypass, widened
from moesim.sim.prepare import Models, Step, limited, one_batch, routed_by
from moesim.sim.rebalance import (
    Rebalance,
    Rebalancer,
    WindowPlanner,
    load_counts,
    slot_table,
)
from moesim.sim.result import SimResult
from moesim.sim.schedules.base import Schedule
from moesim.sim.steps import timed_step
from moesim.sim.timeline import StepTimeline
from moesim.trace.batches import Batches
from moesim.trace.format import Trace
from moesim.types import Progress

Planner = Callable[[npt.NDArray[np.int64]], Placement]
"""From slots of each GPU [G] (0 for one that is down) to a placement."""

MAX_FAULTS_IN_A_ROW = 100
"""Failures without one step in between, after which a run is given up."""


@dataclass(slots=True, eq=False)
class FaultRun:
    """All state of a run with faults; `run` goes through the batches."""

    models: Models
    schedule: Schedule
    trace: Trace
    placement: Placement
    clock: FaultClock
    recovery: Recovery
    mover: Mover
    link_faults: Sequence[Fault] = ()
    planner: Planner | None = None
    speed: SpeedModel | None = None
    timeline: StepTimeline | None = None
    rebalance: Rebalance | None = None
    window_planner: WindowPlanner | None = None
    outages: list[Outage] = field(default_factory=list)
    down: dict[int, float] = field(default_factory=dict)
    rejoining: dict[int, bool] = field(default_factory=dict)
    loading: dict[int, simpy.Event] = field(default_factory=dict)
    link_rooms: dict[int, list[float]] = field(default_factory=dict)
    retried: int = 0
    moved_bytes: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    engine: Engine = field(init=False)
    tally: Tally = field(init=False)
    base: Table = field(init=False)
    own_slots: int = field(init=False)
    current: Placement = field(init=False)
    held: list[list[set[int]]] = field(init=False)
    anew: Rebalancer | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.recovery.on_loss == "replan" and self.planner is None:
            raise InputError("a new plan is wanted, but there is no planner", "give a planner")
        if self.rebalance is not None and self.window_planner is None:
            raise InputError("a new placement is wanted, but there is no planner", "give a planner")
        if self.schedule.coherent:
            raise InputError(
                f"faults with the {self.schedule.name} schedule", "use `schedule` sequential"
            )

    def run(self, batches: Batches, progress: Progress | None = None) -> SimResult:
        """Serve every batch once. Raises InfeasibleError where an expert is nowhere and the
        recovery does not allow for it, or a link that is down for good holds a step up."""
        self.engine = engine = Engine(
            self.models.links.num_links, speed=self.speed, record_links=self.timeline is not None
        )
        self.tally = Tally(self.models, self.schedule.name)
        self.base = slot_table(self.placement)
        self.own_slots = self.base.shape[2]
        self.current, self.held = self.placement, holdings(self.base)
        if self.rebalance is not None and self.window_planner is not None:
            node = np.asarray(self.models.cluster.node_of_gpu)
            self.anew = Rebalancer(self.rebalance, self.window_planner, self.mover, engine, node)
        for fault in self.link_faults:
            self._change_links(fault)
        served_us = 0.0
        for b in range(len(batches)):
            while True:
                self._take_up()
                self._catch_up()
                step = self._prepare(one_batch(batches, b))
                run = self._attempt(step)
                if run is None:
                    self.retried += 1
                    continue
                break
            served_us += run.us
            self.tally.add(run, step)
            for outage in self.outages:
                if math.isnan(outage.recovered_us):
                    outage.recovered_us = run.end_us
            if self.timeline is not None:
                self.timeline.add(run, b, engine.network)
            if self.anew is not None:
                self._place_anew(self.anew, one_batch(batches, b), b + 1, len(batches))
            if progress is not None:
                progress(b + 1, len(batches))
        extra: dict[str, Any] = {
            "faults": {
                "availability": served_us / max(engine.now_us, 1e-300),
                "steps_retried": self.retried,
                "bytes_from_gpus": float(self.moved_bytes[0]),
                "bytes_from_host": float(self.moved_bytes[1]),
                "outages": [outage.to_json() for outage in self.outages],
            }
        }
        if self.anew is not None:
            extra["rebalance"] = self.anew.figures(self.tally.balancedness)
        return self.tally.result(engine, extra)

    def _place_anew(self, anew: Rebalancer, batch: Batches, done: int, total: int) -> None:
        """Count a step's loads; begin to place again on the GPUs that are up if it is time."""
        anew.record(load_counts(self.trace, batch))
        if done % anew.policy.every_steps or done == total or not anew.due(self.tally.balancedness):
            return
        dead = sorted(self.down)
        capacity = self._capacity(dead)
        if int(capacity.max()) > self.own_slots + self.recovery.spare_slots:
            anew.num_skipped += 1
            return
        anew.begin(self.held, anew.wanted(capacity))

    def _take_up(self) -> None:
        """Serve from layers that have been placed again."""
        if self.anew is None or not self.anew.arrived:
            return
        table = slot_table(self.current)
        for layer, row in self.anew.arrived:
            width = max(table.shape[2], self.base.shape[2], row.shape[1])
            table, self.base = widened(table, width), widened(self.base, width)
            table[layer] = widened(row[None], width)[0]
            for gpu in range(self.models.num_gpus):
                if gpu not in self.down:
                    self.base[layer, gpu] = table[layer, gpu]
            self.held[layer] = holdings(table[layer : layer + 1])[0]
        self.anew.arrived.clear()
        self._serve_from(table)

    def _attempt(self, step: Step) -> StepRun | None:
        """Run one step; None if a GPU failed in it."""
        next_us = self.clock.next_for(self.down)
        try:
            run = run_step(self.engine, self.schedule, step.work, next_us)
        except RuntimeError as error:
            raise InfeasibleError(
                f"a step cannot end: {error}",
                "let the link come back (FROM-TO), or give it some rate (=0.1)",
            ) from None
        if run.finished:
            return run
        while True:
            fault = self.clock.pop()
            if not set(fault.gpus) <= set(self.down):
                self._apply(fault, wasted_us=run.us)
                return None
            self._apply(fault)

    def _catch_up(self) -> None:
        """Apply faults that are due and let GPUs rejoin that are back and loaded."""
        while self.clock.next_us <= self.engine.now_us:
            self._apply(self.clock.pop())
        now = self.engine.now_us
        for gpu in sorted(g for g, until in self.down.items() if until <= now):
            if gpu not in self.rejoining:
                self._load_returned(gpu)
        ready = sorted(g for g, loaded in self.rejoining.items() if loaded)
        if ready:
            if self.anew is not None:
                self.anew.abandon()
            for gpu in ready:
                del self.down[gpu], self.rejoining[gpu]
                for layer in range(len(self.held)):
                    self.held[layer][gpu] = set(holdings(self.base[layer : layer + 1])[0][gpu])
            self._mark(f"GPU {', '.join(map(str, ready))} back")
            self.engine.wait(self.recovery.restart_us)
            self._place(Outage("rejoin", now))

    def _apply(self, fault: Fault, wasted_us: float = 0.0) -> None:
        """GPUs go down: notice, place what they held, form the group again."""
        self._take_up()
        if self.anew is not None:
            self.anew.abandon()
        hit = [g for g in fault.gpus if g not in self.down]
        for gpu in fault.gpus:
            self.down[gpu] = max(fault.until_us, self.down.get(gpu, 0.0))
            self.rejoining.pop(gpu, None)
            for layer in self.held:
                layer[gpu] = set()
        if not hit:
            return
        outage = Outage(fault.name, fault.at_us, wasted_us=wasted_us)
        self.outages.append(outage)
        if sum(math.isnan(o.recovered_us) for o in self.outages) > MAX_FAULTS_IN_A_ROW:
            raise InfeasibleError(
                f"{MAX_FAULTS_IN_A_ROW} failures in a row and not one step in between, up to"
                f" {self.engine.now_us / 1e3:,.0f} ms",
                "failures come faster than recovery: a longer `mtbf`, or quicker `detect`,"
                " `restart` and `repair`",
            )
        self._mark(f"{fault.name} fails")
        self.engine.wait(self.recovery.detect_us)
        self._place(outage)
        self.engine.wait(self.recovery.restart_us)

    def _change_links(self, fault: Fault) -> None:
        """Let links lose and regain their rate when it is time, steps or none. Of several faults of
        one link the worst counts."""
        env = self.engine.env

        def change(add: bool) -> Callable[[Any], None]:
            def now(_: Any) -> None:
                room = 1.0
                for link in fault.links:
                    rooms = self.link_rooms.setdefault(link, [])
                    rooms.append(fault.room) if add else rooms.remove(fault.room)
                    room = min(rooms, default=1.0)
                    self.engine.network.set_room(link, room)
                self._mark(f"{fault.name} at {room:.0%}")

            return now

        on_event(env.timeout(fault.at_us), change(add=True))
        if math.isfinite(fault.until_us):
            on_event(env.timeout(fault.until_us), change(add=False))

    def _place(self, outage: Outage) -> None:
        """A placement on the GPUs that are up, and the weights it needs moved there."""
        dead = sorted(self.down)
        if len(dead) == self.models.num_gpus:
            self._wait_for(dead, outage)
            return
        left, lost = without_gpus(self.base, dead)
        outage.lost_experts = len(lost)
        wanted = self._wanted(left, lost, dead)
        if wanted is None:
            self._wait_for(dead, outage)
            return
        node = np.asarray(self.models.cluster.node_of_gpu)
        moves = plan_moves(self.held, wanted, node)
        if moves:
            from_gpus, from_host = self.mover.bytes(moves)
            outage.bytes_from_gpus += from_gpus
            outage.bytes_from_host += from_host
            self.moved_bytes += (from_gpus, from_host)
            self.engine.transfer(self.mover.flows(moves))
        self.held = holdings(wanted)
        self._serve_from(wanted)

    def _serve_from(self, table: Table) -> None:
        self.current = Placement(
            np.ascontiguousarray(table.reshape(table.shape[0], -1)),
            self.placement.num_gpus,
            self.placement.num_nodes,
            self.placement.num_experts,
        )

    def _wanted(self, left: Table, lost: list[tuple[int, int]], dead: list[int]) -> Table | None:
        """Slots [L, G, S] to serve from; None to wait for the GPUs that are down."""
        policy = self.recovery
        if not dead or (not lost and policy.on_loss != "replan"):
            return left
        layer, expert = lost[0] if lost else (0, 0)
        cause = (
            f"expert {expert} of layer {layer} is on no GPU that is up"
            f" ({len(lost)} such experts; down: {', '.join(map(str, dead))})"
        )
        if policy.on_loss == "fail":
            raise InfeasibleError(
                cause, "plan with more redundant experts, or use `on_loss` reload, replan or wait"
            )
        if policy.on_loss == "wait":
            if not math.isfinite(max(self.down.values())):
                raise InfeasibleError(cause, "it never comes back: use `on_loss` reload or replan")
            return None
        limit = self.own_slots + policy.spare_slots
        if self.planner is not None and policy.on_loss == "replan":
            self.engine.wait(policy.plan_us)
            return self._replanned(self.planner, dead, limit)
        table = reloaded(left, lost, dead, limit)
        if table is None:
            raise InfeasibleError(
                f"{cause}, and no GPU has room for it",
                "give more spare slots or redundant experts, or use `on_loss` wait",
            )
        return table

    def _replanned(self, planner: Planner, dead: list[int], limit: int) -> Table:
        """The planner's placement on as many slots as there are, more where experts need them."""
        capacity = self._capacity(dead)
        each = int(capacity.max())
        if each > limit:
            raise InfeasibleError(
                f"{self.placement.num_experts} experts need {each} slots on each of"
                f" {int((capacity > 0).sum())} GPUs, {limit} fit",
                "give more spare slots, or use `on_loss` wait",
            )
        if self.anew is not None and self.anew.window:
            return self.anew.wanted(capacity)
        return slot_table(planner(capacity))

    def _capacity(self, dead: list[int]) -> npt.NDArray[np.int64]:
        """[G] slots of each GPU that is up: its own, more where the experts need them."""
        up = self.models.num_gpus - len(dead)
        each = max(self.own_slots, -(-self.placement.num_experts // up))
        capacity = np.full(self.models.num_gpus, each, np.int64)
        capacity[dead] = 0
        return capacity

    def _wait_for(self, dead: list[int], outage: Outage) -> None:
        """Let time pass until all GPUs are back and loaded."""
        until = max(self.down.values())
        if not math.isfinite(until):
            raise InfeasibleError(
                f"all GPUs are down and one never comes back ({len(dead)} down)",
                "let the faults end (FROM-TO)",
            )
        self.engine.wait(until - self.engine.now_us)
        for gpu in dead:
            self.down.pop(gpu, None)
            self.rejoining.pop(gpu, None)
        self._place(outage)

    def _load_returned(self, gpu: int) -> None:
        """Load the experts of a GPU that is back from its host, beside the running steps."""
        self.rejoining[gpu] = False
        nothing: list[list[set[int]]] = [[set() for _ in layer] for layer in self.held]
        wanted = np.full_like(self.base, -1)
        wanted[:, gpu] = self.base[:, gpu]
        moves = plan_moves(nothing, wanted, np.asarray(self.models.cluster.node_of_gpu))
        self.moved_bytes += self.mover.bytes(moves)
        events = [self.engine.network.send(flow) for flow in self.mover.flows(moves)]
        self.loading[gpu] = loaded = self.engine.env.all_of(events)

        def done(_: Any) -> None:
            if gpu in self.rejoining and self.loading[gpu] is loaded:
                self.rejoining[gpu] = True

        on_event(loaded, done)

    def _prepare(self, batch: Batches) -> Step:
        models, dead = self.models, sorted(self.down)
        home = home_ranks(self.trace, batch, models.num_homes)
        if dead:
            up = np.array([g for g in range(models.num_gpus) if g not in self.down], np.int32)
            moved = np.flatnonzero(np.isin(home, dead))
            home = home.copy()
            home[moved] = up[np.arange(len(moved)) % len(up)]
        trace, batch, drops = limited(models, self.trace, batch, home, self.current)

        def routing(some: Batches, homes: npt.NDArray[np.int32]) -> Routed:
            routed = routed_by(models, trace, some, self.current, homes)
            bypass(routed, dead, np.asarray(models.cluster.node_of_gpu))
            return routed

        return timed_step(models, trace, batch, home, self.schedule.num_chunks, routing, drops)

    def _mark(self, name: str) -> None:
        if self.timeline is not None:
            self.timeline.mark(name, self.engine.now_us)
