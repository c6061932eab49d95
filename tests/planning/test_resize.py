"""Wider and narrower groups of GPUs with the fewest experts moved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError, MismatchError
from moesim.placement import Placement
from moesim.planning.resize import least_moves, resize


def linear(experts: int, gpus: int, layers: int = 1) -> Placement:
    return Placement(np.tile(np.arange(experts, dtype=np.int32), (layers, 1)), gpus, 1, experts)


def moved(old: Placement, new: Placement) -> int:
    """Experts that a GPU of `new` holds and did not hold before."""
    before = old.physical_to_logical.reshape(old.num_layers, old.num_gpus, -1)
    after = new.physical_to_logical.reshape(new.num_layers, new.num_gpus, -1)
    return sum(
        len(set(after[x, g]) - (set(before[x, g]) if g < old.num_gpus else set()))
        for x in range(old.num_layers)
        for g in range(new.num_gpus)
    )


def test_wider_by_hand() -> None:
    """Experts of 8, 2, 4, 4, 1, 1, 2, 2 tokens on two GPUs, to four: an even share is 6. GPU 0 has
    18 and gives two away: the nearest to 12 / 2, expert 0 (8), then the nearest to 4, expert 2.
    GPU 1 has 6 and gives two near 0: 4 and 5. Expert 0 goes to GPU 2, 2 to GPU 3, then 4 to the
    lighter, GPU 3, which is full with it, and 5 to GPU 2."""
    old = linear(8, 2)
    load = np.array([[8.0, 2, 4, 4, 1, 1, 2, 2]])
    new = resize(old, load, 4, 1)
    assert new.physical_to_logical.reshape(4, 2).tolist() == [[1, 3], [6, 7], [0, 5], [2, 4]]
    assert moved(old, new) == least_moves(old, 4) == 4


def test_narrower_by_hand() -> None:
    """Four GPUs to two: experts of the two that go, heaviest first to the lighter that stays."""
    old = linear(8, 4)
    load = np.array([[1.0, 1, 2, 2, 5, 1, 1, 1]])
    new = resize(old, load, 2, 1)
    assert new.physical_to_logical.reshape(2, 4).tolist() == [[0, 1, 4, 7], [2, 3, 5, 6]]
    assert moved(old, new) == least_moves(old, 2) == 4


@given(
    st.integers(0, 1000), st.sampled_from([(2, 4), (4, 2), (3, 6), (6, 3), (2, 6), (6, 2), (4, 6)])
)
def test_never_more_moves_than_needed(seed: int, widths: tuple[int, int]) -> None:
    load = np.random.default_rng(seed).integers(0, 50, (3, 12)).astype(float)
    old = linear(12, widths[0], 3)
    new = resize(old, load, widths[1], 1)
    assert moved(old, new) == least_moves(old, widths[1])
    assert resize(old, load, widths[0], 1).physical_to_logical.tolist() == (
        old.physical_to_logical.tolist()
    )


def test_sizes_that_do_not_go() -> None:
    with pytest.raises(InputError, match="12 experts do not divide over 5"):
        resize(linear(12, 4), np.ones((1, 12)), 5, 1)
    with pytest.raises(MismatchError, match="loads"):
        resize(linear(12, 4), np.ones((2, 12)), 6, 1)
    double = Placement(np.array([[0, 1, 0, 1]], np.int32), 2, 1, 2)
    with pytest.raises(MismatchError, match="one slot each"):
        resize(double, np.ones((1, 2)), 1, 1)
