"""The synthetic generator: kernels against references, seeds, phases, and its JSON form."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import FormatError, InputError
from moesim.trace import synth as synth_module
from moesim.trace.format import Trace, load_token_trace
from moesim.trace.synth import draw_requests, generate, request_seeds, run_model, write_synthetic
from moesim.trace.synth_kernels import (
    noise_tables,
    request_variance,
    splitmix,
    type_responsibilities,
)
from moesim.trace.synth_spec import SynthSpec

MakeTrace = Callable[..., Trace]
BITS64 = (1 << 64) - 1


def make_spec(
    layers: int = 3,
    experts: int = 6,
    top_k: int = 2,
    domains: int = 2,
    types: int = 4,
    seed: int = 0,
    **changed: Any,
) -> SynthSpec:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float16).astype(np.float32)

    values: dict[str, Any] = {
        "model": "toy",
        "num_experts": experts,
        "top_k": top_k,
        "layer_ids": tuple(range(layers)),
        "requests": np.array([[d, 0, 5 + 3 * d, 2] for d in range(domains)]),
        "base": normal(domains, layers, experts),
        "type_logits": normal(layers, types, experts),
        "type_share": np.full((domains, types), 1 / types),
        "type_concentration": 3.0,
        "type_persistence": 0.25,
        "chain": normal(layers - 1, experts, experts),
        "request_spread": np.full(layers, 0.5),
        "noise_persistence": np.full(layers, 0.25),
        "domains": tuple(f"d{d}" for d in range(domains)) if domains > 1 else (),
        "source": {"note": "toy"},
    }
    return SynthSpec(**{**values, **changed})


# References


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & BITS64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & BITS64
    return x ^ (x >> 31)


def run_reference(
    spec: SynthSpec, starts: np.ndarray, domain_idx: np.ndarray, seeds: np.ndarray
) -> np.ndarray:
    """What `run_model` computes, one token, layer and expert at a time."""
    gumbel, normal = noise_tables()
    step, f32 = 0x9E3779B97F4A7C15, np.float32
    out = np.zeros((starts[-1], spec.num_layers, spec.top_k), np.uint8)
    for r, domain in enumerate(domain_idx):
        tokens = range(starts[r], starts[r + 1])
        types: list[int] = []
        state = mix(int(seeds[r]))
        cum = np.cumsum(spec.type_share[domain])
        for _ in tokens:
            state = state + step & BITS64
            if types and (mix(state) >> 11) * 2.0**-53 < spec.type_persistence:
                types.append(types[-1])
                continue
            state = state + step & BITS64
            u = (mix(state) >> 11) * 2.0**-53
            state = state + step & BITS64
            v = (mix(state) >> 11) * 2.0**-53
            if u * (len(types) + spec.type_concentration) < len(types):
                types.append(types[int(v * len(types))])
            else:
                types.append(min(int((cum <= v * cum[-1]).sum()), len(cum) - 1))
        for layer in range(spec.num_layers):
            state = mix((int(seeds[r]) + (layer + 1) * 0xD1342543DE82EF95) & BITS64)
            own = []
            while len(own) < spec.num_experts:
                state = state + step & BITS64
                own += [normal[mix(state) >> 16 * i & 0xFFFF] for i in range(4)]
            spread = f32(spec.request_spread[layer])
            keep = int(spec.noise_persistence[layer] * 65536)
            noise = [f32(0)] * (spec.num_experts + 1)
            for n, t in enumerate(tokens):
                for e in range(0, spec.num_experts, 2):
                    state = state + step & BITS64
                    x = mix(state)
                    for i, (low, draw) in enumerate(((0, 16), (32, 48))):
                        if n == 0 or (x >> low & 0xFFFF) >= keep:
                            noise[e + i] = gumbel[x >> draw & 0xFFFF]
                keys = []
                for e in range(spec.num_experts):
                    centre = spec.base[domain, layer, e] + spread * own[e]
                    score = f32(centre + spec.type_logits[layer, types[n], e]) + noise[e]
                    for k in range(spec.top_k if layer else 0):
                        score = score + spec.chain[layer - 1, out[t, layer - 1, k], e]
                    keys.append((int(score * f32(1 << 24)), e))
                out[t, layer] = [e for _, e in sorted(keys, reverse=True)[: spec.top_k]]
    return out


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    experts=st.integers(2, 7),
    persistence=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_generator_equals_its_reference(
    seed: int, layers: int, experts: int, persistence: float
) -> None:
    spec = make_spec(
        layers=layers,
        experts=experts,
        top_k=1 + seed % experts,
        seed=seed,
        type_persistence=persistence,
        noise_persistence=np.full(layers, persistence),
    )
    starts, domain_idx = np.array([0, 4, 5, 12]), np.array([0, 1, 0])
    seeds = request_seeds(seed, 0, 3)
    np.testing.assert_array_equal(
        run_model(spec, starts, domain_idx, seeds), run_reference(spec, starts, domain_idx, seeds)
    )


def test_splitmix_is_the_published_one() -> None:
    """The known first outputs of splitmix64 (prng.di.unimi.it/splitmix64.c) from state 0."""
    step = 0x9E3779B97F4A7C15
    outputs = [int(splitmix(np.uint64((i + 1) * step & BITS64))) for i in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert outputs == [mix((i + 1) * step & BITS64) for i in range(3)]


def test_mixture_step_equals_its_reference() -> None:
    rng = np.random.default_rng(2)
    ids = rng.random((30, 3, 5)).argsort(axis=2)[:, :, :2].astype(np.int16)
    ids[4, 1] = -1
    log_share = np.log(rng.dirichlet(np.ones(5), (3, 4)).transpose(0, 2, 1)).astype(np.float32)
    log_prior = np.log(rng.dirichlet(np.ones(4))).astype(np.float32)
    counts, weight = np.zeros((3, 5, 4), np.float32), np.zeros(4)
    label = np.zeros(30, np.int64)
    type_responsibilities(ids, log_share, log_prior, counts, weight, label)
    expected = np.zeros((3, 5, 4))
    for t, token in enumerate(ids):
        pairs = [(layer, e) for layer, row in enumerate(token) for e in row if e >= 0]
        log_p = log_prior + sum(log_share[at] for at in pairs)
        p = np.exp(log_p) / np.exp(log_p).sum()
        assert label[t] == np.argmax(p)
        for at in pairs:
            expected[at] += p
    np.testing.assert_allclose(counts, expected, rtol=1e-4, atol=1e-5)
    assert weight.sum() == pytest.approx(30)


def test_request_variance_by_hand() -> None:
    """Requests of 2 and 1 tokens on two experts with mean load 1/2 each. The first has 2 and 0
    choices, so (2 - 1)^2 + (0 - 1)^2 = 2; the second 0 and 1, so 1/4 + 1/4. Over 4 + 1: 1/2."""
    ids = np.array([[[0]], [[0]], [[1]]], np.uint8)
    found = request_variance(ids, np.array([0, 2, 3]), np.full((1, 2), 0.5))
    np.testing.assert_allclose(found, [0.5])


# What the model means


def test_one_choice_follows_the_softmax() -> None:
    """Scores log p choose expert e with probability p: 40,000 tokens, within 5 standard
    deviations (sqrt(p (1 - p) / n), at most 0.0025)."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    spec = make_spec(
        layers=1,
        experts=4,
        top_k=1,
        domains=1,
        base=np.log(p)[None, None].astype(np.float32),
        type_logits=np.zeros((1, 4, 4), np.float32),
        request_spread=np.zeros(1),
        noise_persistence=np.zeros(1),
    )
    ids = generate(spec, 40_000, 3).expert_ids.ravel()
    share = np.bincount(ids, minlength=4) / 40_000
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / 40_000)).all()


def test_two_choices_are_without_replacement() -> None:
    """Of p = 1/2, 1/3, 1/6 the first is left out with probability 1/3 x 1/6 / (2/3) + 1/6 x 1/3 /
    (5/6) = 1/12 + 1/15 = 0.15."""
    p = np.array([1 / 2, 1 / 3, 1 / 6])
    spec = make_spec(
        layers=1,
        experts=3,
        top_k=2,
        domains=1,
        base=np.log(p)[None, None].astype(np.float32),
        type_logits=np.zeros((1, 4, 3), np.float32),
        request_spread=np.zeros(1),
        noise_persistence=np.zeros(1),
    )
    ids = generate(spec, 40_000, 3).expert_ids
    assert 1 - (ids == 0).any(axis=2).mean() == pytest.approx(0.15, abs=5 * 0.0018)


def alike(spec: SynthSpec, num_tokens: int = 20_000) -> float:
    """How often a token chooses in its one layer what the token before it chose."""
    trace = generate(spec, num_tokens, 1)
    follows = trace.request_ids[1:] == trace.request_ids[:-1]
    return float((trace.expert_ids[1:] == trace.expert_ids[:-1]).all(axis=(1, 2))[follows].mean())


def flat(**changed: Any) -> SynthSpec:
    """One layer of four equal experts, top-1; two types that each have one of the experts."""
    zero = np.zeros((1, 1, 4), np.float32)
    values: dict[str, Any] = {
        "base": zero,
        "type_logits": np.zeros((1, 2, 4), np.float32),
        "type_concentration": 1e9,
        "type_persistence": 0.0,
        "request_spread": np.zeros(1),
        "noise_persistence": np.zeros(1),
        "requests": np.array([[0, 0, 200, 0]]),
    }
    return make_spec(layers=1, experts=4, top_k=1, domains=1, types=2, **{**values, **changed})


def test_each_source_of_likeness() -> None:
    """Independent tokens agree in 1/4; with frozen noise always; with types that decide the expert
    and keep on with probability 0.6, in 0.6 + 0.4 / 2; with types that a request never changes,
    always."""
    decided = np.zeros((1, 2, 4), np.float32)
    decided[0, 0, 0] = decided[0, 1, 1] = 50.0
    assert alike(flat()) == pytest.approx(0.25, abs=0.02)
    assert alike(flat(noise_persistence=np.ones(1))) == 1
    assert alike(flat(type_logits=decided, type_persistence=0.6)) == pytest.approx(0.8, abs=0.02)
    assert alike(flat(type_logits=decided, type_concentration=0.0)) == 1
    assert alike(flat(request_spread=np.full(1, 100.0))) > 0.95


def test_urn_shares_vary_as_a_dirichlet_does() -> None:
    """Two types of share 1/2 and concentration 4: the share of a long request has variance
    (1/2)(1/2) / (4 + 1) = 0.05, plus 0.25 / n of its n = 2,000 tokens. 400 requests tell it
    within 4 standard errors, about 28%."""
    decided = np.zeros((1, 2, 4), np.float32)
    decided[0, 0, 0] = decided[0, 1, 1] = 50.0
    spec = flat(type_logits=decided, type_concentration=4.0, requests=np.array([[0, 0, 2000, 0]]))
    trace = generate(spec, 800_000, 2)
    share = (trace.expert_ids[:, 0, 0] == 0).reshape(400, 2000).mean(axis=1)
    assert share.mean() == pytest.approx(0.5, abs=0.05)
    assert share.var() == pytest.approx(0.05, rel=0.28)


def test_chain_ties_layers_together() -> None:
    """A strong chain from expert e to e + 1 makes the next layer certain."""
    chain = np.full((2, 4, 4), -30.0, np.float32)
    for e in range(4):
        chain[:, e, (e + 1) % 4] = 30.0
    spec = make_spec(layers=3, experts=4, top_k=1, domains=1, chain=chain)
    ids = generate(spec, 500, 0).expert_ids[:, :, 0].astype(int)
    np.testing.assert_array_equal(np.diff(ids, axis=1) % 4, 1)


# Traces


def test_requests_have_their_domain_phase_and_positions() -> None:
    """The list holds (domain 0, from position 7: 3 prefill, 2 decode) and (domain 1: 4 decode)."""
    spec = make_spec(requests=np.array([[0, 7, 3, 2], [1, 0, 0, 4]]))
    trace = generate(spec, 9, 0)
    for request in (0, 1):
        rows = np.flatnonzero(trace.request_ids == request)
        domain = trace.domain_ids[rows[0]] if trace.domain_ids is not None else -1
        assert trace.positions[rows].tolist() == (
            [7, 8, 9, 10, 11] if domain == 0 else [0, 1, 2, 3]
        )
        assert trace.phases[rows].tolist() == ([0, 0, 0, 1, 1] if domain == 0 else [1, 1, 1, 1])
    assert trace.meta.source["kind"] == "synthetic"
    assert trace.meta.source["seed"] == 0


@settings(max_examples=40)
@given(num_tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_requests_sum_up_to_the_tokens(num_tokens: int, seed: int) -> None:
    spec = make_spec()
    drawn = list(draw_requests(spec, num_tokens, seed))
    lengths = np.concatenate([order[:, 2] + order[:, 3] for order in drawn])
    assert lengths.sum() == num_tokens
    assert lengths.min() >= 1
    for order in drawn[:-1]:
        np.testing.assert_array_equal(np.sort(order[:, 0]), [0, 1])


@pytest.mark.parametrize("name", ["t.npz", "t"])
def test_written_in_pieces_is_what_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """INV-6: neither the pieces nor the form show; another seed does."""
    spec = make_spec()
    whole = generate(spec, 200, 4).content_hash()
    monkeypatch.setattr(synth_module, "_CHUNK_IDS", 100)
    seen: list[tuple[int, int]] = []
    write_synthetic(spec, tmp_path / name, 200, 4, lambda *at: seen.append(at))
    assert len(seen) > 5
    assert seen[-1] == (200, 200)
    assert load_token_trace(tmp_path / name, "x").content_hash() == whole
    assert generate(spec, 200, 5).content_hash() != whole


def test_a_longer_trace_begins_like_a_shorter_one() -> None:
    spec = make_spec()
    short, long = generate(spec, 40, 1), generate(spec, 400, 1)
    last = int(short.request_ids[-1])
    rows = short.request_ids < last
    np.testing.assert_array_equal(short.expert_ids[rows], long.expert_ids[:40][rows])


def test_many_experts_take_wider_ids(tmp_path: Path) -> None:
    spec = make_spec(layers=1, experts=300, top_k=3, domains=1)
    write_synthetic(spec, tmp_path / "t.npz", 30, 0)
    trace = load_token_trace(tmp_path / "t.npz", "x")
    assert trace.expert_ids.dtype == np.uint16
    assert trace.domain_ids is None


@pytest.mark.parametrize(("tokens", "seed"), [(0, 0), (-1, 0), (1 << 50, 0), (5, -1)])
def test_impossible_traces(tokens: int, seed: int) -> None:
    with pytest.raises(InputError):
        generate(make_spec(), tokens, seed)


# JSON


def test_json_round_trip() -> None:
    spec = make_spec()
    text = spec.to_json()
    back = SynthSpec.from_json(text)
    assert back.to_json() == text
    assert generate(back, 100, 1).content_hash() == generate(spec, 100, 1).content_hash()


def test_json_numbers_are_rounded_to_half_precision() -> None:
    spec = make_spec(request_spread=np.array([1 / 3, 0.1, 2.0]))
    back = SynthSpec.from_json(spec.to_json())
    np.testing.assert_allclose(back.request_spread, spec.request_spread, rtol=2**-11)


def packed(array: np.ndarray, **changed: Any) -> dict[str, Any]:
    data = base64.b64encode(zlib.compress(array.tobytes())).decode()
    out = {"shape": list(array.shape), "dtype": array.dtype.str, "zlib": data}
    return {**out, **changed}


BOMB = base64.b64encode(zlib.compress(bytes(1 << 24))).decode()
HALF = np.zeros(3, "<f2")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "other"),
        ("version", 2),
        ("model", None),
        ("num_experts", 0),
        ("num_experts", 7),
        ("num_experts", True),
        ("top_k", 7),
        ("layer_ids", [0, 1]),
        ("layer_ids", [0, 1, 1]),
        ("layer_ids", []),
        ("type_concentration", -1),
        ("type_concentration", math.nan),
        ("type_concentration", "3"),
        ("type_persistence", 1.5),
        ("domains", ["a"]),
        ("domains", [1, 2]),
        ("source", []),
        ("request_spread", None),
        ("request_spread", [1, 2, 3]),
        ("request_spread", packed(HALF, dtype="<f8")),
        ("request_spread", packed(HALF, dtype="|O")),
        ("request_spread", packed(HALF, shape=[4])),
        ("request_spread", packed(HALF, shape=[1, 3])),
        ("request_spread", packed(HALF, shape=[-3])),
        ("request_spread", packed(HALF, shape=[1 << 60])),
        ("request_spread", packed(HALF, zlib=BOMB)),
        ("request_spread", packed(HALF, zlib="not base64!")),
        ("request_spread", packed(HALF, zlib="AAAA")),
        ("request_spread", packed(HALF + np.float16(np.nan))),
        ("request_spread", packed(HALF + np.float16(5000))),
        ("noise_persistence", packed(HALF - np.float16(1))),
        ("base", packed(np.full((2, 3, 6), np.inf, "<f2"))),
        ("base", packed(np.zeros((2, 3, 5), "<f2"))),
        ("chain", packed(np.zeros((3, 6, 6), "<f2"))),
        ("type_share", packed(np.zeros((2, 4), "<f2"))),
        ("requests", packed(np.zeros((0, 4), "<i8"))),
        ("requests", packed(np.array([[2, 0, 5, 5]], "<i8"))),
        ("requests", packed(np.array([[0, 0, 0, 0]], "<i8"))),
        ("requests", packed(np.array([[0, 0, -5, 9]], "<i8"))),
        ("requests", packed(np.array([[0, 0, 1 << 40, 0]], "<i8"))),
    ],
)
def test_specifications_are_checked(name: str, value: Any) -> None:
    raw = json.loads(make_spec().to_json())
    raw[name] = value
    with pytest.raises(FormatError, match=r"^spec\.json: ") as caught:
        SynthSpec.from_json(json.dumps(raw), "spec.json")
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "{}"])
def test_text_that_is_no_specification(text: str) -> None:
    with pytest.raises(FormatError):
        SynthSpec.from_json(text)


def test_source_cannot_pass_for_a_capture() -> None:
    spec = replace(make_spec(), source={"kind": "captured"})
    assert generate(spec, 5, 0).meta.source["kind"] == "synthetic"


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-6: requests are shared out among threads, each with a seed of its own."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 23)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    spec = make_spec()
    domain_idx = np.zeros(len(lengths), np.int64)
    made: list[np.ndarray] = []
    for workers in (1, 2, 7, 64):
        monkeypatch.setattr("moesim.trace.synth.os.cpu_count", lambda n=workers: n)
        made.append(run_model(spec, starts, domain_idx, request_seeds(0, 0, len(lengths))))
    for other in made[1:]:
        np.testing.assert_array_equal(made[0], other)
