"""Measure this machine: collectives, expert FFN, row gathers, host copies, launches.

The result is `moesim-calibration-raw` JSON, version 1: one list of rows a section, each row with
`us`, `p10_us`, `p90_us` of the slowest rank. `moesim calibrate` turns it into the calibration YAML
that clusters name. Sections run in order of need and a time limit cuts the last ones, with a note.
Buffers are rotated so that repeated calls do not find their data in the L2.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesim.errors import InputError, UnknownNameError
from moesim.files import atomic_write
from moesim.replay import calibrate_experts, calibrate_ffn, calibrate_links
from moesim.replay.engine import ReplayEngine
from moesim.replay.environment import describe
from moesim.replay.measure import Recorder
from moesim.replay.ops import choose
from moesim.replay.process import Context
from moesim.replay.routing import assign_replicas, home_ranks, rank_work
from moesim.replay.session import DEFAULT_SHAPES as DEFAULT_SHAPES
from moesim.replay.session import CalibrateOptions as CalibrateOptions
from moesim.replay.session import Session
from moesim.replay.shape import ExpertShape
from moesim.replay.timing import Body, issue_us, time_calls
from moesim.types import stream

FORMAT = "moesim-calibration-raw"
VERSION = 1

LAYER_SHAPE = ExpertShape("host time", 256, 128, 16, 2)
LAYER_TOKENS = 32


Section = Callable[[Session], None]


def calibrate(ctx: Context, options: CalibrateOptions, out_path: str | None) -> dict[str, Any]:
    """Run the sections; collective. Rank 0 writes `out_path` after each. Returns the record."""
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        raise UnknownNameError("calibration section", unknown[0], SECTIONS)
    if options.max_bytes < 1 << 16 or options.max_tokens_per_rank < 1:
        raise InputError(
            "the largest message is below 64 KiB, or a batch has no token",
            "raise --max-bytes and --max-tokens",
        )
    started = time.monotonic()
    kernels = choose(ctx, options.shapes[0], ffn=options.ffn, graphs=options.graphs)
    modes = ("graph", "eager") if kernels.graphs else ("eager",)
    recorder = Recorder(ctx, modes, options.budget_s, started + options.time_limit_s)
    session = Session(ctx, options, kernels, recorder, list(kernels.notes))
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "environment": describe(ctx),
        "kernels": asdict(kernels),
        "options": asdict(options),
        "notes": session.notes,
        "tables": recorder.tables,
    }
    for name, section in SECTIONS.items():
        if options.sections and name not in options.sections:
            continue
        begin = time.monotonic()
        ctx.beat(f"calibrating {name}")
        section(session)
        recorder.note_if_cut(name, session.notes)
        if ctx.is_cuda:
            torch.cuda.empty_cache()
        ctx.rank0_print(f"calibrate {name}: {time.monotonic() - begin:.1f} s")
        if ctx.rank == 0 and out_path is not None:
            atomic_write(out_path, json.dumps(record, separators=(",", ":"), allow_nan=False))
    ctx.barrier()
    return record


def measure_launch(session: Session) -> None:
    """Host and device cost of small calls: what eager mode pays, what a graph node costs."""
    ctx, recorder = session.ctx, session.recorder
    small = torch.zeros(1024, device=ctx.device)

    def kernel(_: int) -> None:
        small.add_(1.0)

    for mode in recorder.modes:
        samples = time_calls(ctx, kernel, mode=mode, per_round=100, budget_s=0.1)
        recorder.add("launch", {"what": "small kernel, device time", "mode": mode}, samples)
    recorder.value("launch", {"what": "small kernel, host time to enqueue"}, issue_us(ctx, kernel))
    if ctx.num_ranks > 1:
        token = torch.zeros(ctx.num_ranks * 8, device=ctx.device)
        got = torch.zeros_like(token)

        def collective(_: int) -> None:
            dist.all_to_all_single(got, token)

        recorder.value(
            "launch", {"what": "all-to-all, host time to enqueue"}, issue_us(ctx, collective)
        )
    recorder.value(
        "launch", {"what": "layer, host time to enqueue"}, issue_us(ctx, _small_layer(session))
    )


def _small_layer(session: Session) -> Body:
    """A whole replayed layer with hardly anything to compute, for the host's share of one."""
    ctx, shape = session.ctx, LAYER_SHAPE
    slots = -(-shape.num_experts // ctx.num_ranks)
    tokens = LAYER_TOKENS * ctx.num_ranks
    random = stream(0)
    ids = np.argsort(random.random((tokens, shape.num_experts)), axis=1)[:, : shape.top_k]
    placement = np.arange(slots * ctx.num_ranks)
    placement[placement >= shape.num_experts] = -1
    home = home_ranks(tokens, ctx.num_ranks)
    assignment = assign_replicas(ids, None, placement, home, ctx.num_ranks)
    engine = ReplayEngine(ctx, shape, slots, LAYER_TOKENS, session.kernels)
    tables = engine.upload(rank_work(assignment, ctx.rank))
    return lambda i: engine.layer(tables, i)


SECTIONS: dict[str, Section] = {
    "launch": measure_launch,
    "all_to_all_v": calibrate_links.measure_uneven,
    "permute": calibrate_experts.measure_permute,
    "ffn": calibrate_ffn.measure_ffn,
    "copies": calibrate_links.measure_copies,
    "single_expert": calibrate_experts.measure_single,
    "collectives": calibrate_links.measure_collectives,
    "subgroups": calibrate_links.measure_subgroups,
}
