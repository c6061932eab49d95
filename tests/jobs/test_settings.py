"""Settings of a simulated run: what differs from the default, and how it is written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moesim.cluster import load_cluster
from moesim.jobs.simulate_request import SimRequest
from moesim.sim.capacity import DropPolicy
from moesim.sim.rebalance import Rebalance
from moesim.sim.stragglers import SlowWindow, parse_slow


def request(**more: Any) -> SimRequest:
    empty: Any = SimpleNamespace()
    return SimRequest(empty, load_cluster("h100-sxm-ib", num_gpus=8), empty, **more)


def test_defaults_are_no_settings() -> None:
    assert request().settings() == {}


@pytest.mark.parametrize("text", ["3=0.8", "3=0.5@10-20", "0=0.25@0-5"])
def test_slow_gpus_are_written_as_they_are_read(text: str) -> None:
    found = request(slow=(parse_slow(text, 8),)).settings()
    assert found == {"slow": text}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"schedule": "chunked", "num_chunks": 4}, {"schedule": "chunked", "chunks": "4"}),
        ({"fidelity": "analytic"}, {"fidelity": "analytic"}),
        ({"home_ranks": False}, {"parts": "MoE layers only"}),
        ({"network_scale": 2.0}, {"network": "2 times as fast"}),
        ({"drop": DropPolicy(1.25)}, {"capacity factor": "1.25 (score)"}),
        ({"rebalance": Rebalance(100)}, {"rebalance": "every 100 steps, eplb"}),
        ({"speed_sigma": 0.1, "speed_period_us": 5e3}, {"speed spread": "0.1 every 5 ms"}),
        ({"replica_policy": "nearest"}, {"replica policy": "nearest"}),
        ({"context_tokens": 2048}, {"context": "2048 tokens"}),
        ({"slow": (SlowWindow(1, 0.5), SlowWindow(2, 0.9))}, {"slow": "1=0.5, 2=0.9"}),
    ],
)
def test_every_setting_that_changes_a_result_is_said(
    more: dict[str, Any], said: dict[str, str]
) -> None:
    assert request(**more).settings() == said
