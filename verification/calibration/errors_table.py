"""The table of fit errors in docs/calibration.md, from the calibration files themselves:
`python verification/calibration/errors_table.py topologies/calibration/*.yaml`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moesim.cost.calibration import parse_calibration_file


def rows(path: Path) -> list[tuple[str, int, int, list[Any]]]:
    """(what, points, dropped, fits) of every fitted group of one file, in a fixed order."""
    parsed = parse_calibration_file(path.read_text(), where=str(path))
    groups: dict[str, list[Any]] = {}
    for entry in parsed.collectives:
        nodes = "" if "deepep" not in entry.kind else f", {entry.num_nodes} node(s)"
        groups.setdefault(f"{entry.kind}{nodes}", []).extend(entry.fit)
    for entry in parsed.expert_ffn:
        for fit in entry.fit:
            name = f"experts {entry.dtype} {entry.kernel}, {fit.regime}"
            groups.setdefault(name, []).append(fit)
    for entry in parsed.gemm:
        for fit in entry.fit:
            groups.setdefault(f"GEMM {entry.dtype}, {fit.regime}", []).append(fit)
    for entry in parsed.attention:
        for fit in entry.fit:
            name = f"{entry.phase} attention, cache {entry.kv_dtype}, {fit.regime}"
            groups.setdefault(name, []).append(fit)
    for entry in parsed.mla:
        for fit in entry.fit:
            groups.setdefault(f"{entry.phase} MLA layer, {fit.regime}", []).append(fit)
    for entry in parsed.copies:
        groups.setdefault(f"pinned {entry.direction} copy", []).extend(entry.fit)
    for fit in parsed.overheads.fit:
        groups.setdefault(fit.regime, []).append(fit)
    return [
        (name, sum(f.points for f in fits), sum(f.dropped for f in fits), fits)
        for name, fits in groups.items()
        if fits
    ]


def table(paths: list[Path]) -> str:
    """Markdown: one line a group; a range where a group has several fits."""
    lines = [
        "| GPU | what | held-out points | spikes dropped | median error | 90th percentile |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(paths):
        for name, points, dropped, fits in rows(path):
            median = _percent([f.median_error for f in fits])
            p90 = _percent([f.p90_error for f in fits])
            lines.append(f"| {path.stem} | {name} | {points} | {dropped} | {median} | {p90} |")
    return "\n".join(lines) + "\n"


def _percent(values: list[float]) -> str:
    low, high = (f"{100 * v:.1f}" for v in (min(values), max(values)))
    return f"{low}%" if low == high else f"{low} to {high}%"


if __name__ == "__main__":
    sys.stdout.write(table([Path(name) for name in sys.argv[1:]]))
