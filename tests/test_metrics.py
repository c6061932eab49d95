"""Metrics by hand and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moesim.metrics import balancedness, imbalance

loads = arrays(
    np.int64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(0, 99)
)


def test_by_hand() -> None:
    # GPUs with 6, 3, 3, 0 tokens: mean 3, max 6.
    assert imbalance(np.array([6, 3, 3, 0])) == pytest.approx(2.0)
    assert balancedness(np.array([6, 3, 3, 0])) == pytest.approx(0.5)
    # A GPU of twice the speed should take twice the load: 4 : 2 at speeds 2 : 1 is perfect.
    assert imbalance(np.array([4, 2]), np.array([2.0, 1.0])) == pytest.approx(1.0)
    # 3 : 3 at speeds 2 : 1 takes 3 on the slow one where 2 would do: 1.5.
    assert imbalance(np.array([3, 3]), np.array([2.0, 1.0])) == pytest.approx(1.5)


def test_no_load_has_no_balance() -> None:
    values = imbalance(np.array([[0, 0], [0, 4]]))
    assert np.isnan(values[0])
    assert values[1] == 2.0
    assert np.isnan(balancedness(np.zeros((2, 3, 4)))).all()


@given(loads)
def test_bounds_and_inverse(load: np.ndarray) -> None:
    """Imbalance is within 1 and the number of GPUs, and a common speed changes nothing."""
    values = imbalance(load)
    gpus = load.shape[1]
    assert values.shape == load.shape[:1]
    assert (np.isnan(values) == ~load.any(axis=1)).all()
    filled = values[~np.isnan(values)]
    assert (filled >= 1 - 1e-12).all()
    assert (filled <= gpus + 1e-9).all()
    assert balancedness(load) == pytest.approx(1 / values, nan_ok=True)
    assert imbalance(load, np.full(gpus, 0.5)) == pytest.approx(values, nan_ok=True)


@given(loads, st.randoms(use_true_random=False))
def test_relabelling_gpus_changes_nothing(load: np.ndarray, random: object) -> None:
    """INV-5."""
    order = np.random.default_rng(random.getrandbits(32)).permutation(load.shape[1])  # type: ignore[attr-defined]
    speed = np.linspace(0.5, 2, load.shape[1])
    same = pytest.approx(imbalance(load, speed), nan_ok=True)
    assert imbalance(load[:, order], speed[order]) == same
