"""An engine's constants that make the prediction meet a benchmark's medians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moesim.serving.engines import EngineProfile
from moesim.studies.recommend.layouts import Bench, Layout, Tried

if TYPE_CHECKING:
    from collections.abc import Mapping

HALVINGS = 9
WIDER = 4.0
WIDENINGS = 4
NEAR = 0.03
"""A refitted median further off than this is said not to be met."""
MEDIANS = ("tpot_p50", "ttft_p50")


@dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """engine: the profile with refitted constants; tried: the prediction with it; unmet: medians
    that no value of the constants gives."""

    engine: EngineProfile
    tried: Tried
    unmet: tuple[str, ...]


def with_engine(bench: Bench, engine: EngineProfile) -> Bench:
    """The same place and need under another profile."""
    return Bench(replace(bench.place, profile=engine), bench.need)


def refit(
    bench: Bench, layout: Layout, rate: float, measured: Mapping[str, float], source: str
) -> Refit:
    """Median TPOT by `eager_layer_us` where the engine has it, which is its host's, and by
    `kernel_us` where that is not enough or the engine has none; then median TTFT by `request_ms`.

    Constants do not go below 0. Each is found by halving: a step's time acts on the batch that the
    next one has, so that the median is no line in it.
    """
    profile = replace(bench.place.profile, basis="measured")

    def run(engine: EngineProfile) -> Tried:
        return with_engine(bench, engine).run(layout, rate)

    names = ["eager_layer_us"] if profile.eager_layer_us > 0 else []
    for name in [*names, "kernel_us"]:
        profile, met = _halved(profile, name, run, measured["tpot_p50"])
        if met:
            break
    front = bench.engine(layout.front)[0].num_gpus
    outside_ms = profile.outside_us(front, 0.0) / 1e3
    for _ in range(2):
        profile = replace(profile, request_ms=outside_ms, request_rank_ms=0.0)
        missing = measured["ttft_p50"] - _median(run(profile), "ttft_p50")
        outside_ms = max(0.0, outside_ms + missing * 1e3)
    profile = replace(profile, request_ms=outside_ms)
    changed = [n for n in (*names, "kernel_us") if getattr(profile, n) != _was(bench, n)]
    said = f"{', '.join([*changed, 'request_ms'])} refitted to {source}"
    profile = replace(profile, source=f"{said}; others as {bench.place.engine}")
    last = run(profile)
    unmet = tuple(n for n in MEDIANS if abs(_median(last, n) / measured[n] - 1) > NEAR)
    return Refit(profile, last, unmet)


def _set(profile: EngineProfile, name: str, value: float) -> EngineProfile:
    changed: dict[str, Any] = {name: value}
    return replace(profile, **changed)


def _was(bench: Bench, name: str) -> float:
    return float(getattr(bench.place.profile, name))


def _median(tried: Tried, name: str) -> float:
    value = tried.figures[name]
    return float("inf") if value is None else value


def _halved(
    profile: EngineProfile, name: str, run: Callable[[EngineProfile], Tried], wanted: float
) -> tuple[EngineProfile, bool]:
    """The profile whose constant `name` gives the median TPOT, and whether one does. Where even
    none of it is too much, it is 0; where no amount is enough, the steps do not depend on it, and
    it stays as it was."""

    def tpot(value: float) -> float:
        return _median(run(_set(profile, name, value)), "tpot_p50")

    low, high = 0.0, getattr(profile, name) or 1.0
    if tpot(low) >= wanted:
        return _set(profile, name, low), False
    for _ in range(WIDENINGS):
        if tpot(high) >= wanted:
            break
        low, high = high, high * WIDER
    else:
        return profile, False
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if tpot(middle) < wanted else (low, middle)
    return _set(profile, name, (low + high) / 2.0), True
