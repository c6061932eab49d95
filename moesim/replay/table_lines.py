"""What a measured calibration file says of links and host copies, a line an entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesim.cost.calibration_schema import CalibrationFile
from moesim.cost.curves import BYTES_PER_US_AT_1_GB_PER_S


def link_rows(file: CalibrationFile) -> list[dict[str, Any]]:
    """One row a collective or host copy that has a table, as JSON data.

    `latency_us`: median at the smallest size, `smallest_bytes`; `gb_per_s`: that size over the
    median time at the largest, `largest_bytes`; each with its spread, half of p90 - p10.
    """
    out: list[dict[str, Any]] = []
    for entry in file.collectives:
        if entry.table is not None:
            fixed = {"kind": entry.kind, "group_size": entry.group_size}
            more = {"num_nodes": entry.num_nodes, "share": entry.share}
            out.append({**fixed, **more, **_ends(entry.table)})
    for copy in file.copies:
        if copy.table is not None and not copy.is_row_move:
            fixed = {"kind": copy.direction, "pinned": copy.pinned}
            more = {"num_gpus_at_once": copy.num_gpus_at_once}
            out.append({**fixed, **more, **_ends(copy.table)})
    return out


def link_lines(file: CalibrationFile) -> list[str]:
    """`link_rows` as an aligned table; empty without rows."""
    rows = link_rows(file)
    if not rows:
        return []
    cells = [("link", "among", "smallest message", "largest message")]
    for row in rows:
        small = f"{_figure(row['latency_us'])} +- {_figure(row['latency_spread_us'])} us"
        large = f"{_figure(row['gb_per_s'])} +- {_figure(row['spread_gb_per_s'])} GB/s"
        smallest, largest = _size(row["smallest_bytes"]), _size(row["largest_bytes"])
        cells.append((*_name(row), f"{small} at {smallest}", f"{large} at {largest}"))
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _name(row: dict[str, Any]) -> tuple[str, str]:
    if "pinned" in row:
        memory = "pinned" if row["pinned"] else "unpinned"
        gpus = row["num_gpus_at_once"]
        ways = "both, each way" if row["kind"] == "both" else row["kind"]
        return f"{ways}, {memory}", "1 GPU alone" if gpus == 1 else f"{gpus} GPUs at once"
    uneven = "" if row["share"] == 1.0 else f", others {row['share']:g}"
    nodes = "" if row["num_nodes"] == 1 else f" of {row['num_nodes']} nodes"
    return f"{row['kind']}{uneven}", f"{row['group_size']} ranks{nodes}"


def _ends(table: Sequence[Sequence[float]]) -> dict[str, float]:
    ordered = sorted(table, key=lambda row: row[0])
    first, last = ordered[0], ordered[-1]
    rate = last[0] / last[1] / BYTES_PER_US_AT_1_GB_PER_S
    return {
        "smallest_bytes": first[0],
        "latency_us": first[1],
        "latency_spread_us": _spread(first),
        "largest_bytes": last[0],
        "gb_per_s": round(rate, 3),
        "spread_gb_per_s": round(rate * _spread(last) / last[1], 3),
    }


def _spread(row: Sequence[float]) -> float:
    return row[2] if len(row) > 2 else 0.0


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"
