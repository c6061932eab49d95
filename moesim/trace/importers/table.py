"""Plain CSV and JSONL tables, with a map from our column names to those of the file.

Columns (`--columns ours=theirs,...` renames): `request`, `position`, `layer` (absolute), and the
chosen experts as `expert` (one a row) or `experts` (a JSON list, numbers separated by blanks, or
several columns: `experts=e0+e1+e2`); optional `weight` or `weights` in the same way, `token`,
`phase` (prefill, decode, 0, 1), `domain`, `step`, `rank`. Rows of one token and layer need not be
neighbours; requests and tokens keep the order of their first rows. In JSONL, `experts` may hold a
token's choices in all layers, [L][K]; then `layer` is left out and `position` may be. With a
`count` column (`step`, `layer`, `expert`, `count`) the result is a load trace, and so it is where
rows have `layer` and `expert` alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError
from moesim.trace.format import DECODE, MAX_EXPERTS, PREFILL, LoadTrace, Trace
from moesim.trace.importers.base import DAMAGED, ImportOptions, unknown_phases
from moesim.trace.importers.build import Segment, assemble, assemble_load
from moesim.trace.importers.layers import file_layers
from moesim.trace.importers.records import first_record, iter_records, nested_ids
from moesim.types import Array

if TYPE_CHECKING:
    import pandas as pd

NAME = "table"
TITLE = "plain CSV, TSV or JSONL with a column map (--columns)"
SUFFIXES = {".csv": ",", ".tsv": "\t"}
COLUMNS = (
    "request", "position", "layer", "expert", "experts", "weight", "weights", "token", "phase",
    "domain", "step", "rank", "count",
)  # fmt: skip
ALIASES = {"layer": "layer_id", "expert": "expert_id"}
"""What SGLang's first recorder called columns: layer_id, expert_id and count, in a CSV a rank
(sgl-project/sglang issue 5275)."""
_RANK = re.compile(r"rank_?(\d{1,4})")
_PHASES = {"prefill": PREFILL, "decode": DECODE, "0": PREFILL, "1": DECODE}
_NUMBER = re.compile(r"-?\d+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf", re.ASCII)


def detect(path: Path) -> bool:
    """A table whose header, or first record, has a column `expert` or `experts`."""
    if path.suffix in SUFFIXES:
        try:
            with path.open(encoding="utf-8") as text:
                header = text.readline(1 << 16).strip().split(SUFFIXES[path.suffix])
        except (OSError, UnicodeDecodeError):
            return False
        names = {name.strip().strip('"') for name in header}
        return bool({"expert", "experts"} & names) or set(ALIASES.values()) <= names
    if path.suffix not in (".jsonl", ".ndjson"):
        return False
    record = first_record(path)
    return isinstance(record, dict) and bool({"expert", "experts"} & set(record))


def read(paths: Sequence[Path], options: ImportOptions) -> Trace | LoadTrace:
    """All tables in order; requests of different files are different requests."""
    for name in options.columns:
        if name not in COLUMNS:
            raise InputError(
                f"`columns`: {name!r:.40} is not one of our columns", f"ours: {', '.join(COLUMNS)}"
            )
    source: dict[str, Any] = {"format": NAME, "files": [p.name for p in paths]}
    segments: list[Segment] = []
    loads: list[pd.DataFrame] = []
    layers: tuple[int, ...] | None = None
    num_requests = 0
    for path in paths:
        nested = _nested(path, options) if path.suffix not in SUFFIXES else None
        if nested is not None:
            found, table_layers = [nested], None
        else:
            frame = _frame(path, options)
            if set(frame.columns) == {"layer", "expert"}:
                options.notify(
                    f"{path.name}: no column says which token a row is of: {len(frame):,} rows are"
                    " counted, by layer and expert"
                )
                frame = frame.assign(count="1")
            if "count" in frame:
                loads.append(frame)
                continue
            found, table_layers = _long(frame, str(path), options)
        if segments and layers != table_layers:
            raise FormatError(f"{path}: has other layers than {paths[0]}", DAMAGED)
        layers = table_layers
        segments += [replace(part, request=part.request + num_requests) for part in found]
        num_requests += 1 + max(int(np.max(part.request)) for part in found)
    if loads and segments:
        raise InputError("some files hold counts and some tokens", "import each kind apart")
    if loads:
        loads = _of_ranks(loads, paths, options)
        return _load(loads, options, source, str(paths[0]))
    if layers is not None:
        file_layers(layers, options, str(paths[0]))
        options = replace(options, layer_ids=layers)
    return assemble(segments, options, source)


def _frame(path: Path, options: ImportOptions) -> pd.DataFrame:
    """The table with our column names; rows are numbered by their line in the file."""
    import pandas as pd

    if path.suffix in SUFFIXES:
        try:
            frame = pd.read_csv(
                path, sep=SUFFIXES[path.suffix], dtype=str, keep_default_na=False, encoding="utf-8"
            )
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}", "check the path") from None
        except (ValueError, pd.errors.ParserError) as error:
            raise FormatError(f"{path}: not a readable table ({error!s:.120})", DAMAGED) from None
        if not isinstance(frame.index, pd.RangeIndex):
            raise FormatError(f"{path}: line 2: has more fields than the header", DAMAGED)
        frame.columns = [str(name).strip() for name in frame.columns]
        frame.index = frame.index + 2
    else:
        rows = list(iter_records(path))
        for where, record in rows:
            if not isinstance(record, dict):
                raise FormatError(f"{where}: no object", DAMAGED)
        frame = pd.DataFrame([record for _, record in rows], dtype=object)
        frame.index = pd.Index([int(where.rsplit(" ", 1)[1]) for where, _ in rows])
    if frame.empty:
        raise FormatError(f"{path}: has no rows", DAMAGED)
    out = {}
    for ours in COLUMNS:
        alias = ALIASES.get(ours, ours)
        usual = ours if ours in frame or alias not in frame else alias
        theirs = options.columns.get(ours, usual).split("+")
        if all(name in frame for name in theirs):
            out[ours] = frame[theirs[0]] if len(theirs) == 1 else frame[theirs].agg(list, axis=1)
        elif ours in options.columns:
            missing = next(name for name in theirs if name not in frame)
            raise InputError(
                f"{path}: has no column {missing!r:.40}",
                f"its columns: {', '.join(map(str, frame.columns))[:160]}",
            )
    return pd.DataFrame(out)


def _long(
    frame: pd.DataFrame, where: str, options: ImportOptions
) -> tuple[list[Segment], tuple[int, ...]]:
    """Rows of one (token, layer) or one (token, layer, choice) as one segment; its layers."""
    import pandas as pd

    for name in ("request", "position", "layer"):
        if name not in frame:
            raise InputError(
                f"{where}: has no column for {name}",
                f"name it: `columns` {name}=THEIR_NAME (found {', '.join(map(str, frame))[:80]})",
            )
    row_ids, experts = _choices(frame, "expert", where)
    lines = frame.index.to_numpy()[row_ids]
    weights = None
    if "weight" in frame or "weights" in frame:
        weight_rows, weights = _choices(frame, "weight", where)
        if not np.array_equal(weight_rows, row_ids):
            raise FormatError(f"{where}: not every expert has a weight", DAMAGED)
    layer = _whole(frame["layer"], where, "layer")[row_ids]
    position = _whole(frame["position"], where, "position")
    request, _ = pd.factorize(frame["request"].astype(str))
    token, tokens = pd.factorize(pd.MultiIndex.from_arrays([request, position]))
    token = token[row_ids]
    layers, layer_idx = np.unique(layer, return_inverse=True)
    cell = token * len(layers) + layer_idx
    order = np.argsort(cell, kind="stable")
    ordered = cell[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    num_cells = len(tokens) * len(layers)
    if len(np.unique(cell)) < num_cells:
        gap = int(np.flatnonzero(np.bincount(cell, minlength=num_cells) == 0)[0])
        first = int(np.flatnonzero(token == gap // len(layers))[0])
        raise FormatError(
            f"{where}: line {lines[first]}: this token has no row for layer"
            f" {layers[gap % len(layers)]}",
            "every token needs a row in every layer",
        )
    top_k = max(int(rank.max()) + 1, options.top_k or 1)
    ids = np.full((num_cells, top_k), -1, np.int32)
    ids[ordered, rank] = experts[order]
    gates = None
    if weights is not None:
        gates = np.zeros((num_cells, top_k), np.float32)
        gates[ordered, rank] = weights[order]
    first_row = np.full(len(tokens), len(frame), np.int64)
    np.minimum.at(first_row, token, row_ids)
    rows = frame.iloc[first_row]
    shape = (len(tokens), len(layers), top_k)
    base = Segment(
        ids.reshape(shape),
        where,
        request[first_row],
        position[first_row],
        _phases(rows, where, options),
        gate_weights=None if gates is None else gates.reshape(shape),
        token_ids=_column(rows, "token", where),
        step_ids=_column(rows, "step", where),
        rank_ids=_column(rows, "rank", where),
    )
    return _by_domain(base, rows), tuple(int(x) for x in layers)


def _by_domain(base: Segment, rows: pd.DataFrame) -> list[Segment]:
    """`base`, or one segment for each stretch of tokens with the same `domain`."""
    if "domain" not in rows:
        return [base]
    names = rows["domain"].astype(str).to_numpy()
    cuts = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(names)]
    out = []
    for start, stop in pairwise(cuts):
        part = {
            name: value[start:stop]
            for name in ("expert_ids", "request", "positions", "phases", "gate_weights",
                         "token_ids", "step_ids", "rank_ids")
            if (value := getattr(base, name)) is not None
        }  # fmt: skip
        out.append(replace(base, domain=str(names[start]), **part))
    return out


def _nested(path: Path, options: ImportOptions) -> Segment | None:
    """JSONL whose records hold all layers of a token; None when the first record does not."""
    names = {ours: options.columns.get(ours, ours) for ours in COLUMNS}
    requests: dict[str, int] = {}
    seen: dict[int, int] = {}
    ids: list[Array] = []
    request, positions, phases, tokens = [], [], [], []
    for where, record in iter_records(path):
        value = record.get(names["experts"]) if isinstance(record, dict) else None
        if not isinstance(value, list) or not value or not isinstance(value[0], list):
            if ids:
                raise FormatError(f"{where}: {names['experts']} is no list of layers", DAMAGED)
            return None
        table = nested_ids(value, f"{where}: {names['experts']}")
        if table.ndim != 2 or (ids and table.shape != ids[0].shape):
            raise FormatError(
                f"{where}: {names['experts']} has shape {table.shape}"
                + (f", earlier records {ids[0].shape}" if ids else ", wanted [layers][experts]"),
                DAMAGED,
            )
        number = requests.setdefault(str(record.get(names["request"], "0")), len(requests))
        position = record.get(names["position"], seen.get(number, 0))
        token = record.get(names["token"], -1)
        for name, count in (("position", position), ("token", token)):
            if type(count) is not int or not -1 <= count < 1 << 31:
                raise FormatError(f"{where}: {names[name]} must be a whole number", DAMAGED)
        phase = str(record.get(names["phase"], options.phase))
        if phase not in _PHASES:
            raise FormatError(f"{where}: {names['phase']} must be prefill or decode", DAMAGED)
        seen[number] = position + 1
        ids.append(table)
        request.append(number)
        positions.append(position)
        phases.append(_PHASES[phase])
        tokens.append(token)
    if not ids:
        return None
    has_tokens = min(tokens) >= 0
    return Segment(
        np.stack(ids),
        str(path),
        np.array(request),
        np.array(positions),
        np.array(phases, np.uint8),
        token_ids=np.array(tokens) if has_tokens else None,
    )


def _choices(
    frame: pd.DataFrame, name: str, where: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """(row of each choice, its value) from column `name` or the lists in `name`s."""
    is_weight = name == "weight"
    if name in frame:
        column = frame[name]
        values = _real(column, where, name) if is_weight else _expert_ids(column, where, name)
        return np.arange(len(frame)), values
    if f"{name}s" not in frame:
        raise InputError(
            f"{where}: has no column for {name} or {name}s",
            f"name it: `columns` {name}s=THEIR_NAME",
        )
    pattern = _FLOAT if is_weight else _NUMBER
    rows: list[int] = []
    flat: list[float] = []
    for row, (line, cell) in enumerate(frame[f"{name}s"].items()):
        text = " ".join(map(str, cell)) if isinstance(cell, list) else str(cell)
        found = pattern.findall(text)
        if not found or pattern.sub("", text).strip(" \t,;|[]()"):
            raise FormatError(
                f"{where}: line {line}: {name}s is {text!r:.60}, not a list of numbers", DAMAGED
            )
        rows += [row] * len(found)
        flat += map(float, found)
    values = np.array(flat)
    if not is_weight:
        _in_range(values, where, f"{name}s", frame.index.to_numpy()[rows])
        values = values.astype(np.int64)
    return np.array(rows, np.int64), values


def _expert_ids(column: pd.Series, where: str, name: str) -> npt.NDArray[np.int64]:
    values = _whole(column, where, name, low=-1)
    _in_range(values, where, name, column.index.to_numpy())
    return values


def _in_range(values: npt.NDArray[Any], where: str, name: str, lines: npt.NDArray[Any]) -> None:
    bad = (values < -1) | (values >= MAX_EXPERTS)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise FormatError(
            f"{where}: line {lines[at]}: {name} {values[at]:.0f} is no expert id", DAMAGED
        )


def _whole(column: pd.Series, where: str, name: str, low: int = 0) -> npt.NDArray[np.int64]:
    """A column as whole numbers from `low` to 2^31 - 1; FormatError names the line."""
    values = _real(column, where, name)
    bad = (values != np.floor(values)) | (values < low) | (values >= 1 << 31)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise FormatError(
            f"{where}: line {column.index[at]}: {name} is {column.iloc[at]!r:.40}, not a whole"
            " number",
            DAMAGED,
        )
    return values.astype(np.int64)


def _real(column: pd.Series, where: str, name: str) -> npt.NDArray[np.float64]:
    import pandas as pd

    kinds = column.map(
        lambda x: isinstance(x, bool | list | dict) or (isinstance(x, int) and abs(x) > 1 << 64)
    )
    values = pd.to_numeric(column.mask(kinds), errors="coerce").to_numpy(np.float64)
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise FormatError(
            f"{where}: line {column.index[at]}: {name} is {column.iloc[at]!r:.40}, not a number",
            DAMAGED,
        )
    return values


def _column(rows: pd.DataFrame, name: str, where: str) -> Array | None:
    return _whole(rows[name], where, name) if name in rows else None


def _phases(rows: pd.DataFrame, where: str, options: ImportOptions) -> Array:
    if "phase" not in rows:
        return unknown_phases(len(rows), options)
    text = rows["phase"].astype(str).str.strip().str.lower()
    bad = ~text.isin(list(_PHASES))
    if bad.any():
        line = text.index[bad.to_numpy()][0]
        raise FormatError(
            f"{where}: line {line}: phase is {rows['phase'][line]!r:.40}, not prefill or decode",
            DAMAGED,
        )
    return text.map(_PHASES).to_numpy(np.uint8)


def _of_ranks(
    frames: list[pd.DataFrame], paths: Sequence[Path], options: ImportOptions
) -> list[pd.DataFrame]:
    """The counts of all ranks as one step, where the files' names number ranks and nothing numbers
    steps; else as they are, each file a step, with a notice."""
    import pandas as pd

    if len(frames) < 2 or any("step" in frame for frame in frames):
        return frames
    found = [_RANK.findall(path.name) for path in paths]
    ranks = {numbers[-1] for numbers in found if numbers}
    if len(ranks) == len(paths):
        options.notify(f"the files are of {len(ranks)} ranks by their names: their counts add up")
        return [pd.concat(frames)]
    options.notify(
        f"{len(frames)} files without a step column: each is a step of its own. Counts of several"
        " ranks must be added first"
    )
    return frames


def _load(
    frames: list[pd.DataFrame], options: ImportOptions, source: dict[str, Any], where: str
) -> LoadTrace:
    """(step, layer, expert, count) rows as [S, L, E]; steps of later files follow."""
    parts: list[tuple[Any, Any, Any, Any]] = []
    first_step = 0
    for frame in frames:
        for name in ("layer", "expert"):
            if name not in frame:
                raise InputError(f"{where}: has no column for {name}", f"`columns` {name}=NAME")
        count = _whole(frame["count"], where, "count")
        step = _whole(frame["step"], where, "step") if "step" in frame else np.zeros_like(count)
        _, step = np.unique(step, return_inverse=True)
        experts = _whole(frame["expert"], where, "expert")
        _in_range(experts, where, "expert", frame.index.to_numpy())
        parts.append((step + first_step, _whole(frame["layer"], where, "layer"), experts, count))
        first_step += int(step.max()) + 1
    steps, layer, expert, count = (np.concatenate(column) for column in zip(*parts, strict=True))
    layers, layer_idx = np.unique(layer, return_inverse=True)
    num_experts = options.num_experts or int(expert.max()) + 1
    if expert.max() >= num_experts:
        raise FormatError(
            f"{where}: expert {int(expert.max())} is outside 0..{num_experts - 1}",
            "name the model that was recorded",
        )
    load = np.zeros((first_step, len(layers), num_experts), np.int64)
    np.add.at(load, (steps, layer_idx, expert), count)
    return assemble_load(load, options, source, where, layer_ids=tuple(int(x) for x in layers))
