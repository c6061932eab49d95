"""Simulated steps: where the time goes, how it varies, how busy GPUs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moesim.draw.axes import Axes
from moesim.draw.charts import Bar, Interval, Line, bars, intervals, lines
from moesim.draw.colours import PARTS, series_of
from moesim.draw.figures import percent, significant
from moesim.draw.picture import Picture, poster

FloatArray = npt.NDArray[np.float64]


def breakdown(title: str, parts_us: Mapping[str, Mapping[str, float]], axis: str) -> Picture:
    """Stacked bars of the parts of a step; `parts_us` {name: {part of PARTS: microseconds}}."""
    used = used_parts(parts_us)
    rows = [
        Bar(
            name,
            [(*PARTS[part], parts.get(part, 0.0) / 1e3) for part in used],
            f"{significant(sum(parts.get(part, 0.0) for part in used) / 1e3)} ms",
        )
        for name, parts in parts_us.items()
    ]
    return bars(title, rows, axis)


def used_parts(parts_us: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The parts that take any time, in the order in which they are drawn."""
    return [p for p in PARTS if any(parts.get(p, 0.0) > 0 for parts in parts_us.values())]


def step_times(steps_us: Mapping[str, tuple[float, float, float]]) -> Picture:
    """Mean, median and 99th percentile of step times, microseconds; the plan first."""
    series = series_of(list(steps_us), next(iter(steps_us), None))
    rows = []
    for name, times in steps_us.items():
        mean, p50, p99 = (us / 1e3 for us in times)
        rows.append(Interval(name, mean, p50, p99, series[name], f"{significant(mean)} ms"))
    return intervals("How long a step takes", rows, "step (ms), from median to p99")


def gpus_busy(busy: Mapping[str, Sequence[float]]) -> Picture:
    """Shares of time in which GPUs run kernels: mean, least and most busy; {name: [G]}."""
    series = series_of(list(busy), next(iter(busy), None))
    rows = []
    for name, shares in busy.items():
        low, mean, high = (100 * float(f(shares)) for f in (np.min, np.mean, np.max))
        rows.append(Interval(name, mean, low, high, series[name], percent(mean / 100)))
    return intervals("GPUs busy with kernels", rows, "share of all time (%)")


def step_percentiles(steps_us: Mapping[str, FloatArray]) -> Picture:
    """Step time by percentile; {name: [steps] microseconds}, the plan first."""
    series = series_of(list(steps_us), next(iter(steps_us), None))
    drawn = [
        Line(
            name,
            np.linspace(0, 100, len(times)).tolist(),
            (np.sort(times) / 1e3).tolist(),
            series[name],
        )
        for name, times in steps_us.items()
    ]
    return lines("Steps by percentile", drawn, Axes("percentile of steps", "step (ms)"))


def simulation_poster(
    title: str,
    about: str,
    parts_us: Mapping[str, Mapping[str, float]],
    steps_us: Mapping[str, FloatArray],
    busy: Mapping[str, Sequence[float]],
) -> Picture:
    """Everything about simulated steps: see the pictures above for the shapes."""
    spread = {
        name: (float(t.mean()), float(np.percentile(t, 50)), float(np.percentile(t, 99)))
        for name, t in steps_us.items()
    }
    above = [
        breakdown("Where the time of a step goes", parts_us, "mean step (ms)"),
        step_times(spread),
    ]
    below = [step_percentiles(steps_us)]
    if all(len(shares) for shares in busy.values()):
        below.append(gpus_busy(busy))
    return poster(title, [above, below], about)
