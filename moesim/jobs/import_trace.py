"""One import from start to end: find the format, read, drop warm-up rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.trace.format import PREFILL, LoadTrace, Trace
from moesim.trace.importers.base import ImportOptions
from moesim.trace.importers.registry import detect_format, importer
from moesim.trace.importers.warmup import warmup_steps, warmup_tokens
from moesim.trace.suspects import suspects


def import_files(
    paths: Sequence[Path],
    options: ImportOptions,
    format_name: str | None = None,
    keep_warmup: bool = False,
) -> Trace | LoadTrace:
    """The trace in `paths`, in their order; the format is detected unless it is named.

    Rows that a warm-up left behind are dropped with a notice (see warmup.py) unless they are to be
    kept. Raises InputError or FormatError that names file, record and field.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"no such file or folder: {path}", "check the path")
    name = format_name or detect_format(paths, options.columns)
    if format_name is None:
        options.notify(f"format: {name}")
    trace = importer(name).read(paths, options)
    found = suspects(trace)
    if not keep_warmup:
        repeated = any(code == "repeated-decode" for code, _, _ in found)
        trace = _without_warmup(trace, options, decoded=not repeated)
    for _, _, message in found:
        options.notify(f"{message}; moesim trace check says more")
    options.notify(read_line(trace))
    return trace


def read_line(trace: Trace | LoadTrace) -> str:
    """What was read, in such a way that a wrong reading shows."""
    meta = trace.meta
    layers = f"{meta.num_layers} layers ({meta.layer_ids[0]} to {meta.layer_ids[-1]})"
    tail = f"{layers}, top-{meta.top_k} of {meta.num_experts} experts"
    if isinstance(trace, LoadTrace):
        sums = trace.expert_load.sum(axis=2).max(axis=1) / meta.top_k
        return (
            f"read counts of {len(sums):,} steps, {sums.mean():,.4g} tokens each on average; {tail}"
        )
    _, lengths = np.unique(np.asarray(trace.request_ids), return_counts=True)
    prefill = int((np.asarray(trace.phases) == PREFILL).sum())
    ranks = "no ranks"
    if trace.rank_ids is not None:
        number = len(np.unique(np.asarray(trace.rank_ids)))
        ranks = f"{number} rank{'s' * (number != 1)}"
    return (
        f"read {len(lengths):,} requests of {lengths.min():,} to {lengths.max():,} tokens (mean"
        f" {lengths.mean():,.4g}), {trace.num_tokens:,} tokens ({prefill:,} prefill,"
        f" {trace.num_tokens - prefill:,} decode), {ranks}; {tail}"
    )


def _without_warmup(
    trace: Trace | LoadTrace, options: ImportOptions, *, decoded: bool
) -> Trace | LoadTrace:
    """decoded: whether decoded tokens may be warm-up, too; not where they repeat one routing."""
    counts = isinstance(trace, LoadTrace)
    warm = warmup_steps(trace) if isinstance(trace, LoadTrace) else warmup_tokens(trace)
    if not decoded and isinstance(trace, Trace):
        warm &= np.asarray(trace.phases) == PREFILL
    if not warm.any():
        return trace
    unit = "steps" if counts else "tokens"
    if warm.all():
        raise FormatError(
            f"{', '.join(map(str, trace.meta.source.get('files', [])))}: all {len(warm)} {unit} are"
            " routed alike: perhaps an engine's warm-up, or one routing that it repeats",
            "record real traffic without CUDA graphs, or keep them with `keep_warmup`",
        )
    where = np.flatnonzero(warm)
    options.notify(
        f"dropped {len(where)} {unit} of constant routing, the first of them number {where[0]}:"
        " a guess that they are an engine's warm-up; `keep_warmup` keeps them"
    )
    if isinstance(trace, LoadTrace):
        return replace(trace, expert_load=trace.expert_load[~warm])
    return trace.take(np.flatnonzero(~warm))
