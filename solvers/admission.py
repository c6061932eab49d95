"""Which flows a network admits, and on which of their paths: exact, genetic, and one path each.

Priority flow admission and routing (PFAR; Lopez, Labonne, Poletti, Belabed, arXiv:2009.10822;
abstract read): an integer program, and a genetic algorithm for a fixed amount of work. Our reading:
a flow is admitted whole on one of its paths or not at all, its worth is its priority, and the sum
of worths is maximised within the links' capacities. The paper's sections were not read, so its
objective and its operators may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moesim.errors import InputError
from moesim.kernels import kernel
from moesim.types import FloatArray, IntArray, stream

POPULATION = 60
GENERATIONS = 120
MUTATED = 0.03
NODES = 20_000


@dataclass(frozen=True, eq=False)
class Flows:
    """gb_per_s, worth: [F], above 0. paths: of each flow, its paths as arrays of links; the first
    one is the network's own choice. capacity_gb_per_s: [links]."""

    gb_per_s: FloatArray
    worth: FloatArray
    paths: Sequence[Sequence[IntArray]]
    capacity_gb_per_s: FloatArray

    def __len__(self) -> int:
        return len(self.gb_per_s)

    @cached_property
    def table(self) -> IntArray:
        """[F, paths, links] of `paths`, -1 behind the last."""
        paths = max((len(p) for p in self.paths), default=0)
        width = max((len(path) for p in self.paths for path in p), default=0)
        out = np.full((len(self), paths, width), -1, np.int64)
        for flow, of_flow in enumerate(self.paths):
            for number, path in enumerate(of_flow):
                out[flow, number, : len(path)] = path
        return out

    def load(self, chosen: IntArray) -> FloatArray:
        """[links] GB/s of the flows on their paths; `chosen` [F] as in `Admission`."""
        out = np.zeros(len(self.capacity_gb_per_s))
        for flow in np.flatnonzero(chosen >= 0).tolist():
            out[self.paths[flow][chosen[flow]]] += self.gb_per_s[flow]
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """chosen: [F] path of each flow, -1 where it is not admitted. worth: sum over those admitted.
    proven: whether no choice is worth more."""

    chosen: IntArray
    worth: float
    proven: bool = False


def first_path(flows: Flows) -> Admission:
    """The network without a controller: each flow on its first path, the worthiest first, as long
    as there is room."""
    return _admitted(flows, _by_worth(flows), np.zeros(len(flows), np.int64))


def exact(flows: Flows, *, time_limit_s: float = 60.0) -> Admission:
    """The integer program: x[f, p] = 1 where flow f takes path p.

    maximise sum worth[f] x[f, p]  with  sum_p x[f, p] <= 1, sum over paths through a link of
    gb_per_s[f] x[f, p] <= its capacity
    """
    from moesim.solvers.ilp.engine import IlpModel, Outcome

    model = IlpModel("admission")
    begin = genetic(flows, generations=0)
    place = []
    over: dict[int, list[tuple[object, float]]] = {}
    for flow, paths in enumerate(flows.paths):
        row = [model.binary(cost=-float(flows.worth[flow])) for _ in paths]
        model.at_most([(v, 1.0) for v in row], 1.0)
        for number, (variable, path) in enumerate(zip(row, paths, strict=True)):
            model.start(variable, float(begin.chosen[flow] == number))
            for link in path.tolist():
                over.setdefault(link, []).append((variable, float(flows.gb_per_s[flow])))
        place.append(row)
    for link, terms in over.items():
        model.at_most(terms, float(flows.capacity_gb_per_s[link]))
    found = model.solve(time_limit_s=time_limit_s, node_limit=NODES)
    if found.values is None:
        return begin
    values = found.values
    picked = [[values[model.column(v)] for v in row] for row in place]
    chosen = np.array([int(np.argmax(p)) if max(p) > 0.5 else -1 for p in picked], np.int64)
    worth = float(flows.worth[chosen >= 0].sum())
    return Admission(chosen, worth, found.outcome is Outcome.OPTIMAL)


def genetic(flows: Flows, *, seed: int = 0, generations: int = GENERATIONS) -> Admission:
    """A genetic algorithm of POPULATION members over `generations`: same seed, same answer.

    A member has for each flow a path and a place in the order of admission, by which flows are
    admitted as long as their path has room. The better of two members drawn at random is a parent,
    children take each flow from either parent, some flows change path and place, and the best
    member so far stays. The first member is the network's own choice by worth.
    """
    if generations < 0:
        raise InputError(f"{generations} generations", "give 0 or more")
    rng = stream(seed, 0xAD)
    count = np.array([len(p) for p in flows.paths])
    shape = (POPULATION, len(flows))
    path = np.where(rng.random(shape) < 0.5, 0, (rng.random(shape) * count).astype(np.int64))
    key = _key(flows) + 0.3 * rng.standard_normal(shape)
    path[0], key[0] = 0, _key(flows)
    found = [
        _admitted(flows, np.argsort(k, kind="stable"), p) for k, p in zip(key, path, strict=True)
    ]
    for _ in range(generations):
        value = np.array([f.worth for f in found])
        best = int(value.argmax())
        pairs = rng.integers(0, POPULATION, (2, POPULATION, 2))
        parent = np.where(
            value[pairs[..., 0]] >= value[pairs[..., 1]], pairs[..., 0], pairs[..., 1]
        )
        mother = rng.random(shape) < 0.5
        new_path = np.where(mother, path[parent[0]], path[parent[1]])
        new_key = np.where(mother, key[parent[0]], key[parent[1]])
        changed = rng.random(shape) < MUTATED
        new_path = np.where(changed, (rng.random(shape) * count).astype(np.int64), new_path)
        new_key = new_key + np.where(changed, rng.standard_normal(shape), 0.0)
        new_path[0], new_key[0] = path[best], key[best]
        path, key = new_path, new_key
        found = _all_admitted(flows, key, path)
    return max(found, key=lambda f: f.worth)


def _key(flows: Flows) -> FloatArray:
    return np.asarray(-flows.worth / max(float(flows.worth.max(initial=0)), 1e-12))


def _by_worth(flows: Flows) -> IntArray:
    return np.argsort(_key(flows), kind="stable")


def _all_admitted(flows: Flows, key: FloatArray, path: IntArray) -> list[Admission]:
    order = np.argsort(key, axis=1, kind="stable")
    return [_admitted(flows, o, p) for o, p in zip(order, path, strict=True)]


def _admitted(flows: Flows, order: IntArray, path: IntArray) -> Admission:
    """Flows in `order` on their `path`, each if there is room left."""
    room = flows.capacity_gb_per_s * (1 + 1e-9)
    chosen = np.full(len(flows), -1, np.int64)
    _fill(flows.table, flows.gb_per_s, order, path, room, chosen)
    return Admission(chosen, float(flows.worth[chosen >= 0].sum()))


@kernel
def _fill(table, gb_per_s, order, path, room, chosen):  # type: ignore[no-untyped-def]
    for flow in order:
        links = table[flow, path[flow]]
        fits = True
        for link in links:
            if link >= 0 and room[link] < gb_per_s[flow]:
                fits = False
        if fits:
            chosen[flow] = path[flow]
            for link in links:
                if link >= 0:
                    room[link] -= gb_per_s[flow]
