"""The search: closed forms order families of layouts, the simulation decides.

A family is a shape of engine (or one for prompts and one for decoding), in any number. Families are
taken in the order of the fewest GPUs that their closed form allows, and grown until the simulation
keeps the promises; a family whose closed form needs more GPUs than the answers in hand is left out.
Nothing depends on the clock or on the order of threads.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf

from moesim.errors import MoesimError
from moesim.serving.step_cost import EngineStepCost
from moesim.studies.recommend.bounds import Most, most
from moesim.studies.recommend.layouts import Bench, Layout, Tried
from moesim.studies.recommend.shapes import Role, Shape, fits, shapes
from moesim.types import Progress

log = logging.getLogger("moesim")

KEEP = 5
SPLIT_FRONTS, SPLIT_BACKS = 3, 5
"""Shapes of each role that are paired, those that need fewest GPUs per request/s."""
GROWTH = 8
"""Engines that are added to what the closed form allows before a family is given up."""
BISECTIONS = 7


@dataclass(frozen=True, slots=True)
class Engine:
    """A shape with its bound."""

    shape: Shape
    most: Most

    @property
    def gpus_per_rate(self) -> float:
        """GPUs for one request/s at the least."""
        return self.shape.num_gpus / self.most.rate


@dataclass(frozen=True, slots=True)
class Family:
    """Engines that layouts are made of."""

    front: Engine
    back: Engine | None = None

    def least(self, rate: float) -> Layout:
        """The fewest engines that the closed forms allow."""
        replicas = max(1, ceil(rate / self.front.most.rate))
        if self.back is None:
            return Layout(self.front.shape, replicas)
        backs = max(1, ceil(rate / self.back.most.rate))
        return Layout(self.front.shape, replicas, self.back.shape, backs)

    def most_rate(self, layout: Layout) -> float:
        """requests/s that the closed forms allow a layout."""
        rate = self.front.most.rate * layout.replicas
        if self.back is not None:
            rate = min(rate, self.back.most.rate * layout.back_replicas)
        return rate

    def within(self, gpus: int) -> list[Layout]:
        """Layouts of at most so many GPUs, all of them in use, the closed forms' best first: with
        two roles the best split and its neighbours."""
        front, back = self.front.shape, self.back.shape if self.back is not None else None
        if back is None:
            count = gpus // front.num_gpus
            return [Layout(front, count)] if count else []
        found = [
            Layout(front, n, back, (gpus - n * front.num_gpus) // back.num_gpus)
            for n in range(1, gpus // front.num_gpus + 1)
        ]
        found = [layout for layout in found if layout.back_replicas]
        return sorted(found, key=lambda layout: (-self.most_rate(layout), layout.num_gpus))[:3]


@dataclass(slots=True)
class Searched:
    """What a search looked at. skipped: shapes that could not be, by the reason. least_gpus: the
    fewest that a closed form allows, None where there is no family."""

    least_gpus: int | None = None
    shapes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    families: int = 0
    simulated: int = 0


def families(
    bench: Bench, max_gpus: int, searched: Searched, rate: float | None = None
) -> list[Family]:
    """Families with a closed form that allows some load. Engines for prompts and for decoding are
    paired of those that need fewest GPUs, at `rate` or per request/s."""
    costs: dict[Shape, EngineStepCost] = {}
    by_role: dict[Role, list[Engine]] = {}
    for role in ("mixed", "prefill", "decode"):
        for shape in shapes(bench.place, role, max_gpus):
            searched.shapes += 1
            found = _engine(bench, role, shape, costs, searched)
            if found is not None:
                by_role.setdefault(role, []).append(found)
    fronts = _leading(by_role.get("prefill", []), SPLIT_FRONTS, rate)
    backs = _leading(by_role.get("decode", []), SPLIT_BACKS, rate)
    pairs = [Family(front, back) for front in fronts for back in backs]
    return [*(Family(engine) for engine in by_role.get("mixed", [])), *pairs]


def _leading(engines: Sequence[Engine], count: int, rate: float | None) -> list[Engine]:
    """Those that need fewest GPUs, one of each shape but for the size of its steps."""

    def order(engine: Engine) -> tuple[float, float]:
        size = engine.shape.num_gpus
        needed = 0 if rate is None else size * ceil(rate / engine.most.rate)
        return needed, engine.gpus_per_rate

    first: dict[Shape, Engine] = {}
    for engine in sorted(engines, key=order):
        first.setdefault(replace(engine.shape, budget=0), engine)
    return list(first.values())[:count]


def _engine(
    bench: Bench,
    role: Role,
    shape: Shape,
    costs: dict[Shape, EngineStepCost],
    searched: Searched,
) -> Engine | None:
    """The shape with its bound, None where it cannot be. Shapes that differ by the budget alone
    share a step cost here."""
    try:
        made = bench.place.deployment(shape)
        if not fits(made, bench.need.longest):
            searched.skipped["the model or the longest request does not fit"] += 1
            return None
        plain = replace(shape, budget=0)
        if plain not in costs:
            costs[plain] = EngineStepCost(bench.place.deployment(plain))
        drafts = bench.place.speculation
        found = most(role, costs[plain], bench.need, made.max_batch_tokens, drafts)
    except MoesimError as error:
        searched.skipped[error.cause] += 1
        return None
    if found.rate <= 0:
        searched.skipped[f"a promise cannot be kept: {found.binds}"] += 1
        return None
    return Engine(shape, found)


def cheapest(
    bench: Bench,
    max_gpus: int,
    searched: Searched,
    progress: Progress | None = None,
    *,
    keep: int = KEEP,
    below: float = inf,
) -> list[Tried]:
    """The layouts of least size (`Bench.size`) that keep the promises, `keep` at most and all of
    less than `below`, best first: by size, then by how far the promises are from being missed.
    Where none does: the one that misses least."""
    rate = bench.need.rate
    found = [(bench.size(f.least(rate)), f) for f in families(bench, max_gpus, searched, rate)]
    found.sort(key=lambda pair: (pair[0], pair[1].front.gpus_per_rate))
    searched.families = len(found)
    if found:
        searched.least_gpus = min(f.least(rate).num_gpus for _, f in found)
    best = _Best(keep)
    nearest: Tried | None = None
    for done, (size, family) in enumerate(found):
        if progress is not None:
            progress(done, len(found))
        if size > best.ceiling or size >= below:
            break
        for tried in _grow(bench, family, max_gpus, min(best.ceiling, below), searched):
            if tried.kept and bench.size(tried.layout) < below:
                best.add(tried, (bench.size(tried.layout), tried.worst))
            elif not tried.kept and (nearest is None or tried.worst < nearest.worst):
                nearest = tried
    if progress is not None:
        progress(len(found), len(found))
    return best.sorted() or ([nearest] if nearest is not None else [])


def _grow(
    bench: Bench, family: Family, max_gpus: int, ceiling: float, searched: Searched
) -> Iterator[Tried]:
    """Layouts of a family from its least, each simulated, until one keeps the promises."""
    layout = family.least(bench.need.rate)
    for _ in range(GROWTH):
        if layout.num_gpus > max_gpus or bench.size(layout) > ceiling:
            return
        tried = _run(bench, layout, bench.need.rate, searched)
        if tried is None:
            return
        yield tried
        if tried.kept:
            return
        layout = larger(layout, tried)


def larger(layout: Layout, tried: Tried) -> Layout:
    """One more engine of the role whose promise is missed most."""
    worst = max(tried.ratios, key=lambda name: tried.ratios[name])
    if layout.back is None or worst.startswith("ttft"):
        return replace(layout, replicas=layout.replicas + 1)
    return replace(layout, back_replicas=layout.back_replicas + 1)


def _run(bench: Bench, layout: Layout, rate: float, searched: Searched) -> Tried | None:
    searched.simulated += 1
    try:
        return bench.run(layout, rate)
    except MoesimError as error:
        searched.skipped[error.cause] += 1
        return None


def fastest(
    bench: Bench,
    gpus: int,
    searched: Searched,
    progress: Progress | None = None,
    *,
    keep: int = KEEP,
    above: float = 0.0,
) -> list[Tried]:
    """The layouts of at most `gpus` GPUs that keep the promises at the highest rate, `keep` at most
    and all at more than `above` requests/s, each at its rate, best first."""
    found = [(f, layout) for f in families(bench, gpus, searched) for layout in f.within(gpus)]
    found.sort(key=lambda pair: -pair[0].most_rate(pair[1]))
    searched.families = len({id(f) for f, _ in found})
    best = _Best(keep)
    for done, (family, layout) in enumerate(found):
        if progress is not None:
            progress(done, len(found))
        bound = family.most_rate(layout)
        floor = max(above, best.floor)
        if bound <= floor:
            break
        tried = _highest(bench, layout, bound, floor, searched)
        if tried is not None and tried.rate > above:
            best.add(tried, (-tried.rate, tried.worst))
    if progress is not None:
        progress(len(found), len(found))
    return best.sorted()


def _highest(
    bench: Bench, layout: Layout, bound: float, floor: float, searched: Searched
) -> Tried | None:
    """The layout at the highest rate between `floor` and `bound` at which the promises are kept, to
    1% of the bound; None where it is not above the floor."""
    low, high, kept = max(0.0, floor), bound, None
    if low > 0:
        kept = _run(bench, layout, low, searched)
        if kept is None or not kept.kept:
            return None
    for _ in range(BISECTIONS):
        tried = _run(bench, layout, _rounded((low + high) / 2), searched)
        if tried is None:
            return None
        if tried.kept:
            low, kept = tried.rate, tried
        else:
            high = tried.rate
    return kept


def _rounded(rate: float) -> float:
    """Three digits: the search tells no more apart."""
    return float(f"{rate:.3g}")


@dataclass(slots=True)
class _Best:
    """The best layout of each look, `keep` of them, by a key of which less is better."""

    keep: int
    found: dict[tuple[int, ...], tuple[tuple[float, float], Tried]] = field(default_factory=dict)

    def add(self, tried: Tried, key: tuple[float, float]) -> None:
        own = tried.layout.family
        if own not in self.found or key < self.found[own][0]:
            self.found[own] = key, tried

    def _last(self) -> float:
        """First part of the key of the last that is kept; infinite while there is room."""
        keys = sorted(key for key, _ in self.found.values())
        return keys[self.keep - 1][0] if len(keys) >= self.keep else inf

    @property
    def ceiling(self) -> float:
        """Size beyond which a layout cannot be among the best."""
        return self._last()

    @property
    def floor(self) -> float:
        """Rate that a layout has to beat, of keys that are rates below 0."""
        return max(0.0, -self._last())

    def sorted(self) -> list[Tried]:
        """Best first."""
        ordered = sorted(self.found.values(), key=lambda pair: pair[0])
        return [tried for _, tried in ordered][: self.keep]
