"""Routers that decide together: how much of a layer's choice the next one follows."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.trace.synth import generate
from moesim.trace.synth_routers import decide_together
from moesim.trace.synth_shape import design
from moesim.trace.synth_spec import SynthSpec

TOKENS = 3000


@pytest.fixture(scope="module")
def own() -> SynthSpec:
    return design(range(3), 8, 2, seed=3, prompt_tokens=64)


@pytest.mark.parametrize("asked", [0.7, 1.0])
def test_shared_routers_choose_the_same_numbers(own: SynthSpec, asked: float) -> None:
    """Of two experts of a token as many are chosen again as was asked for; at 1 all of them."""
    ids = generate(decide_together(own, "shared", asked, 3), TOKENS, seed=5).expert_ids
    again = (ids[:, :-1, :, None] == ids[:, 1:, None, :]).any(axis=3).mean()
    assert again == pytest.approx(asked, abs=0.03)
    if asked == 1.0:
        assert np.array_equal(np.sort(ids[:, 0]), np.sort(ids[:, 2]))


def test_linked_routers_choose_successors_of_other_numbers(own: SynthSpec) -> None:
    """At 1 an expert has one successor throughout, and no two have the same."""
    ids = generate(decide_together(own, "linked", 1.0, 3), TOKENS, seed=5).expert_ids
    sets: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for a, b in zip(np.sort(ids[:, 0]).tolist(), np.sort(ids[:, 1]).tolist(), strict=True):
        sets.setdefault(tuple(a), set()).add(tuple(b))
    assert all(len(found) == 1 for found in sets.values())
    assert len({next(iter(found)) for found in sets.values()}) == len(sets)
    assert not np.array_equal(np.sort(ids[:, 0]), np.sort(ids[:, 1]))


def test_what_cannot_be(own: SynthSpec) -> None:
    with pytest.raises(InputError, match="token types alone"):
        decide_together(own, "shared", 0.01, 3)
    with pytest.raises(InputError, match="one layer"):
        decide_together(design(range(1), 8, 2, prompt_tokens=64), "linked", 1.0, 3)
    with pytest.raises(InputError, match="affinity"):
        design(range(2), 8, 2, affinity=1.0)
