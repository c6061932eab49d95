"""The closed form of the sequential schedule, batch by batch (C5)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moesim.cost.routing import home_ranks
from moesim.placement import Placement
from moesim.sim.capacity import Drops
from moesim.sim.engine import CATEGORIES, COMPUTE_CATEGORIES
from moesim.sim.prepare import Models, Prepared, limited, prepare
from moesim.sim.result import SimResult
from moesim.trace.batches import Batches
from moesim.trace.format import Trace
from moesim.types import Progress

MAX_CELLS = 20_000_000
MAX_BATCHES = 16


def run_analytic(
    models: Models,
    trace: Trace,
    batches: Batches,
    placement: Placement,
    *,
    workers: int = 2,
    progress: Progress | None = None,
) -> SimResult:
    """Cost every batch of `batches` in closed form; the event simulation of the sequential
    schedule gives the same figures when nothing else happens (INV-8).

    workers: threads; the compiled parts run side by side, and the result does not depend on it.
    """
    gpus, layers = models.num_gpus, trace.num_layers
    fits = MAX_CELLS // (layers * max(gpus * gpus, models.links.num_links))
    each = max(1, min(fits, MAX_BATCHES))
    starts = range(0, len(batches), each)

    def some(start: int) -> tuple[SimResult, Drops]:
        stop = min(start + each, len(batches))
        span = slice(int(batches.indptr[start]), int(batches.indptr[stop]))
        part = Batches(
            batches.token_idx[span],
            batches.indptr[start : stop + 1] - batches.indptr[start],
            batches.phase,
            batches.batch_tokens,
        )
        home = home_ranks(trace, part, models.num_homes)
        kept, part, dropped = limited(models, trace, part, home, placement)
        return closed_form(models, prepare(models, kept, part, placement, home)), dropped

    parts: list[SimResult] = []
    drops = Drops()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for result, dropped in pool.map(some, starts):
            parts.append(result)
            drops = drops + dropped
            if progress is not None:
                progress(sum(len(p.step_us) for p in parts), len(batches))
    result = joined(parts)
    if models.drop is not None:
        result.extra["drops"] = drops.to_json()
    return result


def closed_form(models: Models, ready: Prepared) -> SimResult:
    """The figures of every batch of `ready`."""
    home = ready.home
    experts = ready.expert_us
    num_layers, gpus = experts.shape[1:]
    before = home.attention_us + (home.gate_us + home.shared_us + home.descend_us)[:, None, :]
    before[:, 0] += home.dense_us
    before[:, 1:] += home.ascend_us[:, None, :]
    dispatch = sum((s.us for s in ready.dispatch), np.zeros(experts.shape[:2])).sum(axis=1)
    combine = sum((s.us for s in ready.combine), np.zeros(experts.shape[:2])).sum(axis=1)
    step = before.max(axis=2).sum(axis=1) + experts.max(axis=2).sum(axis=1) + dispatch + combine
    step += home.ascend_us.max(axis=1)
    of_gpu = {
        "attention": home.attention_us.sum(axis=1),
        "gate": home.gate_us * num_layers,
        "shared": home.shared_us * num_layers,
        "dense": home.dense_us + num_layers * (home.descend_us + home.ascend_us),
        "compute": experts.sum(axis=1),
    }
    kernels = sum((of_gpu[name] for name in COMPUTE_CATEGORIES), np.zeros((len(step), gpus)))
    parts = np.zeros((len(step), len(CATEGORIES)))
    for i, name in enumerate(CATEGORIES):
        if name in of_gpu:
            parts[:, i] = of_gpu[name].mean(axis=1)
    parts[:, CATEGORIES.index("dispatch")] = dispatch
    parts[:, CATEGORIES.index("combine")] = combine
    link_bytes = np.zeros(models.links.num_links)
    busy = np.zeros(models.links.num_links)
    for stage in (*ready.dispatch, *ready.combine):
        carried = stage.link_bytes.sum(axis=(0, 1))
        link_bytes += carried
        busy += carried * stage.us_per_byte
    return SimResult(
        fidelity="analytic",
        schedule="sequential",
        exchange=models.exchange_name,
        step_us=step,
        parts_us=parts,
        waiting_us=np.maximum(step - parts.sum(axis=1), 0.0),
        overlapped_us=np.zeros(len(step)),
        gpu_busy=kernels / np.maximum(step, 1e-300)[:, None],
        link_bytes=link_bytes,
        link_busy_us=busy,
        tokens=ready.routed.num_tokens,
        balancedness=np.nanmean(models.balancedness(ready.routed.gpu_tokens(gpus)), axis=1),
        elapsed_us=float(step.sum()),
    )


def joined(parts: list[SimResult]) -> SimResult:
    """Results of consecutive steps as one."""
    if len(parts) == 1:
        return parts[0]
    per_step = (
        "step_us", "parts_us", "waiting_us", "overlapped_us", "gpu_busy", "tokens", "balancedness",
    )  # fmt: skip
    stacked: dict[str, Any] = {
        name: np.concatenate([getattr(p, name) for p in parts]) for name in per_step
    }
    first = parts[0]
    return SimResult(
        fidelity=first.fidelity,
        schedule=first.schedule,
        exchange=first.exchange,
        link_bytes=sum((p.link_bytes for p in parts), np.zeros_like(first.link_bytes)),
        link_busy_us=sum((p.link_busy_us for p in parts), np.zeros_like(first.link_busy_us)),
        elapsed_us=sum(p.elapsed_us for p in parts),
        num_events=sum(p.num_events for p in parts),
        **stacked,
    )
