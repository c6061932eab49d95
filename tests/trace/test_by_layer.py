"""Statistics layer by layer, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import MismatchError
from moesim.trace.by_layer import by_layer, kept_choices, missing_by_position
from moesim.trace.format import Trace, TraceMeta


def toy() -> Trace:
    """Two requests of ten tokens, one a domain; two layers of four experts, one choice. In layer 0
    request r chooses expert r alone; in layer 1 both choose experts 0 to 3 in turn."""
    count = np.arange(20)
    ids = np.stack([count // 10, count % 4], axis=1)[:, :, None]
    return Trace(
        expert_ids=ids.astype(np.int16),
        request_ids=(count // 10).astype(np.int32),
        positions=(count % 10).astype(np.int32),
        phases=np.zeros(20, np.uint8),
        meta=TraceMeta("toy", 4, 1, (3, 7), domains=("a", "b")),
        domain_ids=(count // 10).astype(np.int16),
    )


def test_balance_by_how_much_is_looked_at() -> None:
    """Layer 0: a request loads one expert of four, 4 over the mean; both load two, 20 of 20 tokens
    on two experts: 10 over 5. Layer 1: ten tokens in turn are 3, 3, 2, 2 (3 over 2.5), twenty are
    5 each for request 0's order 0, 1, .. twice: 5, 5, 5, 5."""
    found = by_layer(toy())
    assert found.layer_ids == (3, 7)
    np.testing.assert_allclose(found.whole, [2.0, 1.0])
    np.testing.assert_allclose(found.sequence[0], 4.0)
    assert 1.0 < found.sequence[1] <= 1.2
    assert found.missing is None
    assert found.other is None


def test_another_trace() -> None:
    """Of layer 0 nothing differs, of layer 1 half the tokens choose another expert."""
    one = toy()
    ids = np.array(one.expert_ids)
    ids[::2, 1] = (ids[::2, 1] + 1) % 4
    two = replace(one, expert_ids=ids)
    np.testing.assert_allclose(kept_choices(one, two), [1.0, 0.5])
    found = by_layer(one, two)
    assert found.other is not None
    assert found.other[0] == 0 < found.other[1]
    shorter = by_layer(one, one.take(np.arange(10)))
    assert shorter.kept is None
    other = replace(one, meta=replace(one.meta, layer_ids=(3, 8)))
    with pytest.raises(MismatchError, match="other layers"):
        by_layer(one, other)


def test_drops_by_position() -> None:
    """Each token is a tenth of its request; the last token of both loses layer 0 of its two
    choices: half of the last tenth's."""
    ids = np.array(toy().expert_ids)
    ids[[9, 19], 0] = -1
    missing = missing_by_position(replace(toy(), expert_ids=ids))
    assert missing is not None
    np.testing.assert_allclose(missing, [0] * 9 + [0.5])
