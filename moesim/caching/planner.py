"""From a workload, a GPU's rates and a memory size to a caching plan with held-out figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moesim import compat
from moesim.caching.curves import LayerCurves, layer_curves
from moesim.caching.memory import MemoryBudget, check_host, memory_budget
from moesim.caching.plan import CachePlan, Prefetch
from moesim.caching.policies import ONLINE, get_policy
from moesim.caching.predictors.base import predict
from moesim.caching.predictors.registry import make_predictor, usable_predictors
from moesim.caching.rates import Rates, expert_bytes_of_bits, step_times
from moesim.caching.simulate import CacheSettings
from moesim.caching.slots import allocate_slots, allocate_tiers
from moesim.caching.timeline import CpuMode, Setup, Timeline, run_timeline
from moesim.caching.timeline_kernel import StepTimes
from moesim.caching.workload import Request, Workload, candidates, experts_per_event
from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.model.names import ModelSpec
from moesim.trace.format import Trace
from moesim.types import FloatArray, IntArray

DEPTHS = (1, 2, 4)
MIN_SCORES = (0.05, 0.2, 0.4)
WORTH_IT = 1.01
"""A prefetcher is used only if it is this much faster than none on the select requests."""
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A plan with what it was chosen from: `timeline` is its own held-out run, `candidates` the
    (policy, prefetch, CPU) tried on the select requests with their tokens per second."""

    plan: CachePlan
    timeline: Timeline
    times: StepTimes
    memory: MemoryBudget
    curves: LayerCurves
    candidates: tuple[tuple[str, float], ...]


def num_stages(trace: Trace, request: Request) -> int:
    """How often `plan_cache` calls `progress` at most: fewer times where everything fits."""
    policies = len(ONLINE) if request.policy == "auto" else 1
    names = usable_predictors(trace) if request.prefetch == "auto" else (request.prefetch,)
    depths = sum(depth < trace.num_layers for depth in DEPTHS)
    return policies + 2 + (0 if request.prefetch == "none" else len(names) * depths)


def plan_cache(
    work: Workload, rates: Rates, request: Request, progress: Progress = lambda _: None
) -> Planned:
    """The caching plan for `request`; see the module for how its parts are chosen.

    Raises MismatchError, InputError, InfeasibleError (does not fit) and UnknownNameError.
    """
    trace, model = work.trace, rates.model
    compat.trace_fits_model(trace.meta, model, whole=True)
    _check_names(trace, request)
    shape = (trace.num_layers, trace.num_experts)
    if request.bits is not None and request.bits.shape != shape:
        raise InputError(f"bits have shape {request.bits.shape}, wanted {shape}", "check them")
    sizes = expert_sizes(model, request)
    slot_bytes = float(sizes.max())
    memory = memory_budget(
        model,
        request.hbm_gb,
        request.num_home,
        request.context_tokens,
        slot_bytes,
        work.num_hosted,
    )
    in_dram = check_host(work.num_hosted, rates.host.dram_gb, rates.host.nvme_gb, slot_bytes)
    nvme = np.zeros(shape, bool)
    if in_dram < memory.num_experts:
        order = np.argsort(-work.frequency, axis=None, kind="stable")
        nvme.ravel()[order[in_dram : work.num_hosted]] = True
    if memory.everything_fits:
        return _resident(work, rates, request, memory, _times(rates, request, sizes, nvme))
    rates = rates.offloaded()
    times = _times(rates, request, sizes, nvme)
    names = ONLINE if request.policy == "auto" else (get_policy(request.policy).name,)
    curves: dict[str, LayerCurves] = {}
    for name in names:
        progress(f"miss curves of {name}")
        settings = CacheSettings(name, warm=True)
        curves[name] = layer_curves(
            trace, work.select, settings, work.frequency, miss_cost(request, times)
        )
    totals = {n: allocate_slots(c.cost, memory.num_slots)[1] for n, c in curves.items()}
    policy = min(totals, key=lambda n: (totals[n], names.index(n)))
    chosen = curves[policy]
    if nvme.any():
        near, far = tier_costs(rates, request)
        tiers = allocate_tiers(chosen.expert_misses, near, far, memory.num_slots, in_dram)
        nvme = tiers[1] if work.hosted is None else tiers[1] & work.hosted
        times = _times(rates, request, sizes, nvme)
        cost = np.einsum("lce,le->lc", chosen.expert_misses, miss_cost(request, times))
        chosen = replace(chosen, cost=cost)
    return _choose(work, rates, request, memory, times, policy, chosen, nvme, progress)


def _times(
    rates: Rates, request: Request, sizes: FloatArray, nvme: npt.NDArray[np.bool_]
) -> StepTimes:
    share = request.num_home / request.batch_size
    return step_times(
        rates, request.batch_size, request.context_tokens, sizes, nvme, home_share=share
    )


def expert_sizes(model: ModelSpec, request: Request) -> FloatArray:
    """[L, E] bytes of each expert."""
    if request.bits is not None:
        return expert_bytes_of_bits(model, request.bits)
    return np.full((model.num_moe_layers, model.num_experts), float(model.expert_bytes()))


def tier_costs(rates: Rates, request: Request) -> tuple[FloatArray, FloatArray]:
    """[L, E] seconds of one miss of each expert if it lives in DRAM, and if on NVMe."""
    sizes = expert_sizes(rates.model, request)
    near, far = (
        step_times(rates, 1, 0, sizes, np.full(sizes.shape, on_nvme)) for on_nvme in (False, True)
    )
    return miss_cost(request, near), miss_cost(request, far)


def make_setup(
    work: Workload,
    policy: str,
    slots: IntArray,
    pins: IntArray,
    cpu: str = "none",
    prefetch: Prefetch | None = None,
    cpu_layers: npt.NDArray[np.bool_] | None = None,
) -> Setup:
    """Setup with slots [L] in all of which the `pins` [L] most frequent experts are pinned."""
    shape = work.frequency.shape
    order = np.argsort(-work.frequency, axis=1, kind="stable")
    pinned = np.zeros(shape, bool)
    for layer in range(shape[0]):
        pinned[layer, order[layer, : pins[layer]]] = True
    off = np.zeros(shape[0], bool) if cpu_layers is None else cpu_layers
    mode: CpuMode = "auto" if cpu == "auto" else "none"
    depth, width = (prefetch.depth, prefetch.width) if prefetch else (0, 0)
    return Setup(slots - pins, pinned, off, work.frequency, policy, mode, depth, width)


def setup_of_plan(plan: CachePlan, frequency: FloatArray) -> Setup:
    """The timeline's setup of a plan."""
    return Setup(
        np.array(plan.slots, np.int64),
        plan.pinned_mask(),
        np.isin(plan.layer_ids, plan.cpu_layers),
        frequency,
        plan.policy,
        plan.cpu,
        plan.prefetch.depth if plan.prefetch else 0,
        plan.prefetch.width if plan.prefetch else 0,
    )


def _choose(
    work: Workload,
    rates: Rates,
    request: Request,
    memory: MemoryBudget,
    times: StepTimes,
    policy: str,
    curves: LayerCurves,
    nvme: npt.NDArray[np.bool_],
    progress: Progress,
) -> Planned:
    """Try CPU and prefetch on the select requests; run the best on the held-out ones."""
    trace = work.trace
    tried: list[tuple[str, float, Setup, Prefetch | None]] = []
    allocated: dict[int, IntArray] = {}

    def attempt(cpu: str, prefetch: Prefetch | None, guess: npt.NDArray[np.int16] | None) -> float:
        staging = prefetch.depth * prefetch.width if prefetch else 0
        if staging not in allocated:
            budget = memory.num_slots - staging
            allocated[staging] = allocate_slots(curves.cost, budget)[0]
        slots = allocated[staging]
        pins = np.take_along_axis(curves.pins, slots[:, None], axis=1)[:, 0]
        setup = make_setup(work, policy, slots, pins, cpu, prefetch)
        run = run_timeline(trace, work.trial, setup, times, guess, work.trial_events)
        name = f"{policy}, cpu {_CPU_NAMES[cpu]}, prefetch {label(prefetch)}"
        tried.append((name, run.tokens_per_s, setup, prefetch))
        return run.tokens_per_s

    progress("timeline without prefetch")
    modes = {"auto": ("none", "auto"), "on": ("auto",)}.get(request.cpu, ("none",))
    bare = {cpu: attempt(cpu, None, None) for cpu in modes}
    cpu = max(bare, key=lambda mode: bare[mode])
    best = max(tried, key=lambda t: t[1])
    names = usable_predictors(trace) if request.prefetch == "auto" else (request.prefetch,)
    needed = experts_per_event(work.trial_events)
    widths = sorted({max(1, needed // 4), max(1, needed // 2), needed})
    for name in names if request.prefetch != "none" else ():
        for depth in DEPTHS:
            if depth >= trace.num_layers:
                continue
            progress(f"prefetch by {name}, {depth} ahead")
            guess = predict(work.predictor(name, depth), trace, work.trial, candidates(work))
            for least in MIN_SCORES:
                experts = guess.above(least)
                for width in widths:
                    if depth * width <= memory.num_slots // 2:
                        attempt(cpu, Prefetch(name, depth, width, least), experts)
    fetched = max((t for t in tried if t[3] is not None), key=lambda t: t[1], default=None)
    if fetched and (request.prefetch != "auto" or fetched[1] > WORTH_IT * best[1]):
        best = fetched
    _, _, setup, prefetch = best
    progress("held-out requests")
    plan = CachePlan(
        model=rates.model.name,
        gpu=rates.gpu.name,
        num_experts=trace.num_experts,
        layer_ids=trace.meta.layer_ids,
        slots=tuple(int(x) for x in setup.slots),
        pinned=_rows(setup.pinned),
        policy=policy,
        cpu=setup.cpu,
        prefetch=prefetch,
        bits=None if request.bits is None else tuple(map(tuple, request.bits.tolist())),
        nvme=tuple(tuple(int(e) for e in np.flatnonzero(row)) for row in nvme)
        if nvme.any()
        else (),
        memory=memory.to_dict(),
    )
    run = evaluate(work, plan, times)
    return Planned(plan, run, times, memory, curves, tuple((n, s) for n, s, _, _ in tried))


def evaluate(work: Workload, plan: CachePlan, times: StepTimes) -> Timeline:
    """The plan's run on the held-out requests; its predictor is fitted on the fit requests."""
    guess = work.guess(work.held_out, plan.prefetch) if plan.prefetch else None
    setup = setup_of_plan(plan, work.frequency)
    return run_timeline(work.trace, work.held_out, setup, times, guess, work.held_out_events)


def _resident(
    work: Workload, rates: Rates, request: Request, memory: MemoryBudget, times: StepTimes
) -> Planned:
    """Everything fits: pin all experts."""
    trace = work.trace
    every = work.hosted
    if every is None:
        every = np.ones((trace.num_layers, trace.num_experts), bool)
    plan = CachePlan(
        model=rates.model.name,
        gpu=rates.gpu.name,
        num_experts=trace.num_experts,
        layer_ids=trace.meta.layer_ids,
        slots=(0,) * trace.num_layers,
        pinned=_rows(every),
        policy="static",
        bits=None if request.bits is None else tuple(map(tuple, request.bits.tolist())),
        memory=memory.to_dict(),
    )
    zero = np.zeros((trace.num_layers, trace.num_experts + 1))
    curves = LayerCurves(
        zero, zero, zero.astype(np.int64), np.zeros((*zero.shape, trace.num_experts))
    )
    return Planned(plan, evaluate(work, plan, times), times, memory, curves, ())


def miss_cost(request: Request, times: StepTimes) -> FloatArray:
    """[L, E] seconds of one miss: the transfer, or what remains of it when the CPU takes its
    share of the misses (two servers at once)."""
    load = times.load_s
    if request.cpu == "off":
        return load
    cpu = times.host_s + float(times.cpu_s[1])
    return np.asarray(1.0 / (1.0 / load + 1.0 / cpu))


_CPU_NAMES = {"none": "off", "auto": "on"}


def label(prefetch: Prefetch | None) -> str:
    """A short name: predictor, layers ahead, experts per layer, least score."""
    if prefetch is None:
        return "none"
    return f"{prefetch.predictor} {prefetch.depth}x{prefetch.width}>{prefetch.min_score:g}"


def _rows(mask: npt.NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(e) for e in np.flatnonzero(row)) for row in mask)


def _check_names(trace: Trace, request: Request) -> None:
    if request.policy != "auto":
        get_policy(request.policy)
    if request.cpu not in ("auto", "on", "off"):
        raise UnknownNameError("cpu mode", request.cpu, ("auto", "on", "off"))
    if request.prefetch not in ("auto", "none"):
        make_predictor(request.prefetch, 1)
        if request.prefetch not in (*usable_predictors(trace), "neural", "oracle"):
            raise MismatchError(
                f"the trace has no token_ids, which the predictor {request.prefetch} needs",
                "choose another predictor, or capture the trace with token ids",
            )
