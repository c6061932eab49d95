"""A plan beside what others would do with the same memory, and beside the offline bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.caching.curves import layer_curves
from moesim.caching.memory import MemoryBudget, memory_budget
from moesim.caching.planner import Planned, make_setup
from moesim.caching.rates import Rates
from moesim.caching.simulate import CacheSettings, model_choices, run_policy
from moesim.caching.slots import allocate_slots
from moesim.caching.timeline import Setup, Timeline, run_timeline
from moesim.caching.timeline_kernel import StepTimes
from moesim.caching.workload import Request, Workload, with_hbm
from moesim.errors import InfeasibleError
from moesim.types import FloatArray, IntArray

SWEEP_POINTS = 12


@dataclass(frozen=True, slots=True)
class Result:
    """Held-out figures of one way to use the memory. hit_rate: share of accesses found in HBM
    when their layer needed them (prefetched ones not counted); bytes_per_token over the link, of
    which wasted_bytes_per_token were prefetched for nothing."""

    name: str
    tokens_per_s: float
    hit_rate: float
    prefetch_hit_rate: float
    cpu_share: float
    bytes_per_token: float
    wasted_bytes_per_token: float


@dataclass(frozen=True, slots=True, eq=False)
class OfflineBound:
    """What no plan can beat on the held-out requests.

    hits: [slots + 1] of the optimum with bypass when all layers share one pool that starts with
    the best content; from it follow the hit rate and the speed. See `tokens_per_s`.
    """

    hits: IntArray
    accesses: int
    num_tokens: int
    gate_s: float
    gpu_s: float
    load_s: float
    cpu_s: float

    def hit_rate(self, num_slots: int) -> float:
        return float(self._hits(num_slots) / max(1, self.accesses))

    def tokens_per_s(self, num_slots: int) -> float:
        """Tokens over the least time there can be.

        Time is at least the GPU's own work: gates, plus every expert that the CPU does not
        compute. And each of the M misses takes the link (a transfer each, any time) or the CPU
        (which can work only outside the gates), so time is at least the smallest T with
        T / load + (T - gates) / cpu = M.
        """
        misses = self.accesses - self._hits(num_slots)
        own = (self.gate_s + self.gpu_s) / (1 + self.gpu_s / max(1, self.accesses) / self.cpu_s)
        served = misses * self.load_s
        if served > self.gate_s and np.isfinite(self.cpu_s):
            share = self.load_s / (self.load_s + self.cpu_s)
            served = share * (self.gate_s + misses * self.cpu_s)
        return self.num_tokens / max(own, served)

    def _hits(self, num_slots: int) -> int:
        return int(self.hits[min(num_slots, len(self.hits) - 1)])


def offline_bound(work: Workload, times: StepTimes, *, cpu: bool) -> OfflineBound:
    """The bound for every number of slots; `cpu`: whether the CPU may compute experts."""
    stream, events = work.held_out, work.held_out_events
    settings = CacheSettings("optimum", scope="model", warm=True)
    hits = run_policy(model_choices(work.trace, stream, work.frequency), settings).hits()
    tokens = np.diff(stream.indptr)
    return OfflineBound(
        hits,
        events.num_accesses,
        stream.num_tokens,
        float(times.gate_s[:, tokens].sum() + times.tail_s[tokens].sum()),
        float(times.gpu_s[events.count].sum()),
        float(times.load_s.min()),
        float(times.host_s.min() + times.cpu_s[1]) if cpu else float("inf"),
    )


def result(name: str, run: Timeline, expert_bytes: float) -> Result:
    return Result(
        name,
        run.tokens_per_s,
        run.hit_rate,
        float(run.staged.sum() / max(1, run.accesses)),
        float(run.on_cpu.sum() / max(1, run.accesses)),
        run.transfers_per_token * expert_bytes,
        float(run.wasted.sum() / max(1, run.num_tokens)) * expert_bytes,
    )


def baselines(work: Workload, memory: MemoryBudget, times: StepTimes) -> list[tuple[str, Setup]]:
    """What the same memory does in the hands of others.

    - LRU with equal slots in every layer, misses fetched (mixtral-offloading, vLLM's expert
      cache);
    - the most frequent experts of all layers pinned, the rest computed on the CPU or fetched,
      whichever ends sooner (Fiddler);
    - whole layers on the CPU, the fewest that let all others fit (llama.cpp's --n-cpu-moe).
    """
    num_layers, num = work.frequency.shape
    zero = np.zeros(num_layers, np.int64)
    equal = np.full(num_layers, memory.num_slots // num_layers)
    order = np.argsort(-work.frequency, axis=None, kind="stable")[: memory.num_slots]
    popular = np.bincount(order // num, minlength=num_layers)
    gpu_layers = memory.num_slots // num
    on_cpu = np.arange(num_layers) < num_layers - gpu_layers
    whole = np.where(on_cpu, 0, num).astype(np.int64)
    return [
        ("LRU, equal slots, misses fetched", make_setup(work, "lru", equal, zero)),
        (
            "most frequent pinned, CPU for the rest",
            make_setup(work, "static", popular, popular, "auto"),
        ),
        (
            f"first {int(on_cpu.sum())} layers on the CPU",
            make_setup(work, "static", whole, whole, "none", None, on_cpu),
        ),
    ]


def optimum_setup(work: Workload, memory: MemoryBudget, times: StepTimes) -> Setup:
    """The offline optimum with slots that suit it, on the held-out requests themselves."""
    settings = CacheSettings("optimum", warm=True)
    curves = layer_curves(
        work.trace, work.held_out, settings, work.frequency, times.load_s, pinning=False
    )
    slots, _ = allocate_slots(curves.cost, memory.num_slots)
    return make_setup(work, "optimum", slots, np.zeros(len(slots), np.int64))


def compare(work: Workload, planned: Planned, expert_bytes: float) -> list[Result]:
    """Baselines, the plan, and the offline optimum without prefetch, on held-out requests."""
    out = [
        result(name, _run(work, setup, planned.times), expert_bytes)
        for name, setup in baselines(work, planned.memory, planned.times)
    ]
    out.append(result("this plan", planned.timeline, expert_bytes))
    best = optimum_setup(work, planned.memory, planned.times)
    name = "offline optimum, misses fetched"
    out.append(result(name, _run(work, best, planned.times), expert_bytes))
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """Tokens per second against HBM: hbm_gb [N], slots [N], speed {name: [N]} (NaN where it does
    not fit)."""

    hbm_gb: FloatArray
    slots: IntArray
    speed: dict[str, FloatArray]


def sweep_hbm(
    work: Workload,
    rates: Rates,
    request: Request,
    planned: Planned,
    bound: OfflineBound,
    num_points: int = SWEEP_POINTS,
    progress: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """The plan's policy, prefetch and CPU use at other memory sizes, slots reallocated at each,
    from the least that the model needs to where all of it fits."""
    memory, plan = planned.memory, planned.plan
    fixed = (memory.dense_bytes + memory.kv_bytes + memory.workspace_bytes) / 1e9
    full = fixed + memory.num_experts * memory.slot_bytes / 1e9
    low = fixed + rates.model.top_k * memory.slot_bytes / 1e9
    sizes = np.unique(np.append(np.linspace(low * 1.001, full * 1.001, num_points), request.hbm_gb))
    guess = work.guess(work.held_out, plan.prefetch) if plan.prefetch else None
    staging = plan.prefetch.depth * plan.prefetch.width if plan.prefetch else 0
    speed: dict[str, list[float]] = {}
    slots = []
    for size in sizes:
        progress(f"{size:.3g} GB")
        here = with_hbm(request, float(size))
        try:
            budget = memory_budget(
                rates.model, here.hbm_gb, here.batch_size, here.context_tokens, memory.slot_bytes
            )
        except InfeasibleError:
            budget = None
        slots.append(budget.num_slots if budget else 0)
        row = {"this plan": float("nan"), "offline bound": float("nan")}
        if budget is not None:
            row["offline bound"] = bound.tokens_per_s(budget.num_slots)
            for name, setup in baselines(work, budget, planned.times):
                short = "whole layers on the CPU" if "layers on the CPU" in name else name
                row[short] = _run(work, setup, planned.times).tokens_per_s
            if staging < budget.num_slots:
                count, _ = allocate_slots(planned.curves.cost, budget.num_slots - staging)
                pins = np.take_along_axis(planned.curves.pins, count[:, None], axis=1)[:, 0]
                setup = make_setup(work, plan.policy, count, pins, plan.cpu, plan.prefetch)
                row["this plan"] = _run(work, setup, planned.times, guess).tokens_per_s
        for name, value in row.items():
            speed.setdefault(name, [float("nan")] * (len(slots) - 1)).append(value)
        for values in speed.values():
            if len(values) < len(slots):
                values.append(float("nan"))
    return Sweep(sizes, np.array(slots), {n: np.array(v) for n, v in speed.items()})


def _run(
    work: Workload,
    setup: Setup,
    times: StepTimes,
    guess: npt.NDArray[np.int16] | None = None,
) -> Timeline:
    return run_timeline(work.trace, work.held_out, setup, times, guess, work.held_out_events)
