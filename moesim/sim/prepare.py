"""From tokens and a placement to the numbers of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim.cost.routing import Routed, home_ranks, route
from moesim.cost.step import StepModel
from moesim.metrics import balancedness
from moesim.placement import Placement, ReplicaPolicy
from moesim.sim.capacity import DropPolicy, Drops, apply_capacity
from moesim.sim.collectives.base import Exchange, Stage
from moesim.sim.home import HomeModel, HomeTimes, rank_rows
from moesim.sim.links import LinkTable
from moesim.sim.work import Chunk, HomeWork, StepWork
from moesim.trace.batches import Batches
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.trace.format import Trace

Homes = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """What does not change from step to step: hardware, cost models and the exchange.

    home: None leaves out what a token's home rank computes, so that a step is its MoE part alone.
    drop: capacity that experts have, None for no limit. attention_gpus: with attention and experts
    apart, so many of the first GPUs are the tokens' homes, and the others hold the experts; 0 where
    all do both.
    """

    cluster: Cluster
    step: StepModel
    links: LinkTable
    exchange: Exchange
    home: HomeModel | None
    policy: ReplicaPolicy = "split"
    context_tokens: int | None = None
    drop: DropPolicy | None = None
    attention_gpus: int = 0

    @property
    def num_gpus(self) -> int:
        return self.step.num_gpus

    @property
    def num_homes(self) -> int:
        """GPUs that tokens may be at home on, the first of all."""
        return self.attention_gpus or self.num_gpus

    def balancedness(self, tokens: npt.NDArray[np.int64]) -> FloatArray:
        """[...] of the GPUs with experts, for tokens [..., G] of all."""
        first = self.attention_gpus
        return balancedness(tokens[..., first:], self.step.speed[first:])

    @property
    def exchange_name(self) -> str:
        """What `--all-to-all` calls the exchange."""
        return self.step.all_to_all if self.exchange.name == "flat" else self.exchange.name


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A set of batches, routed and timed; every array has the batches on axis 0."""

    routed: Routed
    expert_us: FloatArray
    dispatch: list[Stage]
    combine: list[Stage]
    home: HomeTimes

    def chunk(self, batch: int) -> Chunk:
        """Batch `batch` as a chunk of a step."""
        return Chunk(
            batch,
            self.expert_us[batch],
            self.dispatch,
            self.combine,
            HomeWork.of(self.home, batch),
        )


def prepare(
    models: Models,
    trace: Trace,
    batches: Batches,
    placement: Placement,
    home: Homes | None = None,
) -> Prepared:
    """Route `batches` through `placement` and time all their parts.

    home: [tokens] home rank of each token of `batches`; default `home_ranks`.
    """
    if home is None:
        home = home_ranks(trace, batches, models.num_homes)
    return timed(models, trace, batches, home, routed_by(models, trace, batches, placement, home))


def routed_by(
    models: Models, trace: Trace, batches: Batches, placement: Placement, home: Homes
) -> Routed:
    """`batches` through `placement`, messages counted as the exchange sends them."""
    return route(
        trace, batches, placement, policy=models.policy, dedup=models.exchange.dedup, home=home
    )


def timed(models: Models, trace: Trace, batches: Batches, home: Homes, routed: Routed) -> Prepared:
    """`prepare` for batches that are routed already."""
    return Prepared(
        routed,
        models.step.compute_us(routed),
        list(models.exchange.dispatch(routed)),
        list(models.exchange.combine(routed)),
        home_times(models, trace, batches, home),
    )


def home_times(models: Models, trace: Trace, batches: Batches, home: Homes) -> HomeTimes:
    """What the home ranks compute, zero without a home model."""
    if models.home is None:
        flat = np.zeros((len(batches), models.num_gpus))
        layers = np.zeros((len(batches), trace.num_layers, models.num_gpus))
        return HomeTimes(layers, flat, flat, flat, flat, flat)
    rows = rank_rows(trace, batches, home, models.num_gpus, models.context_tokens)
    return models.home.times(rows, batches.phase)


def one_batch(batches: Batches, b: int) -> Batches:
    """Batch `b` alone."""
    tokens = batches[b]
    return Batches(
        tokens, np.array([0, len(tokens)], np.int64), batches.phase, batches.batch_tokens
    )


def split_batch(batch: Batches, home: Homes, num_chunks: int) -> tuple[Batches, Homes]:
    """One batch cut into `num_chunks`, each an equal share of every rank's tokens (the first
    chunks take what does not divide), with the homes in the new order."""
    tokens = batch[0]
    order = np.argsort(home, kind="stable")
    ranked = home[order]
    first = np.searchsorted(ranked, ranked)
    count = np.searchsorted(ranked, ranked, side="right") - first
    chunk = (np.arange(len(tokens)) - first) * num_chunks // np.maximum(count, 1)
    within = np.argsort(chunk, kind="stable")
    sizes = np.bincount(chunk, minlength=num_chunks)
    indptr = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    picked = order[within]
    return Batches(tokens[picked], indptr, batch.phase, batch.batch_tokens), home[picked]


def limited(
    models: Models, trace: Trace, batches: Batches, home: Homes, placement: Placement
) -> tuple[Trace, Batches, Drops]:
    """Trace and batches without the choices that `models.drop` drops; as they are without one."""
    if models.drop is None:
        return trace, batches, Drops()
    return apply_capacity(models.drop, trace, batches, home, placement)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step ready to run: its work, the routing of its chunks (as batches), what was dropped."""

    work: StepWork
    routed: Routed
    drops: Drops
