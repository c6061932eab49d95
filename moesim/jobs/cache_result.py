"""The result of `cache`: the plan, its rivals and the bound."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.caching.compare import (
    OfflineBound,
    Sweep,
)
from moesim.caching.compare import Result as Row
from moesim.caching.plan import CachePlan
from moesim.caching.planner import Planned
from moesim.caching.rates import Rates
from moesim.caching.workload import Request
from moesim.cluster.machine import Machine
from moesim.errors import InputError
from moesim.figures import text_table
from moesim.jobs.cache_engines import engine_lines
from moesim.jobs.result import Result
from moesim.offloading.rates import doubts
from moesim.offloading.task import EnginePlan

if TYPE_CHECKING:
    import pandas as pd

    from moesim.draw import Picture


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CacheJob(Result):
    """The plan and everything said about it; `notes` are for the user's eyes. exact: integer
    programs beside the plan's own methods, where asked for; those `in_plan` decided for it.
    engines: the best plan of each on `machine`, the fastest first; longer: the fastest with more
    context; uniform: no trace was given."""

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
    exact: tuple[dict[str, Any], ...] = ()
    machine: Machine | None = None
    engines: tuple[EnginePlan, ...] = ()
    longer: tuple[EnginePlan, ...] = ()
    uniform: bool = False

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

    @property
    def best_engine(self) -> EnginePlan | None:
        """The fastest engine that runs the model; None where none was asked or runs it."""
        return next((plan for plan in self.engines if not plan.problem), None)

    def line(self) -> str:
        plan, row = self.plan, self.own
        best = self.best_engine
        if best is not None and self.machine is not None:
            return (
                f"{plan.model} on {self.machine.name}: {best.engine}"
                f" {best.decode_tokens_per_s:,.1f} tokens/s; a dynamic cache"
                f" {row.tokens_per_s:,.1f}"
            )
        return (
            f"{plan.model} on {plan.gpu}, {self.request.hbm_gb:g} GB: {row.tokens_per_s:,.1f}"
            f" tokens/s held out, {row.hit_rate:.1%} hits, policy {plan.policy}"
        )

    def summary(self) -> str:
        plan, memory = self.plan, self.planned.memory
        lines = []
        if self.engines and self.machine is not None:
            basis = "uniform routing (assumed)" if self.uniform else "the trace's routing"
            lines += [
                f"{plan.model} on {self.machine.name}, {self.request.context_tokens:,} tokens of"
                f" context, {basis}; predicted from assumed figures",
                *doubts(self.machine),
                *engine_lines(self.engines, self.longer, self.own.tokens_per_s),
                "",
                "Dynamic caches",
            ]
        lines += [
            f"{plan.model} on {plan.gpu}: {self.request.hbm_gb:.4g} GB hold {memory.num_slots} of"
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
            own, ours = ("greedy", " in the plan") if check["in_plan"] else ("as planned", "")
            program = "" if found is None else f" integer program {found:.6g} ({check['status']})"
            lines.append(
                f"{check['what']}: {check['own']:.6g} {check['unit']} {own},{program}{ours}, bound"
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

    def picture(self) -> Picture:
        """Tokens per second against memory; needs a run with `sweep`."""
        from moesim.jobs.pictures import cache_picture

        if self.sweep is None:
            raise InputError("memory sizes were not swept", "ask with `sweep`")
        return cache_picture(self)

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
            "machine": None if self.machine is None else self.machine.name,
            "engines": self.plan.engines,
            "more_context": [
                {
                    "context": plan.settings["context"],
                    "tokens_per_s": plan.decode_tokens_per_s,
                    "gpu_share": plan.gpu_share,
                }
                for plan in self.longer
            ],
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
