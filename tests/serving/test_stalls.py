"""Placements made anew stop an engine: what that does to latencies."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from moesim.cluster import load_cluster
from moesim.errors import InputError
from moesim.model.names import load_model
from moesim.serving.config import Stall
from moesim.serving.deployment import deploy
from moesim.serving.requests import Requests
from moesim.serving.stall import stalls_of

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
    """One number is for both; two need engines apart; numbers come in pairs or without ms."""
    model, cluster = load_model("DeepSeek-V2-Lite"), load_cluster("h100-sxm-ib", num_gpus=8)
    engine = deploy(model, cluster, tp=1, dp=8)
    assert stalls_of([3000], [910.0], [engine] * 2) == (Stall(3000, 910e3),) * 2
    assert stalls_of([1000, 3000], [910.0, 400.0], [engine] * 2) == (
        Stall(1000, 910e3),
        Stall(3000, 400e3),
    )
    for every, ms in (([], [5.0]), ([1, 2], [1.0, 2.0]), ([1], [1.0, 2.0])):
        with pytest.raises(InputError, match="rebalance_every"):
            stalls_of(every, ms, [engine])
    with pytest.raises(InputError, match="every 0 steps"):
        Stall(0, 1.0)


def test_a_stall_that_is_not_given() -> None:
    """vLLM pull request 28369: 260 ms for 26 layers of DeepSeek-V2-Lite on 8 H100s, 10 of plan and
    26 x 9 of host; ours has the weights of 7 of 8 slots of each layer beside. Where experts are not
    one set over all GPUs, it has to be given."""
    model, cluster = load_model("DeepSeek-V2-Lite"), load_cluster("h100-sxm-ib", num_gpus=8)
    (stall,) = stalls_of([3000], [], [deploy(model, cluster, tp=1, dp=8)])
    assert 244e3 < stall.us < 275e3
    assert "28369" in stall.source
    with pytest.raises(InputError, match="rebalance_stall"):
        stalls_of([3000], [], [deploy(model, cluster, tp=4, dp=2, ep=2)])
