"""Plain `.npz` archives, with a map from our array names to those of the file.

Arrays (`--columns ours=theirs,...` renames): `expert_ids` [T, L, K] integers; optional
`gate_weights` [T, L, K], `candidate_ids` with `candidate_scores` [T, L, M], and `request_ids`,
`positions`, `phases` (0 prefill, 1 decode), `token_ids`, `step_ids`, `rank_ids` [T]. Without
`request_ids` the whole file is one request. An array `expert_load` [S, L, E] of counts gives a load
trace. No pickle is ever loaded.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.trace.format import DECODE, LoadTrace, Trace, read_npy
from moesim.trace.importers.base import DAMAGED, ImportOptions, bad_field, unknown_phases
from moesim.trace.importers.build import Segment, assemble, assemble_load, integer_ids, whole_counts
from moesim.types import Array

NAME = "npz"
TITLE = "plain .npz with an array map (--columns)"
ARRAYS = (
    "expert_ids", "gate_weights", "request_ids", "positions", "phases", "token_ids", "step_ids",
    "rank_ids", "candidate_ids", "candidate_scores", "expert_load",
)  # fmt: skip


def detect(path: Path) -> bool:
    """An `.npz` with an array of one of our names, which is not a moesim trace already."""
    if path.suffix != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return False
    return bool({"expert_ids", "expert_load"} & names) and "meta" not in names


def read(paths: Sequence[Path], options: ImportOptions) -> Trace | LoadTrace:
    """All archives in order; requests of different files are different requests."""
    for name in options.columns:
        if name not in ARRAYS:
            raise InputError(
                f"`columns`: {name!r:.40} is not one of our arrays", f"ours: {', '.join(ARRAYS)}"
            )
    source: dict[str, Any] = {"format": NAME, "files": [p.name for p in paths]}
    segments: list[Segment] = []
    loads: list[tuple[str, Array]] = []
    num_requests = 0
    for path in paths:
        raw = _read(path, options)
        if "expert_load" in raw:
            loads.append((str(path), whole_counts(raw["expert_load"], f"{path}: expert_load")))
            continue
        part = _segment(raw, str(path), num_requests, options)
        num_requests = 1 + int(np.max(part.request, initial=num_requests))
        segments.append(part)
    if not loads:
        return assemble(segments, options, source)
    if segments:
        raise InputError("some files hold counts and some tokens", "import each kind apart")
    for where, load in loads:
        if load.shape[1:] != loads[0][1].shape[1:]:
            raise FormatError(
                f"{where}: expert_load has shape {load.shape}, the first file {loads[0][1].shape}",
                DAMAGED,
            )
    counts = np.concatenate([load.astype(np.int64) for _, load in loads])
    return assemble_load(counts, options, source, loads[0][0])


def _read(path: Path, options: ImportOptions) -> dict[str, Array]:
    wanted = {options.columns.get(ours, ours): ours for ours in ARRAYS}
    raw: dict[str, Array] = {}
    names: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                names.append(name)
                if name in wanted:
                    with archive.open(info) as member:
                        raw[wanted[name]] = read_npy(member, info.file_size, f"{path}: {name}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", "check it") from None
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, zlib.error) as error:
        raise FormatError(f"{path}: not a readable .npz file ({error!s:.120})", DAMAGED) from None
    for ours, theirs in options.columns.items():
        if ours not in raw:
            raise InputError(
                f"{path}: has no array {theirs!r:.40}", f"its arrays: {', '.join(names)[:160]}"
            )
    if "expert_ids" not in raw and "expert_load" not in raw:
        raise InputError(
            f"{path}: has no array expert_ids",
            f"name it: `columns` expert_ids=NAME (arrays: {', '.join(names)[:120]})",
        )
    return raw


def _segment(
    raw: dict[str, Array], where: str, first_request: int, options: ImportOptions
) -> Segment:
    ids = integer_ids(raw["expert_ids"], f"{where}: expert_ids")
    count = len(ids)
    columns: dict[str, Array] = {}
    for name in ("request_ids", "positions", "phases", "token_ids", "step_ids", "rank_ids"):
        if name not in raw:
            continue
        column = integer_ids(raw[name], f"{where}: {name}", 1)
        if len(column) != count:
            raise bad_field(where, name, f"of length {count}, not {len(column)}")
        top = DECODE if name == "phases" else (1 << 31) - 1
        if count and (column.min() < 0 or column.max() > top):
            raise bad_field(where, name, f"from 0 to {top}")
        columns[name] = column
    if "request_ids" in columns:
        _, request = np.unique(columns["request_ids"], return_inverse=True)
    else:
        request = np.zeros(count, np.int64)
    return Segment(
        ids,
        f"{where}: expert_ids",
        request + first_request,
        columns.get("positions", np.arange(count)),
        columns.get("phases", unknown_phases(count, options)),
        gate_weights=_gates(raw.get("gate_weights"), where),
        token_ids=columns.get("token_ids"),
        step_ids=columns.get("step_ids"),
        rank_ids=columns.get("rank_ids"),
        candidate_ids=raw.get("candidate_ids"),
        candidate_scores=raw.get("candidate_scores"),
    )


def _gates(array: Array | None, where: str) -> Array | None:
    if array is not None and array.dtype.kind != "f":
        raise bad_field(where, "gate_weights", f"floats, not {array.dtype}")
    return array
