"""Points as `moesim cache` evaluates them: one GPU that does not hold all experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from moesim import compat
from moesim.caching.rates import torch_kernels
from moesim.cluster import Machine, load_machine
from moesim.cluster.load import cluster_of_machine
from moesim.errors import InputError, MismatchError
from moesim.figures import figures_named
from moesim.studies.evaluator import Evaluated, Factor, Number, Params, Whole, Word
from moesim.studies.evaluators.routing import RoutingEvaluator, model_name, model_required
from moesim.studies.inputs import kept, rerouted_trace


def _word(value: Any) -> Any:
    """Words that YAML and `--set` read as nothing or as a boolean."""
    if value is None:
        return "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Choice = Annotated[Word, BeforeValidator(_word)]


class CacheParams(Params):
    """machine: as `moesim cache --machine`, in the place of `cluster`'s first GPU; quant: types of
    GGUF. hbm_gb: memory of the GPU, by default what the GPU's has. The network plays no part."""

    gpus: Annotated[Whole, Field(ge=1, le=1)] = 1
    trace: Word
    reroute: Word | None = None
    model: Word | None = None
    machine: Word | None = None
    quant: Word | None = None
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
    figures: ClassVar = figures_named(
        "tokens_per_s",
        "hit_rate",
        "bytes_per_token",
        "engine_tokens_per_s",
        "num_slots",
        "hbm_gb",
    )
    goal: ClassVar = "tokens_per_s"
    throughput: ClassVar = "tokens_per_s"
    front: ClassVar = ("hbm_gb", "tokens_per_s")
    scales: ClassVar = {"host link": "host_link_scale", "CPU": "cpu_scale"}

    def check_named(self, params: Mapping[str, Any]) -> None:
        super().check_named(params)
        if params["machine"] is not None:
            _machine(params)
        elif params["quant"] is not None:
            raise InputError("`quant` without `machine`", "fix the machine: --set machine=NAME")

    def inputs(self, params: Mapping[str, Any]) -> dict[str, str]:
        found = super().inputs(params)
        if params["machine"] is not None:
            found["machine"] = cluster_of_machine(_machine(params)).cluster_hash()
        return found

    def evaluate(self, params: Mapping[str, Any]) -> Evaluated:
        return _on_cluster(self, params) if params["machine"] is None else _on_machine(params)

    def cluster(self, params: Mapping[str, Any]) -> Any:
        """The machine as a cluster where one is named: what GPUs cost is asked of it."""
        if params["machine"] is None:
            return super().cluster(params)
        return cluster_of_machine(_machine(params))


def _machine(params: Mapping[str, Any]) -> Machine:
    name = str(params["machine"])
    return kept("machine", name, lambda: load_machine(name))  # type: ignore[no-any-return]


def _scaled(machine: Machine, params: Mapping[str, Any]) -> Machine:
    """The machine with its GPUs, host link and CPU so many times as fast. Raises MismatchError
    where torch's measured kernels would be taken all the same."""
    compute, link, cpu = (params[n] for n in ("compute_scale", "host_link_scale", "cpu_scale"))
    if compute == link == cpu == 1.0:
        return machine
    if torch_kernels(machine):
        raise MismatchError(
            f"{machine.name} is timed with measured kernels, which scales do not reach",
            "name its cluster with `cluster`, or a host with `machine`",
        )
    host = machine.host
    kernels = host.kernels and (host.kernels[0], host.kernels[1] * cpu, host.kernels[2] * cpu)
    gpus = tuple(
        replace(
            gpu,
            tflops={name: rate * compute for name, rate in gpu.tflops.items()},
            hbm_gb_per_s=gpu.hbm_gb_per_s * compute,
            pcie_gb_per_s=gpu.pcie_gb_per_s * link,
        )
        for gpu in machine.gpus
    )
    host = replace(
        host, dram_gb_per_s=host.dram_gb_per_s * cpu, ghz=host.ghz * cpu, kernels=kernels
    )
    return replace(machine, gpus=gpus, host=host)


def _on_machine(params: Mapping[str, Any]) -> Evaluated:
    """As `moesim cache --machine`."""
    from moesim.jobs.cache import CacheOptions, run_cache

    trace, changed = rerouted_trace(params)
    context = params["context_tokens"]
    job = run_cache(
        trace,
        CacheOptions(
            _scaled(_machine(params), params),
            model_name(params),
            params["hbm_gb"],
            params["batch_size"],
            context,
            params["policy"],
            params["prefetch"],
            params["cpu"],
            quant=params["quant"],
            max_steps=params["max_steps"],
            seed=params["seed"],
            prompt=max(1, context // 2),
            output=max(1, context // 8),
        ),
    )
    best = job.best_engine
    return Evaluated(
        {
            "tokens_per_s": job.own.tokens_per_s,
            "hit_rate": job.own.hit_rate,
            "bytes_per_token": job.own.bytes_per_token,
            "engine_tokens_per_s": None if best is None else best.decode_tokens_per_s,
            "num_slots": float(job.planned.memory.num_slots),
            "hbm_gb": job.request.hbm_gb,
        },
        job.basis,
        (*changed, *job.notes),
        "" if best is None else best.engine,
    )


def _on_cluster(evaluator: CacheEvaluator, params: Mapping[str, Any]) -> Evaluated:
    """As `moesim cache` with the first GPU of the cluster, beside the host that torch's kernels
    were measured on."""
    from moesim.caching.compare import result
    from moesim.caching.planner import plan_cache
    from moesim.caching.rates import HostSpec, build_rates
    from moesim.caching.workload import Request, make_workload
    from moesim.cost.scaled import faster_calibration
    from moesim.cost.step import calibration_of_gpu

    (trace, changed), model = rerouted_trace(params), model_required(params)
    compat.trace_fits_model(trace.meta, model, whole=True)
    gpu = evaluator.cluster(params).gpus[0]
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
            "engine_tokens_per_s": None,
            "num_slots": float(planned.memory.num_slots),
            "hbm_gb": hbm,
        },
        rates.basis,
        (*changed, *work.notes),
    )
