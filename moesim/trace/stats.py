"""Statistics of a trace: skew, affinity, co-activation, drift, domains, requests."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.trace.batches import Phase, draw_batches, index_requests
from moesim.trace.counts import TraceCounts, count_trace
from moesim.trace.format import LoadTrace, Trace, TraceMeta, drop_pages
from moesim.trace.measures import (
    Affinity,
    CoActivation,
    DomainLoad,
    Drift,
    Skew,
    affinity,
    co_activation,
    domain_loads,
    drift,
    jensen_shannon,
    skew,
)
from moesim.types import FloatArray, IntArray, Progress


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """num_requests, and the percentiles of their length in tokens by name: min, p5, ... max."""

    num_requests: int
    lengths: dict[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class Reuse:
    """Experts that a token shares with the one before it in its request, of K; [L] each.

    overlap: measured, over `num_pairs` pairs of neighbouring tokens; by_load: what independent
    tokens of this load would share, sum of p_e^2 / K.
    """

    overlap: FloatArray
    by_load: FloatArray
    num_pairs: int


@dataclass(frozen=True, slots=True, eq=False)
class TraceStats:
    """Statistics of a token-level trace. `load` is [L, E]; the parts say their own shapes.

    What could not be counted is None, and `notices` says why.
    """

    meta: TraceMeta
    num_tokens: int
    num_prefill: int
    load: IntArray
    skew: Skew
    affinity: Affinity | None
    co_activation: CoActivation | None
    drift: Drift
    domains: tuple[DomainLoad, ...]
    requests: Requests
    reuse: Reuse | None
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values for JSON, with `meta` in its file form."""
        out: dict[str, Any] = plain(self)
        out["meta"] = _meta_dict(self.meta)
        out["num_decode"] = self.num_tokens - self.num_prefill
        return out


@dataclass(frozen=True, slots=True, eq=False)
class LoadStats:
    """Statistics of a load trace: skew of the summed load [L, E], and the mean divergence between
    successive steps in bits (None below two steps). Nothing else can be told from counts."""

    meta: TraceMeta
    num_steps: int
    load: IntArray
    skew: Skew
    step_divergence: float | None

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = plain(self)
        out["meta"] = _meta_dict(self.meta)
        return out


def trace_stats(trace: Trace, progress: Progress | None = None) -> TraceStats:
    """All statistics in one bounded pass (see `counts.count_trace`)."""
    return stats_from_counts(trace.meta, count_trace(trace, progress))


def stats_from_counts(meta: TraceMeta, counts: TraceCounts) -> TraceStats:
    """The statistics that `counts` hold."""
    load = counts.load
    reuse = None
    if counts.num_follows:
        share = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
        reuse = Reuse(
            overlap=counts.shared / (counts.num_follows * meta.top_k),
            by_load=meta.top_k * (share**2).sum(axis=1),
            num_pairs=counts.num_follows,
        )
    return TraceStats(
        meta=meta,
        num_tokens=counts.num_tokens,
        num_prefill=counts.num_prefill,
        load=load,
        skew=skew(load),
        affinity=None
        if counts.between is None
        else affinity(counts.between, counts.num_tokens, meta.top_k),
        co_activation=None
        if counts.within is None or meta.top_k == 1
        else co_activation(counts.within, load, counts.num_tokens),
        drift=drift(counts.window_load),
        domains=()
        if counts.domain_load is None
        else domain_loads(counts.domain_load, counts.domain_tokens, meta.domains),
        requests=_requests(counts.request_lengths),
        reuse=reuse,
        notices=counts.notices,
    )


def load_stats(trace: LoadTrace) -> LoadStats:
    """What can be told from expert counts alone."""
    steps = trace.expert_load
    total = np.asarray(steps.sum(axis=0))
    apart = jensen_shannon(steps[:-1], steps[1:])
    finite = apart[np.isfinite(apart)]
    return LoadStats(
        trace.meta, len(steps), total, skew(total), float(finite.mean()) if finite.size else None
    )


@dataclass(frozen=True, slots=True)
class BatchImbalance:
    """Max over mean load of GPUs under contiguous placement, over batches and layers."""

    num_gpus: int
    batch_tokens: int
    num_batches: int
    mean: float
    p50: float
    p99: float
    notice: str


def batch_imbalance(
    trace: Trace,
    num_gpus: int = 8,
    phase: Phase = "prefill",
    batch_tokens: int = 4096,
    num_batches: int = 100,
    seed: int = 0,
) -> BatchImbalance:
    """Imbalance of seeded batches when GPU g holds experts [g E / G, (g + 1) E / G).

    The whole trace is drawn from, since nothing is tuned here. Raises InputError when there are
    fewer experts than GPUs.
    """
    num_experts = trace.num_experts
    if not 1 <= num_gpus <= num_experts:
        raise InputError(
            f"{num_gpus} GPUs cannot share {num_experts} experts", "ask for fewer GPUs"
        )
    index, notice = index_requests(trace, phase)
    batches = draw_batches(index, phase, batch_tokens, num_batches, seed)
    starts = -(-np.arange(num_gpus) * num_experts // num_gpus)
    ratios = np.empty((num_batches, trace.num_layers))
    for b in range(num_batches):
        load = np.add.reduceat(token_load(trace, batches[b]), starts, axis=1)
        drop_pages(trace.expert_ids)
        mean = load.mean(axis=1)
        ratios[b] = np.where(mean > 0, load.max(axis=1) / np.maximum(mean, 1e-300), np.nan)
    ratios = ratios[~np.isnan(ratios)]
    return BatchImbalance(
        num_gpus=num_gpus,
        batch_tokens=batch_tokens,
        num_batches=num_batches,
        mean=float(ratios.mean()),
        p50=float(np.percentile(ratios, 50)),
        p99=float(np.percentile(ratios, 99)),
        notice=notice,
    )


def token_load(trace: Trace, token_idx: IntArray) -> IntArray:
    """Load [L, E] of some tokens."""
    from moesim.trace.kernels import count_load

    out = np.zeros((1, trace.num_layers, trace.num_experts), np.int64)
    ids = np.array(trace.expert_ids[token_idx], order="C")
    count_load(ids, np.zeros(len(ids), np.int64), out)
    return out[0]


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays as lists, dataclasses as objects, NaN as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return round(value, 9) if math.isfinite(value) else None
    return value


def _meta_dict(meta: TraceMeta) -> dict[str, Any]:
    import json

    out: dict[str, Any] = json.loads(meta.to_json())
    return out


def _requests(lengths: IntArray) -> Requests:
    if not len(lengths):
        return Requests(0, {})
    points = {"min": 0, "p5": 5, "p50": 50, "p95": 95, "max": 100}
    values = np.percentile(lengths, list(points.values()))
    named = dict(zip(points, (float(v) for v in values), strict=True))
    return Requests(len(lengths), {**named, "mean": float(lengths.mean())})
