"""The network: flows over links, in time.

A *flow* is a fixed amount of bytes on each of a set of links, all advanced in proportion: one
transfer over a path, or a whole collective (the flows of a collective end together, as the coflow
discipline MADD makes them: Chowdhury, Zhong, Stoica, "Efficient Coflow Scheduling with Varys",
SIGCOMM 2014). Rates are max-min fair in the bytes per second that a flow moves over its busiest
link, and solved again only when a flow starts or ends or a link changes.

A link is given by what a flow occupies of it, in microseconds of the whole link, so that each
kind of traffic has its own efficiency (SimGrid's bandwidth factor, by kind instead of one for all).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from moesim.sim.maxmin import max_min_rates
from moesim.types import FloatArray, IntArray

DONE = 1e-12
"""Share of a flow below which what is left of it counts as nothing (rounding of times)."""


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """Bytes over links.

    link_idx:  [n] int64, the links that carry some of it.
    bytes:     [n] on each; busy_us: [n] time each link would need, were it alone and all its own.
    latency_us: before the first byte; alone_us: from then to the last byte with nothing else on
    the network, at least `busy_us.max()`.
    """

    name: str
    category: str
    link_idx: IntArray
    bytes: FloatArray
    busy_us: FloatArray
    latency_us: float
    alone_us: float

    @property
    def size(self) -> float:
        """Bytes on the busiest link, the unit of the flow's rate."""
        return float(self.bytes.max(initial=0.0))


@dataclass(slots=True, eq=False)
class _Active:
    flow: Flow
    done: simpy.Event
    size: float
    left: float
    rate: float = 0.0
    load: FloatArray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True, slots=True, eq=False)
class LinkUse:
    """Share of every link in use from `start_us` on: `used` [links], 1 is all of a link."""

    start_us: float
    used: FloatArray


class Network:
    """Links shared by flows, inside a SimPy environment whose unit of time is one microsecond.

    room: [links] share of each link that works: 1, or less where it is degraded, 0 where it is
    down. `bytes` and `busy_us` [links] add up what finished flows carried, of a cancelled flow its
    part. `history` is kept where `record` is true.
    """

    def __init__(self, env: simpy.Environment, num_links: int, *, record: bool = False) -> None:
        self.env = env
        self.room = np.ones(num_links)
        self.bytes = np.zeros(num_links)
        self.busy_us = np.zeros(num_links)
        self.used = np.zeros(num_links)
        self.peak_used = np.zeros(num_links)
        self.num_solved = 0
        self.record = record
        self.history: list[LinkUse] = []
        self._active: list[_Active] = []
        self._entering: dict[simpy.Event, simpy.Event] = {}
        self._last_us = 0.0
        self._dirty = False
        self._version = 0

    @property
    def num_active(self) -> int:
        """Flows that move bytes now; those still in their latency do not count."""
        return len(self._active)

    def send(self, flow: Flow) -> simpy.Event:
        """Start `flow`; the event fires when its last byte has arrived."""
        done = self.env.event()
        if flow.latency_us > 0:
            wait = self.env.timeout(flow.latency_us)
            self._entering[wait] = done

            def arrive(event: simpy.Event) -> None:
                if self._entering.pop(event, None) is not None:
                    self._enter(flow, done)

            on_event(wait, arrive)
        else:
            self._enter(flow, done)
        return done

    def set_room(self, link_idx: npt.ArrayLike, share: float) -> None:
        """Set the working share of links from now on."""
        self._advance()
        self.room[np.asarray(link_idx)] = share
        self._changed()

    def cancel(self, sent: Iterable[simpy.Event]) -> None:
        """Drop flows by the events that `send` gave; these never fire, and what the flows had
        carried is counted."""
        dropped = set(sent)
        self._advance()
        for active in self._active:
            if active.done in dropped:
                self._count(active.flow, 1.0 - active.left / active.size)
        self._active = [a for a in self._active if a.done not in dropped]
        self._entering = {w: d for w, d in self._entering.items() if d not in dropped}
        self._changed()

    def _enter(self, flow: Flow, done: simpy.Event) -> None:
        size = flow.size
        if size <= 0.0 or flow.alone_us <= 0.0:
            self._count(flow, 1.0)
            done.succeed()
            return
        self._advance()
        self._active.append(_Active(flow, done, size, size, load=flow.busy_us / size))
        self._changed()

    def _count(self, flow: Flow, share: float) -> None:
        self.bytes[flow.link_idx] += share * flow.bytes
        self.busy_us[flow.link_idx] += share * flow.busy_us

    def _advance(self) -> None:
        """Move all flows forward to now."""
        elapsed = self.env.now - self._last_us
        self._last_us = self.env.now
        if elapsed > 0.0:
            for active in self._active:
                active.left = max(0.0, active.left - active.rate * elapsed)

    def _changed(self) -> None:
        """Solve once all that happens at this instant has happened."""
        if not self._dirty:
            self._dirty = True
            on_event(self.env.timeout(0), self._resolve)

    def _resolve(self, _: simpy.Event) -> None:
        self._dirty = False
        self._version += 1
        self._advance()
        self._solve()
        if self.record:
            self.history.append(LinkUse(self.env.now, self.used.copy()))
        if not self._active:
            return
        finish = min((a.left / a.rate if a.rate > 0.0 else np.inf) for a in self._active)
        if np.isfinite(finish):
            version = self._version
            on_event(self.env.timeout(finish), lambda _: self._finish(version, finish))

    def _solve(self) -> None:
        active = self._active
        if not active:
            self.used[:] = 0.0
            return
        self.num_solved += 1
        counts = np.array([len(a.load) for a in active])
        rates = max_min_rates(
            np.concatenate(([0], np.cumsum(counts))),
            np.concatenate([a.flow.link_idx for a in active]),
            np.concatenate([a.load for a in active]),
            np.array([a.size / a.flow.alone_us for a in active]),
            self.room,
            self.used,
        )
        np.maximum(self.peak_used, self.used, out=self.peak_used)
        for a, rate in zip(active, rates.tolist(), strict=True):
            a.rate = rate

    def _finish(self, version: int, elapsed: float) -> None:
        if version != self._version:
            return
        ended = [a for a in self._active if a.left - a.rate * elapsed <= a.size * DONE]
        self._advance()
        for a in ended:
            self._active.remove(a)
            self._count(a.flow, 1.0)
            a.done.succeed()
        self._changed()

    def stalled(self) -> list[str]:
        """Names of flows that cannot move because a link of theirs is down."""
        return [a.flow.name for a in self._active if a.rate <= 0.0]


def on_event(event: simpy.Event, callback: Callable[[Any], None]) -> None:
    """Call `callback` when `event` fires; cheaper than a process."""
    event.callbacks.append(callback)
