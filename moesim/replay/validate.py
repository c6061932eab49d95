"""Replay plans on the ranks and write what was measured: `moesim-measured` JSON, version 1.

`results[i]` is one plan, batch and mode: `phase_us` [L][G][5] medians of `PHASES`, `layer_us` and
`step_us` medians with p10 and p90 (`step_us`: the slowest rank, no events within), `slot_rows`
[L][P] rows that each slot served, `messages` [L][G][G] rows from home rank to destination with own
rows on the diagonal. A layer's time is, repetition by repetition, that of the slower rank.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.files import atomic_write
from moesim.replay.cases import (
    Batch,
    NamedPlan,
    assign,
    build_batches,
    load_plans,
    pick_layers,
    replay_policy,
)
from moesim.replay.engine import PHASES, LayerTables, ReplayEngine
from moesim.replay.environment import describe
from moesim.replay.memory import memory_need, require_memory
from moesim.replay.numerics import TOLERANCE, NumericsError, check_layer, graph_deviation
from moesim.replay.ops import Kernels, choose
from moesim.replay.process import Context
from moesim.replay.routing import Assignment, Dedup, rank_work, send_matrix
from moesim.replay.shape import ExpertShape
from moesim.trace.format import Trace, load_token_trace
from moesim.types import FloatArray

FORMAT = "moesim-measured"
VERSION = 1
L2_MULTIPLE = 4
DEFAULT_L2_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ValidateOptions:
    """What to replay.

    tokens_per_rank: batch sizes; num_layers: layers of the trace, evenly spaced (0: all).
    modes: "graph" and "eager"; graph is dropped, with a note, where it does not work. Eager mode
    is timed on the first `num_eager_batches` batches of a size alone.
    weight_sets: copies of a layer's weights used in turn; 0 chooses so many that they exceed four
    times the L2. memory_limit_bytes: pretend that a rank has no more. time_limit_s: stop in good
    order after that long. checks: verify numerics and conservation of each plan and size.
    """

    tokens_per_rank: tuple[int, ...] = (128, 1024, 8192)
    num_batches: int = 2
    num_layers: int = 8
    modes: tuple[str, ...] = ("graph", "eager")
    num_eager_batches: int = 1
    dedup: Dedup = "gpu"
    policy: str | None = None
    phase: str = "auto"
    ffn: str = "auto"
    weight_sets: int = 0
    seed: int = 0
    budget_s: float = 0.3
    max_reps: int = 20
    memory_limit_bytes: int | None = None
    time_limit_s: float = 3600.0
    held_out: bool = True
    checks: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class _Unit:
    """One plan and batch, ready to run."""

    entry: NamedPlan
    batch: Batch
    assignments: list[Assignment]
    tables: list[LayerTables]


def validate(
    ctx: Context,
    plan_paths: Sequence[str],
    trace_path: str,
    shape: ExpertShape,
    options: ValidateOptions,
    out_path: str | None,
) -> dict[str, Any]:
    """Replay every plan on every batch; collective.

    Rank 0 writes `out_path` when all is done, marked `complete`; until then what there is stands
    beside it, in `out_path` with `.partial` added, which stays behind where a rank dies.

    Returns the record (complete on rank 0). Raises MismatchError for inputs that do not belong
    together, InputError when memory is short, NumericsError when a result is wrong.
    """
    started = time.monotonic()
    trace = load_token_trace(trace_path, "validate")
    plans = load_plans(plan_paths, shape, trace, ctx.num_ranks)
    layers = pick_layers(trace.num_layers, options.num_layers)
    batches: list[Batch] = []
    notes: list[str] = []
    for tokens in options.tokens_per_rank:
        some, notice = build_batches(
            trace,
            tokens,
            ctx.num_ranks,
            options.num_batches,
            phase=options.phase,
            seed=options.seed,
            held_out=options.held_out,
        )
        batches += some
        notes += [notice] if notice else []
    slots = max(entry.plan.placement.slots_per_gpu for entry in plans)
    num_sets = _weight_sets(ctx, shape, slots, options)
    need = memory_need(
        shape,
        slots,
        num_sets,
        max(int(np.bincount(b.home, minlength=ctx.num_ranks).max()) for b in batches),
        _busiest_rows(trace, plans, batches, layers, options),
        num_pools=3 if ctx.is_cuda and "graph" in options.modes else 1,
        on_gpu=ctx.is_cuda,
    )
    require_memory(ctx, need, options.memory_limit_bytes, f"replaying {shape.name}")
    kernels = choose(ctx, shape, ffn=options.ffn, graphs="graph" in options.modes)
    modes = [m for m in options.modes if m == "eager" or kernels.graphs] or ["eager"]
    if modes == ["eager"]:
        options = replace(options, num_eager_batches=options.num_batches)
    max_home = max(int(np.bincount(b.home).max()) for b in batches)
    engine = ReplayEngine(
        ctx, shape, slots, max_home, kernels, num_sets=num_sets, seed=options.seed
    )
    record = _header(ctx, trace, shape, plans, layers, options, kernels, num_sets, notes)
    record["memory_bytes_needed"] = need.total_bytes
    for batch in batches:
        for entry in plans:
            label = f"{shape.name}, {entry.name}, {batch.tokens_per_rank} tokens, {batch.phase}"
            left = options.time_limit_s - (time.monotonic() - started)
            if not ctx.agree(left > 0):
                record["notes"].append(f"time limit: stopped before {label} batch {batch.index}")
                return _finish(ctx, record, out_path)
            ctx.beat(f"preparing {label}")
            unit = _prepare(ctx, engine, trace, entry, batch, layers, options)
            if options.checks and batch.index == 0:
                ctx.beat(f"checking {label}")
                record["checks"].append(_check(engine, trace, unit, layers, kernels, options))
            for mode in modes:
                if mode == "eager" and batch.index >= options.num_eager_batches:
                    continue
                ctx.beat(f"timing {label}, {mode}")
                record["results"].append(_measure(engine, unit, mode, options))
            if ctx.is_cuda:
                _free_graph_pools()
            last = record["results"][-1]
            ctx.rank0_print(f"{label}: {sum(last['layer_us']['median']):.0f} us ({last['mode']})")
        _save(ctx, record, _aside(out_path))
    return _finish(ctx, record, out_path)


def _header(
    ctx: Context,
    trace: Trace,
    shape: ExpertShape,
    plans: list[NamedPlan],
    layers: npt.NDArray[np.int64],
    options: ValidateOptions,
    kernels: Kernels,
    num_sets: int,
    notes: list[str],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "environment": describe(ctx),
        "model": shape.to_json(),
        "trace": {
            "name": trace.path.replace("\\", "/").rsplit("/", 1)[-1],
            "sha256": trace.content_hash(),
            "model": trace.meta.model,
        },
        "plans": [
            {
                "name": p.name,
                "solver": p.plan.solver,
                "num_slots": p.plan.placement.num_slots,
                "replica_policy": options.policy or replay_policy(p.plan),
            }
            for p in plans
        ],
        "layers": layers.tolist(),
        "layer_ids": [trace.meta.layer_ids[i] for i in layers],
        "phases": list(PHASES),
        "options": asdict(options),
        "kernels": asdict(kernels),
        "weight_sets": num_sets,
        "complete": False,
        "notes": [*notes, *kernels.notes],
        "checks": [],
        "results": [],
    }


def _weight_sets(ctx: Context, shape: ExpertShape, slots: int, options: ValidateOptions) -> int:
    """Enough copies that reading all of them in turn leaves nothing in the L2."""
    if options.weight_sets > 0:
        return options.weight_sets
    if not ctx.is_cuda:
        return 1
    import torch

    l2 = getattr(torch.cuda.get_device_properties(ctx.device), "L2_cache_size", DEFAULT_L2_BYTES)
    return int(np.clip(-(-L2_MULTIPLE * l2 // (slots * shape.expert_bytes)), 2, 8))


def _busiest_rows(
    trace: Trace,
    plans: list[NamedPlan],
    batches: list[Batch],
    layers: npt.NDArray[np.int64],
    options: ValidateOptions,
) -> int:
    """Rows of the busiest rank, over all plans and layers, of the largest batch."""
    batch = max(batches, key=lambda b: len(b.token_idx))
    most = 0
    for entry in plans:
        num_gpus = entry.plan.placement.num_gpus
        for layer in layers:
            rows = assign(trace, batch, entry, int(layer), options.policy).slot_rows
            most = max(most, int(rows.reshape(num_gpus, -1).sum(axis=1).max()))
    return most


def _prepare(
    ctx: Context,
    engine: ReplayEngine,
    trace: Trace,
    entry: NamedPlan,
    batch: Batch,
    layers: npt.NDArray[np.int64],
    options: ValidateOptions,
) -> _Unit:
    assignments = [assign(trace, batch, entry, int(i), options.policy) for i in layers]
    tables = [engine.upload(rank_work(a, ctx.rank, options.dedup)) for a in assignments]
    return _Unit(entry, batch, assignments, tables)


def _check(
    engine: ReplayEngine,
    trace: Trace,
    unit: _Unit,
    layers: npt.NDArray[np.int64],
    kernels: Kernels,
    options: ValidateOptions,
) -> dict[str, Any]:
    label = f"plan {unit.entry.name}, {unit.batch.tokens_per_rank} tokens per rank"
    layer = int(layers[0])
    found = check_layer(
        engine,
        unit.tables[0],
        unit.assignments[0],
        np.asarray(trace.expert_ids[unit.batch.token_idx, layer]),
        unit.entry.plan.placement.physical_to_logical[layer],
        dedup=options.dedup,
        label=label,
    )
    out: dict[str, Any] = {
        "plan": unit.entry.name,
        "tokens_per_rank": unit.batch.tokens_per_rank,
        "layer": layer,
        **asdict(found),
        "tolerance": TOLERANCE[engine.shape.dtype],
    }
    if kernels.graphs:
        deviation = engine.ctx.max(graph_deviation(engine, unit.tables[0]))
        out["graph_deviation"] = deviation
        if not deviation <= TOLERANCE[engine.shape.dtype]:
            raise NumericsError(
                f"{label}: replayed from a CUDA graph the layer differs by {deviation:.3g}",
                "run with --mode eager, and report this",
            )
    return out


def _measure(
    engine: ReplayEngine, unit: _Unit, mode: str, options: ValidateOptions
) -> dict[str, Any]:
    ctx = engine.ctx
    phases, whole = engine.measure(
        unit.tables, mode, budget_s=options.budget_s, max_reps=options.max_reps
    )
    every = ctx.gather(phases.reshape(-1)).reshape(ctx.num_ranks, *phases.shape)
    steps = ctx.gather(whole)
    layer_us = every.sum(axis=3).max(axis=0)
    slowest = steps[np.median(steps, axis=1).argmax()]
    return {
        "plan": unit.entry.name,
        "tokens_per_rank": unit.batch.tokens_per_rank,
        "phase": unit.batch.phase,
        "batch": unit.batch.index,
        "mode": mode,
        "reps": len(phases),
        "phase_us": _rounded(np.median(every, axis=1).transpose(1, 0, 2)),
        "layer_us": _spread(layer_us),
        "step_us": _spread(slowest[:, None]),
        "slot_rows": [a.slot_rows.tolist() for a in unit.assignments],
        "messages": [send_matrix(a, options.dedup).tolist() for a in unit.assignments],
    }


def _spread(samples: FloatArray) -> dict[str, Any]:
    """Medians, p10 and p90 over the first axis."""
    low, middle, high = np.percentile(samples, [10, 50, 90], axis=0)
    return {"median": _rounded(middle), "p10": _rounded(low), "p90": _rounded(high)}


def _rounded(values: FloatArray) -> Any:
    return np.round(values, 2).tolist()


def _free_graph_pools() -> None:
    import torch

    torch.cuda.empty_cache()


def _save(ctx: Context, record: dict[str, Any], out_path: str | None) -> None:
    if ctx.rank == 0 and out_path is not None:
        atomic_write(out_path, json.dumps(record, separators=(",", ":"), allow_nan=False))


def _aside(out_path: str | None) -> str | None:
    return None if out_path is None else f"{out_path}.partial"


def _finish(ctx: Context, record: dict[str, Any], out_path: str | None) -> dict[str, Any]:
    record["complete"] = True
    ctx.barrier()
    _save(ctx, record, out_path)
    aside = _aside(out_path)
    if ctx.rank == 0 and aside is not None:
        Path(aside).unlink(missing_ok=True)
    ctx.barrier()
    return record
