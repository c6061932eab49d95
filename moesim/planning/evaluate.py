"""Held-out evaluation of placements: the same batches for all, intervals over requests.

Point figures come from batches drawn from the held-out requests. Intervals come from bootstrap
resamples of those requests (each resample with batches of its own), since what is uncertain is
which requests will come, not which batches they are packed into: 95 % normal intervals from the
spread of the resamples' figures, a little wide because each resample has fewer batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.routing import Dedup, home_ranks, route
from moesim.cost.step import StepModel
from moesim.metrics import balancedness, imbalance
from moesim.placement import Placement, ReplicaPolicy
from moesim.trace.batches import (
    Batches,
    Phase,
    RequestIndex,
    draw_batches,
    resample_requests,
)
from moesim.trace.format import Trace
from moesim.types import FloatArray

NUM_BATCHES = 48
NUM_RESAMPLES = 20
BATCHES_PER_RESAMPLE = 12
MIN_BATCHES_PER_RESAMPLE = 4
MAX_CHOICES = 200_000_000
MAX_PAIRS = 1_200_000_000
CHUNK_CELLS = 20_000_000
Z_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Interval:
    """A held-out figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Held-out batches: the first `num_main` for point figures, then `num_resamples` groups of
    equal size, each from its own resample of the requests."""

    batches: Batches
    num_main: int
    num_resamples: int
    num_requests: int

    def groups(self, values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Split `values` [B, ...] into the main part and [resamples, batches, ...]."""
        rest = values[self.num_main :]
        return values[: self.num_main], rest.reshape(self.num_resamples, -1, *rest.shape[1:])


def draw_sample(
    trace: Trace,
    held_out: RequestIndex,
    phase: Phase,
    batch_tokens: int,
    seed: int,
    num_gpus: int = 0,
) -> Sample:
    """Draw the evaluation batches; fewer where layers, or pairs of many GPUs, make each dear."""
    per_batch = batch_tokens * trace.num_layers * trace.top_k
    pairs = trace.num_layers * num_gpus**2
    total = NUM_BATCHES + NUM_RESAMPLES * BATCHES_PER_RESAMPLE
    share = min(1.0, MAX_CHOICES / (per_batch * total), MAX_PAIRS / max(1, pairs * total))
    num_main = max(16, int(NUM_BATCHES * share))
    each = max(MIN_BATCHES_PER_RESAMPLE, int(BATCHES_PER_RESAMPLE * share))
    parts = [draw_batches(held_out, phase, batch_tokens, num_main, seed + 1)]
    for i in range(NUM_RESAMPLES):
        pool = resample_requests(held_out, seed * 7919 + i)
        parts.append(draw_batches(pool, phase, batch_tokens, each, seed + i))
    lengths = np.concatenate([np.diff(p.indptr) for p in parts])
    merged = Batches(
        np.concatenate([p.token_idx for p in parts]),
        np.concatenate(([0], np.cumsum(lengths))),
        phase,
        batch_tokens,
    )
    return Sample(merged, num_main, NUM_RESAMPLES, len(held_out.ids))


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What one placement does on every batch of a sample.

    imbalance, balancedness: [B, L]; gpu_load: [L, G] mean token-choices; fan_out, node_fan_out:
    [B] a token and layer; and, with a step model: inter_node_bytes [B] a token over all layers,
    step_us, dispatch_us, compute_us, combine_us: [B], and layer_parts_us: [L, 3], dispatch, compute
    and combine of each layer in the mean main batch.
    """

    values: Mapping[str, FloatArray]
    gpu_load: FloatArray
    layer_parts_us: FloatArray | None = None


def measure(
    trace: Trace,
    sample: Sample,
    placement: Placement,
    *,
    policy: ReplicaPolicy,
    dedup: Dedup,
    step: StepModel | None,
    speed: FloatArray | None = None,
    homes: Callable[[Batches], npt.NDArray[np.int32]] | None = None,
    attention_gpus: int = 0,
) -> Measured:
    """Route the whole sample through `placement`, a few batches at a time, on threads.

    homes: home GPU of every token of some batches; default `home_ranks`. attention_gpus: so many of
    the first GPUs are the homes and hold no experts, loads are of the others; 0 where all do both.
    """
    first = attention_gpus
    speed = None if speed is None else speed[first:]
    batches = sample.batches
    workers = os.cpu_count() or 1
    cells = trace.num_layers * placement.num_gpus**2
    chunk = max(1, min(CHUNK_CELLS // cells // workers, -(-len(batches) // (2 * workers))))

    def part(start: int) -> tuple[dict[str, FloatArray], FloatArray, FloatArray]:
        stop = min(start + chunk, len(batches))
        span = slice(int(batches.indptr[start]), int(batches.indptr[stop]))
        some = Batches(
            batches.token_idx[span],
            batches.indptr[start : stop + 1] - batches.indptr[start],
            batches.phase,
            batches.batch_tokens,
        )
        home = homes(some) if homes else home_ranks(trace, some, first or placement.num_gpus)
        routed = route(trace, some, placement, policy=policy, dedup=dedup, home=home)
        tokens = routed.gpu_tokens(placement.num_gpus)[..., first:]
        per = routed.num_tokens * trace.num_layers
        main, parts_us = slice(0, max(0, sample.num_main - start)), np.zeros((trace.num_layers, 3))
        values = {
            "imbalance": imbalance(tokens, speed),
            "balancedness": balancedness(tokens, speed),
            "fan_out": routed.gpu_fan_out.sum(axis=1) / per,
            "node_fan_out": routed.node_fan_out.sum(axis=1) / per,
        }
        if step is not None:
            cost = step.cost(routed)
            parts_us = cost.layer_parts_us[main].sum(axis=0)
            crossing = _between_nodes(routed.messages, placement.node_of_gpu)
            size = step.dispatch_bytes + step.combine_bytes
            values |= {
                "inter_node_bytes": crossing * size / routed.num_tokens,
                "step_us": cost.step_us,
                "dispatch_us": cost.dispatch_us.sum(axis=1),
                "compute_us": cost.compute_us.max(axis=2).sum(axis=1),
                "combine_us": cost.combine_us.sum(axis=1),
            }
        return values, tokens[main].sum(axis=0), parts_us

    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(part, range(0, len(batches), chunk)))
    joined = {name: np.concatenate([values[name] for values, *_ in parts]) for name in parts[0][0]}
    load = np.sum([load for _, load, _ in parts], axis=0)
    parts_us = np.sum([us for *_, us in parts], axis=0) / sample.num_main
    return Measured(joined, load / sample.num_main, None if step is None else parts_us)


def _between_nodes(
    messages: npt.NDArray[Any], node_of_gpu: npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """[B]: messages [B, L, G, G] from one node to another; GPUs of a node are neighbours."""
    total = messages.sum(axis=(1, 2, 3), dtype=np.int64)
    edges = np.flatnonzero(np.diff(node_of_gpu, prepend=-1, append=node_of_gpu[-1] + 1))
    for first, last in pairwise(edges.tolist()):
        total -= messages[:, :, first:last, first:last].sum(axis=(1, 2, 3), dtype=np.int64)
    return total


STATISTICS: dict[str, tuple[str, Callable[[FloatArray], float]]] = {
    "balancedness": ("balancedness", lambda x: float(np.nanmean(x))),
    "balancedness_worst_layer": ("balancedness", lambda x: _worst_layer(x)),
    "imbalance": ("imbalance", lambda x: float(np.nanmean(x))),
    "imbalance_p99": ("imbalance", lambda x: float(np.nanpercentile(x, 99))),
    "fan_out": ("fan_out", lambda x: float(x.mean())),
    "node_fan_out": ("node_fan_out", lambda x: float(x.mean())),
    "inter_node_bytes": ("inter_node_bytes", lambda x: float(x.mean())),
    "step_us": ("step_us", lambda x: float(x.mean())),
    "step_us_p99": ("step_us", lambda x: float(np.percentile(x, 99))),
    "dispatch_us": ("dispatch_us", lambda x: float(x.mean())),
    "compute_us": ("compute_us", lambda x: float(x.mean())),
    "combine_us": ("combine_us", lambda x: float(x.mean())),
}
"""Figures by name: which per-batch values they summarise, and how. A layer without load in a batch
has no balance there (NaN) and is left out of the means."""


def _worst_layer(values: FloatArray) -> float:
    """Least mean over batches of a layer; values: [B, L], NaN where there is no load."""
    filled = ~np.isnan(values).all(axis=0)
    return float(np.nanmean(values[:, filled], axis=0).min())


def figures(sample: Sample, measured: Measured) -> dict[str, Interval]:
    """All statistics of one placement with their intervals."""
    out = {}
    for name, (source, statistic) in STATISTICS.items():
        if source in measured.values:
            point, resampled = _statistic(sample, measured.values[source], statistic)
            out[name] = _interval(point, resampled)
    return out


def difference(sample: Sample, a: Measured, b: Measured, name: str) -> Interval | None:
    """Figure `name` of `a` minus that of `b`, paired batch by batch and resample by resample."""
    source, statistic = STATISTICS[name]
    if source not in a.values or source not in b.values:
        return None
    point_a, resampled_a = _statistic(sample, a.values[source], statistic)
    point_b, resampled_b = _statistic(sample, b.values[source], statistic)
    return _interval(point_a - point_b, resampled_a - resampled_b)


def _statistic(
    sample: Sample, values: FloatArray, statistic: Callable[[FloatArray], float]
) -> tuple[float, FloatArray]:
    main, groups = sample.groups(values)
    return statistic(main), np.array([statistic(g) for g in groups])


def _interval(point: float, resampled: FloatArray) -> Interval:
    half = Z_95 * float(resampled.std(ddof=1))
    return Interval(point, point - half, point + half)
