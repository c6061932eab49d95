"""Simulating a plan whose experts do not all fit: caches, host links and NVMe in the event
simulation, on the requests that the caching plan was held out from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.caching.batching import Batching, pooled_stream, waits
from moesim.caching.events import Stream
from moesim.caching.group import hosted_experts
from moesim.caching.plan import CachePlan
from moesim.caching.planner import expert_sizes, setup_of_plan
from moesim.caching.policies import ONLINE
from moesim.caching.rates import HostSpec, Rates, rates_on, step_times, torch_kernels
from moesim.caching.workload import Request, Workload, make_workload
from moesim.cost.curves import weakest
from moesim.errors import FormatError, InputError, MismatchError
from moesim.jobs.simulate_request import SimRequest
from moesim.jobs.simulate_result import SimReport
from moesim.jobs.simulate_steps import build_models, speeds_of
from moesim.jobs.simulate_workload import check_plan
from moesim.model.names import WEIGHT_BYTES
from moesim.placement import Placement
from moesim.sim.offload.run import GpuCache, OffloadRun
from moesim.sim.prepare import Models
from moesim.sim.result import SimResult
from moesim.sim.timeline import StepTimeline
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import Trace
from moesim.types import Progress, shifted

DEFAULT_CONTEXT = 2048
RESIDENT = "resident"
"""In `compare`: the same steps with all experts in GPU memory."""


def simulate_offloaded(request: SimRequest, *, progress: Progress | None = None) -> SimReport:
    """Simulate the first steps of the decode stream through the caches of `request.caches`.

    `request.compare` names cache policies that are tried in the same slots, or RESIDENT. Raises
    MismatchError where the caches are of another model or number of GPUs, InputError for what
    cannot be combined with offloading.
    """
    _check_options(request)
    trace, cluster = request.trace, request.cluster
    placement = _placement(request)
    _check_caches(request)
    defaults: dict[str, str] = {}
    notices = _gpu_notices(request)
    first = request.caches[0]
    made = _made_with(first)
    batch, context = _workload(request, defaults, made)
    models, notes = build_models(replace(request, home_ranks=False), "decode", defaults)
    if cluster.num_gpus == 1:
        defaults.pop("all-to-all", None)
    asked = Request(
        hbm_gb=1.0,
        batch_size=batch,
        context_tokens=context,
        max_steps=int(made["max_steps"]),
        seed=int(made["seed"]),
    )
    work = make_workload(trace, asked)
    notices += [note for note in work.notes if note not in notices]
    stream, num_requests = _stream(request, work, asked)
    builder = _Builder(request, models, work, asked, stream, placement, made)
    jobs = {"plan": request.caches}
    for name in request.compare:
        jobs[name] = tuple(_changed(plan, name, trace) for plan in request.caches)
    timeline = None
    if request.timeline_steps:
        timeline = StepTimeline(models.links, models.num_gpus, request.timeline_steps)
    results: dict[str, SimResult] = {}
    for i, (name, plans) in enumerate(jobs.items()):
        tick = shifted(progress, i * stream.num_steps, len(jobs) * stream.num_steps)
        results[name] = builder.run(plans, timeline if i == 0 else None, tick)
        if request.batching is not None:
            results[name].extra["batching"] = _waits(
                request.batching, stream, results[name], builder.activated
            )
    rates = builder.rates(0)
    used = rates.notes if any(plan.nvme for plan in request.caches) else (
        *rates.notes[:3], *rates.notes[4:]
    )  # fmt: skip
    collectives = tuple(n for n in notes if n.startswith("collectives")) * (cluster.num_gpus > 1)
    details: dict[str, Any] = {}
    predicted = first.predicted.get("tokens_per_s")
    same = request.batching is None and first.predicted.get("batch_size") == batch
    same = same and first.gpu == cluster.gpus[0].name
    if cluster.num_gpus == 1 and same and isinstance(predicted, float):
        details["cache_plan_predicted"] = {
            "tokens_per_s": predicted,
            "hit_rate": first.predicted.get("hit_rate"),
            "num_tokens": first.predicted.get("num_tokens"),
        }
    return SimReport(
        request,
        results,
        models,
        "decode",
        batch,
        num_requests,
        defaults,
        tuple(notices),
        weakest(models.step.basis, rates.basis),
        (*collectives, *used),
        timeline,
        details,
    )


class _Builder:
    """From cache plans to runs over one stream."""

    def __init__(
        self,
        request: SimRequest,
        models: Models,
        work: Workload,
        asked: Request,
        stream: Stream,
        placement: Placement,
        made: dict[str, Any],
    ) -> None:
        self.request, self.models, self.work, self.asked = request, models, work, asked
        self.stream, self.placement, self.made = stream, placement, made
        self.hosted = hosted_experts(placement)
        self.activated = 0.0
        self._rates: dict[str, Rates] = {}

    def rates(self, gpu: int) -> Rates:
        """Rates of one GPU and its host, as the cache plan took them."""
        spec = self.request.cluster.gpus[gpu]
        if spec.name not in self._rates:
            model = self.request.model
            if self.made["expert_dtype"] is not None:
                model = replace(model, expert_dtype=self.made["expert_dtype"])
            at_once = self.placement.num_gpus // self.placement.num_nodes
            self._rates[spec.name] = rates_on(
                model,
                spec,
                self.request.cluster.machine,
                self.made["host"],
                quantised=self.made["engine"],
                num_gpus=at_once,
            )
        return self._rates[spec.name]

    def run(
        self, plans: tuple[CachePlan, ...], timeline: StepTimeline | None, tick: Progress | None
    ) -> SimResult:
        request = self.request
        speeds = speeds_of(request)
        run = OffloadRun(
            self.models,
            request.trace,
            self.stream,
            self.placement,
            [self._cache(g, plan) for g, plan in enumerate(plans)],
            None if speeds.nominal else speeds,
            timeline,
        )
        result = run.run(tick)
        self.activated = float(
            sum(m.counts.accesses for m in run.memories)
            / (self.stream.num_steps * request.trace.num_layers)
        )
        result.extra["offload"]["experts_per_layer_and_step"] = self.activated
        return result

    def _cache(self, gpu: int, plan: CachePlan) -> GpuCache:
        rates, work = self.rates(gpu), self.work
        held = np.array(plan.slots) + [len(pinned) for pinned in plan.pinned]
        if (held < self.hosted[gpu].sum(axis=1)).any():
            rates = rates.offloaded()
        bits = None if plan.bits is None else np.array(plan.bits, np.int64)
        sizes = expert_sizes(rates.model, replace(self.asked, bits=bits))
        nvme = plan.nvme_mask()
        times = step_times(rates, self.asked.batch_size, self.asked.context_tokens, sizes, nvme)
        if not self.request.home_ranks:
            times = times._replace(gate_s=0.0 * times.gate_s, tail_s=0.0 * times.tail_s)
        frequency = work.frequency * self.hosted[gpu]
        empty: npt.NDArray[np.int16] = np.zeros(
            (self.stream.num_steps, self.request.trace.num_layers, 0), np.int16
        )
        guess = work.guess(self.stream, plan.prefetch) if plan.prefetch is not None else empty
        return GpuCache(setup_of_plan(plan, frequency), times, rates, sizes, nvme, guess)


def _stream(request: SimRequest, work: Workload, asked: Request) -> tuple[Stream, int]:
    """The first steps, and the number of requests that they are drawn from."""
    index, _ = index_requests(request.trace, "decode")
    tune, held = split_requests(index, asked.seed)
    stream = work.held_out
    if request.batching is not None:
        if asked.batch_size > min(request.batching.pool, len(held.ids)):
            raise InputError(
                f"batches of {asked.batch_size} from a pool of {request.batching.pool} requests"
                f" ({len(held.ids)} held-out requests in all)",
                "give a larger `pool`, or smaller batches",
            )
        stream = pooled_stream(
            request.trace, held, asked.batch_size, request.batching, fit=tune, seed=asked.seed
        )
    num_steps = min(request.num_steps, stream.num_steps)
    stop = int(stream.indptr[num_steps])
    cut = Stream(
        stream.token_idx[:stop],
        stream.indptr[: num_steps + 1],
        stream.lane_idx[:stop],
        stream.starts[:stop],
        stream.num_lanes,
    )
    return cut, len(held.ids)


def _waits(
    batching: Batching, stream: Stream, result: SimResult, activated: float
) -> dict[str, Any]:
    """What holding requests back costs them, in milliseconds between two of their tokens."""
    waited = waits(stream, result.step_us * 1e-6) * 1e3
    return {
        "order": batching.order,
        "pool": batching.pool,
        "patience_steps": batching.patience,
        "experts_per_layer_and_step": activated,
        "wait_ms": {
            "mean": float(waited.mean()),
            "p50": float(np.percentile(waited, 50)),
            "p99": float(np.percentile(waited, 99)),
            "max": float(waited.max()),
        },
    }


def _changed(plan: CachePlan, name: str, trace: Trace) -> CachePlan:
    """The plan with another policy in its slots, or with everything in GPU memory."""
    if name != RESIDENT:
        return replace(plan, policy=name)
    return replace(
        plan,
        slots=(0,) * trace.num_layers,
        pinned=(tuple(range(trace.num_experts)),) * trace.num_layers,
        policy="static",
        cpu="none",
        cpu_layers=(),
        prefetch=None,
    )


def _check_options(request: SimRequest) -> None:
    """Raise InputError for what has no meaning with offloading."""
    asked = {
        "`fidelity` analytic": request.fidelity != "event",
        "`phase` prefill": request.phase == "prefill",
        f"`schedule` {request.schedule}": request.schedule != "sequential",
        "`chunks`": request.num_chunks is not None,
        "`reduce`": request.reduce != 1.0,
        "`capacity_factor`": request.drop is not None,
        "`drift`": request.drift,
        "faults": not request.faults.none,
        "rebalancing": request.rebalance is not None,
    }
    for name, wanted in asked.items():
        if wanted:
            raise InputError(
                f"{name} together with a cache plan",
                "simulate without it, or take all experts as in GPU memory: --no-offload",
            )
    known = (RESIDENT, *ONLINE)
    for name in request.compare:
        if name not in known:
            raise InputError(
                f"`compare` {name} together with a cache plan",
                f"compare with other caches: {', '.join(known)}; or use --no-offload",
            )
    if request.num_steps < 1:
        raise InputError(f"`steps` {request.num_steps}", "give at least 1")


def _check_caches(request: SimRequest) -> None:
    trace, cluster, caches = request.trace, request.cluster, request.caches
    if len(caches) != cluster.num_gpus:
        raise MismatchError(
            f"cache plans for {len(caches)} GPU{'s' if len(caches) > 1 else ''},"
            f" {cluster.num_gpus} GPUs to simulate",
            "use `gpus` as the plan was made for, or make a new plan",
        )
    have = (trace.meta.layer_ids, trace.num_experts)
    for plan in caches:
        names = (plan.model, request.model.name)
        if (plan.layer_ids, plan.num_experts) != have or (names[0] and names[0] != names[1]):
            raise MismatchError(
                f"the cache plan is for {names[0] or 'a model'} ({len(plan.layer_ids)} MoE layers,"
                f" {plan.num_experts} experts), the trace is of {names[1]} ({len(have[0])} layers,"
                f" {have[1]} experts)",
                "use a trace and a cache plan of the same model",
            )


def _placement(request: SimRequest) -> Placement:
    """The plan's placement, or all experts on one GPU. Raises MismatchError."""
    trace = request.trace
    if request.plan is not None:
        check_plan(request.plan, trace, request.cluster)
        return request.plan.placement
    table = np.tile(np.arange(trace.num_experts, dtype=np.int32), (trace.num_layers, 1))
    return Placement(table, 1, 1, trace.num_experts)


def _gpu_notices(request: SimRequest) -> list[str]:
    notes = []
    for g, plan in enumerate(request.caches):
        name = request.cluster.gpus[g].name
        if plan.gpu and plan.gpu != name:
            notes.append(f"the cache plan of GPU {g} was made for {plan.gpu}, this is {name}")
            break
    engine = request.caches[0].provenance.get("kernels") == "engine"
    machine = request.cluster.machine
    if engine and machine is None:
        raise MismatchError(
            "the cache plan was made for kernels of engines on a machine, and clusters are"
            " simulated with torch's",
            "name the machine with `cluster`, as rtx-4090+ddr5-2ch",
        )
    if not engine and not torch_kernels(machine):
        notes.append("the cache plan was made for torch's kernels, this machine has engines'")
    made_from = request.caches[0].provenance.get("trace_hash")
    if made_from is not None and made_from != request.trace.content_hash():
        notes.append("the cache plan was made from another trace than this one")
    return notes


def _made_with(plan: CachePlan) -> dict[str, Any]:
    """Seed, steps, expert type and host that a cache plan was made with. Raises FormatError."""
    raw = plan.provenance
    made: dict[str, Any] = {"engine": raw.get("kernels") == "engine"}
    for name, default in (("seed", 0), ("max_steps", Request(1.0).max_steps)):
        made[name] = raw.get(name, default)
        if type(made[name]) is not int or not 0 <= made[name] < 1 << 31:
            raise FormatError(f"provenance.{name} of the cache plan is not a number", _REMEDY)
    made["max_steps"] = max(1, made["max_steps"])
    made["expert_dtype"] = raw.get("expert_dtype")
    if made["expert_dtype"] not in (None, *WEIGHT_BYTES):
        raise FormatError("provenance.expert_dtype of the cache plan is unknown", _REMEDY)
    host = raw.get("host") or {}
    fields = {f for f in HostSpec.__dataclass_fields__ if f not in ("name", "kind", "source")}
    if not isinstance(host, dict) or any(
        key not in fields or isinstance(value, bool) or not isinstance(value, int | float)
        for key, value in host.items()
    ):
        raise FormatError("provenance.host of the cache plan is not of rates and sizes", _REMEDY)
    made["host"] = host
    return made


_REMEDY = "make it again with moesim cache"


def _workload(
    request: SimRequest, defaults: dict[str, str], made: dict[str, Any]
) -> tuple[int, int]:
    """Requests decoded at once, and tokens of context of each."""
    predicted = request.caches[0].predicted
    batch, context = request.batch_tokens, request.context_tokens
    if batch is None:
        planned = predicted.get("batch_size")
        batch = planned if type(planned) is int else request.cluster.num_gpus
        defaults["batch tokens"] = f"{batch} over all GPUs"
    if context is None:
        planned = predicted.get("context_tokens")
        context = planned if type(planned) is int else DEFAULT_CONTEXT
        defaults["context tokens"] = str(context)
    if not 1 <= batch <= 1 << 16:
        raise InputError(f"`batch_tokens` {batch}", "give the requests that decode together")
    if not 0 <= context <= 1 << 30:
        raise InputError(f"`context_tokens` {context}", "give at least 0")
    return batch, context
