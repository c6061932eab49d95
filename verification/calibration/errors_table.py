"""The table of fit errors in docs/calibration.md, from the calibration files themselves:
`python verification/calibration/errors_table.py topologies/calibration/*.yaml`. With --engines
first, the shorter table of the serving engines' files (`h200-vllm.yaml`) in docs/step-time.md.
"""

from __future__ import annotations

import re
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
    for chosen in parsed.indexed:
        for fit in chosen.fit:
            groups.setdefault(f"{chosen.phase} MLA layer with an indexer, {fit.regime}", []).append(
                fit
            )
    for entry in parsed.copies:
        groups.setdefault(f"pinned {entry.direction} copy", []).extend(entry.fit)
    for move in parsed.rearrangements:
        when = "beside" if move.asynchronous else "in"
        groups.setdefault(f"weights through {move.through} {when} the step", []).extend(move.fit)
    for fit in parsed.overheads.fit:
        groups.setdefault(fit.regime, []).append(fit)
    return [
        (name, sum(f.points for f in fits), sum(f.dropped for f in fits), fits)
        for name, fits in groups.items()
        if fits
    ]


ENGINES = ("vllm", "sglang", "trtllm")
BLACKWELL = ("b200", "b300", "gb200", "gb300")


def of_engine(path: Path) -> bool:
    """Whether a file holds a serving engine's kernels, as all of Blackwell's do."""
    return path.stem in BLACKWELL or not set(ENGINES).isdisjoint(path.stem.split("-"))


def engine_table(paths: list[Path]) -> str:
    """Markdown: one line a part of every engine's file, all its regimes and shapes together."""
    lines = [
        "| file | part | held-out points | median error | 90th percentile |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(p for p in paths if of_engine(p)):
        parts: dict[str, tuple[int, list[Any]]] = {}
        for name, points, _, fits in rows(path):
            part = name.split(",")[0].split(" MLA")[0]
            part = " ".join(w for w in part.split() if not re.fullmatch(r"\d+x\d+", w))
            part += " latent attention" if "MLA" in name else ""
            so_far, listed = parts.get(part, (0, []))
            parts[part] = so_far + points, [*listed, *fits]
        for part, (points, fits) in parts.items():
            median = _percent([f.median_error for f in fits])
            p90 = _percent([f.p90_error for f in fits])
            lines.append(f"| {path.stem} | {part} | {points} | {median} | {p90} |")
    return "\n".join(lines) + "\n"


def table(paths: list[Path]) -> str:
    """Markdown: one line a group; a range where a group has several fits."""
    lines = [
        "| GPU | what | held-out points | spikes dropped | median error | 90th percentile |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(p for p in paths if not of_engine(p)):
        for name, points, dropped, fits in rows(path):
            median = _percent([f.median_error for f in fits])
            p90 = _percent([f.p90_error for f in fits])
            lines.append(f"| {path.stem} | {name} | {points} | {dropped} | {median} | {p90} |")
    return "\n".join(lines) + "\n"


def _percent(values: list[float]) -> str:
    low, high = (f"{100 * v:.1f}" for v in (min(values), max(values)))
    return f"{low}%" if low == high else f"{low} to {high}%"


if __name__ == "__main__":
    wanted = engine_table if "--engines" in sys.argv else table
    sys.stdout.write(wanted([Path(name) for name in sys.argv[1:] if not name.startswith("--")]))
