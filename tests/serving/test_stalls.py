"""Placements made anew stop an engine: what that does to latencies."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.jobs.serve import _stalls
from moesim.serving.config import Stall
from moesim.serving.requests import Requests

STEP = {"step_us": 1000.0, "row_us": 0.0, "context_us": 0.0, "pair_us": 0.0, "moe_us": 0.0}


def test_a_stall_by_hand(small: ModuleType) -> None:
    """One request of 8 output tokens in steps of 1 ms: the first token after 1 ms, the last after
    8. With 5 ms after every third step, two of the eight are later: 18 ms."""
    requests = Requests.of(np.zeros(1), np.array([10]), np.array([8]))
    plain = small.serve(requests, small.tables(**STEP))
    stalled = small.serve(requests, small.tables(**STEP), stalls=(Stall(3, 5000.0),))
    assert plain.finish_s[0] - plain.start_s[0] == pytest.approx(0.008)
    assert stalled.finish_s[0] - stalled.start_s[0] == pytest.approx(0.018)
    assert stalled.first_token_s[0] == plain.first_token_s[0]


def test_stalls_of_prompt_and_decoding_engines() -> None:
    """One number is for both; two need engines apart; numbers come in pairs."""
    assert _stalls([3000], [910.0], apart=True) == (Stall(3000, 910e3),) * 2
    assert _stalls([1000, 3000], [910.0, 400.0], apart=True) == (
        Stall(1000, 910e3),
        Stall(3000, 400e3),
    )
    for every, ms, apart in (([3000], [], False), ([1, 2], [1.0, 2.0], False)):
        with pytest.raises(InputError, match="rebalance_every"):
            _stalls(every, ms, apart=apart)
    with pytest.raises(InputError, match="every 0 steps"):
        Stall(0, 1.0)
