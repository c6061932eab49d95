"""`cache`: what stays in GPU memory when not all experts fit."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim import compat
from moesim.caching.bits import assumed_errors, choose_bits, loss_table, significance
from moesim.caching.compare import (
    SWEEP_POINTS,
    compare,
    offline_bound,
    sweep_hbm,
)
from moesim.caching.plan import CachePlan
from moesim.caching.planner import num_stages, plan_cache
from moesim.caching.predictors.base import accuracy
from moesim.caching.rates import rates_on, torch_kernels
from moesim.caching.workload import Request, Workload, make_workload
from moesim.cluster import Machine
from moesim.errors import FormatError, InputError
from moesim.jobs import inputs
from moesim.jobs.cache_engines import (
    contexts_of,
    engines_json,
    hot_curve,
    plans_of,
    weights_of,
    with_counts,
)
from moesim.jobs.cache_exact import exact_bits, solve_exactly
from moesim.jobs.cache_notes import few_slots, notes_of
from moesim.jobs.cache_result import CacheJob
from moesim.model.weights import Weights
from moesim.offloading.rates import filled_gb
from moesim.offloading.task import EnginePlan
from moesim.trace.format import Trace, read_npy
from moesim.trace.uniform import uniform_trace

if TYPE_CHECKING:
    from moesim.jobs.inputs import MachineLike, ModelLike, TraceLike

DEFAULT_MACHINE = "l40s"

MAX_ERROR_BYTES = 1 << 30
StageProgress = Callable[[str, int, int], None]


def _silent(_text: str, _done: int, _total: int) -> None:
    """The default of `progress`."""


@dataclass(slots=True)
class _Stages:
    """Counts what is begun: what was begun before is done."""

    progress: StageProgress
    total: int
    done: int = 0

    def __call__(self, text: str) -> None:
        self.progress(text, min(self.done, self.total), self.total)
        self.done += 1


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What the user says; see `moesim cache --help`. `host` overrides fields of HostSpec. With
    `bits` or several requests at once no engine is asked."""

    machine: MachineLike
    model: ModelLike | None = None
    hbm_gb: float | None = None
    batch_size: int = 1
    context_tokens: int = 2048
    policy: str = "auto"
    prefetch: str = "auto"
    cpu: str = "auto"
    expert_dtype: str | None = None
    average_bits: float | None = None
    bit_errors: Path | None = None
    host: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 4096
    seed: int = 0
    sweep: bool = False
    engines: tuple[str, ...] = ()
    quant: str | None = None
    cache_type: str = "fp16"
    prompt: int = 2048
    output: int = 512
    ilp: bool = False


def cache(
    trace: TraceLike | None = None,
    *,
    model: ModelLike | None = None,
    machine: MachineLike = DEFAULT_MACHINE,
    engine: Sequence[str] | None = None,
    quant: str | None = None,
    hbm: float | None = None,
    batch: int = 1,
    context: int = 2048,
    cache_type: str = "fp16",
    prompt: int | None = None,
    output: int | None = None,
    policy: str = "auto",
    prefetch: str = "auto",
    cpu: str = "auto",
    expert_dtype: str | None = None,
    bits: float | None = None,
    bit_errors: Path | None = None,
    dram: float | None = None,
    dram_gb_per_s: float | None = None,
    cpu_us: float | None = None,
    cpu_tflops: float | None = None,
    nvme_gb_per_s: float | None = None,
    ilp: bool = False,
    steps: int = 4096,
    seed: int = 0,
    sweep: bool = False,
    progress: StageProgress = _silent,
) -> CacheJob:
    """The best placement of each engine on a machine, and a caching plan for its (first) GPU.

    A quarter of the trace's requests gives frequencies and fits predictors, a quarter chooses, and
    every figure comes from the other half. Without a trace routing is assumed uniform, which no
    policy or predictor can use: LRU without prefetch stands for all. engine: names, by default
    every engine. prompt, output: tokens of the request that engines' settings are chosen for, by
    default half of the context and an eighth. sweep: other memory sizes too, for the picture.
    progress(text, done, total) says what is being done, and how many stages of how many at most
    are done. The other names and defaults are those of
    `moesim cache`. Raises MismatchError, InputError, UnknownNameError, and InfeasibleError where
    the memory does not hold the least and no engine runs either.
    """
    host = {
        "dram_gb": dram,
        "dram_gb_per_s": dram_gb_per_s,
        "cpu_us": cpu_us,
        "cpu_tflops": cpu_tflops,
        "nvme_gb_per_s": nvme_gb_per_s,
    }
    options = CacheOptions(
        model=model,
        machine=machine,
        engines=tuple(engine or ()),
        quant=quant,
        cache_type=cache_type,
        prompt=max(1, context // 2) if prompt is None else prompt,
        output=max(1, context // 8) if output is None else output,
        hbm_gb=hbm,
        batch_size=batch,
        context_tokens=context,
        policy=policy,
        prefetch=prefetch,
        cpu=cpu,
        expert_dtype=expert_dtype,
        average_bits=bits,
        bit_errors=bit_errors,
        host={name: value for name, value in host.items() if value is not None},
        max_steps=steps,
        seed=seed,
        sweep=sweep,
        ilp=ilp,
    )
    if trace is None:
        return run_without_trace(options, progress)
    return run_cache(inputs.token_trace_of(trace, "moesim cache"), options, progress)


def run_without_trace(options: CacheOptions, progress: StageProgress = _silent) -> CacheJob:
    """`run_cache` under uniform routing. Raises InputError where no model is named either."""
    if options.model is None:
        raise InputError(
            "neither a trace nor a model is given", "name a model with `model`, or a trace"
        )
    weights, _ = weights_of(options.model, "", options.quant, options.expert_dtype)
    spec = weights.spec
    trace = uniform_trace(
        spec.name, spec.moe_layer_ids, spec.num_experts, spec.real_top_k, options.seed
    )
    policy = "lru" if options.policy == "auto" else options.policy
    prefetch = "none" if options.prefetch == "auto" else options.prefetch
    return run_cache(trace, replace(options, policy=policy, prefetch=prefetch), progress, True)


_NONE: tuple[dict[str, Any], ...] = ()


def run_cache(
    trace: Trace,
    options: CacheOptions,
    progress: StageProgress = _silent,
    uniform: bool = False,
) -> CacheJob:
    """Plan, compare with others and with the bound, and, if asked, sweep the memory size.

    uniform: the trace stands for routing that nobody knows.
    """
    weights = weights_of(options.model, trace.meta.model, options.quant, options.expert_dtype)
    model = weights[0].spec
    compat.trace_fits_model(trace.meta, model, whole=True)
    machine = inputs.machine_of(options.machine)
    rates = rates_on(model, machine.gpus[0], machine, options.host, quantised=weights[0].quantised)
    request = _request(options, machine, weights[0])
    stages = num_stages(trace, request) + 3 + (SWEEP_POINTS + 1 if options.sweep else 0)
    stage = _Stages(progress, stages + options.ilp)
    stage("requests and steps")
    work = make_workload(trace, request)
    engines: _Plans = ((), ())
    if options.average_bits is None and options.batch_size == 1:
        stage("engines")
        engines = _engines(work, weights, machine, options, uniform)
    bits_line, exact = None, _NONE
    if options.average_bits is not None:
        request, bits_line, exact = _with_bits(work, request, options)
    planned = plan_cache(work, rates, request, stage)
    stage("baselines and bound")
    results = compare(work, planned, float(planned.memory.slot_bytes))
    bound = offline_bound(work, planned.times, cpu=planned.plan.cpu == "auto")
    sweep = None
    if options.sweep:
        sweep = sweep_hbm(work, rates, request, planned, bound, progress=stage)
    predicted = asdict(next(row for row in results if row.name == "this plan")) | {
        "bound_tokens_per_s": bound.tokens_per_s(planned.memory.num_slots),
        "bound_hit_rate": bound.hit_rate(planned.memory.num_slots),
        "basis": rates.basis,
    }
    notes = notes_of(options, request, machine, weights[0], uniform)
    job = CacheJob(
        request,
        replace(
            _annotated(planned.plan, predicted, work, options),
            provenance=_made_from(trace, options, machine, weights[0], uniform),
            engines=engines_json(engines[0]),
        ),
        planned,
        tuple(results),
        bound,
        sweep,
        (*notes, *few_slots(trace, planned), *work.notes),
        rates.notes if planned.plan.nvme else rates.notes[:3] + rates.notes[4:],
        rates.basis,
        bits_line,
        rates,
        machine=machine,
        engines=engines[0],
        longer=engines[1],
        uniform=uniform,
    )
    if not options.ilp:
        return job
    stage("integer program")
    return replace(job, exact=(*solve_exactly(job), *exact))


def _request(options: CacheOptions, machine: Machine, weights: Weights) -> Request:
    hbm = options.hbm_gb
    if hbm is None and torch_kernels(machine, weights.quantised):
        hbm = machine.gpus[0].hbm_gb * len(machine.gpus)
    return Request(
        hbm_gb=sum(filled_gb(machine)) if hbm is None else hbm,
        batch_size=options.batch_size,
        context_tokens=options.context_tokens,
        policy=options.policy,
        prefetch=options.prefetch,
        cpu=options.cpu,
        max_steps=options.max_steps,
        seed=options.seed,
    )


_Plans = tuple[tuple[EnginePlan, ...], tuple[EnginePlan, ...]]


def _engines(
    work: Workload,
    weights: tuple[Weights, Weights],
    machine: Machine,
    options: CacheOptions,
    uniform: bool,
) -> _Plans:
    """Plans of the engines, and of the fastest of them with longer contexts."""
    asked = {
        "context": max(1, options.context_tokens),
        "prompt": options.prompt,
        "output": options.output,
        "cache_type": options.cache_type,
        "memory_gb": options.hbm_gb,
    }
    hot = None if uniform else hot_curve(work)
    engines = plans_of(weights, machine, hot, asked, options.engines)
    if not uniform:
        engines = with_counts(engines, work, weights[1].spec)
    if not engines or engines[0].problem:
        return engines, ()
    return engines, contexts_of(weights, machine, hot, asked, engines[0].engine)


def _with_bits(
    work: Workload, request: Request, options: CacheOptions
) -> tuple[Request, str, tuple[dict[str, Any], ...]]:
    """The request with each expert's bits, a line about them, and the integer program's row."""
    assert options.average_bits is not None
    worth = significance(work.trace, work.fit)
    loss = loss_table(worth, _errors(options.bit_errors, worth.shape))
    exact: tuple[dict[str, Any], ...] = ()
    if options.ilp:
        chosen, row = exact_bits(loss, options.average_bits)
        exact = (row,)
    else:
        chosen = choose_bits(loss, options.average_bits)
    line = _bits_line(chosen, loss, options.bit_errors)
    return replace(request, bits=chosen), line, exact


def _annotated(
    plan: CachePlan, predicted: dict[str, Any], work: Workload, options: CacheOptions
) -> CachePlan:
    """The plan with its held-out figures."""
    basis = predicted.pop("basis")
    more = {
        "num_tokens": work.held_out.num_tokens,
        "batch_size": options.batch_size,
        "context_tokens": options.context_tokens,
        "semantics": "atomic",
        "basis": basis,
    }
    return replace(plan, predicted=predicted | more | _prediction(work, plan))


def _made_from(
    trace: Trace, options: CacheOptions, machine: Machine, weights: Weights, uniform: bool
) -> dict[str, Any]:
    torch = torch_kernels(machine, weights.quantised)
    return {
        "trace_hash": trace.content_hash(),
        "seed": options.seed,
        "max_steps": options.max_steps,
        "expert_dtype": options.expert_dtype,
        "host": options.host,
        "machine": machine.name,
        "quant": options.quant,
        "kernels": "torch" if torch else "engine",
        "routing": "uniform, assumed" if uniform else "trace",
    }


def _prediction(work: Workload, plan: CachePlan) -> dict[str, float]:
    """How right the plan's predictor is on the held-out requests, mean over layers, whether or not
    an expert was in HBM already."""
    if plan.prefetch is None:
        return {}
    found = accuracy(work.guess(work.held_out, plan.prefetch), work.trace, work.held_out)
    return {
        "prefetch_precision": float(np.nanmean(found.precision)),
        "prefetch_recall": float(np.nanmean(found.recall)),
    }


def _errors(path: Path | None, shape: tuple[int, int]) -> Any:
    """[L, E, 3] quantisation errors from a .npy file, or the assumed ones."""
    if path is None:
        return assumed_errors(shape)
    try:
        if path.stat().st_size > MAX_ERROR_BYTES:
            raise FormatError(f"{path}: larger than {MAX_ERROR_BYTES} bytes", "give a smaller file")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "give a .npy file") from None
    try:
        table = read_npy(io.BytesIO(data), len(data), str(path))
    except FormatError as error:
        raise FormatError(error.cause, "write it with numpy.save") from None
    if table.shape != (*shape, 3) or table.dtype.kind not in "fiu":
        raise FormatError(
            f"{path}: {table.dtype} {table.shape}, wanted numbers of shape {(*shape, 3)}",
            "give the error of every layer's experts at 1, 2 and 3 bits",
        )
    if not np.isfinite(table).all() or table.min() < 0:
        raise FormatError(f"{path}: errors are negative or not finite", "give errors from 0 on")
    return table.astype(np.float64)


def _bits_line(chosen: Any, loss: Any, path: Path | None) -> str:
    count = np.bincount(chosen.ravel(), minlength=4)
    value = np.take_along_axis(loss, chosen[:, :, None] - 1, axis=2).sum()
    flat = loss[:, :, 1].sum()
    basis = "errors from file" if path else "errors assumed to fall by 4 a bit"
    return (
        f"bits: {count[1]} experts of 1, {count[2]} of 2, {count[3]} of 3, mean"
        f" {chosen.mean():.2f}; weighted error {value / max(1e-300, flat):.2f} of that of 2 bits"
        f" everywhere ({basis})"
    )
