"""From what `moesim.replay calibrate` measured to the calibration file that clusters name.

Above the cost model, so never imported by the part that runs in an engine's container.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moesim.cost.calibration import build_calibration, checked_file
from moesim.errors import FormatError, MismatchError
from moesim.files import atomic_write
from moesim.replay.record_schema import check_raw
from moesim.replay.records import read_record
from moesim.replay.table_company import operation_saves_us
from moesim.replay.table_experts import Rows, expert_entries

FORMAT = "moesim-calibration-raw"
SOURCE = "measured"
SMALL_MESSAGE_BYTES = 1 << 16
ISSUES = {
    "all-to-all": "collective",
    "expert FFN": "ffn",
    "gather": "permute",
    "reduce": "reduce",
    "fetch": "fetch",
}


def load_raw(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the record that the ranks wrote, also gzipped. Raises InputError or FormatError."""
    raw = read_record(path, FORMAT, _REMEDY)
    check_raw(raw, str(path), _REMEDY)
    return raw


def merge_raw(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of several made with one machine and software: a section that was measured again
    replaces the earlier one. Raises MismatchError where they were not."""
    first, *others = records
    for other in others:
        for name in ("device", "num_ranks", "num_nodes", "backend", "torch", "nccl", "driver"):
            ours, theirs = (r["environment"].get(name) for r in (first, other))
            if ours != theirs:
                raise MismatchError(
                    f"the records differ in {name}: {ours!r:.60} and {theirs!r:.60}",
                    "merge sections measured with one machine and software",
                )
    return {
        **first,
        "tables": {name: rows for r in records for name, rows in r["tables"].items()},
        "notes": [note for r in records for note in r.get("notes", [])],
    }


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
    the per-expert counts that were measured, row moves are tables. Raises FormatError when the
    record has no usable table, or tables that make no calibration.
    """
    tables, environment = raw["tables"], raw["environment"]
    ranks, nodes = int(environment["num_ranks"]), int(environment.get("num_nodes", 1))
    entries = [*_collectives(tables, ranks, nodes), *_uneven(tables, ranks, nodes)]
    entries += _subgroups(tables)
    ffn = [r for r in tables.get("ffn", []) if r["us"] > 0]
    alone, num_sms = tables.get("ffn_alone", ffn), int(environment.get("num_sms", 0))
    experts = expert_entries(_pick(ffn), alone, SOURCE, num_sms)
    copies = _copies(tables)
    if not entries and not experts and not copies:
        raise FormatError("the record holds no measured table", _REMEDY)
    software = f"torch {environment['torch']}"
    if environment.get("nccl"):
        software += f", NCCL {environment['nccl']}, driver {environment.get('driver', '?')}"
    described = f"{ranks} x {environment['device']}, {software}, {environment['date']}"
    data: dict[str, Any] = {
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
    if data["overheads"] and entries and {"permute", "reduce"} <= {c["direction"] for c in copies}:
        made = build_calibration(checked_file(data, "what the record measured", _REMEDY))
        data["overheads"]["in_layer_saves_us"] = operation_saves_us(raw, made)
    checked_file(data, "what the record measured", _REMEDY)
    return data


def _pick(rows: Iterable[dict[str, Any]]) -> Rows:
    """Rows replayed from CUDA graphs; eager ones where there is none."""
    every = list(rows)
    graph = [r for r in every if r.get("mode") == "graph"]
    return graph or every


def _collectives(tables: Mapping[str, Rows], ranks: int, nodes: int) -> list[dict[str, Any]]:
    """Even collectives of all ranks."""
    even = [r for r in _pick(tables.get("all_to_all_v", [])) if r["share"] == 1.0]
    rows = _pick(tables.get("collectives", []))
    out = _collective("all_to_all_v", ranks, nodes, even)
    for kind in ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "p2p"):
        of_kind = [r for r in rows if r["kind"] == kind]
        two = kind == "p2p"
        out += _collective(kind, 2 if two else ranks, 1 if two else nodes, of_kind)
    return out


def _uneven(tables: Mapping[str, Rows], ranks: int, nodes: int) -> list[dict[str, Any]]:
    rows = _pick(tables.get("all_to_all_v", []))
    shares = sorted({r["share"] for r in rows if r["share"] < 1.0}, reverse=True)
    return [
        entry
        for share in shares
        for entry in _collective(
            "all_to_all_v", ranks, nodes, [r for r in rows if r["share"] == share], share=share
        )
    ]


def _subgroups(tables: Mapping[str, Rows]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int, int, float], Rows] = {}
    for row in _pick(tables.get("subgroups", [])):
        key = (str(row["kind"]), int(row["group_size"]), int(row["num_nodes"]), row["share"])
        groups.setdefault(key, []).append(row)
    out: list[dict[str, Any]] = []
    for (kind, size, nodes, share), rows in groups.items():
        more = {} if share == 1.0 else {"share": share}
        out += _collective(kind, size, nodes, rows, **more)
    return out


def _collective(
    kind: str, ranks: int, nodes: int, rows: Rows, **more: float
) -> list[dict[str, Any]]:
    """An entry, or none where fewer than two sizes were measured."""
    table = _table(rows)
    if len(table) < 2:
        return []
    fixed = {"kind": kind, "group_size": ranks, "num_nodes": nodes, **more}
    return [{**fixed, "basis": "measured", "source": SOURCE, "table": table}]


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
    out: dict[str, Any]
    names = {**ISSUES, "layer": "layer"}
    for row in tables.get("launch", []):
        what = str(row["what"]).removesuffix(", host time to enqueue")
        if what in names:
            issue[names[what]] = max(issue.get(names[what], 0.0), float(row["us"]))
    modes: dict[str, list[float]] = {"graph": [], "eager": []}
    for row in tables.get("all_to_all_v", []):
        if row["share"] == 1.0 and row["bytes"] <= SMALL_MESSAGE_BYTES:
            modes[row["mode"]].append(float(row["us"]))
    adds = 0.0
    if modes["graph"] and modes["eager"]:
        adds = max(0.0, float(np.median(modes["eager"]) - np.median(modes["graph"])))
    out = {"eager_collective_us": round(adds, 2), "issue_us": issue}
    hand_overs = [float(row["us"]) for row in tables.get("fetch", [])]
    if hand_overs:
        out["hand_over_us"] = round(float(np.median(hand_overs)), 3)
    return out


def _copies(tables: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """Row moves, an entry a fan, and host copies: pinned by all GPUs at once, then the rest."""
    out: list[dict[str, Any]] = []
    moves = _pick(tables.get("permute", []))
    for direction, op in (("permute", "gather"), ("reduce", "reduce")):
        for fan in sorted({r["fan"] for r in moves if r["op"] == op}):
            rows = [r for r in moves if r["op"] == op and r["fan"] == fan]
            if len({r["bytes"] for r in rows}) > 1:
                out.append(_copy_entry(direction, rows, fan=float(fan)))
    host: dict[tuple[bool, int, str], Rows] = {}
    for row in tables.get("copies", []):
        key = (bool(row["pinned"]), int(row["num_gpus_at_once"]), str(row["direction"]))
        host.setdefault(key, []).append(row)
    order = ("h2d", "d2h", "both")
    for pinned, gpus, direction in sorted(host, key=lambda k: (not k[0], -k[1], order.index(k[2]))):
        rows = host[pinned, gpus, direction]
        if len({r["bytes"] for r in rows}) > 1:
            more = {} if pinned else {"pinned": False}
            out.append(_copy_entry(direction, rows, **more, num_gpus_at_once=gpus))
    return out


def _copy_entry(direction: str, rows: Rows, **more: float | bool) -> dict[str, Any]:
    fixed = {"direction": direction, **more, "basis": "measured", "source": SOURCE}
    return {**fixed, "table": _table(rows)}


_REMEDY = "give the JSON that `python -m moesim.replay calibrate --out` wrote"
