"""Promises about latency: parsing them, and judging results by them.

A promise such as `tpot_p99<50ms` is about a percentile over requests and is kept or missed as a
whole. One without a percentile, such as `ttft<2s`, is about each request: goodput counts the
requests that keep all of those.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moesim import numerals
from moesim.errors import InputError, UnknownNameError
from moesim.figures import LATENCIES

STATS: Mapping[str, float | None] = {
    "mean": None,
    "p50": 50.0,
    "p90": 90.0,
    "p95": 95.0,
    "p99": 99.0,
    "max": 100.0,
}
UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
METRICS = tuple(f"{latency}_{stat}" for latency in LATENCIES for stat in STATS)
"""Names of the figures over requests, all in seconds: ttft_mean, ttft_p50, ... e2e_max."""
_BOUND = re.compile(r"^\s*([a-z0-9_]+)\s*<=?\s*([0-9.eE+-]+)\s*([a-z]*)\s*$")
_REMEDY = 'write promises as "ttft<2s,tpot<50ms" or "ttft_p99<2s", in us, ms, s or min'


@dataclass(frozen=True, slots=True)
class Bound:
    """One promise: `latency` of each request (`stat` "") or its `stat` is under `limit_s`."""

    latency: str
    stat: str
    limit_s: float

    @property
    def name(self) -> str:
        return f"{self.latency}_{self.stat}" if self.stat else self.latency

    def __str__(self) -> str:
        unit = next((u for u in ("s", "ms") if self.limit_s >= UNITS_S[u]), "us")
        return f"{self.name}<{self.limit_s / UNITS_S[unit]:g}{unit}"


@dataclass(frozen=True, slots=True)
class Slo:
    """All promises of a service, as given to `parse_slo`."""

    bounds: tuple[Bound, ...]

    @property
    def per_request(self) -> tuple[Bound, ...]:
        """What a request must keep to count as goodput: bounds with no percentile.

        Where there are none, those with a percentile are taken for each request.
        """
        plain = tuple(b for b in self.bounds if not b.stat)
        return plain or self.bounds

    @property
    def over_requests(self) -> tuple[Bound, ...]:
        """The bounds with a percentile (or mean, or max)."""
        return tuple(b for b in self.bounds if b.stat)

    def missed(self, metrics: Mapping[str, float | None]) -> tuple[Bound, ...]:
        """Bounds over requests that `metrics` (by METRICS name, seconds) do not keep.

        A figure that is None, since no request has one, keeps its bound. Raises UnknownNameError
        for a figure that `metrics` does not hold.
        """
        out = []
        for bound in self.over_requests:
            if bound.name not in metrics:
                raise UnknownNameError("figure", bound.name, metrics)
            value = metrics[bound.name]
            if value is not None and not value < bound.limit_s:
                out.append(bound)
        return tuple(out)

    def __str__(self) -> str:
        return ",".join(str(b) for b in self.bounds)


def parse_slo(text: str) -> Slo:
    """Promises from text such as "ttft<2s,tpot_p99<50ms".

    Raises InputError for text that is none, a time that is not positive, or a figure bound twice,
    UnknownNameError for a figure that is not known.
    """
    bounds: list[Bound] = []
    for part in text.split(","):
        found = _BOUND.match(part)
        if found is None:
            raise InputError(f"{part.strip()[:80]!r} is no promise", _REMEDY)
        name, number, unit = found.groups()
        latency, _, stat = name.partition("_")
        if latency not in LATENCIES or (stat and stat not in STATS) or name.endswith("_"):
            raise UnknownNameError("figure", name, (*LATENCIES, *METRICS))
        if unit not in UNITS_S:
            raise InputError(f"{part.strip()!r} has no unit of time that is known", _REMEDY)
        try:
            limit_s = numerals.number(number) * UNITS_S[unit]
        except ValueError:
            raise InputError(f"{number!r} in {part.strip()!r} is no number", _REMEDY) from None
        if not (math.isfinite(limit_s) and limit_s > 0):
            raise InputError(f"{part.strip()!r}: the time is not positive", "give one above 0")
        bound = Bound(latency, stat, limit_s)
        if bound.name in (b.name for b in bounds):
            raise InputError(f"{bound.name} is bound twice in {text!r:.120}", "keep one of the two")
        bounds.append(bound)
    return Slo(tuple(bounds))
