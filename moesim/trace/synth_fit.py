"""Fitting a synthetic specification to a real trace.

Types of tokens come from a mixture model, domains and the chain from counts; what these leave
open is calibrated by simulation until the synthetic load, affinity, variety of requests and
token-to-token overlap are those of the trace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError
from moesim.trace.batches import RequestIndex, index_requests
from moesim.trace.format import PREFILL, Trace
from moesim.trace.measures import affinity
from moesim.trace.synth import request_seeds, run_model
from moesim.trace.synth_spec import MAX_CELLS, MAX_REQUEST_TOKENS, SynthSpec
from moesim.trace.synth_types import token_types, type_dynamics
from moesim.types import Array, FloatArray, IntArray, Progress, stream

FIT_TOKENS = 65_536
RUN_TOKENS = 12_288
NUM_ROUNDS = 32
LARGE_CELLS = 1 << 24
"""Beyond so many pairs of experts in adjacent layers, counts are float32, exact to 2**24, and a
specification is calibrated in LARGE_ROUNDS."""
LARGE_ROUNDS = 8
_SETTLED = 10
_LARGE_SETTLED = 4
_MEMORY = 0.75
_MAX_REQUESTS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What a specification is calibrated to.

    load: [D, L, E], choices of an expert per token. bits: [L-1], affinity of adjacent layers.
    variance: [L], `request_variance` around the mean load; reuse: [L], share of experts that
    neighbouring tokens have in common. None leaves the parameter as it is.
    """

    load: FloatArray
    bits: FloatArray
    variance: FloatArray | None = None
    reuse: FloatArray | None = None


def fit(trace: Trace, seed: int = 0, progress: Progress | None = None) -> SynthSpec:
    """A specification whose synthetic traces have the statistics of `trace`.

    Up to 65,536 tokens of whole requests are used, drawn by `seed`; request ids, positions and
    phases are read whole. `progress(done, total)` counts rounds of calibration. Raises
    FormatError for an empty trace, InputError for one with too many experts to count pairs of.
    """
    if trace.num_tokens == 0:
        raise FormatError(f"{trace.path}: the trace has no tokens", "give one that has some")
    if trace.num_layers * trace.num_experts**2 > MAX_CELLS:
        raise InputError(
            f"{trace.num_layers} layers of {trace.num_experts} experts are too many to fit",
            "slice some layers out",
        )
    rng = stream(seed, 0xF17)
    index, _ = index_requests(trace)
    requests = request_shapes(trace, index)
    sample = _sample(index, rng)
    starts, token_idx = sample.indptr, sample.token_idx
    ids = np.array(trace.expert_ids[token_idx], order="C")
    domain_idx = _first_domain(trace, sample)
    num_domains = max(1, len(trace.meta.domains))

    measured = measure(ids, starts, domain_idx, num_domains, trace.num_experts)
    share = measured.load.sum(axis=0) / len(ids)
    trust = np.bincount(domain_idx, minlength=num_domains)
    trust_weight = (trust / (trust + 1.0))[:, None]
    tokens = np.maximum(measured.tokens, 1)[:, None, None]
    load = trust_weight[:, :, None] * (measured.load / tokens)
    load = np.maximum(load + (1 - trust_weight[:, :, None]) * share, 1e-4)
    for _ in range(20):
        total = (load * measured.tokens[:, None, None]).sum(axis=0) / len(ids)
        load *= share / np.maximum(total, 1e-9)

    log_share, label = token_types(ids, share, rng)
    prior = np.bincount(label, minlength=log_share.shape[2]) + 0.1
    prior /= prior.sum()
    by_domain = np.zeros((num_domains, len(prior)))
    np.add.at(by_domain, (np.repeat(domain_idx, np.diff(starts)), label), 1)
    by_domain /= np.maximum(by_domain.sum(axis=1, keepdims=True), 1)
    type_share = trust_weight * by_domain + (1 - trust_weight) * prior
    type_share = 0.98 * type_share + 0.02 * prior
    concentration, persistence = type_dynamics(label, starts, type_share, measured.tokens)

    top_k = trace.top_k
    inclusion = np.exp(log_share).transpose(0, 2, 1) * top_k
    spec = SynthSpec(
        model=trace.meta.model,
        num_experts=trace.num_experts,
        top_k=top_k,
        layer_ids=trace.meta.layer_ids,
        requests=requests,
        base=_centred(race_score(load)).astype(np.float32),
        type_logits=(race_score(inclusion) - race_score(share)[:, None]).astype(np.float32),
        type_share=type_share,
        type_concentration=concentration,
        type_persistence=persistence,
        chain=_log_lift(measured.between, len(ids)),
        request_spread=np.full(trace.num_layers, 0.3),
        noise_persistence=np.full(trace.num_layers, 0.2),
        domains=trace.meta.domains if trace.domain_ids is not None else (),
        source={"fitted_to": trace.content_hash(), "fit_seed": seed, "fit_tokens": len(ids)},
    )
    targets = Targets(load, measured.bits(top_k), measured.variance, measured.reuse)
    layout = np.stack(
        [domain_idx, np.zeros_like(domain_idx), np.diff(starts), np.zeros_like(domain_idx)], axis=1
    )
    return calibrate(spec, targets, layout, seed=seed, progress=progress)


@dataclass(slots=True, eq=False)
class Measured:
    """Counts of one set of requests: load [D, L, E], tokens [D], between [L-1, E, E],
    variance [L] and reuse [L]."""

    num_tokens: float
    load: FloatArray
    tokens: FloatArray
    between: FloatArray
    variance: FloatArray
    reuse: FloatArray

    def blend(self, other: Measured, memory: float) -> Measured:
        """`other` together with a share of these counts: few requests at a time would show more
        affinity, and more uneven loads, than many do."""
        share = memory / (1 + memory)
        return Measured(
            memory * self.num_tokens + other.num_tokens,
            memory * self.load + other.load,
            memory * self.tokens + other.tokens,
            memory * self.between + other.between,
            share * self.variance + (1 - share) * other.variance,
            share * self.reuse + (1 - share) * other.reuse,
        )

    def bits(self, top_k: int) -> FloatArray:
        return affinity(self.between, self.num_tokens, top_k).bits


def measure(
    ids: Array,
    starts: IntArray,
    domain_idx: IntArray,
    num_domains: int,
    num_experts: int,
    share: FloatArray | None = None,
) -> Measured:
    """Measure tokens [T, L, K] of requests; `share` [L, E] is the mean load that variance is
    taken around, by default their own."""
    from moesim.trace.kernels import count_load, count_pairs, count_reuse
    from moesim.trace.synth_kernels import request_variance

    num_tokens, num_layers, top_k = ids.shape
    domain = np.repeat(domain_idx, np.diff(starts))
    load = np.zeros((num_domains, num_layers, num_experts), np.int64)
    count_load(ids, domain, load)
    pairs = (num_layers - 1, num_experts, num_experts)
    between = np.zeros(pairs, np.float32 if math.prod(pairs) > LARGE_CELLS else np.float64)
    count_pairs(ids, between, np.zeros((0, num_experts, num_experts), np.int64))
    follows = np.ones(num_tokens, bool)
    follows[starts[:-1]] = False
    shared = np.zeros(num_layers, np.int64)
    count_reuse(ids, follows, shared)
    if share is None:
        share = load.sum(axis=0) / num_tokens
    return Measured(
        num_tokens=num_tokens,
        load=load.astype(np.float64),
        tokens=np.bincount(domain, minlength=num_domains).astype(np.float64),
        between=between,
        variance=request_variance(ids, starts, share),
        reuse=shared / (max(1, int(follows.sum())) * top_k),
    )


def calibrate(
    spec: SynthSpec,
    targets: Targets,
    layout: IntArray,
    *,
    scale_types: bool = False,
    num_rounds: int | None = None,
    run_tokens: int = RUN_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> SynthSpec:
    """Adjust a specification by simulation until it meets `targets`.

    Each round runs the model on fresh random requests of `layout` [N, 4] and moves every
    parameter towards its target, with steps that shrink (Robbins and Monro 1951). Affinity is
    met by the strength of the chain, or, with `scale_types`, by that of token types and chain
    together.
    """
    rng = stream(seed, 0xCA1)
    large = spec.chain.size > LARGE_CELLS
    settled = _LARGE_SETTLED if large else _SETTLED
    if num_rounds is None:
        num_rounds = LARGE_ROUNDS if large else NUM_ROUNDS
    base = spec.base.astype(np.float64)
    strength = np.full(spec.num_layers, 1.0) if scale_types else np.full(spec.num_layers - 1, 0.1)
    spread, kept = spec.request_spread.copy(), spec.noise_persistence.copy()
    type_kept = spec.type_persistence
    type_std = spec.type_logits.std(axis=(1, 2)).astype(np.float64)

    def current() -> SynthSpec:
        types = strength if scale_types else np.ones(spec.num_layers)
        links = np.sqrt(strength[1:] * strength[:-1]) if scale_types else strength
        return replace(
            spec,
            base=base.astype(np.float32),
            type_logits=spec.type_logits * types.astype(np.float32)[:, None, None],
            chain=spec.chain * links.astype(np.float32)[:, None, None],
            request_spread=spread,
            noise_persistence=kept,
            type_persistence=float(type_kept),
        )

    pool: Measured | None = None
    for number in range(num_rounds):
        part = _some_requests(layout, run_tokens, rng)
        starts = np.concatenate(([0], np.cumsum(part[:, 2] + part[:, 3])))
        domain_idx = part[:, 0].copy()
        seeds = request_seeds(int(rng.integers(1 << 62)), 0, len(part))
        ids = run_model(current(), starts, domain_idx, seeds)
        want = (targets.load * _by_domain(part, len(base))[:, None, None]).sum(axis=0) / len(ids)
        got = measure(ids, starts, domain_idx, len(base), spec.num_experts, want)
        pool = got if pool is None else pool.blend(got, _MEMORY if number >= settled else 0.0)
        step = 1.0 / (1.0 + max(0, number - settled) / 6)

        expected = targets.load * pool.tokens[:, None, None]
        want = expected.sum(axis=0) / pool.num_tokens
        overall = np.log((want + 1e-4) / (pool.load.sum(axis=0) / pool.num_tokens + 1e-4))
        # The wider the other scores, the less a step of the base moves the load.
        types = type_std * (strength if scale_types else 1.0)
        width = np.minimum(np.sqrt(1 + (types**2 + spread**2) / 6), 6.0)[:, None]
        base += max(0.6 * step, 0.2) * width * overall
        if len(base) > 1:
            prior = 20 * want + 0.5
            own = np.log((expected + prior) / (pool.load + prior))
            base += (
                0.4 * step * width * np.where(pool.tokens[:, None, None] > 0, own - overall, 0.0)
            )
        base = np.clip(base, -60, 60)
        if spec.num_layers > 1:
            ratio = targets.bits / np.maximum(pool.bits(spec.top_k), 1e-4)
            ratio = np.clip(np.where(targets.bits > 1e-4, ratio, 0.5), 0.5, 2) ** (0.7 * step)
            if scale_types:
                padded = np.concatenate((ratio[:1], np.sqrt(ratio[1:] * ratio[:-1]), ratio[-1:]))
                strength = np.clip(strength * padded, 0.01, 8)
            else:
                strength = np.clip(strength * ratio, 0.002, 3)
        if targets.variance is not None:
            ratio = targets.variance / np.maximum(pool.variance, 1e-12)
            spread = np.clip(spread * np.clip(ratio, 0.6, 1.6) ** (0.6 * step), 0.02, 3)
        if targets.reuse is not None:
            short = targets.reuse - pool.reuse
            kept = np.clip(kept + 0.8 * step * short, 0, 0.6)
            type_kept = float(np.clip(type_kept + step * short.mean(), 0, 0.9))
        if progress is not None:
            progress(number + 1, num_rounds)
    return current()


def race_score(inclusion: FloatArray) -> FloatArray:
    """The score at which an expert is chosen with a given probability.

    In a race of exponential clocks stopped at a common time, a runner of rate w has arrived with
    probability 1 - exp(-w): the score is log w = log(-log(1 - p)). Choosing without replacement
    stops at the K-th arrival instead, which is close to a common time.
    """
    p = np.clip(inclusion, 1e-5, 0.995)
    return np.asarray(np.log(-np.log1p(-p)))


def request_shapes(trace: Trace, index: RequestIndex) -> IntArray:
    """[N, 4]: domain, first position, prefill and decode tokens of the requests (at most 4,096,
    evenly spaced over the ids)."""
    num_requests = len(index.ids)
    prefill = np.asarray(trace.phases)[index.token_idx] == PREFILL
    lengths = np.diff(index.indptr)
    num_prefill = np.add.reduceat(prefill.astype(np.int64), index.indptr[:-1])
    first = np.asarray(trace.positions)[index.token_idx[index.indptr[:-1]]].astype(np.int64)
    shapes = np.stack([_first_domain(trace, index), first, num_prefill, lengths - num_prefill], 1)
    shapes[:, 1:] = np.minimum(shapes[:, 1:], MAX_REQUEST_TOKENS)
    if num_requests > _MAX_REQUESTS:
        shapes = shapes[np.linspace(0, num_requests - 1, _MAX_REQUESTS).astype(np.int64)]
    return shapes


def _first_domain(trace: Trace, index: RequestIndex) -> IntArray:
    first = index.token_idx[index.indptr[:-1]]
    if trace.domain_ids is None:
        return np.zeros(len(first), np.int64)
    return np.asarray(trace.domain_ids)[first].astype(np.int64)


def _sample(index: RequestIndex, rng: np.random.Generator) -> RequestIndex:
    """Whole requests of at most FIT_TOKENS tokens; a single longer request is cut."""
    lengths = np.diff(index.indptr)
    if lengths.sum() <= FIT_TOKENS:
        return index
    order = rng.permutation(len(lengths))
    keep = np.zeros(len(lengths), bool)
    keep[order[np.cumsum(lengths[order]) <= FIT_TOKENS]] = True
    if keep.any():
        return index.select(keep)
    keep[order[0]] = True
    cut = index.select(keep)
    return RequestIndex(cut.ids, np.array([0, FIT_TOKENS]), cut.token_idx[:FIT_TOKENS])


def _some_requests(layout: IntArray, num_tokens: int, rng: np.random.Generator) -> IntArray:
    order = layout[rng.permutation(len(layout))]
    while (order[:, 2] + order[:, 3]).sum() < num_tokens:
        order = np.concatenate((order, order))
    ends = np.cumsum(order[:, 2] + order[:, 3])
    return order[: int(np.searchsorted(ends, num_tokens)) + 1]


def _by_domain(requests: IntArray, num_domains: int) -> FloatArray:
    """[D] tokens of the requests [n, 4] by domain."""
    lengths = (requests[:, 2] + requests[:, 3]).astype(np.float64)
    return np.bincount(requests[:, 0], lengths, num_domains).astype(np.float64)


def _log_lift(between: FloatArray, num_tokens: int) -> npt.NDArray[np.float32]:
    """log(observed / expected) of pairs of experts in adjacent layers, damped where few were
    expected."""
    joint = between
    total = np.maximum(joint.sum(axis=(1, 2), keepdims=True), 1.0)
    expected = joint.sum(axis=2, keepdims=True) * joint.sum(axis=1, keepdims=True) / total
    damping = max(1.0, 0.002 * num_tokens)
    return np.log((joint + damping) / (expected + damping)).astype(np.float32)


def _centred(score: FloatArray) -> FloatArray:
    return np.asarray(score - score.mean(axis=-1, keepdims=True))
