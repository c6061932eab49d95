"""`serve` with whole models as experts: one machine, three tiers of memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.errors import InfeasibleError, InputError
from moesim.figures import text_table
from moesim.jobs import inputs
from moesim.jobs.arrivals import arriving_requests
from moesim.jobs.result import Result
from moesim.serving.composition import DRAM, HBM, NVME, TIER_NAMES, Served, Tiers, serve_in_order
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.memory import gpu_memory, kv_bytes_per_token_per_gpu
from moesim.serving.requests import Requests
from moesim.serving.step_cost import EngineStepCost
from moesim.types import FloatArray, IntArray, stream

if TYPE_CHECKING:
    import pandas as pd

    from moesim.jobs.inputs import ClusterLike, ModelLike

HOST_SHARE = 0.9
STATS = ("mean", "p50", "p99")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CompositionResult(Result):
    """deployment: of one model over all GPUs; models: how many there are; drawn: how requests came
    to them; requests, served: what was asked and what came of it."""

    deployment: Deployment
    models: int
    drawn: str
    tiers: Tiers
    requests: Requests
    served: Served

    def line(self) -> str:
        d = self.deployment
        return (
            f"{len(self.requests):,} requests for {self.models:,} models of {d.model.name}'s size"
            f" on {d.num_gpus} x {d.gpu.name}, {self.drawn}"
        )

    def _figures(self) -> dict[str, float]:
        served, came = self.served, self.requests.arrival_s * 1e6
        out: dict[str, float] = {}
        for name, us in (("ttft", served.first_us - came), ("e2e", served.finish_us - came)):
            values = (us.mean(), *np.percentile(us, [50, 99]))
            out |= {f"{name}_{s}_ms": float(v) / 1e3 for s, v in zip(STATS, values, strict=True)}
        copying = float((served.ready_us - served.begin_us).sum())
        busy = float((served.finish_us - served.begin_us).sum())
        out["copying_share"] = copying / busy
        out["busy_share"] = busy / float(served.finish_us[-1])
        out["gpus_if_all_in_hbm"] = float(
            self.deployment.num_gpus * -(-self.models // self.tiers.hbm_models)
        )
        return out

    def summary(self) -> str:
        f, tiers = self._figures(), self.tiers
        copy = (0.0, tiers.from_dram_us, tiers.from_dram_us + tiers.from_nvme_us)
        held = (
            min(self.models, tiers.hbm_models),
            min(self.models, tiers.dram_models),
            self.models,
        )
        rows = [
            [
                TIER_NAMES[t],
                f"{held[t]:,}",
                f"{(self.served.tier == t).mean():.1%}",
                f"{copy[t] / 1e3:,.1f}",
            ]
            for t in (HBM, DRAM, NVME)
        ]
        times = [
            [label, *(f"{f[f'{name}_{s}_ms']:,.1f}" for s in STATS)]
            for name, label in (("ttft", "time to first token"), ("e2e", "end to end"))
        ]
        return "\n".join(
            [
                self.line(),
                text_table(["model found in", "models", "requests", "copying, ms"], rows),
                text_table(["ms", *STATS], times),
                f"{f['copying_share']:.1%} of the busy time is copying; the machine is busy"
                f" {f['busy_share']:.1%} of the time",
                f"with all models in HBM: {f['gpus_if_all_in_hbm']:,.0f} GPUs",
                "one request after the other; copies at the cluster file's rates",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        tier = {name: float((self.served.tier == t).mean()) for t, name in enumerate(TIER_NAMES)}
        return {
            "format": "moesim-composition",
            "version": 1,
            "model": self.deployment.model.name,
            "num_gpus": self.deployment.num_gpus,
            "num_models": self.models,
            "drawn": self.drawn,
            "hbm_models": self.tiers.hbm_models,
            "host_models": self.tiers.dram_models,
            "from_host_us": self.tiers.from_dram_us,
            "from_nvme_us": self.tiers.from_nvme_us,
            "found_in": tier,
            "figures": self._figures(),
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per figure."""
        import pandas as pd

        return pd.DataFrame.from_dict(self._figures(), orient="index", columns=["value"])


def serve_composition(
    requests: Requests | str | os.PathLike[str],
    *,
    whole_models: int,
    skew: float = 1.0,
    by: str | None = None,
    model: ModelLike,
    cluster: ClusterLike | None = None,
    gpus: int = 8,
    engine: str = "vllm",
    seed: int = 0,
    **log: Any,
) -> CompositionResult:
    """Requests for `whole_models` models, each of the size and speed of `model`, on one machine.

    skew: a request is for the model of rank r in proportion to r**-skew (0: all as likely); by: a
    column of the log that names the model instead. Models lie in the tiers by how often they are
    asked for at the start. log: as `arriving_requests`.
    Raises InputError for numbers that are none or more names than models, InfeasibleError where not
    one model fits HBM, or not all of them the tiers.
    """
    if not 1 <= whole_models <= 1_000_000 or not 0 <= skew <= 10:
        raise InputError(f"{whole_models} models with skew {skew}", "give 1 or more, skew 0 to 10")
    arriving = arriving_requests(requests, seed=seed, label=by, **log)
    spec = inputs.model_required(model, "", "the service")
    one = deploy(spec, inputs.cluster_of(cluster, gpus), tp=gpus, engine=engine)
    longest = int((arriving.prompt_tokens + arriving.output_tokens).max())
    tiers = _tiers(one, whole_models, longest)
    first, rest = _times(EngineStepCost(one), arriving)
    which, text = _models(arriving, whole_models, skew, by, seed)
    served = serve_in_order(arriving.arrival_s * 1e6, which, first, rest, tiers)
    return CompositionResult(one, whole_models, text, tiers, arriving, served)


def _tiers(one: Deployment, models: int, longest: int) -> Tiers:
    """From what memory holds, beside the KV cache of one request of `longest` tokens."""
    cluster, memory = one.cluster, gpu_memory(one)
    kept = longest * kv_bytes_per_token_per_gpu(one)
    room = min(gpu.hbm_gb for gpu in cluster.gpus) * 1e9 * one.memory_fraction - kept
    hbm = int(room // memory.weight_bytes)
    whole = memory.weight_bytes * one.num_gpus
    dram = int(float(cluster.host_dram_gb.sum()) * 1e9 * HOST_SHARE // whole)
    routes = cluster.host_routes()
    if hbm < 1:
        raise InfeasibleError(
            f"one model of {whole / 1e9:,.0f} GB does not fit {one.num_gpus} GPUs", "use more GPUs"
        )
    disk = float(cluster.host_nvme_gb.sum()) * 1e9 // whole
    if models > max(hbm, dram, disk):
        raise InfeasibleError(
            f"{models:,} models of {whole / 1e9:,.0f} GB do not fit: HBM holds {hbm}, host memory"
            f" {dram:,}, NVMe {disk:,.0f}",
            "use fewer models, or a machine with more memory",
        )
    nvme_us = 0.0
    if routes.nvme_to_gpu is not None:
        rate = float(routes.nvme_to_gpu.gb_per_s.min()) * len(cluster.host_nvme_gb)
        nvme_us = whole / rate / 1e3
    from_dram = memory.weight_bytes / float(routes.dram_to_gpu.gb_per_s.min()) / 1e3
    return Tiers(min(hbm, models), min(max(dram, hbm), models), from_dram, nvme_us)


def _times(cost: EngineStepCost, requests: Requests) -> tuple[FloatArray, FloatArray]:
    """[R] microseconds to the first token, and from there to the last, of each alone."""
    prompt, output = requests.prompt_tokens, requests.output_tokens
    first, rest = np.zeros(len(prompt)), np.zeros(len(prompt))
    for r, (n, m) in enumerate(zip(prompt.tolist(), output.tolist(), strict=True)):
        first[r] = cost.one_us([0], [0], [n], [n * (n + 1) / 2], [1])
        rest[r] = (m - 1) * cost.one_us([1], [n + m / 2], [0], [0], [0]) if m > 1 else 0.0
    return first, rest


def _models(
    requests: Requests, count: int, skew: float, by: str | None, seed: int
) -> tuple[IntArray, str]:
    """[R] model of each request, the most popular 0, and how it was found."""
    if by is None:
        weight = np.arange(1, count + 1, dtype=np.float64) ** -skew
        drawn = stream(seed, 0xC0E).choice(count, len(requests), p=weight / weight.sum())
        return drawn.astype(np.int64), f"popularity r**-{skew:g}"
    names, which, often = np.unique(requests.labels, return_inverse=True, return_counts=True)
    if not len(names) or len(names) > count:
        raise InputError(
            f"the column {by} names {len(names):,} models, there are {count:,}",
            "give as many models as it names, or more",
        )
    rank = np.empty(len(names), np.int64)
    rank[np.argsort(-often, kind="stable")] = np.arange(len(names))
    return rank[which], f"by the column {by}"
