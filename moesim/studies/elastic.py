"""`elastic`: expert-parallel groups of fixed and of changing width through a day of load.

Every hour of the day has a rate; the service at each rate and width is simulated once, with the
lengths of the requests given. Policies choose a width for every hour. A change of width stops the
group: for the weights that the least-movement plan sends (`planning.resize`), host time for each
layer (`sim.rearrange`) and to form the group anew (assumed). Requests that come meanwhile count as
having missed their promises. Dollars are those of the GPUs held in each hour.

Ignored: how long a GPU takes to be had and to load what is no expert, which goes on beside the
narrower group, and redundant experts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.cost.step import build_step_model
from moesim.errors import InputError, plain
from moesim.figures import count, text_table
from moesim.jobs import inputs
from moesim.jobs.arrivals import arriving_requests
from moesim.jobs.result import Result
from moesim.jobs.serve import serve
from moesim.placement import EMPTY, Placement
from moesim.planning.migration import movers
from moesim.planning.resize import least_moves, resize
from moesim.sim.rearrange import PLAN_US, said, weight_move
from moesim.types import Progress

if TYPE_CHECKING:
    import pandas as pd

    from moesim.cluster import Cluster
    from moesim.draw import Picture
    from moesim.jobs.inputs import ClusterLike, ModelLike
    from moesim.model.spec import ModelSpec
    from moesim.serving.requests import Requests

HOURS = 24
SWING, PEAK_HOUR = 0.75, 14
LEAST_REQUESTS, ARRIVING_S = 1500, 120.0
"""Requests simulated at each rate: those of two minutes, since a service of some seconds is still
filling, and no fewer than LEAST_REQUESTS."""
DEFAULT_GOOD = 0.99


@dataclass(frozen=True, slots=True)
class Change:
    """From one width to another. moved: experts of a layer that a GPU fetches; least: as few as
    any placement needs; transfer_s: of their weights; stall_s: in all."""

    moved: int
    least: int
    transfer_s: float
    stall_s: float


@dataclass(frozen=True, slots=True)
class Policy:
    """widths: [HOURS] GPUs. missed: share of the day's requests that miss their promises."""

    widths: tuple[int, ...]
    usd_per_day: float
    missed: float
    num_changes: int
    stalled_s: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ElasticResult(Result):
    """rates: [HOURS] requests/s. kept: {(width, rate): share of requests that keep their promises}.
    changes: {(from, to): Change}. policies: by name. good: share that has to be kept."""

    model: str
    cluster: str
    slo: str
    good: float
    rates: tuple[float, ...]
    kept: Mapping[tuple[int, float], float]
    changes: Mapping[tuple[int, int], Change]
    policies: Mapping[str, Policy]
    basis: tuple[str, ...]
    defaults: Mapping[str, str]
    unsteady: tuple[tuple[int, float], ...] = ()

    @property
    def best(self) -> str | None:
        """The cheapest policy that keeps the promises to `good` of the requests."""
        fine = {n: p for n, p in self.policies.items() if p.missed <= 1 - self.good}
        return min(fine, key=lambda n: (fine[n].usd_per_day, fine[n].num_changes), default=None)

    @property
    def worth_it(self) -> bool:
        """Whether a changing width is the cheapest."""
        return self.best is not None and self.policies[self.best].num_changes > 0

    def line(self) -> str:
        best = self.best
        if best is None:
            return f"no policy keeps {self.good:.1%} of the promises: give wider groups"
        own = self.policies[best]
        text = f"{best}: ${own.usd_per_day:,.0f} per day, {own.missed:.2%} of promises missed"
        fixed = [
            p for p in self.policies.values() if not p.num_changes and p.missed <= 1 - self.good
        ]
        if own.num_changes and fixed:
            least = min(p.usd_per_day for p in fixed)
            text += f", {own.usd_per_day / least - 1:+.0%} against the cheapest fixed width"
        return text if own.num_changes else f"keep one width: {text}"

    def summary(self) -> str:
        defaults = "; ".join(f"{name}: {value}" for name, value in self.defaults.items())
        rows = [
            [
                name,
                f"{p.usd_per_day:,.0f}",
                f"{100 * p.missed:.2f}",
                str(p.num_changes),
                f"{p.stalled_s:.1f}",
                _runs(p.widths),
            ]
            for name, p in self.policies.items()
        ]
        moves = [
            [
                f"{a} to {b}",
                f"{c.moved:,}",
                f"{c.least:,}",
                f"{1e3 * c.transfer_s:.1f}",
                f"{c.stall_s:.2f}",
            ]
            for (a, b), c in self.changes.items()
        ]
        heads = ["policy", "$ per day", "promises missed, %", "changes", "stalled, s", "GPUs"]
        return "\n".join(
            [
                *([f"defaults taken: {defaults}"] if defaults else []),
                f"{plain(self.model)} on {plain(self.cluster)}, {self.slo}:"
                f" {min(self.rates):,.3g} to {max(self.rates):,.3g} requests/s through the day",
                text_table(heads, rows),
                text_table(
                    ["GPUs", "experts moved", "least possible", "weights, ms", "stall, s"], moves
                ),
                self.line(),
                *self._unsteady(),
                *self.basis,
            ]
        )

    def _unsteady(self) -> list[str]:
        if not self.unsteady:
            return []
        least = {w: min(r for x, r in self.unsteady if x == w) for w, _ in self.unsteady}
        said = ", ".join(f"{count(w, 'GPU')} from {r:g} requests/s" for w, r in least.items())
        return [f"no steady state: {said}; more promises are missed in an hour than simulated"]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "moesim-elastic",
            "version": 1,
            "model": self.model,
            "cluster": self.cluster,
            "slo": self.slo,
            "good": self.good,
            "requests_per_s": list(self.rates),
            "kept": [
                {"gpus": w, "requests_per_s": r, "share": s} for (w, r), s in self.kept.items()
            ],
            "changes": [
                {"from": a, "to": b, **{n: getattr(c, n) for n in Change.__dataclass_fields__}}
                for (a, b), c in self.changes.items()
            ],
            "policies": {
                name: {n: getattr(p, n) for n in Policy.__dataclass_fields__}
                for name, p in self.policies.items()
            },
            "unsteady": [{"gpus": w, "requests_per_s": r} for w, r in self.unsteady],
            "best": self.best,
            "basis": list(self.basis),
            "defaults": dict(self.defaults),
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per policy."""
        import pandas as pd

        names = [n for n in Policy.__dataclass_fields__ if n != "widths"]
        data = {name: {n: getattr(p, n) for n in names} for name, p in self.policies.items()}
        return pd.DataFrame.from_dict(data, orient="index").rename_axis("policy")

    def picture(self) -> Picture:
        raise InputError("this result has no picture", "plot its frame or JSON")


def elastic(
    requests: Requests | str | os.PathLike[str],
    *,
    model: ModelLike,
    widths: Sequence[int],
    slo: str,
    peak: float,
    cluster: ClusterLike | None = None,
    day: Sequence[float] | None = None,
    good: float = DEFAULT_GOOD,
    restart: float = 1000.0,
    first: int | None = None,
    max_batch_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ElasticResult:
    """Widths, dollars and missed promises of a day.

    requests: their lengths and order, as for `serve`; at each rate those of ARRIVING_S seconds, or
    the `first` of them. widths: GPUs of an engine with attention data-parallel and experts over
    all. max_batch_tokens: as for `serve`. peak: requests/s of the busiest hour. day: relative load
    of 24 hours; by default one cosine between 0.25 and 1.75 of the mean with its peak at 14 h
    (assumed). good: share of the requests whose promises are to be kept.
    restart: ms to form a group anew. progress(done, total) counts simulations.

    Raises InputError for numbers that cannot be used, and what `serve` raises.
    """
    defaults: dict[str, str] = {}
    spec = inputs.model_of(model)
    sized = sorted(dict.fromkeys(int(w) for w in widths))
    for width in sized:
        if width < 1 or spec.num_experts % width:
            raise InputError(
                f"{spec.num_experts} experts do not divide over {width} GPUs",
                "choose `widths` that divide them",
            )
    if len(sized) < 2:
        raise InputError(f"`widths` {sized}", "give at least two numbers of GPUs, as 2,4,8")
    if not (0 < good < 1 and np.isfinite(restart) and restart >= 0):
        raise InputError(f"`good` {good}, `restart` {restart}", "give a share, and 0 or more")
    rates = _rates(day, peak, defaults)
    clusters = {w: inputs.cluster_of(cluster, w, defaults) for w in sized}
    arriving = arriving_requests(requests, seed=seed, first=first)
    if first is None:
        defaults["first"] = (
            f"the requests of {ARRIVING_S:g} s at each rate, {LEAST_REQUESTS:,} or more, of the"
            f" {len(arriving):,} given"
        )
    kept: dict[tuple[int, float], float] = {}
    unsteady: list[tuple[int, float]] = []
    pairs = [(w, r) for w in sized for r in sorted(set(rates))]
    for width, rate in pairs:
        own = arriving
        if first is None:
            own = arriving.first(max(LEAST_REQUESTS, ceil(rate * ARRIVING_S)))
        record = serve(
            own.scaled(rate / own.rate_per_s),
            model=spec,
            cluster=clusters[width],
            gpus=width,
            tp=1,
            dp=width,
            max_batch_tokens=max_batch_tokens,
            slo=slo,
            seed=seed,
        ).record
        if record["window"]["state"] != "steady":
            unsteady.append((width, rate))
        kept[width, rate] = float(record["slo"]["goodput"]["share"])
        if progress is not None:
            progress(len(kept), len(pairs))
    changes = {
        (a, b): _change(spec, clusters[max(a, b)], a, b, restart / 1e3)
        for a in sized
        for b in sized
        if a != b
    }
    wide = clusters[sized[-1]]
    price = float(np.mean([gpu.price_usd_per_hour for gpu in wide.gpus]))
    chosen = _policies(rates, kept, sized, good)
    return ElasticResult(
        model=spec.name,
        cluster=wide.name,
        slo=slo,
        good=good,
        rates=rates,
        kept=kept,
        changes=changes,
        policies={n: _judged(w, rates, kept, changes, price) for n, w in chosen.items()},
        basis=(
            f"a change of width: {said(weight_move(wide, False), PLAN_US)};"
            f" {restart:g} ms to form the group anew (assumed); requests meanwhile miss their"
            " promises",
            f"${price:g} per GPU and hour (the cluster file's, assumed); held by the hour",
        ),
        defaults=defaults,
        unsteady=tuple(unsteady),
    )


def _rates(day: Sequence[float] | None, peak: float, defaults: dict[str, str]) -> tuple[float, ...]:
    if day is None:
        shape = 1.0 + SWING * np.cos(2 * np.pi * (np.arange(HOURS) - PEAK_HOUR) / HOURS)
        defaults["day"] = "a cosine with its peak at 14 h (assumed)"
    else:
        shape = np.asarray(day, np.float64)
    usable = shape.shape == (HOURS,) and np.isfinite(shape).all() and shape.min() > 0
    if not (usable and np.isfinite(peak) and peak > 0):
        raise InputError(
            f"`peak` {peak:g} and {len(shape)} hours of `day`", f"give {HOURS} loads above 0"
        )
    return tuple(float(f"{r:.4g}") for r in peak * shape / shape.max())


def _change(
    model: ModelSpec, cluster: Cluster, before: int, after: int, restart_s: float
) -> Change:
    """cluster: of the wider group, whose first GPUs are those of the narrower."""
    load = np.ones((model.num_moe_layers, model.num_experts))
    table = np.tile(np.arange(model.num_experts, dtype=np.int32), (model.num_moe_layers, 1))
    nodes = cluster.num_nodes
    old = Placement(table, before, nodes if before == cluster.num_gpus else 1, model.num_experts)
    new = resize(old, load, after, nodes if after == cluster.num_gpus else 1)
    step = build_step_model(cluster, model, phase="decode")
    plan = movers(_spread(old, cluster), cluster, model, step).plan(_spread(new, cluster))
    host_us = model.num_moe_layers * weight_move(cluster, False).layer_us
    transfer_s = plan.us / 1e6
    stall_s = (PLAN_US + host_us) / 1e6 + transfer_s + restart_s
    return Change(plan.num_moves, least_moves(old, after), transfer_s, stall_s)


def _spread(placement: Placement, cluster: Cluster) -> Placement:
    """The placement on all GPUs of a cluster, the further ones empty."""
    own = placement.physical_to_logical.reshape(placement.num_layers, placement.num_gpus, -1)
    table = np.full((placement.num_layers, cluster.num_gpus, own.shape[2]), EMPTY, np.int32)
    table[:, : placement.num_gpus] = own
    flat = table.reshape(placement.num_layers, -1)
    return Placement(flat, cluster.num_gpus, cluster.num_nodes, placement.num_experts)


def _policies(
    rates: Sequence[float],
    kept: Mapping[tuple[int, float], float],
    widths: Sequence[int],
    good: float,
) -> dict[str, list[int]]:
    needed = [next((w for w in widths if kept[w, r] >= good), widths[-1]) for r in rates]
    return {
        **{f"always {count(w, 'GPU')}": [w] * HOURS for w in widths},
        "as the hour before needed": [needed[-1], *needed[:-1]],
        "the same, a width wider": [
            widths[min(widths.index(w) + 1, len(widths) - 1)] for w in (needed[-1], *needed[:-1])
        ],
        "as this and the next hour need (known)": [
            max(a, b) for a, b in zip(needed, [*needed[1:], needed[0]], strict=True)
        ],
    }


def _judged(
    widths: Sequence[int],
    rates: Sequence[float],
    kept: Mapping[tuple[int, float], float],
    changes: Mapping[tuple[int, int], Change],
    price: float,
) -> Policy:
    missed, stalled, num = 0.0, 0.0, 0
    for hour, (width, rate) in enumerate(zip(widths, rates, strict=True)):
        good, pause = kept[width, rate], 0.0
        if widths[hour - 1] != width:
            pause = changes[widths[hour - 1], width].stall_s
            num += 1
        stalled += pause
        missed += rate * (3600 * (1 - good) + min(pause, 3600.0) * good)
    share = missed / (3600 * sum(rates))
    return Policy(tuple(widths), sum(widths) * price, share, num, stalled)


def _runs(widths: Sequence[int]) -> str:
    """Widths with the hour from which each is held."""
    later = enumerate(pairwise(widths), 1)
    return ", ".join([str(widths[0]), *(f"{b} from {h} h" for h, (a, b) in later if a != b)])
