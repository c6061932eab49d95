"""INV-12: rates of a steady service do not depend on how long it was simulated."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cluster.prices import Prices
from moesim.serving.config import ServingConfig
from moesim.serving.record import dollars
from moesim.serving.requests import Requests
from moesim.serving.slo import parse_slo
from moesim.serving.steady import FEWEST_BATCHES, find_window, mser_cut
from moesim.serving.synthetic import synthetic_requests
from moesim.types import FloatArray

RATES = ("requests_per_s", "output_tokens_per_s", "prompt_tokens_per_s")


def poisson(rate: float, count: int, prompt: int, output: int, seed: int = 0) -> Requests:
    text = f"poisson:rate={rate},requests={count},prompt={prompt},output={output}"
    return synthetic_requests(text, seed)


@settings(max_examples=6, deadline=None)
@given(st.floats(5.0, 60.0), st.integers(2, 12), st.integers(0, 50))
def test_rates_do_not_depend_on_the_length_of_the_run(
    small: ModuleType, rate: float, output: int, seed: int
) -> None:
    """At most 60 requests/s of at most 12 tokens, steps of 5 ms for a sequence: always served. The
    rates of 500, 3,000 and 20,000 requests are those offered, within four standard deviations of
    the number of requests in the window."""
    for count in (500, 3000, 20_000):
        requests = poisson(rate, count, 20, output, seed)
        result = small.serve(requests, small.tables(5000.0))
        window = result.window
        assert window.state == "steady"
        noise = 4.0 / math.sqrt(window.served)
        for name, size in zip(RATES, (1, output, 20), strict=True):
            assert result.metrics[name] == pytest.approx(rate * size, rel=noise)
        assert result.metrics["offered_requests_per_s"] == pytest.approx(rate, rel=noise)
        kept = result.goodput(parse_slo("ttft<10s"))
        assert kept["requests_per_s"] == pytest.approx(rate, rel=noise)


def test_warm_up_and_drain_are_left_out(small: ModuleType) -> None:
    """Steps of 10 ms, 500 tokens: a request takes 5 s. 600 of them at 10/s arrive until 59.9 s and
    end from 5 s to 65 s: 50 are in the service from 5 s to 59.9 s, 10 end and 5,000 tokens are made
    per second there. Over the whole run it would be 600 / 64.9 = 9.2. One H100 at $3 per hour makes
    a million tokens in 200 s: 17 cents."""
    arrivals = np.arange(600) / 10.0
    requests = Requests.of(arrivals, np.full(600, 8), np.full(600, 500))
    result = small.serve(requests, small.tables(10_000.0))
    window, metrics = result.window, result.metrics
    assert window.state == "steady"
    assert 5.0 <= window.start_s < 30.0
    assert window.end_s == pytest.approx(59.9)
    assert metrics["requests_per_s"] == pytest.approx(10.0, rel=0.01)
    assert metrics["output_tokens_per_s"] == pytest.approx(5000.0, rel=0.01)
    assert metrics["running_mean"] == pytest.approx(50.0, rel=0.01)
    assert metrics["duration_s"] == pytest.approx(64.9, rel=0.01)
    paid = dollars(small.small_deployment(), ServingConfig(), result, Prices({}))
    assert paid["cost_usd_per_hour"] == 3.0
    assert paid["cost_usd_per_million_output_tokens"] == pytest.approx(1 / 6, rel=0.01)
    mine = dollars(small.small_deployment(), ServingConfig(), result, Prices({"h100-sxm": 6.0}))
    assert mine["cost_usd_per_million_output_tokens"] == pytest.approx(2 / 6, rel=0.01)


def test_latencies_are_of_the_window_that_rates_are_of(small: ModuleType) -> None:
    """Steps of 1 ms and 0.1 ms per sequence, 100 tokens, ten requests per 100 ms: the first meet an
    empty service and are quicker than any of the steady one, whose latencies alone are taken."""
    requests = Requests.of(np.arange(6000) / 100.0, np.full(6000, 8), np.full(6000, 100))
    result = small.serve(requests, small.tables(1000.0, row_us=100.0))
    start, end = result.window.start_s, result.window.end_s
    own = (result.arrival_s > start) & (result.arrival_s <= end)
    assert start > 0
    assert result.e2e_s[~own].min() < result.e2e_s[own].min()
    assert result.metrics["e2e_p50"] == pytest.approx(float(np.median(result.e2e_s[own])))
    promised = result.promised(parse_slo("e2e_mean<1h".replace("1h", "60min")))
    assert promised["e2e_mean"] == pytest.approx(float(result.e2e_s[own].mean()))


def test_a_service_that_falls_behind_says_so(small: ModuleType) -> None:
    """Steps of 10 ms with one sequence each, 10 tokens: ten requests per second are served. With
    twelve offered the queue grows by two per second."""
    one = small.small_deployment(max_sequences=1)
    result = small.serve(poisson(12.0, 3000, 8, 10), small.tables(10_000.0), deployment=one)
    assert result.window.state == "growing"
    assert result.metrics["requests_per_s"] == pytest.approx(10.0, rel=0.02)
    assert result.metrics["offered_requests_per_s"] == pytest.approx(12.0, rel=0.08)
    assert "requests/s are offered and 10.00 served" in result.window.warning
    below = small.serve(poisson(8.0, 3000, 8, 10), small.tables(10_000.0), deployment=one)
    assert below.window.state == "steady"


def test_a_run_shorter_than_its_requests_has_no_rates(small: ModuleType) -> None:
    """100 requests within 10 s that take 50 s each: nothing ends before the last arrival."""
    requests = Requests.of(np.arange(100) / 10.0, np.full(100, 8), np.full(100, 5000))
    result = small.serve(requests, small.tables(10_000.0))
    assert result.window.state == "short"
    assert all(result.metrics[name] is None for name in RATES)
    assert "give several times as many. Latencies" in result.window.warning
    assert result.goodput(parse_slo("ttft<10s")) == {
        "share": 1.0,
        "requests_per_s": None,
        "requests_per_s_per_gpu": None,
    }
    paid = dollars(small.small_deployment(), ServingConfig(), result, Prices({}))
    assert paid == {"cost_usd_per_hour": 3.0, "cost_usd_per_million_output_tokens": None}


def test_a_log_whose_load_changes_has_means_over_its_arrivals() -> None:
    """Ten requests per second for 60 s and then forty, each 0.1 s: 3,000 in 120 s."""
    arrivals = np.concatenate([np.arange(600) / 10.0, 60.0 + np.arange(2400) / 40.0])
    tokens = np.histogram(arrivals, np.arange(0, 151) * 1.0)[0].astype(float)
    window = find_window(tokens, tokens / 10, 1.0, arrivals, arrivals + 0.1, float(arrivals[-1]))
    assert (window.state, window.start_s) == ("varying", 5.0)
    assert window.offered == 3000 - 51
    assert "means over the last 115 s of arrivals" in window.warning


@given(st.lists(st.floats(0.0, 100.0), min_size=FEWEST_BATCHES, max_size=40))
def test_mser_by_its_definition(values: list[float]) -> None:
    """The squared standard error of what is left, worked out one cut after the other."""

    def error(left: FloatArray) -> float:
        return float(((left - left.mean()) ** 2).sum() / len(left) ** 2)

    means = np.array(values)
    errors = [error(means[d:]) for d in range(len(means) - FEWEST_BATCHES // 2)]
    cut = mser_cut(means)
    least = min(errors)
    if cut is None:
        assert min(errors[: len(means) // 2 + 1]) >= least - 1e-9
    else:
        assert errors[cut] == pytest.approx(least, abs=1e-6)


def test_mser_finds_the_end_of_a_ramp() -> None:
    assert mser_cut(np.array([0.0] * 5 + [10.0] * 15)) == 5
    assert mser_cut(np.array([10.0] * 20)) == 0
    assert mser_cut(np.arange(20.0)) is None


def test_rates_of_load_tests_do_not_depend_on_their_length() -> None:
    """Twenty or two hundred waves of 16 requests: the same steady rate, while the tokens over the
    duration, ramp and drain included, differ. Prompts are not replayed as graphs: a slow ramp."""
    from moesim.serving.deployment import deploy
    from moesim.serving.engines import ENGINES
    from moesim.serving.static import LoadTest, run_load_test
    from moesim.serving.step_cost import EngineStepCost

    engine = replace(ENGINES["vllm"], graph_rows=0)
    cost = EngineStepCost(deploy("gpt-oss-20b", "h200-sxm-ib", tp=1, engine=engine))
    few, many = (
        run_load_test(cost, LoadTest(512, 64, 16, 16 * waves, range_ratio=0.5))
        for waves in (20, 200)
    )
    assert few.steady_output_tokens_per_s == pytest.approx(
        many.steady_output_tokens_per_s, rel=0.02
    )
    assert many.output_tokens_per_s == pytest.approx(many.steady_output_tokens_per_s, rel=0.02)
    short = run_load_test(cost, LoadTest(512, 64, 16, 48, range_ratio=0.5))
    assert short.has_middle
    off = [
        abs(rate / many.steady_output_tokens_per_s - 1)
        for rate in (short.steady_output_tokens_per_s, short.output_tokens_per_s)
    ]
    assert off[0] < 0.05 < off[1]
    assert not run_load_test(cost, LoadTest(512, 64, 16, 16)).has_middle
