"""What came of a simulated service: latencies, throughput, utilisation, over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.cost.curves import Basis
from moesim.figures import LATENCIES
from moesim.serving.slo import STATS, Slo
from moesim.serving.state import (
    DEMOTE,
    FINISHED,
    MOST_WAITING,
    NUM_STEPS,
    REFUSE,
    REFUSED,
    SERIES,
    SHORTEN,
    TOO_LARGE,
    UNFINISHED,
)
from moesim.serving.steady import Window, find_window
from moesim.types import FloatArray, IntArray

if TYPE_CHECKING:
    from moesim.serving.config import ServingConfig
    from moesim.serving.deployment import Deployment
    from moesim.serving.requests import Requests
    from moesim.serving.state import Clock

STATUS_NAMES = {
    UNFINISHED: "unfinished",
    FINISHED: "finished",
    TOO_LARGE: "rejected",
    REFUSED: "refused",
}
_ROLES = ("serving", "decode")


@dataclass(frozen=True, slots=True, eq=False)
class ServingResult:
    """Results by request and over time.

    [R]: status (see STATUS_NAMES), arrival_s, start_s (first step), first_token_s, finish_s (NaN
    where it did not happen), prompt_tokens, generated_tokens, cached_tokens (of the prompt, found
    in the prefix cache), preempted (times), degraded (action taken on arrival, 0: none), level,
    rank (-1: none).
    ttft_s, tpot_s, e2e_s: [R], NaN where there is none; tpot only of two tokens or more.
    series: by role, each [bins] of `bin_s` seconds: time and what SERIES holds, as rates and means.
    window: the time over which rates, means over time and latencies are taken
    (`moesim.serving.steady`).
    metrics: by name, in seconds, tokens and shares; None where there is nothing to measure. Means
    over time are of the whole run where the window has no rates.
    """

    status: IntArray
    arrival_s: FloatArray
    start_s: FloatArray
    first_token_s: FloatArray
    finish_s: FloatArray
    prompt_tokens: IntArray
    generated_tokens: IntArray
    cached_tokens: IntArray
    preempted: IntArray
    degraded: IntArray
    level: IntArray
    rank: IntArray
    ttft_s: FloatArray
    tpot_s: FloatArray
    e2e_s: FloatArray
    series: Mapping[str, Mapping[str, FloatArray]]
    bin_s: float
    metrics: Mapping[str, float | None]
    num_gpus: int
    basis: Basis
    notes: tuple[str, ...]
    window: Window

    @classmethod
    def of(
        cls,
        deployment: Deployment,
        requests: Requests,
        config: ServingConfig,
        req: Any,
        clock: Clock,
        basis: Basis,
        notes: tuple[str, ...],
        prefix_on: bool,
    ) -> ServingResult:
        """From the arrays that the loop leaves behind."""
        first, finish, start = (
            np.where(times >= 0, times / 1e6, np.nan)
            for times in (req["first_us"], req["finish_us"], req["start_us"])
        )
        ttft = first - requests.arrival_s
        e2e = finish - requests.arrival_s
        more = np.maximum(req["generated"] - 1, 1)
        tpot = np.where(req["generated"] > 1, (finish - first) / more, np.nan)
        end_s = (
            float(np.nanmax(finish)) if np.isfinite(finish).any() else float(clock.now_us[0]) / 1e6
        )
        gpus = _role_gpus(deployment, config)
        bin_s = float(clock.bin_us[0]) / 1e6
        taken = (req["status"] == FINISHED) | (req["status"] == UNFINISHED)
        window = find_window(
            clock.series[:, :, SERIES.index("decode_tokens")].sum(axis=0),
            clock.series[:, :, SERIES.index("running_us")].sum(axis=0) / float(clock.bin_us[0]),
            bin_s,
            requests.arrival_s[taken],
            np.nan_to_num(finish[taken], nan=np.inf),
            min(float(requests.arrival_s[-1]), config.until_s),
        )
        out = cls(
            status=req["status"],
            arrival_s=requests.arrival_s,
            start_s=start,
            first_token_s=first,
            finish_s=finish,
            prompt_tokens=req["prompt"],
            generated_tokens=req["generated"],
            cached_tokens=req["cached"],
            preempted=req["preempted"],
            degraded=req["degraded"],
            level=req["level"],
            rank=req["rank"],
            ttft_s=ttft,
            tpot_s=tpot,
            e2e_s=e2e,
            series=_series(clock, _num_instances(deployment, config)),
            bin_s=bin_s,
            metrics={},
            num_gpus=sum(gpus),
            basis=basis,
            notes=notes,
            window=window,
        )
        instances = _num_instances(deployment, config)
        metrics = _metrics(out, clock, gpus, instances, config, end_s, prefix_on)
        return replace(out, metrics=metrics)

    def __len__(self) -> int:
        return len(self.status)

    @property
    def timed(self) -> npt.NDArray[np.bool_]:
        """[R]: requests whose latencies are taken: those that arrive in the window; all where it
        has no rates."""
        if not self.window.has_rates:
            return np.ones(len(self), np.bool_)
        after = self.arrival_s > self.window.start_s
        return np.asarray(after & (self.arrival_s <= self.window.end_s))

    def latencies(self, among: npt.NDArray[np.bool_] | None = None) -> dict[str, float | None]:
        """Every figure of `slo.METRICS`, over finished requests that are `timed`, or some of them
        by mask [R]."""
        own = (self.status == FINISHED) & self.timed
        if among is not None:
            own = own & among
        return _latencies({name: getattr(self, f"{name}_s")[own] for name in LATENCIES})

    def promised(self, slo: Slo) -> dict[str, float | None]:
        """The figures that the promises over requests of `slo` are about, by name: as `latencies`,
        but with every request that was not served as infinitely late."""
        served, timed = self.status == FINISHED, self.timed
        out: dict[str, float | None] = {}
        for bound in slo.over_requests:
            values = getattr(self, f"{bound.latency}_s")
            values = np.where(served, values, np.inf)[timed]
            out[bound.name] = _figure(values[~np.isnan(values)], STATS[bound.stat])
        return out

    def goodput(self, slo: Slo) -> dict[str, float | None]:
        """Requests that keep every per-request promise: their share of all requests (rejected,
        refused and unfinished ones keep none), and how many of those that arrive in the window per
        second of it; None where the window has no rates."""
        kept = self.status == FINISHED
        for bound in slo.per_request:
            values = getattr(self, f"{bound.latency}_s")
            kept &= ~(values >= bound.limit_s)
        window = self.window
        rate = float((kept & self.timed).sum()) / window.seconds if window.has_rates else None
        return {
            "share": int(kept.sum()) / len(self),
            "requests_per_s": rate,
            "requests_per_s_per_gpu": None if rate is None else rate / self.num_gpus,
        }

    def counts(self) -> dict[str, int]:
        """Requests by what became of them; their sum is the number of requests (INV-1)."""
        return {name: int((self.status == code).sum()) for code, name in STATUS_NAMES.items()}


def _role_gpus(deployment: Deployment, config: ServingConfig) -> list[int]:
    gpus = [config.replicas * deployment.num_gpus]
    if config.decode is not None:
        gpus.append(config.decode_replicas * config.decode.num_gpus)
    return gpus


def _latencies(values: Mapping[str, FloatArray]) -> dict[str, float | None]:
    return {
        f"{name}_{stat}": _figure(found[np.isfinite(found)], q)
        for name, found in values.items()
        for stat, q in STATS.items()
    }


def _figure(values: FloatArray, q: float | None) -> float | None:
    """The mean (q None) or a percentile, linear between order statistics; infinite where one of
    the two is; None of nothing."""
    if not len(values):
        return None
    if q is None:
        return float(values.mean())
    ordered = np.sort(values)
    place = (len(ordered) - 1) * q / 100.0
    low, high = ordered[int(np.floor(place))], ordered[int(np.ceil(place))]
    return float(high if low == high or np.isinf(high) else low + (high - low) * (place % 1.0))


def _num_instances(deployment: Deployment, config: ServingConfig) -> list[int]:
    """Batches that can be under way at a time, by role."""
    front = config.replicas * deployment.pp
    return [front, *([config.decode_replicas * config.decode.pp] if config.decode else [])]


def _series(clock: Clock, instances: list[int]) -> dict[str, Any]:
    """Rates and time averages by role: tokens/s, share of time in steps, sequences running
    and requests waiting on all instances, share of the KV cache in use, mean step."""
    width_s = float(clock.bin_us[0]) / 1e6
    used = int(np.flatnonzero(clock.series.sum(axis=(0, 2)) > 0).max(initial=0)) + 1
    out: dict[str, Any] = {}
    for role, (name, num) in enumerate(zip(_ROLES, instances, strict=False)):
        raw = dict(zip(SERIES, clock.series[role, :used].T, strict=True))
        steps = np.maximum(raw["steps"], 1)
        wall_us = width_s * 1e6
        out[name] = {
            "time_s": np.arange(used) * width_s,
            "output_tokens_per_s": raw["decode_tokens"] / width_s,
            "prompt_tokens_per_s": raw["prefill_tokens"] / width_s,
            "busy": np.minimum(raw["busy_us"] / (wall_us * num), 1.0),
            "running": raw["running_us"] / wall_us,
            "waiting": raw["waiting_us"] / wall_us,
            "kv_used": raw["kv_us"] / (wall_us * num),
            "step_ms": raw["busy_us"] / steps / 1e3,
        }
    return out


def _rates(out: ServingResult) -> dict[str, float | None]:
    """Requests and tokens per second of the window; a prompt counts when its first token is out."""
    names = (
        "offered_requests_per_s",
        "requests_per_s",
        "output_tokens_per_s",
        "output_tokens_per_s_per_gpu",
        "prompt_tokens_per_s",
        "total_tokens_per_s_per_gpu",
    )
    window = out.window
    if not window.has_rates:
        return dict.fromkeys(names)
    seconds = window.seconds
    first, last = (round(t / out.bin_s) for t in (window.start_s, window.end_s))
    made = sum(s["output_tokens_per_s"][first:last].sum() * out.bin_s for s in out.series.values())
    began = (out.first_token_s > window.start_s) & (out.first_token_s <= window.end_s)
    output = float(made) / ((last - first) * out.bin_s)
    prompt = float(out.prompt_tokens[began].sum()) / seconds
    values = (
        window.offered / seconds,
        window.served / seconds,
        output,
        output / out.num_gpus,
        prompt,
        (output + prompt) / out.num_gpus,
    )
    return dict(zip(names, values, strict=True))


def _metrics(
    out: ServingResult,
    clock: Clock,
    gpus: list[int],
    instances: list[int],
    config: ServingConfig,
    end_s: float,
    prefix_on: bool,
) -> dict[str, float | None]:
    duration, wall, series = max(end_s, 1e-9), max(end_s, 1e-9), clock.series
    if out.window.has_rates:
        first, last = (round(t / out.bin_s) for t in (out.window.start_s, out.window.end_s))
        series, wall = series[:, first:last], (last - first) * out.bin_s
    totals = [dict(zip(SERIES, row, strict=True)) for row in series.sum(axis=1)]
    wall_us = wall * 1e6
    busy = sum(t["busy_us"] / n * g for t, n, g in zip(totals, instances, gpus, strict=False))
    steps = sum(t["steps"] for t in totals)
    slow = sum(t["rank_max_us"] for t in totals)
    waits = (out.start_s - out.arrival_s)[np.isfinite(out.start_s) & out.timed]
    metrics: dict[str, float | None] = dict(out.latencies())
    metrics |= {
        "duration_s": duration,
        **_rates(out),
        "gpu_utilisation": min(1.0, busy / out.num_gpus / wall_us),
        "rank_balance": sum(t["rank_mean_us"] for t in totals) / slow if slow else None,
        "kv_used_mean": totals[0]["kv_us"] / (wall_us * instances[0]),
        "kv_used_peak": float(clock.peak_kv[0]),
        "queue_mean": sum(t["waiting_us"] for t in totals) / wall_us,
        "queue_peak_on_a_rank": float(clock.counts[MOST_WAITING]),
        "queue_s_mean": float(waits.mean()) if len(waits) else None,
        "queue_s_p99": float(np.percentile(waits, 99)) if len(waits) else None,
        "running_mean": sum(t["running_us"] for t in totals) / wall_us,
        "steps": float(clock.counts[NUM_STEPS]),
        "step_ms_mean": sum(t["busy_us"] for t in totals) / steps / 1e3 if steps else None,
        "preemptions": float(out.preempted.sum()),
        "shortened": float((out.degraded == SHORTEN).sum()),
        "demoted": float((out.degraded == DEMOTE).sum()),
        "refused": float((out.degraded == REFUSE).sum()),
    }
    if config.decode is not None:
        metrics["decode_kv_used_mean"] = totals[1]["kv_us"] / (wall_us * instances[1])
        metrics["decode_kv_used_peak"] = float(clock.peak_kv[1])
    if prefix_on:
        begun = np.isfinite(out.start_s)
        prompt = float(out.prompt_tokens[begun].sum())
        metrics["prefix_hit_share"] = float(out.cached_tokens.sum()) / prompt if prompt else None
    if config.speculation is not None:
        drafted, accepted = clock.accepted.tolist()
        k = np.arange(len(clock.drafts))
        total = clock.drafts.sum()
        metrics["drafts_mean"] = float((k * clock.drafts).sum() / total) if total else None
        metrics["drafts_accepted_share"] = accepted / drafted if drafted else None
    return metrics
