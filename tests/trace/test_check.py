"""Deeper checks: each finding from a trace that has it, and none from real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moesim.trace import counts as counts_module
from moesim.trace.check import check_trace
from moesim.trace.format import LoadTrace, Trace, TraceMeta
from moesim.trace.importers.warmup import MIN_RUN

MakeTrace = Callable[..., Trace]
LENGTHS = (60, 50, 70)
TOKENS = sum(LENGTHS)


@pytest.fixture
def good(make_trace: MakeTrace) -> Callable[..., Trace]:
    """A trace of 180 tokens without findings; keywords replace its arrays."""
    return lambda **changed: make_trace(**{"lengths": LENGTHS, "gates": True, **changed})


def codes(trace: Trace | LoadTrace) -> dict[str, tuple[str, int]]:
    found = check_trace(trace)
    severities = [f.severity for f in found]
    assert severities == sorted(severities), "errors come first"
    return {f.code: (f.severity, f.count) for f in found}


def test_nothing_is_wrong_with_a_good_trace(good: Callable[..., Trace]) -> None:
    assert codes(good()) == {}
    assert codes(good(gate_weights=None, domain_ids=None)) == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sample:debian-moe", {}),
        ("debian-moe.npz", {}),
        ("gpt-oss-20b.npz", {}),
        ("deepseek-v2-lite.npz", {"unordered-gates": ("warning", 430_570)}),
    ],
)
def test_real_traces(
    real_trace: Callable[[str], Trace], name: str, expected: dict[str, Any]
) -> None:
    """The weights of the DeepSeek trace are indeed not sorted."""
    assert codes(real_trace(name)) == expected


def test_duplicate_positions(good: Callable[..., Trace]) -> None:
    """Two tokens at positions that others have: each is one duplicate and leaves one gap, the
    gap after position 2 and the missing last position, which is none."""
    positions = good().positions.copy()
    positions[3] = 2
    positions[TOKENS - 1] = 0
    found = codes(good(positions=positions))
    assert found == {"duplicate-position": ("error", 2), "position-gap": ("warning", 1)}


def test_gaps_and_late_starts(good: Callable[..., Trace]) -> None:
    positions = good().positions.copy()
    positions[60:110] += 100
    positions[80:110] += 1
    found = codes(good(positions=positions))
    assert found == {"position-gap": ("warning", 1), "late-start": ("warning", 1)}
    decode = np.ones(TOKENS, np.uint8)
    assert codes(good(positions=positions + 7, phases=decode)) == {"position-gap": ("warning", 1)}


def test_order_of_rows_does_not_matter(good: Callable[..., Trace]) -> None:
    shuffled = good().take(np.random.default_rng(0).permutation(TOKENS))
    assert codes(shuffled) == {}


def test_prefill_after_decode(good: Callable[..., Trace]) -> None:
    phases = np.zeros(TOKENS, np.uint8)
    phases[40:50] = 1
    phases[105:] = 1
    phases[110:] = 0
    assert codes(good(phases=phases)) == {"phase-order": ("warning", 1)}


def test_a_request_in_two_domains(good: Callable[..., Trace]) -> None:
    domains = np.zeros(TOKENS, np.int16)
    domains[30:60] = 1
    assert codes(good(domain_ids=domains)) == {"mixed-domains": ("warning", 1)}


def test_one_request_cannot_be_held_out(good: Callable[..., Trace]) -> None:
    found = codes(good(lengths=(180,)))
    assert found == {"one-request": ("warning", 1)}


def test_warm_up_rows(good: Callable[..., Trace]) -> None:
    ids = good().expert_ids.copy()
    ids[10 : 10 + MIN_RUN] = ids[10]
    assert codes(good(expert_ids=ids)) == {"warm-up": ("warning", MIN_RUN)}
    ids[:] = ids[0]
    found = codes(good(expert_ids=ids))
    assert found["warm-up"] == ("error", TOKENS)
    assert found["constant-layer"] == ("error", 3)


def test_constant_and_equal_layers(good: Callable[..., Trace]) -> None:
    """Layer 3 repeats layer 2 in another order; then layer 1 is the same for all tokens."""
    ids = good().expert_ids.copy()
    ids[:, 2] = ids[:, 1, ::-1]
    assert codes(good(expert_ids=ids)) == {"equal-layers": ("error", 1)}
    ids[:, 0] = (4, 6)
    ids[::2, 0] = (6, 4)
    found = codes(good(expert_ids=ids))
    assert found["constant-layer"] == ("error", 1)
    assert found["unused-experts"] == ("warning", 6)


def test_all_experts_chosen_is_no_constant_layer(good: Callable[..., Trace]) -> None:
    assert codes(good(experts=3, top_k=3)) == {}


def test_missing_experts(good: Callable[..., Trace]) -> None:
    ids = good(gate_weights=None).expert_ids.astype(np.int16)
    ids[5:9] = -1
    ids[20, 1] = -1
    assert codes(good(expert_ids=ids, gate_weights=None)) == {"no-experts": ("warning", 4)}
    gates = good().gate_weights
    found = codes(good(expert_ids=ids, gate_weights=gates))
    assert found["stray-gates"] == ("warning", 4 * 3 * 2 + 2)


def test_gate_weights(good: Callable[..., Trace]) -> None:
    gates = good().gate_weights
    assert gates is not None
    for change, expected in (
        (lambda g: g.__setitem__((3, 1), (-0.1, -0.2)), {"negative-gates": ("error", 2)}),
        (lambda g: g.__setitem__((3, 1), (0, 0)), {"zero-gates": ("warning", 1)}),
        (lambda g: g.__setitem__((3, 1), (2.0, 0.5)), {"large-gates": ("warning", 1)}),
        (lambda g: g.__setitem__((3, 1), (0.3, 0.7)), {"unordered-gates": ("warning", 1)}),
        (lambda g: g.__imul__(2.5), {}),
    ):
        changed = gates.copy()
        change(changed)
        assert codes(good(gate_weights=changed)) == expected


def test_an_empty_trace(good: Callable[..., Trace]) -> None:
    assert codes(good().take(slice(0, 0))) == {"empty": ("error", 1)}


def test_chunks_do_not_show(good: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch) -> None:
    ids = good().expert_ids.copy()
    ids[:, 2] = ids[:, 1]
    ids[:, 0] = (4, 6)
    trace = good(expert_ids=ids)
    whole = check_trace(trace)
    monkeypatch.setattr(counts_module, "_CHUNK_IDS", 42)
    seen: list[tuple[int, int]] = []
    assert check_trace(trace, lambda *at: seen.append(at)) == whole
    assert seen[-1] == (TOKENS, TOKENS)
    assert len(seen) == -(-TOKENS // 7)


def test_load_traces() -> None:
    meta = TraceMeta("m", 4, 2, (0, 1))
    good = np.array([[[5, 5, 6, 4], [1, 9, 9, 1]]] * 3, np.int64)
    assert codes(LoadTrace(good, meta)) == {}
    idle = good.copy()
    idle[1] = 0
    assert codes(LoadTrace(idle, meta)) == {"idle-steps": ("warning", 1)}
    assert codes(LoadTrace(idle * 0, meta)) == {"empty": ("error", 3)}
    uneven = good.copy()
    uneven[2, 1, 0] = 0
    assert codes(LoadTrace(uneven, meta)) == {"uneven-layers": ("warning", 1)}
    warm = good.copy()
    warm[0] = 0
    warm[0, :, :2] = 50
    assert codes(LoadTrace(warm, meta)) == {"warm-up": ("warning", 1)}
    unused = good.copy()
    unused[:, 0] = (10, 10, 0, 0)
    assert codes(LoadTrace(unused, meta)) == {"unused-experts": ("warning", 2)}
