"""Points as a service under arriving requests: every request simulated, open loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from moesim.figures import LATENCIES, figures_named
from moesim.serving.slo import parse_slo
from moesim.studies.evaluator import Evaluated, Factor, Number, Tokens, Whole, Word
from moesim.studies.evaluators.static import (
    Degree,
    DeploymentEvaluator,
    DeploymentParams,
    drafting_of,
    service_of,
)
from moesim.studies.inputs import file_hash, kept

if TYPE_CHECKING:
    from moesim.serving.requests import Requests
    from moesim.serving.result import ServingResult

PERCENTILES = ("p50", "p90", "p99")
_RATES = (
    "output_tokens_per_s",
    "output_tokens_per_s_per_gpu",
    "prompt_tokens_per_s",
    "requests_per_s",
    "offered_requests_per_s",
    "gpu_utilisation",
    "kv_used_peak",
)


class RequestsParams(DeploymentParams):
    """requests: a file, or a process such as "poisson:rate=8,requests=2000". load_scale: arrivals
    come so many times as fast. max_requests: the first ones alone. decode_gpus: so many of the GPUs
    decode only, in `decode_replicas` engines, the others compute prompts and send KV caches at
    transfer_gb_per_s (by default what the NICs give). goodput_slo: promises of each request."""

    requests: Word
    max_requests: Annotated[Whole, Field(ge=1, le=10_000_000)] | None = None
    load_scale: Factor = 1.0
    router: Literal["round_robin", "least_loaded", "length_aware"] = "least_loaded"
    decode_gpus: Degree | None = None
    decode_replicas: Degree | None = None
    length_error: Annotated[Number, Field(ge=0, le=10)] | None = None
    kv_window: Tokens | None = None
    chunk_tokens: Annotated[Whole, Field(ge=1, le=1 << 20)] | None = None
    prefix_cache: bool | None = None
    shared_reads: bool = False
    fixed_drafts: bool = False
    transfer_gb_per_s: Annotated[Number, Field(gt=0, le=1e6)] | None = None
    goodput_slo: Word | None = None


class RequestsEvaluator(DeploymentEvaluator):
    """TTFT, TPOT and end-to-end times of requests that arrive when they do."""

    name: ClassVar = "requests"
    about: ClassVar = "every request of a log or an arrival process, simulated"
    params: ClassVar = RequestsParams
    figures: ClassVar = figures_named(
        *(f"{latency}_{stat}" for latency in LATENCIES for stat in ("mean", *PERCENTILES)),
        *_RATES,
        "served_share",
        "goodput_share",
        "queue_s_p99",
    )
    goal: ClassVar = "output_tokens_per_s_per_gpu"
    throughput: ClassVar = "output_tokens_per_s"
    front: ClassVar = ("gpus", "tpot_p99")
    scales: ClassVar = {
        "network bandwidth": "network_scale",
        "compute": "compute_scale",
        "load": "load_scale",
        "imbalance": "imbalance_scale",
    }

    def check_named(self, params: Mapping[str, Any]) -> None:
        super().check_named(params)
        _source(params)

    def inputs(self, params: Mapping[str, Any]) -> dict[str, str]:
        from moesim.serving.synthetic import is_synthetic

        found = super().inputs(params)
        if not is_synthetic(params["requests"]):
            found["requests"] = file_hash(params["requests"])
        return found

    def evaluate(self, params: Mapping[str, Any]) -> Evaluated:
        from moesim.serving.config import ServingConfig
        from moesim.serving.fit import pools_text
        from moesim.serving.run import simulate_serving

        goodput = parse_slo(params["goodput_slo"]) if params["goodput_slo"] else None
        (front, back), notes = service_of(params)
        config = ServingConfig(
            replicas=front.replicas,
            router=params["router"],
            length_error=params["length_error"],
            decode=None if back is None else back.engine,
            decode_replicas=1 if back is None else back.replicas,
            chunk_tokens=params["chunk_tokens"],
            prefix_cache=params["prefix_cache"],
            shared_reads=params["shared_reads"],
            transfer_gb_per_s=params["transfer_gb_per_s"],
            speculation=drafting_of(params, front.engine)[0],
            seed=params["seed"],
        )
        result = simulate_serving(front.engine, _arriving(params), config)
        metrics = result.metrics
        out: dict[str, float | None] = {name: metrics[name] for name in (*_RATES, "queue_s_p99")}
        counts = result.counts()
        out["served_share"] = counts["finished"] / len(result)
        out["goodput_share"] = result.goodput(goodput)["share"] if goodput is not None else None
        for latency in LATENCIES:
            out[f"{latency}_mean"] = metrics[f"{latency}_mean"]
            out |= _percentiles(latency, result)
        unserved = len(result) - counts["finished"]
        if unserved:
            notes = (*notes, f"{unserved} requests are not served; they count as infinitely late")
        if result.window.warning:
            notes = (*notes, result.window.warning)
        engines = pools_text(front, back)
        return Evaluated(out, result.basis, (*notes, *result.notes), engines)


def _arriving(params: Mapping[str, Any]) -> Requests:
    """The requests of a point."""
    found = _source(params)
    if params["max_requests"] is not None:
        found = found.first(params["max_requests"])
    return found if params["load_scale"] == 1.0 else found.scaled(params["load_scale"])


def _source(params: Mapping[str, Any]) -> Requests:
    """The requests of the log or process, read or drawn once."""
    from moesim.serving.arrivals import load_requests
    from moesim.serving.synthetic import is_synthetic, synthetic_requests

    text, seed = params["requests"], params["seed"]
    found: Requests
    if is_synthetic(text):
        found = kept(f"requests {seed}", text, lambda: synthetic_requests(text, seed))
    else:
        found = kept("requests", text, lambda: load_requests(text, skip_empty=True))
    return found


def _percentiles(latency: str, result: ServingResult) -> dict[str, float | None]:
    """Percentiles over all requests, those that are not served being infinitely late: None where
    that makes the percentile infinite."""
    from moesim.serving.state import FINISHED

    values: npt.NDArray[np.float64] = getattr(result, f"{latency}_s")
    values = np.where(result.status == FINISHED, values, np.inf)
    values = np.sort(values[~np.isnan(values)])
    out: dict[str, float | None] = {}
    for stat in PERCENTILES:
        name = f"{latency}_{stat}"
        if not len(values):
            out[name] = None
            continue
        at = (len(values) - 1) * float(stat[1:]) / 100
        low, high = values[int(np.floor(at))], values[int(np.ceil(at))]
        late = not np.isfinite(high)
        out[name] = None if late else float(low + (high - low) * (at - np.floor(at)))
    return out
