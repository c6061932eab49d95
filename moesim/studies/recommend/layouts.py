"""Layouts of a service: how many engines of which shape, and what becomes of the requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moesim.cluster.prices import Prices
from moesim.cost.curves import Basis, weakest
from moesim.serving.config import ServingConfig
from moesim.serving.run import run_tables
from moesim.serving.step_cost import EngineStepCost
from moesim.serving.step_table import TERM_TIMES, StepTables, tables_of
from moesim.studies.recommend.need import Need
from moesim.studies.recommend.shapes import Place, Shape, sized

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment
    from moesim.serving.requests import Requests
    from moesim.serving.result import ServingResult

TIMES = tuple(name for name in StepTables._fields if name.endswith("_us"))


@dataclass(frozen=True, slots=True)
class Layout:
    """`replicas` engines of shape `front`; with `back` they compute prompts, and `back_replicas`
    engines of that shape decode."""

    front: Shape
    replicas: int
    back: Shape | None = None
    back_replicas: int = 0

    @property
    def num_gpus(self) -> int:
        back = 0 if self.back is None else self.back.num_gpus * self.back_replicas
        return self.front.num_gpus * self.replicas + back

    @property
    def family(self) -> tuple[int, ...]:
        """What makes two layouts look different: the engines' sizes, and the tensor parallelism and
        stages of engines that do both."""
        if self.back is None:
            return self.front.num_gpus, 0, self.front.tp, self.front.pp
        return self.front.num_gpus, self.back.num_gpus

    @property
    def name(self) -> str:
        """As "2 x 8 prefill (tp1 dp8 ep8), 1 x 16 decode (tp1 dp16 ep16)"."""
        if self.back is None:
            return _named(self.replicas, self.front, "")
        return (
            f"{_named(self.replicas, self.front, ' prefill')},"
            f" {_named(self.back_replicas, self.back, ' decode')}"
        )


def _named(count: int, shape: Shape, role: str) -> str:
    return f"{count} x {shape.num_gpus}{role} ({shape.parallelism})"


@dataclass(frozen=True, slots=True, eq=False)
class Tried:
    """A layout after its simulation at `rate` requests/s.

    figures: latencies in seconds, rates, shares, as `ServingResult.metrics`. ratios: each promise's
    figure over its limit, below 1 where it is kept. overloaded: requests pile up as long as the run
    is, so that its latencies are none of a steady service.
    """

    layout: Layout
    rate: float
    figures: Mapping[str, float | None]
    ratios: Mapping[str, float]
    basis: Basis
    notes: tuple[str, ...]
    overloaded: bool

    @property
    def worst(self) -> float:
        """The largest ratio."""
        return max(self.ratios.values())

    @property
    def kept(self) -> bool:
        """Whether every promise is kept, and would be in a longer run."""
        return self.worst < 1.0 and not self.overloaded


@dataclass(slots=True)
class Bench:
    """Simulates layouts of one place for one need; engines' step costs are built once.

    prices: of GPUs, by which layouts of two types are compared. tried: all that was simulated, in
    order.
    """

    place: Place
    need: Need
    prices: Prices = field(default_factory=lambda: Prices({}))
    tried: list[Tried] = field(default_factory=list)
    _engines: dict[Shape, tuple[Deployment, EngineStepCost]] = field(default_factory=dict)
    _loads: dict[float, Requests] = field(default_factory=dict)

    def engine(self, shape: Shape) -> tuple[Deployment, EngineStepCost]:
        """The deployment of a shape and its step cost. Raises what they raise."""
        if shape not in self._engines:
            made = self.place.deployment(shape)
            self._engines[shape] = made, EngineStepCost(made)
        return self._engines[shape]

    def requests(self, rate: float) -> Requests:
        """The load at a rate."""
        if rate not in self._loads:
            self._loads[rate] = self.need.requests(rate)
        return self._loads[rate]

    def per_hour(self, shape: Shape) -> float | None:
        """Dollars an hour of one engine, None where a price is not known."""
        return self.prices.per_hour(sized(self.place.cluster_of(shape), shape.num_gpus))

    def size(self, layout: Layout) -> float:
        """What the fewest is meant of: GPUs; dollars an hour where they are of two types."""
        if layout.back is not None and layout.front.cluster != layout.back.cluster:
            front, back = self.per_hour(layout.front), self.per_hour(layout.back)
            if front is not None and back is not None:
                return front * layout.replicas + back * layout.back_replicas
        return float(layout.num_gpus)

    def config(self, layout: Layout) -> ServingConfig:
        """The service that a layout is."""
        if layout.back is None:
            return ServingConfig(
                replicas=layout.replicas, speculation=self.place.speculation, seed=self.need.seed
            )
        return ServingConfig(
            replicas=layout.replicas,
            speculation=self.place.speculation,
            decode=self.engine(layout.back)[0],
            decode_replicas=layout.back_replicas,
            seed=self.need.seed,
        )

    def run(self, layout: Layout, rate: float, slower: float = 1.0) -> Tried:
        """Requests at `rate` through a layout, every step `slower` times as long as predicted."""
        front, cost = self.engine(layout.front)
        costs = [cost] if layout.back is None else [cost, self.engine(layout.back)[1]]
        requests = self.requests(rate)
        result = run_tables(
            front,
            requests,
            self.config(layout),
            slowed(tables_of(costs), slower),
            basis=weakest(*(c.basis for c in costs), requests.basis),
            notes=tuple(dict.fromkeys(note for c in costs for note in c.notes)),
        )
        tried = self._judged(layout, rate, result)
        if slower == 1.0:
            self.tried.append(tried)
        return tried

    def _judged(self, layout: Layout, rate: float, result: ServingResult) -> Tried:
        found = result.promised(self.need.slo)
        ratios = {
            str(bound): _ratio(found[bound.name], bound.limit_s) for bound in self.need.slo.bounds
        }
        return Tried(
            layout,
            rate,
            dict(result.metrics),
            ratios,
            result.basis,
            result.notes,
            result.window.state in ("growing", "short"),
        )


def _ratio(value: float | None, limit_s: float) -> float:
    return 0.0 if value is None else value / limit_s


def slowed(tables: StepTables, factor: float) -> StepTables:
    """Steps that take `factor` times as long."""
    if factor == 1.0:
        return tables
    terms = tables.terms.copy()
    terms[:, :, TERM_TIMES] *= factor
    scaled = {name: np.asarray(getattr(tables, name)) * factor for name in TIMES}
    return tables._replace(terms=terms, **scaled)
