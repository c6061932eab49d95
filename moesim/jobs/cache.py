"""`cache`: what stays in GPU memory when not all experts fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim import compat
from moesim.caching.bits import assumed_errors, choose_bits, loss_table, significance
from moesim.caching.compare import (
    OfflineBound,
    Sweep,
    compare,
    offline_bound,
    sweep_hbm,
)
from moesim.caching.compare import Result as Row
from moesim.caching.plan import CachePlan
from moesim.caching.planner import (
    Planned,
    Request,
    Workload,
    make_workload,
    plan_cache,
)
from moesim.caching.policies import POLICIES
from moesim.caching.predictors.base import accuracy
from moesim.caching.rates import HostSpec, Rates, build_rates
from moesim.cluster.load import load_gpu
from moesim.errors import FormatError, InputError
from moesim.figures import text_table
from moesim.jobs import inputs
from moesim.jobs.result import Result
from moesim.trace.format import Trace
from moesim.types import FloatArray

if TYPE_CHECKING:
    import pandas as pd

    from moesim.jobs.inputs import ModelLike, TraceLike

DEFAULT_GPU = "l40s"

MAX_ERROR_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What the user says; see `moesim cache --help`. `host` overrides fields of HostSpec."""

    gpu: str
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


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CacheJob(Result):
    """The plan and everything said about it; `notes` are for the user's eyes. `loss`: [L, E, 3]
    loss of each bit-width where experts have mixed precision, `average_bits` their budget. exact:
    integer programs beside the plan's own methods, where asked for."""

    request: Request
    plan: CachePlan
    planned: Planned
    results: tuple[Row, ...]
    bound: OfflineBound
    sweep: Sweep | None
    notes: tuple[str, ...]
    rate_notes: tuple[str, ...]
    basis: str
    bits: str | None
    rates: Rates
    loss: FloatArray | None
    average_bits: float
    exact: tuple[dict[str, Any], ...] = ()

    @property
    def bound_tokens_per_s(self) -> float:
        return self.bound.tokens_per_s(self.planned.memory.num_slots)

    @property
    def bound_hit_rate(self) -> float:
        return self.bound.hit_rate(self.planned.memory.num_slots)

    @property
    def own(self) -> Row:
        """The plan's own row of `results`."""
        return next(row for row in self.results if row.name == "this plan")

    def line(self) -> str:
        plan, row = self.plan, self.own
        return (
            f"{plan.model} on {plan.gpu}, {self.request.hbm_gb:g} GB: {row.tokens_per_s:,.1f}"
            f" tokens/s held out, {row.hit_rate:.1%} hits, policy {plan.policy}"
        )

    def summary(self) -> str:
        plan, memory = self.plan, self.planned.memory
        lines = [
            f"{plan.model} on {plan.gpu}: {self.request.hbm_gb:g} GB hold {memory.num_slots} of"
            f" {memory.num_experts} experts of {memory.slot_bytes / 1e6:.1f} MB beside"
            f" {memory.dense_bytes / 1e9:.2f} GB of dense weights, {memory.kv_bytes / 1e9:.2f} GB"
            f" of KV cache and {memory.workspace_bytes / 1e9:.1f} GB of workspace"
        ]
        if memory.everything_fits:
            lines.append("everything fits: all experts stay in HBM, no cache is needed")
        else:
            lines += _policy_lines(self)
        rows = [_cells(row) for row in self.results]
        bound = (f"{self.bound_tokens_per_s:.1f}", f"{self.bound_hit_rate:.1%}")
        rows.append(("offline bound (any policy)", *bound, "", "", ""))
        head = ("held-out requests", "tokens/s", "hits", "prefetched", "on CPU", "MB/token")
        lines.append(text_table(head, rows))
        if "prefetch_precision" in plan.predicted:
            wasted = plan.predicted["wasted_bytes_per_token"] / 1e6
            lines.append(
                f"prefetch: precision {plan.predicted['prefetch_precision']:.1%}, recall"
                f" {plan.predicted['prefetch_recall']:.1%}, {wasted:.1f} MB per token sent for"
                " nothing"
            )
        for check in self.exact:
            found = check["integer_program"]
            program = "" if found is None else f" integer program {found:.6g} ({check['status']}),"
            lines.append(
                f"{check['what']}: {check['own']:.6g} {check['unit']} as planned,{program} bound"
                f" {check['bound']:.6g}"
            )
        lines.append(f"weakest figure behind this: {self.basis}")
        return "\n".join([*lines, *(f"  {line}" for line in self.rate_notes)])

    def to_json(self) -> dict[str, Any]:
        data = self.to_dict()
        if self.exact:
            data["ilp"] = list(self.exact)
        return data

    def to_frame(self) -> pd.DataFrame:
        """One row per way of caching, held-out figures in columns."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.results]).set_index("name")

    def plot(self, path: str | Path | None = None) -> Any:
        """Tokens per second against memory; needs a run with `sweep`."""
        from moesim.draw.cache import plot_speed_by_memory

        if self.sweep is None:
            raise InputError("memory sizes were not swept", "ask with `sweep`")
        plan, asked = self.plan, self.request
        title = (
            f"{plan.model}, {plan.gpu}, batch {asked.batch_size},"
            f" {asked.context_tokens} tokens of context"
        )
        target = Path(path) if path is not None else None
        return plot_speed_by_memory(self.sweep, asked.hbm_gb, title, target)

    def save(self, path: str | Path) -> Path:
        """Write the cache plan file."""
        self.plan.save(Path(path))
        return Path(path)

    def to_dict(self) -> dict[str, Any]:
        """JSON data: the plan, the figures beside it, the sweep where one was made."""
        data: dict[str, Any] = {
            "format": "moesim-cache-run",
            "version": 1,
            "model": self.plan.model,
            "plan": self.plan.to_dict(),
            "results": [asdict(row) for row in self.results],
            "offline_bound": {
                "tokens_per_s": self.bound_tokens_per_s,
                "hit_rate": self.bound_hit_rate,
            },
            "candidates": [
                {"name": name, "tokens_per_s": speed} for name, speed in self.planned.candidates
            ],
            "basis": self.basis,
            "rates": list(self.rate_notes),
            "notes": list(self.notes),
        }
        if self.sweep is not None:
            data["sweep"] = {
                "hbm_gb": self.sweep.hbm_gb.tolist(),
                "slots": self.sweep.slots.tolist(),
                "tokens_per_s": {
                    name: [None if np.isnan(x) else float(x) for x in speed]
                    for name, speed in self.sweep.speed.items()
                },
            }
        return data


def _policy_lines(job: CacheJob) -> list[str]:
    plan, prefetch = job.plan, job.plan.prefetch
    pinned = sum(len(row) for row in plan.pinned)
    ahead = "none"
    if prefetch is not None:
        ahead = (
            f"{prefetch.predictor}, {prefetch.depth} layers ahead, at most {prefetch.width} per"
            f" layer of score {prefetch.min_score:g} or more"
        )
    lines = [
        f"policy {plan.policy}; {sum(plan.slots)} slots, {min(plan.slots)} to {max(plan.slots)} per"
        f" layer; {pinned} experts pinned; CPU"
        f" {'computes misses' if plan.cpu == 'auto' else 'unused'}; prefetch {ahead}"
    ]
    if plan.nvme:
        lines.append(f"{sum(map(len, plan.nvme))} experts live on NVMe, the rest in DRAM")
    return [*lines, job.bits] if job.bits is not None else lines


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.tokens_per_s:.1f}",
        f"{row.hit_rate:.1%}",
        f"{row.prefetch_hit_rate:.1%}",
        f"{row.cpu_share:.1%}",
        f"{row.bytes_per_token / 1e6:.1f}",
    )


def cache(
    trace: TraceLike,
    *,
    model: ModelLike | None = None,
    gpu: str = DEFAULT_GPU,
    hbm: float | None = None,
    batch: int = 1,
    context: int = 2048,
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
    progress: Callable[[str], None] = lambda _: None,
) -> CacheJob:
    """Plan expert offloading for one GPU: slots per layer, pinned experts, policy, prefetch, CPU.

    A quarter of the trace's requests gives frequencies and fits predictors, a quarter chooses, and
    every figure comes from the other half. sweep: other memory sizes too, for the picture.
    progress(text) says what is being done. The other names and defaults are those of
    `moesim cache`. Raises MismatchError, InputError, UnknownNameError, and InfeasibleError where
    the memory does not hold the least.
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
        gpu=gpu,
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
    )
    job = run_cache(inputs.token_trace_of(trace, "moesim cache"), options, progress)
    if ilp:
        from moesim.jobs.cache_exact import solve_exactly

        progress("integer program")
        job = replace(job, exact=tuple(solve_exactly(job)))
    return job


def run_cache(
    trace: Trace, options: CacheOptions, progress: Callable[[str], None] = lambda _: None
) -> CacheJob:
    """Plan, compare with others and with the bound, and, if asked, sweep the memory size."""
    model = inputs.model_required(options.model, trace.meta.model)
    if options.expert_dtype is not None:
        model = replace(model, expert_dtype=options.expert_dtype)
    compat.trace_fits_model(trace.meta, model, whole=True)
    gpu = load_gpu(options.gpu)
    host = HostSpec()
    if options.host:
        changed = ", ".join(sorted(options.host))
        host = replace(
            host, **options.host, kind="assumed", source=f"given: {changed}; {host.source}"
        )
    rates = build_rates(model, gpu, host)
    hbm = gpu.hbm_gb if options.hbm_gb is None else options.hbm_gb
    request = Request(
        hbm_gb=hbm,
        batch_size=options.batch_size,
        context_tokens=options.context_tokens,
        policy=options.policy,
        prefetch=options.prefetch,
        cpu=options.cpu,
        max_steps=options.max_steps,
        seed=options.seed,
    )
    notes = [
        f"{name} needs the future: this is a bound, not a plan that a server can run"
        for name in (options.policy, options.prefetch)
        if name == "oracle" or (name in POLICIES and POLICIES[name].offline)
    ]
    if hbm > gpu.hbm_gb:
        notes.append(f"{hbm:g} GB are more than the {gpu.hbm_gb:g} GB of one {gpu.name}")
    progress("requests and steps")
    work = make_workload(trace, request)
    bits_line, loss = None, None
    if options.average_bits is not None:
        worth = significance(trace, work.fit)
        loss = loss_table(worth, _errors(options.bit_errors, worth.shape))
        chosen = choose_bits(loss, options.average_bits)
        request = replace(request, bits=chosen)
        bits_line = _bits_line(chosen, loss, options.bit_errors)
    planned = plan_cache(work, rates, request, progress)
    expert_bytes = float(planned.memory.slot_bytes)
    progress("baselines and bound")
    results = compare(work, planned, expert_bytes)
    bound = offline_bound(work, planned.times, cpu=planned.plan.cpu == "auto")
    sweep = None
    if options.sweep:
        progress("memory sizes")
        sweep = sweep_hbm(work, rates, request, planned, bound)
    own = next(row for row in results if row.name == "this plan")
    slots = planned.memory.num_slots
    if slots < trace.num_layers * trace.top_k and not planned.memory.everything_fits:
        notes.append(
            f"{slots} slots are fewer than one token's {trace.num_layers * trace.top_k} experts:"
            " most experts are moved or computed on the CPU for every token"
        )
    plan = replace(
        planned.plan,
        predicted=asdict(own)
        | {
            "bound_tokens_per_s": bound.tokens_per_s(slots),
            "bound_hit_rate": bound.hit_rate(slots),
            "num_tokens": work.held_out.num_tokens,
            "batch_size": options.batch_size,
            "context_tokens": options.context_tokens,
            "semantics": "atomic",
            "basis": rates.basis,
            **_prediction(work, planned.plan),
        },
        provenance={
            "trace_hash": trace.content_hash(),
            "seed": options.seed,
            "max_steps": options.max_steps,
            "expert_dtype": options.expert_dtype,
            "host": options.host,
        },
    )
    return CacheJob(
        request,
        plan,
        planned,
        tuple(results),
        bound,
        sweep,
        (*notes, *work.notes),
        rates.notes if planned.plan.nvme else rates.notes[:3] + rates.notes[4:],
        rates.basis,
        bits_line,
        rates,
        loss,
        options.average_bits or 0.0,
    )


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
        table = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "give a .npy file") from None
    except (ValueError, EOFError):
        raise FormatError(
            f"{path}: not a .npy file of numbers", "write it with numpy.save"
        ) from None
    if table.shape != (*shape, 3) or table.dtype.kind not in "fiu":
        raise FormatError(
            f"{path}: {table.dtype} {table.shape}, wanted numbers of shape {(*shape, 3)}",
            "give the error of every layer's experts at 1, 2 and 3 bits",
        )
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
