"""GPUs that are slower than nominal: always, for a while, by chance, or changing all the time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moesim.errors import InputError
from moesim.numerals import number, whole
from moesim.types import FloatArray, stream


@dataclass(frozen=True, slots=True)
class SlowWindow:
    """GPU `gpu` runs at `factor` of its speed from start_us (inclusive) to end_us (exclusive)."""

    gpu: int
    factor: float
    start_us: float = 0.0
    end_us: float = math.inf

    def __str__(self) -> str:
        """As the command line writes it: 3=0.5, or 3=0.5@10-20."""
        if math.isinf(self.end_us) and self.start_us == 0:
            return f"{self.gpu}={self.factor:g}"
        end = "" if math.isinf(self.end_us) else f"{self.end_us / 1e3:g}"
        return f"{self.gpu}={self.factor:g}@{self.start_us / 1e3:g}-{end}"


@dataclass(slots=True, eq=False)
class GpuSpeeds:
    """Speed of every GPU in time, as a factor on top of the cluster's own; a `SpeedModel`.

    The factors of all `windows` that hold multiply. `sigma` > 0 adds a log-normal factor of median
    1 for each GPU, drawn once, or again every `period_us`. Work in progress goes on at the new
    speed. Only kernels are affected, not links.

    Raises InputError for a GPU that does not exist or a factor that is not finite and positive.
    """

    num_gpus: int
    windows: Sequence[SlowWindow] = ()
    sigma: float = 0.0
    period_us: float = math.inf
    seed: int = 0
    _drawn: dict[int, FloatArray] = field(default_factory=dict)
    _of_gpu: Mapping[int, list[SlowWindow]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and 0 <= self.sigma <= 2):
            raise InputError(f"speed spread {self.sigma}", "give a log-normal sigma of 0 to 2")
        if not self.period_us > 0:
            raise InputError(f"a speed that changes every {self.period_us} us", "give above 0")
        of_gpu: dict[int, list[SlowWindow]] = {}
        for window in self.windows:
            if not 0 <= window.gpu < self.num_gpus:
                raise InputError(
                    f"no GPU {window.gpu} among {self.num_gpus}", f"use 0 to {self.num_gpus - 1}"
                )
            if not (math.isfinite(window.factor) and window.factor > 0):
                raise InputError(
                    f"speed factor {window.factor} of GPU {window.gpu}",
                    "give a finite factor above 0; a GPU that stops is a fault",
                )
            if not 0 <= window.start_us < window.end_us:
                raise InputError(
                    f"GPU {window.gpu} slow from {window.start_us} to {window.end_us} us",
                    "end after the start, and start at 0 or later",
                )
            of_gpu.setdefault(window.gpu, []).append(window)
        self._of_gpu = of_gpu

    @property
    def nominal(self) -> bool:
        """Whether nothing is slow at any time."""
        return not self.windows and self.sigma == 0.0

    def speed(self, gpu: int, at_us: float) -> float:
        """Factor of one GPU at one time."""
        factor = 1.0
        for window in self._of_gpu.get(gpu, ()):
            if window.start_us <= at_us < window.end_us:
                factor *= window.factor
        if self.sigma > 0.0:
            factor *= float(self._draw(self._period(at_us))[gpu])
        return factor

    def end_us(self, gpu: int, start_us: float, work_us: float) -> float:
        """When work of `work_us` at factor 1 ends."""
        now, left = start_us, work_us
        while True:
            speed = self.speed(gpu, now)
            until = self._next_change(gpu, now)
            if left <= (until - now) * speed:
                return now + left / speed
            left -= (until - now) * speed
            now = until

    def _next_change(self, gpu: int, now: float) -> float:
        soonest = math.inf
        for window in self._of_gpu.get(gpu, ()):
            for edge in (window.start_us, window.end_us):
                if now < edge < soonest:
                    soonest = edge
        if self.sigma > 0.0 and math.isfinite(self.period_us):
            edge = (self._period(now) + 1) * self.period_us
            soonest = min(soonest, edge)
        return soonest

    def _period(self, at_us: float) -> int:
        if not math.isfinite(self.period_us):
            return 0
        period = int(at_us // self.period_us)
        return period + 1 if (period + 1) * self.period_us <= at_us else period

    def _draw(self, period: int) -> FloatArray:
        if period not in self._drawn:
            rng = stream(self.seed, 0x51, period)
            self._drawn[period] = np.exp(self.sigma * rng.standard_normal(self.num_gpus))
        return self._drawn[period]


def parse_slow(text: str, num_gpus: int) -> SlowWindow:
    """`3=0.5` (GPU 3 at half speed) or `3=0.5@10-20` (from 10 to 20 ms). Raises InputError."""
    name, sep, rest = text.partition("=")
    factor, at, span = rest.partition("@")
    first, dash, last = span.partition("-")
    try:
        gpu = whole(name)
        window = SlowWindow(
            gpu,
            number(factor),
            number(first) * 1e3 if at else 0.0,
            number(last) * 1e3 if at and last else math.inf,
        )
    except ValueError:
        window = None
    if not sep or window is None or (at and not (first and dash)):
        raise InputError(
            f"`slow` {text!r:.40}", "write GPU=FACTOR, or GPU=FACTOR@FROM-TO in ms, as 3=0.5@10-20"
        )
    GpuSpeeds(num_gpus, (window,))
    return window
