"""One import from start to end: find the format, read, drop warm-up rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.trace.format import LoadTrace, Trace
from moesim.trace.importers.base import ImportOptions
from moesim.trace.importers.registry import detect_format, importer
from moesim.trace.importers.warmup import warmup_steps, warmup_tokens


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
    return trace if keep_warmup else _without_warmup(trace, options)


def _without_warmup(trace: Trace | LoadTrace, options: ImportOptions) -> Trace | LoadTrace:
    counts = isinstance(trace, LoadTrace)
    warm = warmup_steps(trace) if isinstance(trace, LoadTrace) else warmup_tokens(trace)
    if not warm.any():
        return trace
    unit = "steps" if counts else "tokens"
    if warm.all():
        raise FormatError(
            f"{', '.join(map(str, trace.meta.source.get('files', [])))}: all {len(warm)} {unit} are"
            " routed alike, as in an engine's warm-up",
            "record real traffic, or keep them with --keep-warmup",
        )
    where = np.flatnonzero(warm)
    options.notify(
        f"dropped {len(where)} {unit} of constant routing (warm-up), the first of them number"
        f" {where[0]}; --keep-warmup keeps them"
    )
    if isinstance(trace, LoadTrace):
        return replace(trace, expert_load=trace.expert_load[~warm])
    return trace.take(np.flatnonzero(~warm))
