"""Schemes in a service of requests: their steps, their stalls, and the KV cache that they leave.

The deployment is the engine with attention data-parallel over all GPUs. Its MoE time per step,
whose routing is the trace's, is scaled by what the scheme's judged steps took against those of
doing nothing: the same factor for every size of batch, and for prompt and output steps. Plans that
stop serving stop the engine every so many steps; what moves beside the steps is spread over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.planning.evaluate import Z_95, Interval
from moesim.serving.config import ServingConfig, Stall
from moesim.serving.memory import gpu_memory
from moesim.serving.run import run_tables
from moesim.serving.step_cost import EngineStepCost
from moesim.serving.step_table import tables_of
from moesim.types import FloatArray, stream

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment
    from moesim.serving.requests import Requests
    from moesim.serving.result import ServingResult
    from moesim.serving.slo import Slo

RESAMPLES = 200
FIGURES = ("ttft_mean", "ttft_p99", "tpot_mean", "tpot_p99", "output_tokens_per_s_per_gpu")


@dataclass(frozen=True, slots=True)
class Load:
    """One scheme as the service feels it. factor: of the MoE time; kv_share: of the cache."""

    factor: float
    kv_share: float
    stall: Stall | None


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """figures: FIGURES, and goodput_share with promises, None where the run is too short for a
    rate. tpot, ttft: paired change of the mean
    against doing nothing, as a share, over requests that both finished."""

    figures: Mapping[str, float | None]
    ttft: Interval
    tpot: Interval


def serve_schemes(
    deployment: Deployment, requests: Requests, loads: Mapping[str, Load], slo: Slo | None
) -> dict[str, Served]:
    """Every scheme of `loads`; the first is what the others are compared with."""
    tables = tables_of([EngineStepCost(deployment)])
    capacity = gpu_memory(deployment).kv_token_capacity
    results: dict[str, ServingResult] = {}
    for name, load in loads.items():
        results[name] = run_tables(
            deployment,
            requests,
            ServingConfig(stalls=(load.stall,) if load.stall is not None else ()),
            tables._replace(
                moe_us=tables.moe_us * load.factor, even_us=tables.even_us * load.factor
            ),
            capacity_tokens=(int(capacity * load.kv_share),),
        )
    base = next(iter(results.values()))
    return {name: _served(found, base, slo) for name, found in results.items()}


def _served(found: ServingResult, base: ServingResult, slo: Slo | None) -> Served:
    figures: dict[str, float | None] = {name: found.metrics[name] for name in FIGURES}
    if slo is not None:
        figures["goodput_share"] = found.goodput(slo)["share"]
    return Served(figures, _paired(found.ttft_s, base.ttft_s), _paired(found.tpot_s, base.tpot_s))


def _paired(own: FloatArray, base: FloatArray) -> Interval:
    """Change of the mean as a share, with its bootstrap interval over requests."""
    both = np.isfinite(own) & np.isfinite(base)
    own, base = own[both], base[both]
    if not len(own):
        return Interval(0.0, 0.0, 0.0)
    value = float(own.mean() / base.mean()) - 1.0
    drawn = stream(0, 0x5E7E).integers(0, len(own), (RESAMPLES, len(own)))
    spread = own[drawn].mean(axis=1) / base[drawn].mean(axis=1)
    half = Z_95 * float(spread.std(ddof=1))
    return Interval(value, value - half, value + half)
