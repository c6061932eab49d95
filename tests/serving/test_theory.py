"""One rank that serves one request at a time is a queue with known waiting times."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from moesim.serving.requests import Requests

COUNT = 200_000


def poisson(load: float, service_s: float, seed: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(service_s / load, COUNT))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_m_d_1(small: ModuleType, load: float) -> None:
    """Prompts of one token and outputs of one: every request is one step of 1 ms. Mean wait by
    Pollaczek and Khinchine: rho s / (2 (1 - rho)): 0.5 and 2 ms."""
    requests = Requests.of(poisson(load, 1e-3, 1), np.ones(COUNT), np.ones(COUNT))
    result = small.serve(
        requests, small.tables(1000.0), deployment=small.small_deployment(max_sequences=1)
    )
    wait_s = float((result.start_s - result.arrival_s).mean())
    assert wait_s == pytest.approx({0.5: 0.5e-3, 0.8: 2e-3}[load], rel=0.04)
    assert result.metrics["gpu_utilisation"] == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_m_m_1(small: ModuleType, load: float) -> None:
    """Exponential service: prompts of geometric length, mean 1000 rows of 1 us each. Mean wait
    rho s / (1 - rho): 1 and 4 ms."""
    prompt = np.random.default_rng(2).geometric(1e-3, COUNT)
    requests = Requests.of(poisson(load, 1e-3, 1), prompt, np.ones(COUNT))
    result = small.serve(
        requests,
        small.tables(0.0, row_us=1.0),
        deployment=small.small_deployment(max_sequences=1, max_batch_tokens=1 << 20),
    )
    wait_s = float((result.start_s - result.arrival_s).mean())
    assert wait_s == pytest.approx({0.5: 1e-3, 0.8: 4e-3}[load], rel=0.05)


def test_m_d_2(small: ModuleType) -> None:
    """Two replicas behind the router that sends to the one with fewest requests, against the
    recursion of Kiefer and Wolfowitz for two servers and one queue: with equal service times the
    two are the same, wait by wait."""
    arrival = np.cumsum(np.random.default_rng(5).exponential(1e-3 / 1.6, 20_000))
    requests = Requests.of(arrival, np.ones(len(arrival)), np.ones(len(arrival)))
    result = small.serve(
        requests,
        small.tables(1000.0),
        deployment=small.small_deployment(max_sequences=1),
        replicas=2,
        router="least_loaded",
    )
    expected, free = [], [0.0, 0.0]
    for time in requests.arrival_s.tolist():
        start = max(time, min(free))
        free[free.index(min(free))] = start + 1e-3
        expected.append(start - time)
    np.testing.assert_allclose(result.start_s - result.arrival_s, expected, atol=1e-9)
    assert np.mean(expected) > 0.5e-3
