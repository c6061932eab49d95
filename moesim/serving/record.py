"""A served run as JSON: figures, their basis, and where the inputs came from."""

from __future__ import annotations

import hashlib
import math
import platform
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.cluster.prices import Prices
from moesim.figures import LATENCIES
from moesim.serving.memory import gpu_memory
from moesim.serving.state import FINISHED

if TYPE_CHECKING:
    from moesim.serving.config import ServingConfig
    from moesim.serving.deployment import Deployment
    from moesim.serving.requests import Requests
    from moesim.serving.result import ServingResult
    from moesim.serving.slo import Slo

FORMAT = "moesim-serving-run"
VERSION = 1
QUANTILES = 101
RULE = "MSER-5 on output tokens/s and requests in the service, until the last arrival"
SERIES_POINTS = 512


def run_record(
    deployment: Deployment,
    requests: Requests,
    config: ServingConfig,
    result: ServingResult,
    *,
    slo: Slo | None = None,
    defaults: dict[str, str] | None = None,
    notices: tuple[str, ...] = (),
    seconds: float | None = None,
    prices: Prices | None = None,
) -> dict[str, Any]:
    """The run as `moesim simulate --requests --json` prints it. Times in seconds; `cdf` holds
    QUANTILES quantiles of each latency; `provenance.run` alone differs between equal runs.
    prices: of GPUs, those of the cluster files where left out."""
    prices = Prices({}) if prices is None else prices
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": service_name(deployment, config),
        "model": deployment.model.name,
        "num_gpus": result.num_gpus,
        "deployment": describe_deployment(deployment),
        "decode_deployment": (
            None if config.decode is None else describe_deployment(config.decode)
        ),
        "service": _service(config),
        "requests": requests.describe(),
        "counts": result.counts(),
        "pools": _pools(deployment, requests, config, result),
        "window": {**asdict(result.window), "rule": RULE},
        "metrics": {**result.metrics, **dollars(deployment, config, result, prices)},
        "by_level": _by_level(requests, result),
        "slo": None if slo is None else _slo(slo, result),
        "cdf": _cdf(result),
        "bin_s": result.bin_s,
        "series": _series(result),
        "basis": result.basis,
        "predictions": [*predictions(deployment, requests, config, result), *_priced(prices)],
        "defaults": defaults or {},
        "notices": [*notices, *filter(None, [result.window.warning])],
        "provenance": _provenance(deployment, requests, config, seconds),
    }


def service_name(deployment: Deployment, config: ServingConfig) -> str:
    """As "DeepSeek-V3 on 32 x h200-sxm, 4 x tp1 dp8 ep8"."""
    front = f"{config.replicas} x {deployment.parallelism}"
    num, gpu = config.replicas * deployment.num_gpus, deployment.gpu_names
    if config.decode is None:
        return f"{deployment.model.name} on {num} x {gpu}, {front}"
    back = f"{config.decode_replicas} x {config.decode.parallelism}"
    decoding = config.decode_replicas * config.decode.num_gpus
    where = f"{num} x {gpu} for prompts, {front}; {decoding} x {config.decode.gpu_names}"
    return f"{deployment.model.name} on {where} decoding, {back}"


def describe_deployment(deployment: Deployment) -> dict[str, Any]:
    """Parallelism, precisions, limits and memory of one replica."""
    memory = gpu_memory(deployment)
    names = (
        "num_gpus", "tp", "dp", "pp", "ep", "moe_tp", "expert_dtype", "dense_dtype", "kv_dtype",
        "max_batch_tokens", "max_sequences", "memory_fraction", "moe_comm",
        "redundant_experts", "two_batch_overlap", "expert_gpus", "micro_batches", "kv_scale",
        "kv_window", "mtp",
    )  # fmt: skip
    return {
        "name": deployment.name,
        "cluster": deployment.cluster.name,
        "gpu": deployment.gpu.name,
        "engine": deployment.engine.name,
        **{name: getattr(deployment, name) for name in names},
        "planned": deployment.plan is not None,
        "weights_gb_per_gpu": memory.weight_bytes / 1e9,
        "dispatch_tokens": deployment.dispatch_tokens if memory.exchange_bytes else None,
        "exchange_gb_per_gpu": memory.exchange_bytes / 1e9,
        "kv_cache_gb_per_gpu": memory.kv_cache_bytes / 1e9,
        "kv_tokens_per_rank": memory.kv_token_capacity,
    }


def predictions(
    deployment: Deployment, requests: Requests, config: ServingConfig, result: ServingResult
) -> list[str]:
    """What each part of the figures rests on."""
    out = [f"requests: {requests.basis} ({requests.source})"]
    out.append(f"step times: {result.basis} at the weakest part")
    out += [f"step times: {note}" for note in result.notes]
    engine = deployment.engine
    out.append(f"engine's host time and request overhead: {engine.basis} ({engine.name})")
    routing = config.routing
    if deployment.kv_scale != 1.0 or deployment.kv_window is not None:
        out.append("compressed KV cache: size as given; what it costs in quality is not claimed")
    if config.length_error is not None:
        out.append("router's prediction of lengths: log-normal error as given")
    if deployment.two_batch_overlap != "off":
        out.append("two-batch overlap: the longer of computing and sending, SM share assumed")
    if any(part.expert_gpus for part in (deployment, config.decode) if part is not None):
        out.append(
            "attention and experts apart: exchange as an all-to-all of as many GPUs, assumed;"
            " `pools` has a step with it as flows over the network"
        )
    if deployment.redundant_experts is not None:
        out.append("placement of experts: EPLB that knows their popularity, assumed")
    if routing is None:
        what = "a routing trace" if deployment.trace is not None else "assumed popularity"
        out.append(f"load of experts: {what}")
    else:
        out.append(
            f"load of experts: routing trace by domain ({len(routing.groups)} told apart);"
            " mixes interpolated"
        )
        if routing.drift_s < math.inf:
            out.append("drift of the domains: assumed form")
    for which, stall in zip(("engines", "decoding engines"), config.stalls, strict=False):
        out.append(
            f"rebalancing: {which} stand still {stall.us / 1e3:g} ms every {stall.every_steps:,}"
            f" steps ({stall.source})"
        )
    if config.decode is not None:
        out.append("transfer of KV caches: assumed rate and latency")
    if config.speculation is not None:
        out.append("accepted drafts: assumed")
        drafting = (
            "one multi-token-prediction layer, its parts as the model's layers"
            if deployment.mtp
            else "a share of the step as given, and no memory of its own: assumed"
        )
        out.append(f"drafting: {drafting}")
        if deployment.trace is not None:
            out.append("experts of drafted tokens: chunks of consecutive tokens of the trace")
    return out


def dollars(
    deployment: Deployment, config: ServingConfig, result: ServingResult, prices: Prices
) -> dict[str, float | None]:
    """Dollars per hour, and per million tokens of the window: decoding engines bear the output
    tokens and the others the input tokens, or all the output tokens. None where a price or a rate
    is not known."""
    parts = [(deployment, config.replicas)]
    if config.decode is not None:
        parts.append((config.decode, config.decode_replicas))
    hourly = []
    for part, replicas in parts:
        each = prices.per_hour(part.cluster)
        hourly.append(math.nan if each is None else replicas * each)
    output, prompt = (result.metrics[f"{n}_tokens_per_s"] for n in ("output", "prompt"))
    per_output = hourly[-1] / (output * 3600) * 1e6 if output else math.nan
    found = {"cost_usd_per_hour": sum(hourly), "cost_usd_per_million_output_tokens": per_output}
    if len(parts) > 1:
        per_input = hourly[0] / (prompt * 3600) * 1e6 if prompt else math.nan
        found["cost_usd_per_million_input_tokens"] = per_input
    return {name: _finite(value) for name, value in found.items()}


def _priced(prices: Prices) -> list[str]:
    """Where each price is from."""
    out = []
    for gpu, found in prices.used.items():
        dollars = found["usd_per_gpu_hour"]
        source = f" ({found['source']})" if found["source"] else ""
        said = f"${dollars:g} per hour of {gpu}, {found['kind']}{source}" if dollars else ""
        out.append(f"dollars: {said or f'no price of {gpu} is known'}")
    return out


def _service(config: ServingConfig) -> dict[str, Any]:
    out: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "replicas", "router", "block_size", "prefix_cache", "chunk_tokens", "prefill_first",
            "length_error", "shared_reads", "seed",
        )
    }  # fmt: skip
    if config.decode is not None:
        out["decode_replicas"] = config.decode_replicas
        out["transfer_gb_per_s"] = config.transfer_gb_per_s
        out["transfer_latency_us"] = config.transfer_latency_us
    if config.speculation is not None:
        out["speculation"] = asdict(config.speculation)
    out["levels"] = [asdict(level) for level in config.levels]
    out["until_s"] = config.until_s if config.until_s < math.inf else None
    if config.routing is not None:
        routing = config.routing
        out["domains"] = {
            name: float(weight)
            for (name, _), weight in zip(routing.groups, routing.weights(), strict=True)
        }
        out["drift_s"] = routing.drift_s if routing.drift_s < math.inf else None
    return out


def _by_level(requests: Requests, result: ServingResult) -> list[dict[str, Any]]:
    """Latencies by priority as requested, the first the most urgent; none where all are alike."""
    values = np.unique(requests.priority)
    if len(values) < 2:
        return []
    out = []
    for value in values.tolist():
        own = requests.priority == value
        ended = own & (result.status == FINISHED)
        row: dict[str, Any] = {"priority": value, "requests": int(own.sum())}
        row["finished"] = int(ended.sum())
        row["degraded"] = int((own & (result.degraded > 0)).sum())
        row |= result.latencies(ended)
        out.append(row)
    return out


def _pools(
    deployment: Deployment, requests: Requests, config: ServingConfig, result: ServingResult
) -> dict[str, float] | None:
    """A mean decode step of the engines whose experts are apart."""
    from moesim.serving.apart_events import pools_record

    split = deployment if config.decode is None else config.decode
    running = result.metrics["running_mean"]
    if split.expert_gpus is None or not running:
        return None
    replicas = config.replicas if config.decode is None else config.decode_replicas
    context = float(requests.prompt_tokens.mean() + requests.output_tokens.mean() / 2.0)
    return pools_record(split, running / (replicas * split.dp), context)


def _slo(slo: Slo, result: ServingResult) -> dict[str, Any]:
    figures = result.promised(slo)
    missed = slo.missed(figures)
    return {
        "text": str(slo),
        "promises": [
            {"latency": b.latency, "stat": b.stat, "limit_s": b.limit_s} for b in slo.bounds
        ],
        "goodput": result.goodput(slo),
        "missed": [
            {"promise": str(b), "limit_s": b.limit_s, "value_s": _finite(figures[b.name])}
            for b in missed
        ],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _cdf(result: ServingResult) -> dict[str, list[float]]:
    ended = (result.status == FINISHED) & result.timed
    levels = np.linspace(0, 100, QUANTILES)
    out = {}
    for name in LATENCIES:
        values = getattr(result, f"{name}_s")[ended]
        values = values[np.isfinite(values)]
        out[name] = np.percentile(values, levels).tolist() if len(values) else []
    return out


def _series(result: ServingResult) -> dict[str, dict[str, list[float]]]:
    """The series, thinned to about SERIES_POINTS points by means of neighbours."""
    out: dict[str, dict[str, list[float]]] = {}
    for role, columns in result.series.items():
        length = len(columns["time_s"])
        starts = np.arange(0, length, max(1, math.ceil(length / SERIES_POINTS)))
        sizes = np.diff(np.append(starts, length))
        out[role] = {
            name: (
                values[starts] if name == "time_s" else np.add.reduceat(values, starts) / sizes
            ).tolist()
            for name, values in columns.items()
        }
    return out


def _provenance(
    deployment: Deployment, requests: Requests, config: ServingConfig, seconds: float | None
) -> dict[str, Any]:
    from importlib.metadata import version

    trace = config.routing.trace if config.routing is not None else deployment.trace
    return {
        "requests_hash": requests.content_hash(),
        "cluster": deployment.cluster.name,
        "cluster_hash": deployment.cluster.cluster_hash(),
        "trace": None if trace is None else trace.content_hash(),
        "plan_hash": (
            None
            if deployment.plan is None
            else hashlib.sha256(
                np.ascontiguousarray(deployment.plan.placement.physical_to_logical).tobytes()
            ).hexdigest()
        ),
        "moesim": version("moesim"),
        "run": {
            "command": " ".join(sys.argv),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "seconds": None if seconds is None else round(seconds, 3),
        },
    }
