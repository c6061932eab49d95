"""Synthetic traces against the real ones that they were fitted to, and designed ones against what
was asked for.

The tolerances are those of docs/trace-tools.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from moesim.errors import FormatError, InputError
from moesim.trace.format import Trace
from moesim.trace.stats import TraceStats, batch_imbalance, trace_stats
from moesim.trace.synth import generate
from moesim.trace.synth_fit import fit, race_score
from moesim.trace.synth_kernels import request_variance
from moesim.trace.synth_shape import design, reshape
from moesim.trace.synth_spec import SynthSpec
from moesim.trace.synth_types import type_dynamics

MakeTrace = Callable[..., Trace]
RealTrace = Callable[[str], Trace]

LAYER_CV, MEAN_CV = 0.12, 0.06
LAYER_GINI = 0.12
ENTROPY = 0.03
LAYER_BITS, MEAN_BITS = 0.12, 0.05
LAYER_REUSE, MEAN_REUSE = 0.10, 0.025
IMBALANCE, IMBALANCE_P99 = 0.04, 0.08


@cache
def fitted(real_trace: RealTrace, name: str) -> tuple[Trace, TraceStats, SynthSpec]:
    trace = real_trace(name)
    spec = SynthSpec.from_json(fit(trace, seed=0).to_json())
    return trace, trace_stats(trace), spec


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found / wanted - 1).max())


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("sample:debian-moe", 1),
        ("sample:debian-moe", 4),
        ("deepseek-v2-lite.npz", 3),
        ("gpt-oss-20b.npz", 1),
    ],
)
def test_a_fit_reproduces_the_trace(real_trace: RealTrace, name: str, scale: int) -> None:
    """At the trace's own size and at several times it, from a seed that the fit never saw."""
    trace, real, spec = fitted(real_trace, name)
    made = generate(spec, trace.num_tokens * scale, seed=77)
    found = trace_stats(made)
    assert off(found.skew.cv, real.skew.cv) < LAYER_CV
    assert found.skew.cv.mean() == pytest.approx(real.skew.cv.mean(), rel=MEAN_CV)
    assert off(found.skew.gini, real.skew.gini) < LAYER_GINI
    assert np.abs(found.skew.entropy - real.skew.entropy).max() < ENTROPY
    assert found.affinity is not None
    assert real.affinity is not None
    assert off(found.affinity.bits, real.affinity.bits) < LAYER_BITS
    assert found.affinity.bits.mean() == pytest.approx(real.affinity.bits.mean(), rel=MEAN_BITS)
    assert found.reuse is not None
    assert real.reuse is not None
    apart = np.abs(found.reuse.overlap - real.reuse.overlap)
    assert apart.max() < LAYER_REUSE
    assert apart.mean() < MEAN_REUSE


@pytest.mark.parametrize("name", ["sample:debian-moe", "deepseek-v2-lite.npz", "gpt-oss-20b.npz"])
@pytest.mark.parametrize(("phase", "tokens"), [("prefill", 4096), ("decode", 256)])
def test_a_fit_reproduces_the_imbalance_of_batches(
    real_trace: RealTrace, name: str, phase: str, tokens: int
) -> None:
    """Max over mean load of 8 GPUs; what makes batches differ is the variety of requests."""
    trace, _, spec = fitted(real_trace, name)
    made = generate(spec, 100_000, seed=78)
    real, found = (
        batch_imbalance(t, 8, phase, tokens, 100)  # type: ignore[arg-type]
        for t in (trace, made)
    )
    assert found.mean == pytest.approx(real.mean, rel=IMBALANCE)
    assert found.p50 == pytest.approx(real.p50, rel=IMBALANCE)
    assert found.p99 == pytest.approx(real.p99, rel=IMBALANCE_P99)


def test_requests_vary_as_real_ones_do(real_trace: RealTrace) -> None:
    """The part of the variance of a batch's load that its requests bring, per layer: within 15%
    over the layers; without scores and types of its own a request would bring far less."""
    trace, real, spec = fitted(real_trace, "sample:debian-moe")
    flat = replace(spec, request_spread=spec.request_spread * 0, type_concentration=1e9)
    share = real.load / trace.num_tokens

    def variance(t: Trace) -> np.ndarray:
        starts = np.flatnonzero(np.diff(t.request_ids, prepend=-1, append=-1))
        return request_variance(np.array(t.expert_ids), starts, share)

    wanted = variance(trace)
    found = variance(generate(spec, 100_000, seed=80)) / wanted
    without = variance(generate(flat, 100_000, seed=80)) / wanted
    assert found.mean() == pytest.approx(1, abs=0.15)
    assert without.mean() < 0.8
    assert (without < found).all()


def test_domains_keep_their_difference(real_trace: RealTrace) -> None:
    """Domains of the sample are 0.055 to 0.10 bits apart; synthetic ones within a quarter."""
    trace, real, spec = fitted(real_trace, "sample:debian-moe")
    found = trace_stats(generate(spec, trace.num_tokens, seed=79))
    assert [d.name for d in found.domains] == [d.name for d in real.domains]
    apart = [[d.divergence for d in s.domains] for s in (found, real)]
    ratio = np.array(apart[0]) / np.array(apart[1])
    assert ratio.mean() == pytest.approx(1, abs=0.25)


def test_same_trace_same_specification(make_trace: MakeTrace) -> None:
    """INV-6."""
    trace = make_trace(lengths=(40, 30, 50, 20), experts=6)
    assert fit(trace, 3).to_json() == fit(trace, 3).to_json()


def test_requests_of_a_fit_are_those_of_the_trace(make_trace: MakeTrace) -> None:
    """Domain, first position, prefill and decode tokens."""
    phases = np.array([0, 0, 1, 1, 0, 1, 1], np.uint8)
    positions = np.array([0, 1, 2, 3, 10, 11, 12], np.int32)
    trace = make_trace(lengths=(4, 3), phases=phases, positions=positions)
    spec = fit(trace)
    assert spec.requests.tolist() == [[0, 0, 2, 2], [1, 10, 1, 2]]
    made = generate(spec, 7, 0)
    assert sorted(made.positions.tolist()) == sorted(positions.tolist())
    assert made.phases.sum() == phases.sum()


@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": (1,)},
        {"lengths": (1, 1), "layers": 1, "top_k": 1},
        {"lengths": (30, 2), "top_k": 8, "experts": 8},
        {"lengths": (70,), "experts": 2, "top_k": 1, "domains": ("x", "y")},
        {"lengths": (20, 20), "domain_ids": None},
    ],
)
def test_small_traces_can_be_fitted(make_trace: MakeTrace, shape: dict[str, object]) -> None:
    trace = make_trace(**shape)
    made = generate(fit(trace), 50, 0)
    assert made.meta.layer_ids == trace.meta.layer_ids
    assert np.isfinite(trace_stats(made).skew.cv).all()


def test_traces_with_missing_choices_can_be_fitted(make_trace: MakeTrace) -> None:
    ids = make_trace(lengths=(40, 40)).expert_ids.astype(np.int16)
    ids[::3, :, 1] = -1
    made = generate(fit(make_trace(lengths=(40, 40), expert_ids=ids)), 60, 0)
    assert (made.expert_ids < 8).all()


def test_unused_experts_stay_unused(make_trace: MakeTrace) -> None:
    """Expert 7 of layer 1 is never chosen, in two domains: less than one token in 200 has it."""
    ids = make_trace(lengths=(200, 200, 200, 200), experts=7, seed=3).expert_ids
    trace = make_trace(lengths=(200, 200, 200, 200), expert_ids=ids)
    made = generate(fit(trace), 4000, 0)
    assert (made.expert_ids == 7).any(axis=2).mean() < 0.005


def test_nothing_to_fit(make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FormatError, match="no tokens"):
        fit(make_trace().take(slice(0, 0)))
    monkeypatch.setattr("moesim.trace.synth_fit.MAX_CELLS", 100)
    with pytest.raises(InputError, match="3 layers of 8 experts are too many"):
        fit(make_trace())


def test_long_traces_are_sampled_by_request(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesim.trace.synth_fit.FIT_TOKENS", 25)
    assert fit(make_trace(lengths=(10, 10, 10, 10))).source["fit_tokens"] == 20
    assert fit(make_trace(lengths=(40, 30))).source["fit_tokens"] == 25


def test_race_score_by_hand() -> None:
    """Rate 1 arrives by time 1 with probability 1 - 1/e, and log 1 is 0."""
    np.testing.assert_allclose(race_score(np.array([1 - np.exp(-1.0)])), [0.0], atol=1e-12)
    assert np.isfinite(race_score(np.array([0.0, 1.0]))).all()


def test_type_dynamics_are_found_again() -> None:
    """Two even types, kept from token to token with probability 0.5 and otherwise drawn from
    request shares that are Beta(2, 2), that is concentration 4."""
    rng = np.random.default_rng(0)
    labels = []
    for _ in range(400):
        share = rng.beta(2, 2)
        own: list[int] = []
        for _ in range(100):
            own.append(own[-1] if own and rng.random() < 0.5 else int(rng.random() < share))
        labels += own
    concentration, persistence = type_dynamics(
        np.array(labels), np.arange(0, 40_001, 100), np.full((1, 2), 0.5), np.array([40_000.0])
    )
    assert concentration == pytest.approx(4, rel=0.25)
    assert persistence == pytest.approx(0.5, abs=0.05)


# From parameters


@pytest.mark.parametrize(
    ("skew", "strength"), [("zipf", 0.0), ("zipf", 0.8), ("lognormal", 0.5), ("lognormal", 1.0)]
)
def test_designed_load_is_as_asked(skew: str, strength: float) -> None:
    """Sorted load of every layer against the law, an expert being in 95% of choices at most."""
    spec = design(
        range(4),
        32,
        4,
        skew=skew,  # type: ignore[arg-type]
        skew_strength=strength,
        affinity=0.1,
    )
    load = trace_stats(generate(spec, 60_000, 1)).load
    share = np.sort(load / load.sum(axis=1, keepdims=True), axis=1)[:, ::-1]
    if skew == "zipf":
        law = np.arange(1, 33) ** -strength
    else:
        from scipy.special import ndtri

        law = np.exp(strength * ndtri(1 - (np.arange(32) + 0.5) / 32))
    law /= law.sum()
    assert law[0] * 4 < 0.95
    assert np.abs(share - law).sum(axis=1).max() < 0.12


@pytest.mark.parametrize("affinity", [0.05, 0.15, 0.3])
def test_designed_affinity_is_as_asked(affinity: float) -> None:
    spec = design(range(5), 64, 8, affinity=affinity, num_domains=3)
    found = trace_stats(generate(spec, 40_000, 2)).affinity
    assert found is not None
    assert found.normalised.mean() == pytest.approx(affinity, rel=0.15)


def test_designed_requests_and_domains() -> None:
    """Means of 300 prefill and 100 decode tokens, within 5% (log-normal quantiles lose the far
    tail); domains that differ by more are further apart."""
    spec = design((3, 5), 16, 2, num_domains=3, prompt_tokens=300, output_tokens=100)
    assert spec.layer_ids == (3, 5)
    assert spec.requests[:, 2].mean() == pytest.approx(300, rel=0.05)
    assert spec.requests[:, 3].mean() == pytest.approx(100, rel=0.05)
    apart = []
    for spread in (0.0, 0.3, 1.0):
        one = design((0, 1), 16, 2, num_domains=3, domain_spread=spread, seed=1)
        stats = trace_stats(generate(one, 60_000, 0))
        apart.append(np.mean([d.divergence for d in stats.domains]))
    assert apart[0] < 0.5 * apart[1] < 0.25 * apart[2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"skew_strength": -1.0},
        {"skew_strength": float("nan")},
        {"affinity": 1.0},
        {"num_domains": 0},
        {"request_spread": 9.0},
        {"prompt_tokens": 0.0},
        {"layer_ids": ()},
        {"layer_ids": (1, 1)},
        {"top_k": 9},
        {"num_experts": 30_000},
    ],
)
def test_designs_that_cannot_be(wrong: dict[str, object]) -> None:
    values = {"layer_ids": (0, 1), "num_experts": 8, "top_k": 2, **wrong}
    with pytest.raises(InputError):
        design(**values)  # type: ignore[arg-type]


def test_another_shape_keeps_the_character(real_trace: RealTrace) -> None:
    """From 12 layers of 64 to 6 of 96, top-6: load skew by depth within 20%, affinity over its
    ceiling within 25%, and requests of the same lengths."""
    _, real, spec = fitted(real_trace, "sample:debian-moe")
    made = reshape(spec, range(2, 8), 96, 6, model="other")
    trace = generate(made, 40_000, 3)
    assert (trace.num_layers, trace.num_experts, trace.top_k) == (6, 96, 6)
    assert trace.meta.source["reshaped_from"]["num_experts"] == 64
    found = trace_stats(trace)
    depth = np.round(np.linspace(0, 11, 6)).astype(int)
    assert off(found.skew.cv, real.skew.cv[depth]) < 0.2
    assert found.affinity is not None
    assert real.affinity is not None
    assert found.affinity.normalised.mean() == pytest.approx(
        real.affinity.normalised.mean(), rel=0.25
    )
    assert found.requests.lengths["p50"] == real.requests.lengths["p50"]
