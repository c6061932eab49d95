"""Measures on counts, against arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moesim.trace.kernels import count_pairs
from moesim.trace.measures import (
    affinity,
    co_activation,
    domain_loads,
    drift,
    entropy_bits,
    jensen_shannon,
    skew,
)


def test_skew_by_hand() -> None:
    """Load 4, 2, 1, 1: mean 2, variance (4 + 0 + 1 + 1) / 4 = 1.5.
    Gini: sorted 1, 1, 2, 4 with weights -3, -1, 1, 3 gives 10, over 4^2 x 2 = 32.
    Entropy of 1/2, 1/4, 1/8, 1/8 is 1.75 bits of 2."""
    found = skew(np.array([[4, 2, 1, 1]]))
    assert found.max_over_mean[0] == 2
    assert found.cv[0] == pytest.approx(1.5**0.5 / 2)
    assert found.gini[0] == pytest.approx(10 / 32)
    assert found.entropy[0] == pytest.approx(1.75 / 2)
    assert found.num_unused[0] == 0


def test_skew_at_its_ends() -> None:
    """Balanced, all on one of 4 experts (Gini 3/4), and no load at all."""
    found = skew(np.array([[5, 5, 5, 5], [0, 8, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_allclose(found.max_over_mean, [1, 4, 1])
    np.testing.assert_allclose(found.cv, [0, 3**0.5, 0])
    np.testing.assert_allclose(found.gini, [0, 0.75, 0])
    np.testing.assert_allclose(found.entropy, [1, 0, 1])
    np.testing.assert_array_equal(found.num_unused, [0, 3, 4])
    assert skew(np.array([[7]])).entropy[0] == 1


@settings(max_examples=60)
@given(hnp.arrays(np.int64, (3, 7), elements=st.integers(0, 1000)))
def test_skew_does_not_depend_on_scale_or_order(load: np.ndarray) -> None:
    a, b = skew(load), skew(load[:, ::-1] * 3)
    for name in ("max_over_mean", "cv", "gini", "entropy"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-12)
    assert (a.gini >= -1e-12).all()
    assert (a.entropy <= 1 + 1e-12).all()


def joint(ids: np.ndarray, num_experts: int) -> np.ndarray:
    num_layers = ids.shape[1]
    out = np.zeros((num_layers - 1, num_experts, num_experts), np.int64)
    count_pairs(ids, out, np.zeros((0, num_experts, num_experts), np.int64))
    return out


def test_affinity_of_blocks_is_the_ceiling() -> None:
    """Four experts, always {0, 1} then {2, 3}, or {2, 3} then {0, 1}: a choice tells which of two
    blocks, so 1 bit = log2(4 / 2), and no routing of two out of four could tell more."""
    ids = np.array([[[0, 1], [2, 3]], [[2, 3], [0, 1]]] * 500, np.uint8)
    found = affinity(joint(ids, 4), len(ids), 2)
    assert found.plug_in[0] == pytest.approx(1)
    assert found.ceiling[0] == pytest.approx(1)
    bias = 2 * 2 / (2 * 1000 * 4 * np.log(2))
    assert found.bits[0] == pytest.approx(1 - bias)
    assert found.normalised[0] == pytest.approx(1 - bias)


def test_affinity_by_hand_for_top_1() -> None:
    """Joint counts 3, 1, 1, 3 of two experts: 1 bit each, 1.811 bits together (3/8, 1/8 twice),
    so 0.189 bits; Miller and Madow take off (2 - 1)^2 / (2 x 8 ln 2)."""
    found = affinity(np.array([[[3, 1], [1, 3]]]), 8, 1)
    together = -2 * (3 / 8 * np.log2(3 / 8) + 1 / 8 * np.log2(1 / 8))
    assert found.plug_in[0] == pytest.approx(2 - together)
    assert found.bits[0] == pytest.approx(2 - together - 1 / (16 * np.log(2)))


@pytest.mark.parametrize("top_k", [1, 4, 12])
def test_affinity_of_independent_layers_is_nil(top_k: int) -> None:
    """The correction takes off what chance alone shows: over 6 layers the mean plug-in estimate
    is (E - K)^2 / (2 T K^2 ln 2) within 10%, and the corrected one is a tenth of it at most.
    The textbook's (E - 1)^2 would be off by 22% for K = 4 and by 2.4 times for K = 12."""
    num_experts, num_tokens = 32, 20_000
    rng = np.random.default_rng(5)
    order = rng.random((num_tokens, 7, num_experts)).argsort(axis=2)
    ids = order[:, :, :top_k].astype(np.uint8)
    found = affinity(joint(ids, num_experts), num_tokens, top_k)
    expected = (num_experts - top_k) ** 2 / (2 * num_tokens * top_k**2 * np.log(2))
    assert found.plug_in.mean() == pytest.approx(expected, rel=0.1)
    assert found.bits.mean() < 0.1 * expected


def test_affinity_without_choices_or_freedom() -> None:
    """No counts; and all experts chosen always, where there is nothing to know."""
    assert affinity(np.zeros((1, 4, 4)), 0, 2).bits[0] == 0
    full = affinity(np.full((1, 4, 4), 50), 50, 4)
    assert full.bits[0] == pytest.approx(0, abs=1e-12)
    assert full.ceiling[0] == pytest.approx(0, abs=1e-12)
    assert full.normalised[0] == 0


def test_lift_by_hand() -> None:
    """Pairs 01 twice, 02 and 12 once: loads 3, 3, 2. Expected in proportion 9 : 6 : 6, that is
    12/7, 8/7, 8/7 of 4; lifts 7/6, 7/8, 7/8, mean over pairs (2 x 7/6 + 2 x 7/8) / 4."""
    within = np.zeros((1, 3, 3), np.int64)
    within[0, 0, 1], within[0, 0, 2], within[0, 1, 2] = 20, 10, 10
    found = co_activation(within, np.array([[30, 30, 20]]), 40)
    assert found.mean_lift[0] == pytest.approx((2 * 7 / 6 + 2 * 7 / 8) / 4)
    assert [(p.first, p.second, p.count) for p in found.top] == [(0, 1, 20), (0, 2, 10), (1, 2, 10)]
    assert found.top[0].lift == pytest.approx(7 / 6)


def test_rare_pairs_are_not_ranked() -> None:
    """Nine tokens are fewer than ten: their pair cannot be told from chance."""
    within = np.zeros((1, 4, 4), np.int64)
    within[0, 0, 1], within[0, 2, 3] = 9, 500
    found = co_activation(within, np.array([[9, 9, 500, 500]]), 509)
    assert [(p.first, p.second) for p in found.top] == [(2, 3)]


def test_jensen_shannon_by_hand() -> None:
    """Apart: 1 bit. Alike in other amounts: 0. (1, 0) and (1/2, 1/2): the entropy of their mean
    (3/4, 1/4) is 0.811 bits, less half of 1."""
    p, q = np.array([[4, 0], [1, 3], [8, 0]]), np.array([[0, 9], [10, 30], [5, 5]])
    middle = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) - 0.5
    np.testing.assert_allclose(jensen_shannon(p, q), [1, 0, middle], atol=1e-12)
    assert np.isnan(jensen_shannon(np.array([0, 0]), np.array([1, 1])))


@settings(max_examples=60)
@given(hnp.arrays(np.int64, (2, 4, 6), elements=st.integers(0, 50)))
def test_jensen_shannon_is_symmetric_and_at_most_a_bit(counts: np.ndarray) -> None:
    a, b = jensen_shannon(counts[0], counts[1]), jensen_shannon(counts[1], counts[0])
    np.testing.assert_allclose(a, b, atol=1e-12)
    assert ((a >= 0) & (a <= 1 + 1e-12))[np.isfinite(a)].all()


def test_entropy_of_counts() -> None:
    np.testing.assert_allclose(entropy_bits(np.array([[1, 1, 1, 1], [0, 0, 9, 0]])), [2, 0])
    assert entropy_bits(np.zeros(3)) == 0


def windows(change: float) -> np.ndarray:
    """[16, 2, 1, 20] counts of 4,000 choices each, the preference moving by `change` a window."""
    rng = np.random.default_rng(1)
    start, end = rng.dirichlet(np.ones(20)), rng.dirichlet(np.ones(20))
    out = np.empty((16, 2, 1, 20), np.int64)
    for w in range(16):
        p = (1 - change * w) * start + change * w * end
        for half in range(2):
            out[w, half, 0] = rng.multinomial(4000, p)
    return out


def test_drift_is_the_noise_without_a_change_and_above_it_with_one() -> None:
    still, moving = drift(windows(0.0)), drift(windows(1 / 15))
    assert still.ratio == pytest.approx(1, abs=0.25)
    assert still.ends == pytest.approx(still.within, rel=0.8)
    assert moving.ratio is not None
    assert moving.ratio > 1.5
    assert moving.ends is not None
    assert moving.successive is not None
    assert moving.ends > 10 * moving.successive


def test_drift_that_cannot_be_told() -> None:
    """One window; and windows whose second half is empty."""
    one = drift(windows(0.0)[:1])
    assert one.successive is None
    assert one.ratio is None
    empty = windows(0.0)
    empty[:, 1] = 0
    assert drift(empty) == type(one)(16, None, None, None, None)


def test_domains_by_hand() -> None:
    """Two domains on experts of their own are 1 bit apart, and alike within; the third is empty."""
    counts = np.zeros((3, 2, 1, 2), np.int64)
    counts[0, :, 0, 0] = 10
    counts[1, :, 0, 1] = 30
    found = domain_loads(counts, np.array([20, 60, 0]), ("a", "b", "c"))
    assert [(d.name, d.num_tokens, d.divergence, d.noise) for d in found] == [
        ("a", 20, 1.0, 0.0),
        ("b", 60, 1.0, 0.0),
    ]
