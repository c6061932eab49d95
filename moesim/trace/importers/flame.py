"""FLAME-MoE's published routing traces: one parquet file for each checkpoint and MoE layer.

`actives/iter_N/layer_LL.parquet` has one row a token with `indices` (list of 6 int16) and `scores`
(list of 6 float16, softmax probabilities of the chosen experts before renormalisation);
`samples/*.parquet` has the tokens' `token_id` in the same order. Layers in file names are
Megatron's, counted from 1; here they become LL - 1. Text was packed into sequences of 2,048 tokens,
each of which becomes one request.

Give the folder `iter_N`, or its layer files. Only whole prefill: no phases, no domains. A capture
has 52,428,800 tokens: `--max-tokens` reads the head of it.

Source: the data set CMU-FLAME/FLAME-MoE-Traces (its README) and cmu-flame/FLAME-MoE@e9b2fe2
(scripts/empirical_analysis/modules/capture_step2.sh for the sequence length).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.trace.format import PREFILL, Trace
from moesim.trace.importers.base import DAMAGED, ImportOptions
from moesim.trace.importers.build import Segment, assemble
from moesim.trace.importers.layers import file_layers
from moesim.types import Array

NAME = "flame-moe"
TITLE = "FLAME-MoE traces: a folder iter_N with layer_*.parquet"
SEQUENCE_TOKENS = 2048
_LAYER = re.compile(r"layer_(\d{1,4})\.parquet")


def detect(path: Path) -> bool:
    """`layer_NN.parquet`, or a folder of such files."""
    if path.is_dir():
        return any(_LAYER.fullmatch(file.name) for file in path.glob("layer_*.parquet"))
    return bool(_LAYER.fullmatch(path.name))


def read(paths: Sequence[Path], options: ImportOptions) -> Trace:
    """All layers of one checkpoint; several folders are read one after another."""
    folders = [path for path in paths if path.is_dir()]
    groups = [sorted(folder.glob("layer_*.parquet")) for folder in folders]
    loose = [path for path in paths if not path.is_dir()]
    if loose:
        groups.append(loose)
    segments: list[Segment] = []
    layers: tuple[int, ...] = ()
    left = options.max_tokens
    for files in groups:
        tables = _by_layer(files)
        if layers and tuple(tables) != layers:
            raise FormatError(
                f"{files[0].parent}: has other layers than {groups[0][0].parent}", DAMAGED
            )
        layers = tuple(tables)
        found = _segments(tables, len(segments), left)
        segments += found
        if left is not None:
            left = max(0, left - sum(len(s.expert_ids) for s in found))
    absolute = tuple(layer - 1 for layer in layers)
    file_layers(absolute, options, str(paths[0]))
    source: dict[str, Any] = {"format": NAME, "files": [f"{p.parent.name}/{p.name}" for p in paths]}
    return assemble(segments, replace(options, layer_ids=absolute), source)


def _by_layer(files: Sequence[Path]) -> dict[int, Path]:
    out: dict[int, Path] = {}
    for file in files:
        match = _LAYER.fullmatch(file.name)
        if not match or int(match[1]) < 1:
            raise InputError(
                f"{file}: is not named layer_NN.parquet", "give the files of one folder"
            )
        if int(match[1]) in out:
            raise InputError(
                f"{file}: layer {int(match[1])} is there twice", "give one checkpoint at a time"
            )
        out[int(match[1])] = file
    return dict(sorted(out.items()))


def _segments(tables: dict[int, Path], first_request: int, limit: int | None) -> list[Segment]:
    ids: list[Array] = []
    gates: list[Array] = []
    for file in tables.values():
        indices, scores = _columns(file, ("indices", "scores"), limit)
        if len(indices) != len(ids[0] if ids else indices) or scores.shape != indices.shape:
            raise FormatError(
                f"{file}: has {len(indices)} rows of indices, {scores.shape} of scores and"
                f" {len(ids[0]) if ids else len(indices)} tokens in other layers",
                DAMAGED,
            )
        ids.append(indices)
        gates.append(scores)
    where = str(next(iter(tables.values())).parent)
    count = len(ids[0])
    sequence, positions = np.divmod(np.arange(count), SEQUENCE_TOKENS)
    return [
        Segment(
            np.stack(ids, axis=1),
            where,
            first_request + sequence,
            positions,
            np.full(count, PREFILL, np.uint8),
            gate_weights=np.stack(gates, axis=1),
            token_ids=_token_ids(next(iter(tables.values())), count),
        )
    ]


def _token_ids(layer_file: Path, count: int) -> Array | None:
    """[count] from `samples/` beside `actives/`, in order of file names; None when it is absent."""
    out: list[Array] = []
    found = 0
    for file in sorted((layer_file.parent.parent.parent / "samples").glob("*.parquet")):
        if found >= count:
            break
        (tokens,) = _columns(file, ("token_id",), count - found)
        out.append(tokens)
        found += len(tokens)
    return np.concatenate(out) if out and found >= count else None


def _columns(file: Path, names: Sequence[str], limit: int | None) -> list[Array]:
    """Columns as arrays: [rows] of numbers or [rows, K] of lists of equal length."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{file}: reading parquet needs pyarrow", "install it: pip install 'moesim[parquet]'"
        ) from None
    try:
        reader = pyarrow.parquet.ParquetFile(file)
        missing = [n for n in names if n not in reader.schema_arrow.names]
        if missing:
            raise FormatError(
                f"{file}: has no column {missing[0]}, only"
                f" {', '.join(reader.schema_arrow.names)[:120]}",
                DAMAGED,
            )
        batches, rows = [], 0
        for batch in reader.iter_batches(columns=list(names)):
            batches.append(batch)
            rows += batch.num_rows
            if limit is not None and rows >= limit:
                break
        if not rows:
            raise FormatError(f"{file}: has no rows", DAMAGED)
        table = pyarrow.Table.from_batches(batches).slice(0, limit)
        return [_array(file, name, table.column(name).combine_chunks()) for name in names]
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror or error}", "check the file"
        ) from None
    except pyarrow.ArrowException as error:
        raise FormatError(
            f"{file}: not a readable parquet file ({error!s:.120})", DAMAGED
        ) from None


def _array(file: Path, name: str, column: Any) -> Array:
    import pyarrow

    if column.null_count:
        raise FormatError(f"{file}: column {name} has empty values", DAMAGED)
    if not pyarrow.types.is_list(column.type) and not pyarrow.types.is_fixed_size_list(column.type):
        return _numbers(file, name, column)
    flat = _numbers(file, name, column.flatten())
    rows = len(column)
    if rows == 0 or len(flat) % rows:
        raise FormatError(f"{file}: column {name} has lists of different lengths", DAMAGED)
    lengths = np.diff(np.asarray(column.offsets)) if hasattr(column, "offsets") else None
    if lengths is not None and (lengths != len(flat) // rows).any():
        row = int(np.flatnonzero(lengths != len(flat) // rows)[0])
        raise FormatError(f"{file}: row {row}: {name} has {lengths[row]} values", DAMAGED)
    return flat.reshape(rows, len(flat) // rows)


def _numbers(file: Path, name: str, column: Any) -> Array:
    import pyarrow

    wanted = name == "scores"
    good = pyarrow.types.is_floating if wanted else pyarrow.types.is_integer
    if column.null_count or not good(column.type):
        raise FormatError(
            f"{file}: column {name} has type {column.type}, wanted"
            f" {'floats' if wanted else 'whole numbers'}",
            DAMAGED,
        )
    return np.asarray(column.to_numpy(zero_copy_only=False))
