"""A trace made ready for caching plans: what to plan for, and streams of its requests.

Requests are split three ways: *fit* (frequencies, predictors), *select* (policy, slots, pinning,
prefetch, CPU), *held-out* (every figure that is reported).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moesim.caching.events import Events, Stream, decode_stream
from moesim.caching.memory import check_sizes
from moesim.caching.plan import Prefetch
from moesim.caching.predictors.base import Predictor, predict
from moesim.caching.predictors.registry import make_predictor
from moesim.caching.simulate import expert_frequency
from moesim.caching.timeline import all_events
from moesim.trace.batches import RequestIndex, index_requests, split_requests
from moesim.trace.format import Trace
from moesim.types import FloatArray, stream

CANDIDATES = 3
"""Experts a predictor names, in units of what a step asks for; most are in HBM already."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to plan for.

    hbm_gb: memory of the GPU. batch_size, context_tokens: of decoding. home_requests: those of the
    batch whose attention and KV cache are on this GPU, None for all. policy, prefetch, cpu:
    a name (`none` for no prefetch) or `auto`. bits: [L, E] bits of each expert, None for the
    model's type. max_steps: decode steps simulated, of the select and of the held-out requests;
    CPU and prefetch are compared on a quarter of the former.
    """

    hbm_gb: float
    batch_size: int = 1
    context_tokens: int = 2048
    policy: str = "auto"
    prefetch: str = "auto"
    cpu: str = "auto"
    bits: npt.NDArray[np.int64] | None = None
    max_steps: int = 4096
    seed: int = 0
    home_requests: int | None = None

    @property
    def num_home(self) -> int:
        return self.batch_size if self.home_requests is None else self.home_requests


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """A trace made ready: streams of the select requests, of a quarter of their steps (`trial`) and
    of the held-out requests, frequencies of the fit requests, and what the user should know
    (`notes`). `hosted`: [L, E] experts that the GPU is responsible for, None for all."""

    trace: Trace
    fit: RequestIndex
    select: Stream
    trial: Stream
    held_out: Stream
    frequency: FloatArray
    trial_events: Events
    held_out_events: Events
    notes: tuple[str, ...] = field(default=())
    hosted: npt.NDArray[np.bool_] | None = None
    fitted: dict[tuple[str, int], Predictor] = field(default_factory=dict)

    @property
    def num_hosted(self) -> int:
        """Experts that the GPU is responsible for, over all layers."""
        if self.hosted is None:
            return self.trace.num_layers * self.trace.num_experts
        return int(self.hosted.sum())

    def predictor(self, name: str, depth: int) -> Predictor:
        """The predictor fitted on the fit requests, once."""
        key = (name, depth)
        if key not in self.fitted:
            made = make_predictor(name, depth)
            made.fit(self.trace, self.fit)
            self.fitted[key] = made
        return self.fitted[key]

    def guess(self, stream: Stream, prefetch: Prefetch) -> npt.NDArray[np.int16]:
        """What `prefetch` expects on a stream, for `run_timeline`."""
        predictor = self.predictor(prefetch.predictor, prefetch.depth)
        named = predict(predictor, self.trace, stream, candidates(self))
        return named.above(prefetch.min_score)


def make_workload(
    trace: Trace, request: Request, hosted: npt.NDArray[np.bool_] | None = None
) -> Workload:
    """Split requests and lay them out as decode streams of at most `max_steps` steps each.

    hosted: [L, E] experts that the GPU is responsible for; choices of others are left out.

    Raises InputError where the trace has fewer than two requests, or the request absurd sizes.
    """
    check_sizes(request.hbm_gb, request.batch_size, request.context_tokens)
    if hosted is not None:
        trace = _keep_hosted(trace, hosted)
    requests, notice = index_requests(trace, "decode")
    notes = [notice] if notice else []
    tune, held = split_requests(requests, request.seed)
    if len(tune.ids) >= 2:
        fit, select = split_requests(tune, request.seed + 1)
    else:
        fit = select = tune
        notes.append("too few requests to fit and select on different ones: both use the same")
    if request.batch_size > len(held.ids):
        notes.append(
            f"the trace has {len(held.ids)} held-out requests, fewer than the batch of"
            f" {request.batch_size}: the steps simulated have at most {len(held.ids)} tokens"
        )
    picked, trial, kept = (
        decode_stream(_limit(part, request, share), request.batch_size, request.seed)
        for part, share in ((select, 1), (select, 4), (held, 1))
    )
    return Workload(
        trace,
        fit,
        picked,
        trial,
        kept,
        expert_frequency(trace, fit),
        all_events(trace, trial),
        all_events(trace, kept),
        tuple(notes),
        hosted,
    )


def _keep_hosted(trace: Trace, hosted: npt.NDArray[np.bool_]) -> Trace:
    """The trace with the choices of experts elsewhere replaced by -1."""
    ids = np.asarray(trace.expert_ids).astype(np.int16)
    layer = np.arange(trace.num_layers)[None, :, None]
    here = (ids >= 0) & hosted[layer, ids]
    return replace(trace, expert_ids=np.where(here, ids, np.int16(-1)))


def experts_per_event(events: Events) -> int:
    """The mean number of distinct experts that a layer's step asks for, at least 1."""
    return max(1, round(events.num_accesses / max(1, events.num_events)))


def candidates(work: Workload) -> int:
    """How many experts a predictor names for a layer."""
    return min(work.trace.num_experts, CANDIDATES * experts_per_event(work.trial_events))


def _limit(requests: RequestIndex, request: Request, share: int) -> RequestIndex:
    """As many requests, in seeded random order, as `max_steps` / `share` steps of the batch need;
    a request that goes beyond is cut."""
    length = np.diff(requests.indptr)
    want = min(max(1, request.max_steps // share) * request.batch_size, int(length.sum()))
    order = stream(request.seed, 7).permutation(len(length))
    before = np.cumsum(length[order]) - length[order]
    take = order[before < want]
    cut = np.minimum(length[take], want - before[before < want])
    parts = [
        requests.token_idx[requests.indptr[i] : requests.indptr[i] + n]
        for i, n in zip(take, cut, strict=True)
    ]
    indptr = np.concatenate(([0], np.cumsum(cut)))
    return RequestIndex(requests.ids[take], indptr, np.concatenate(parts))


def with_hbm(request: Request, hbm_gb: float) -> Request:
    """The same request with another memory size."""
    return replace(request, hbm_gb=hbm_gb)
