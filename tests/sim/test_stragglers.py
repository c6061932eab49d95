"""Slow GPUs: fixed, for a while, drawn, changing; what it does to a step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.sim.event import run_event
from moesim.sim.schedules.sequential import Sequential
from moesim.sim.stragglers import GpuSpeeds, SlowWindow, parse_slow


def test_a_window_by_hand() -> None:
    """GPU 0 at half speed from 4 to 10. Work of 8 from time 0: 4 done by 4, 3 more by 10 at half
    speed, the last 1 at full speed: 11. From 10 on it takes 8, and GPU 1 always takes 8."""
    speeds = GpuSpeeds(2, (SlowWindow(0, 0.5, 4, 10),))
    assert speeds.end_us(0, 0, 8) == 11
    assert speeds.end_us(0, 10, 8) == 18
    assert speeds.end_us(1, 0, 8) == 8


def test_windows_multiply() -> None:
    """Half of half speed from 2 to 4: 2 + 0.5 done by 4, then 1.5 left at half speed: 7."""
    speeds = GpuSpeeds(1, (SlowWindow(0, 0.5), SlowWindow(0, 0.5, 2, 4)))
    assert speeds.end_us(0, 0, 3.0) == pytest.approx(7.0)


def test_drawn_once_or_anew() -> None:
    once = GpuSpeeds(64, sigma=0.2, seed=3)
    assert once.speed(5, 0) == once.speed(5, 1e9)
    drawn = np.log([once.speed(g, 0) for g in range(64)])
    assert abs(drawn.std() - 0.2) < 0.06
    anew = GpuSpeeds(64, sigma=0.2, period_us=10, seed=3)
    assert anew.speed(5, 0) == anew.speed(5, 9.9)
    assert anew.speed(5, 0) != anew.speed(5, 10)
    by_parts = 10 * anew.speed(5, 0) + 4 * anew.speed(5, 10)
    assert anew.end_us(5, 0, by_parts) == pytest.approx(14)


def test_same_seed_same_speeds() -> None:
    """INV-6, whatever the order in which speeds are asked for."""
    a, b = (GpuSpeeds(4, sigma=0.1, period_us=7, seed=1) for _ in range(2))
    late = b.speed(2, 700)
    assert a.speed(2, 0) == b.speed(2, 0)
    assert a.speed(2, 700) == late


def test_a_gpu_at_half_speed_everywhere(trace, batches, models_of, linear_of) -> None:
    """The window's factor is the cluster's speed factor, launch included; the step is slower and
    no part of it faster (INV-9), and the slow GPU is the last of every layer."""
    models = models_of(8)
    placement = linear_of(models)
    normal = run_event(models, Sequential(), trace, batches, placement)
    slow = run_event(
        models, Sequential(), trace, batches, placement, speed=GpuSpeeds(8, (SlowWindow(3, 0.5),))
    )
    assert (slow.step_us > normal.step_us).all()
    assert slow.parts_us.sum() > normal.parts_us.sum()
    assert slow.extra["stragglers"]["last_share"][3] == 1.0
    tokens = normal.extra["stragglers"]["token_waiting_us"]
    assert slow.extra["stragglers"]["token_waiting_us"] == tokens
    assert tokens <= normal.waiting_us.mean() + 1e-9


def test_unit_factor_changes_nothing(trace, batches, models_of, linear_of) -> None:
    models = models_of(8)
    placement = linear_of(models)
    normal = run_event(models, Sequential(), trace, batches, placement)
    same = run_event(
        models, Sequential(), trace, batches, placement, speed=GpuSpeeds(8, (SlowWindow(3, 1.0),))
    )
    np.testing.assert_allclose(same.step_us, normal.step_us, rtol=1e-12)


def test_parse() -> None:
    assert parse_slow("3=0.5", 8) == SlowWindow(3, 0.5, 0.0, math.inf)
    assert parse_slow("3=0.5@10-20", 8) == SlowWindow(3, 0.5, 1e4, 2e4)
    assert parse_slow("3=0.5@10-", 8) == SlowWindow(3, 0.5, 1e4, math.inf)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "x=1",
        "3=",
        "3=0",
        "3=-1",
        "3=nan",
        "3=inf",
        "9=0.5",
        "3=0.5@",
        "3=0.5@5",
        "3=1@9-2",
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InputError):
        parse_slow(text, 8)


@pytest.mark.parametrize(("sigma", "period"), [(-1, 1), (math.nan, 1), (3, 1), (0.1, 0)])
def test_refused_spreads(sigma: float, period: float) -> None:
    with pytest.raises(InputError):
        GpuSpeeds(2, sigma=sigma, period_us=period)
