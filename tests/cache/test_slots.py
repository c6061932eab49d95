"""Slots a layer: dynamic programming against brute force and AdapMoE's published instance."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.caching.slots import allocate_slots
from moesim.errors import InfeasibleError, InputError


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 9), least=st.integers(0, 1))
def test_equals_enumeration(seed: int, budget: int, least: int) -> None:
    cost = np.random.default_rng(seed).integers(0, 20, (3, 4)).astype(float)
    if 3 * least > budget:
        with pytest.raises(InfeasibleError):
            allocate_slots(cost, budget, least)
        return
    slots, total = allocate_slots(cost, budget, least)
    every = [
        sum(cost[layer, c] for layer, c in enumerate(choice))
        for choice in product(range(least, 4), repeat=3)
        if sum(choice) <= budget
    ]
    assert total == min(every)
    assert slots.sum() <= budget
    assert total == sum(cost[layer, c] for layer, c in enumerate(slots))


ACCURACY = np.array([
    0.0, 0.5663, 0.7211, 0.7891, 0.8656, 0.8588, 0.8299, 0.8401, 0.8486, 0.801, 0.898, 0.898,
    0.8929, 0.9099, 0.9252, 0.881, 0.915, 0.9388, 0.9048, 0.8793, 0.8759, 0.8929, 0.8793, 0.8759,
    0.8878, 0.8844, 0.9218, 0.9133, 0.8861, 0.8997, 0.9031, 0.8503,
])  # fmt: skip
SINGLE = np.array([
    0.0, 0.0348, 0.0049, 0.0009, 0.0004, 0.0025, 0.0079, 0.0341, 0.0345, 0.0491, 0.013, 0.0196,
    0.0296, 0.0055, 0.0155, 0.0284, 0.0639, 0.071, 0.1407, 0.2803, 0.2987, 0.3651, 0.4145, 0.3556,
    0.4952, 0.521, 0.5479, 0.618, 0.78, 0.884, 0.9754, 0.8577,
])  # fmt: skip
"""Mixtral-8x7B's prefetch accuracy and share of tokens gated to one expert, by layer
(github.com/PKU-SEC-Lab/AdapMoE, src/dp.py, rounded to 4 digits)."""


def adapmoe_cost(single: np.ndarray) -> np.ndarray:
    """[32, 9] expected on-demand loads of a top-2 of 8 layer with c experts cached, where a
    prefetch hides a load with the layer's accuracy a (AdapMoE, section 4.3): of one expert
    (1 - c/8)(1 - a); of two, both absent: 2 (1 - a) + a, one absent: 1 - a."""
    c = np.arange(9)
    both, one = (8 - c) * (7 - c) / 56, 2 * (8 - c) * c / 56
    rows = []
    for a, p in zip(ACCURACY, single, strict=True):
        pair = both * (2 * (1 - a) + a) + one * (1 - a)
        rows.append(p * (1 - c / 8) * (1 - a) + (1 - p) * pair)
    return np.array(rows)


@pytest.mark.parametrize(
    ("single", "budget", "expected"),
    [
        (SINGLE, 64, [8, 4] + [3] * 5 + [2] * 12 + [1] * 13),
        (0 * SINGLE, 64, [8] + [2] * 12 + [1, 1, 2, 1, 1] + [2] * 8 + [1, 1] + [2] * 4),
        (SINGLE, 128, [8, 7, 6, 6] + [5] * 14 + [4] * 3 + [3] * 3 + [2, 2] + [1] * 6),
        (0 * SINGLE, 128, [8, 5] + [4] * 12 + [3, 4, 3, 3] + [4] * 8 + [3, 3] + [4] * 4),
    ],
)
def test_adapmoe_instance(single: np.ndarray, budget: int, expected: list[int]) -> None:
    """The sizes that AdapMoE's own program gives, with and without its adaptive gating."""
    slots, _ = allocate_slots(adapmoe_cost(single), budget, least=1)
    assert slots.tolist() == expected


def test_bad_input() -> None:
    with pytest.raises(InputError, match="finite"):
        allocate_slots(np.array([[1.0, np.nan]]), 1)
    with pytest.raises(InputError):
        allocate_slots(np.zeros((0, 3)), 1)
    with pytest.raises(InputError):
        allocate_slots(np.zeros((1, 3)), 5, least=4)
