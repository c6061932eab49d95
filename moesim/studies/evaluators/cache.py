"""Points as `moesim cache` evaluates them: one GPU that does not hold all experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from moesim import compat
from moesim.studies.evaluator import Evaluated, Factor, Number, Params, StudyFigure, Whole, Word
from moesim.studies.evaluators.routing import RoutingEvaluator, model_required
from moesim.studies.inputs import rerouted_trace


def _word(value: Any) -> Any:
    """Words that YAML and `--set` read as nothing or as a boolean."""
    if value is None:
        return "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Choice = Annotated[Word, BeforeValidator(_word)]


class CacheParams(Params):
    """hbm_gb: memory of the GPU, by default the GPU's own. The network plays no part."""

    gpus: Annotated[Whole, Field(ge=1, le=1)] = 1
    trace: Word
    reroute: Word | None = None
    model: Word | None = None
    hbm_gb: Annotated[Number, Field(gt=0, le=1e5)] | None = None
    batch_size: Annotated[Whole, Field(ge=1, le=65536)] = 1
    context_tokens: Annotated[Whole, Field(ge=0, le=1 << 24)] = 2048
    policy: Choice = "auto"
    prefetch: Choice = "auto"
    cpu: Choice = "auto"
    max_steps: Annotated[Whole, Field(ge=16, le=1 << 20)] = 4096
    seed: Annotated[Whole, Field(ge=0, le=2**31)] = 0
    host_link_scale: Factor = 1.0
    cpu_scale: Factor = 1.0


class CacheEvaluator(RoutingEvaluator):
    """Decoding on one GPU with experts in host memory."""

    name: ClassVar = "cache"
    about: ClassVar = "one GPU with experts in host memory, as moesim cache"
    params: ClassVar = CacheParams
    figures: ClassVar = (
        StudyFigure("tokens_per_s", "tokens/s", "", "high"),
        StudyFigure("hit_rate", "hit rate", "", "high"),
        StudyFigure("bytes_per_token", "bytes per token over the host link", "bytes"),
        StudyFigure("num_slots", "experts in GPU memory", "", ""),
        StudyFigure("hbm_gb", "GB of GPU memory"),
    )
    goal: ClassVar = "tokens_per_s"
    throughput: ClassVar = "tokens_per_s"
    front: ClassVar = ("hbm_gb", "tokens_per_s")
    scales: ClassVar = {"host link": "host_link_scale", "CPU": "cpu_scale"}

    def evaluate(self, params: Mapping[str, Any]) -> Evaluated:
        from moesim.caching.compare import result
        from moesim.caching.planner import Request, make_workload, plan_cache
        from moesim.caching.rates import HostSpec, build_rates
        from moesim.cost.scaled import faster_calibration
        from moesim.cost.step import calibration_of_gpu

        (trace, changed), model = rerouted_trace(params), model_required(params)
        compat.trace_fits_model(trace.meta, model, whole=True)
        gpu = self.cluster(params).gpus[0]
        hbm = gpu.hbm_gb if params["hbm_gb"] is None else params["hbm_gb"]
        host, cpu = HostSpec(), params["cpu_scale"]
        host = replace(
            host,
            dram_gb_per_s=host.dram_gb_per_s * cpu,
            cpu_tflops=host.cpu_tflops * cpu,
        )
        calibration = faster_calibration(
            calibration_of_gpu(gpu, None, only_type=True),
            compute=params["compute_scale"],
            host_link=params["host_link_scale"],
        )
        rates = build_rates(model, gpu, host, calibration)
        request = Request(
            hbm_gb=hbm,
            batch_size=params["batch_size"],
            context_tokens=params["context_tokens"],
            policy=params["policy"],
            prefetch=params["prefetch"],
            cpu=params["cpu"],
            max_steps=params["max_steps"],
            seed=params["seed"],
        )
        work = make_workload(trace, request)
        planned = plan_cache(work, rates, request)
        row = result("this plan", planned.timeline, float(planned.memory.slot_bytes))
        return Evaluated(
            {
                "tokens_per_s": row.tokens_per_s,
                "hit_rate": row.hit_rate,
                "bytes_per_token": row.bytes_per_token,
                "num_slots": float(planned.memory.num_slots),
                "hbm_gb": hbm,
            },
            rates.basis,
            (*changed, *work.notes),
        )
