"""From what `moesim.replay calibrate` measured to the calibration file that clusters name.

Above the cost model, so never imported by the part that runs in an engine's container.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.fitting import ExpertFit
from moesim.errors import FormatError, InputError
from moesim.files import atomic_write

FORMAT = "moesim-calibration-raw"
SOURCE = "measured"
WEIGHT_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
MIN_FFN_ROWS = 6
DIGITS = 4
Rows = list[dict[str, Any]]
FloatArray = npt.NDArray[np.float64]


def load_raw(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the record that the ranks wrote. Raises InputError or FormatError."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", _REMEDY) from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: not JSON", _REMEDY) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("version") != 1:
        raise FormatError(f'{path}: format is not "{FORMAT}", version 1', _REMEDY)
    if not isinstance(raw.get("tables"), dict) or not isinstance(raw.get("environment"), dict):
        raise FormatError(f"{path}: tables or environment are missing", _REMEDY)
    return raw


def write_calibration(raw: Mapping[str, Any], path: str | os.PathLike[str], name: str) -> None:
    """Write the calibration YAML of a raw record."""
    import yaml

    text = yaml.safe_dump(
        calibration_data(raw, name), sort_keys=False, default_flow_style=None, width=100
    )
    atomic_write(path, text)


def calibration_data(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The calibration file's content as plain data (docs/calibration.md).

    Graph timings are taken where there are any, eager ones otherwise. Expert GEMMs are fitted with
    the per-expert counts that were measured: one entry for each shape, named by it, behind one for
    all shapes together. Raises FormatError when the record has no usable table.
    """
    tables, environment = raw["tables"], raw["environment"]
    ranks, nodes = int(environment["num_ranks"]), int(environment.get("num_nodes", 1))
    entries = [_collective(kind, ranks, nodes, rows) for kind, rows in _collectives(tables) if rows]
    experts = _experts(_pick(tables.get("ffn", [])), raw)
    copies = _copies(tables)
    if not entries and not experts and not copies:
        raise FormatError("the record holds no measured table", _REMEDY)
    software = f"torch {environment['torch']}"
    if environment.get("nccl"):
        software += f", NCCL {environment['nccl']}, driver {environment.get('driver', '?')}"
    described = f"{ranks} x {environment['device']}, {software}, {environment['date']}"
    return {
        "format": "moesim-calibration",
        "version": 1,
        "name": name,
        "gpu": str(environment["device"]),
        "description": f"Measured by moesim calibrate: {described}",
        "sources": {SOURCE: f"moesim calibrate, {described}"},
        "overheads": _overheads(tables) if environment.get("backend") == "nccl" else {},
        "collectives": entries,
        "expert_ffn": experts,
        "copies": copies,
    }


def expert_kernel(kernel: str, hidden: int, intermediate: int) -> str:
    """Name of the expert entry of one shape."""
    return f"{kernel} {hidden}x{intermediate}"


def _pick(rows: Iterable[dict[str, Any]]) -> Rows:
    """Rows replayed from CUDA graphs; eager ones where there is none."""
    every = list(rows)
    graph = [r for r in every if r.get("mode") == "graph"]
    return graph or every


def _collectives(tables: Mapping[str, Rows]) -> list[tuple[str, Rows]]:
    even = [r for r in _pick(tables.get("all_to_all_v", [])) if r["share"] == 1.0]
    rows = _pick(tables.get("collectives", []))
    kinds = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "p2p")
    return [("all_to_all_v", even), *((k, [r for r in rows if r["kind"] == k]) for k in kinds)]


def _collective(kind: str, ranks: int, nodes: int, rows: Rows) -> dict[str, Any]:
    return {
        "kind": kind,
        "group_size": 2 if kind == "p2p" else ranks,
        "num_nodes": 1 if kind == "p2p" else nodes,
        "basis": "measured",
        "source": SOURCE,
        "table": _table(rows),
    }


def _table(rows: Rows) -> list[list[float]]:
    """[bytes, us, half of p90 - p10] by size; rows of equal size are averaged."""
    by_size: dict[int, Rows] = {}
    for row in rows:
        by_size.setdefault(int(row["bytes"]), []).append(row)
    out = []
    for size, same in sorted(by_size.items()):
        us = float(np.mean([r["us"] for r in same]))
        half = float(np.mean([(r["p90_us"] - r["p10_us"]) / 2 for r in same]))
        if size > 0 and us > 0:
            out.append([float(size), round(us, 3), round(max(half, 0.0), 3)])
    return out


def _overheads(tables: Mapping[str, Rows]) -> dict[str, Any]:
    issue: dict[str, float] = {}
    of = {"all-to-all": "collective", "expert FFN": "ffn", "gather": "permute", "reduce": "reduce"}
    for row in tables.get("launch", []):
        what = str(row["what"]).removesuffix(", host time to enqueue")
        if what in of:
            issue[of[what]] = max(issue.get(of[what], 0.0), float(row["us"]))
    modes: dict[str, list[float]] = {"graph": [], "eager": []}
    for row in tables.get("all_to_all_v", []):
        if row["share"] == 1.0 and row["bytes"] <= 1 << 16:
            modes[row["mode"]].append(float(row["us"]))
    adds = 0.0
    if modes["graph"] and modes["eager"]:
        adds = max(0.0, float(np.median(modes["eager"]) - np.median(modes["graph"])))
    return {"eager_collective_us": round(adds, 2), "issue_us": issue}


def _experts(rows: Rows, raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    shapes: dict[tuple[str, int, int], Rows] = {}
    for row in rows:
        key = (str(row["dtype"]), int(row["hidden"]), int(row["intermediate"]))
        shapes.setdefault(key, []).append(row)
    eager = [r for r in raw["tables"].get("ffn", []) if r["mode"] == "eager"]
    out = []
    for dtype in sorted({key[0] for key in shapes}):
        own = {key: r for key, r in shapes.items() if key[0] == dtype and len(r) >= MIN_FFN_ROWS}
        if not own:
            continue
        together = [row for r in own.values() for row in r]
        kernel = f"torch {together[0]['kernel']}"
        out.append(_expert(together, dtype, kernel, eager))
        for (_, hidden, width), some in own.items():
            if len(own) > 1:
                out.append(_expert(some, dtype, expert_kernel(kernel, hidden, width), eager))
    return out


def _expert(rows: Rows, dtype: str, kernel: str, eager: Rows) -> dict[str, Any]:
    """Fit on every other case, state the error on the others, then fit on all."""
    fit = _fit(rows, dtype)
    half = np.arange(len(rows)) % 2 == 0
    errors = None
    if half.sum() >= MIN_FFN_ROWS:
        trial = _solve(fit.subset(half), dtype, kernel)
        held_out = fit.subset(~half)
        errors = np.abs(held_out.predict_us(trial) / held_out.times_us - 1.0)
    model = _solve(fit, dtype, kernel)
    small = [r["us"] for r in eager if r["dtype"] == dtype]
    graph = {_case(r): r["us"] for r in rows}
    adds = [r["us"] - graph[_case(r)] for r in eager if _case(r) in graph]
    entry: dict[str, Any] = {
        "dtype": dtype,
        "kernel": kernel,
        "basis": "measured",
        "source": SOURCE,
        "weight_bytes_per_param": WEIGHT_BYTES[dtype],
        "launch_us": model.launch_us,
        "weight_gb_per_s": model.weight_gb_per_s,
        "tflops": model.tflops,
        "half_tokens": model.half_tokens,
        "sharpness": model.sharpness,
        "row_gb_per_s": model.row_gb_per_s,
        "ranges": {
            "tokens_per_expert": [1.0, float(max(r["max_tokens"] for r in rows))],
            "params_per_expert": [
                float(f(3 * r["hidden"] * r["intermediate"] for r in rows)) for f in (min, max)
            ],
        },
    }
    if small and adds:
        entry["eager_launch_us"] = round(model.launch_us + max(0.0, float(np.median(adds))), 2)
    if errors is not None:
        entry["fit"] = [
            {
                "points": len(rows),
                "median_error": round(float(np.median(errors)), DIGITS),
                "p90_error": round(float(np.percentile(errors, 90)), DIGITS),
                "held_out": "every other case",
            }
        ]
    return {k: v for k, v in entry.items() if v is not None}


def _case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("hidden", "intermediate", "active", "tokens", "max_tokens"))


def _fit(rows: Rows, dtype: str) -> ExpertFit:
    point, tokens, weight = [], [], []
    for i, row in enumerate(rows):
        sizes, times = np.unique([c for c in row["counts"] if c > 0], return_counts=True)
        point += [i] * len(sizes)
        tokens += sizes.tolist()
        weight += times.tolist()
    return ExpertFit(
        point_idx=np.array(point, np.float64),
        tokens=np.array(tokens, np.float64),
        weight=np.array(weight, np.float64),
        hidden=np.array([r["hidden"] for r in rows], np.float64),
        intermediate=np.array([r["intermediate"] for r in rows], np.float64),
        times_us=np.array([r["us"] for r in rows], np.float64),
        token_rows=np.zeros(len(rows)),
        weight_bytes_per_param=WEIGHT_BYTES[dtype],
    )


def _solve(fit: ExpertFit, dtype: str, kernel: str) -> Any:
    params = 3 * fit.hidden * fit.intermediate
    rows = np.bincount(fit.point_idx, fit.tokens * fit.weight, len(params))
    active = np.bincount(fit.point_idx, fit.weight, len(params))
    rate = float((2 * params * rows / fit.times_us).max()) / 1e6
    moved = float((params * fit.weight_bytes_per_param * active / fit.times_us).max()) / 1e3
    return fit.fit(
        dtype=dtype,
        kernel=kernel,
        start_tflops=max(rate * 1.1, 1e-3),
        start_gb_per_s=max(moved * 1.1, 1e-3),
    )


def _copies(tables: Mapping[str, Rows]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    moves = _pick(tables.get("permute", []))
    for direction, op in (("permute", "gather"), ("reduce", "reduce")):
        rows = [r for r in moves if r["op"] == op]
        if len({r["bytes"] for r in rows}) > 1:
            table = _table(rows)
            out.append(_copy_entry(direction, table))
    pinned = [r for r in tables.get("copies", []) if r["pinned"]]
    most = max((r["num_gpus_at_once"] for r in pinned), default=1)
    for direction in ("h2d", "d2h"):
        rows = [r for r in pinned if r["direction"] == direction and r["num_gpus_at_once"] == most]
        if len(rows) > 1:
            out.append({**_copy_entry(direction, _table(rows)), "num_gpus_at_once": most})
    return out


def _copy_entry(direction: str, table: list[list[float]]) -> dict[str, Any]:
    return {"direction": direction, "basis": "measured", "source": SOURCE, "table": table}


_REMEDY = "give the JSON that `python -m moesim.replay calibrate --out` wrote"
