"""Ranks of expert-parallel groups: measured one after the other beside predicted.

    python verification/engine/rank_tables.py reports/engine-vllm [--write]

Reads raw/ranks.json.gz (ranks.py) and predictions_ranks.json (ranks_prepare.py, written before).
A rank's time is the median of its rounds, meant over both captures; a plan's is its slowest rank
of a layer, mean over layers. Two plans differ by more than noise where both captures put them in
the same order and the difference is larger than that between the captures.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tables import put

PLANS = ("linear", "eplb", "ours", "eplb+", "ours+")
LEAST = (0.0, 0.01, 0.02, 0.05)
NAMES = {0.0: "more than noise", 0.01: "more than 1%", 0.02: "more than 2%", 0.05: "more than 5%"}
Record = dict[str, Any]


@dataclass(frozen=True)
class Slowest:
    """The slowest rank of one plan: microseconds by capture, and predicted."""

    measured: np.ndarray
    predicted: float


@dataclass(frozen=True)
class Pair:
    """Two plans that differ by more than noise: a over b - 1, measured and predicted."""

    block: tuple[str, str, str]
    a: str
    b: str
    measured: float
    predicted: float

    @property
    def right(self) -> bool:
        """Whether the predicted order is the measured one."""
        return bool(np.sign(self.measured) == np.sign(self.predicted))


def load(report: Path) -> tuple[Record, Record]:
    """What was measured and what was predicted, by model."""
    raw = json.loads(gzip.decompress((report / "raw" / "ranks.json.gz").read_bytes()))
    said = json.loads((report / "predictions_ranks.json").read_text())
    return {key: raw[key] for key in said}, said


def middle(times: Record, key: str) -> dict[int, float]:
    """{rank: median microseconds} of one placement and layer in one capture."""
    return {int(r): float(np.median(rounds)) for r, (_, rounds) in times[key].items()}


def slowest(raw: Record, said: Record) -> dict[tuple[str, str, str], dict[str, Slowest]]:
    """{(model, group, phase): {plan: its slowest rank}}."""
    found: dict[tuple[str, str, str], dict[str, Slowest]] = {}
    for model, record in raw.items():
        by_plan: dict[tuple[str, str, str], list[str]] = {}
        for key in record["passes"][0]:
            group, phase, plan, _ = key.split("/")
            by_plan.setdefault((group, phase, plan), []).append(key)
        for (group, phase, plan), keys in by_plan.items():
            measured = [
                float(np.mean([max(middle(times, k).values()) for k in keys]))
                for times in record["passes"]
            ]
            predicted = float(np.mean([max(said[model]["now"][k]) for k in keys]))
            spot = found.setdefault((model, group, phase), {})
            spot[plan] = Slowest(np.array(measured), predicted)
    return found


def pairs(blocks: dict[tuple[str, str, str], dict[str, Slowest]]) -> Iterator[Pair]:
    """Those that differ by more than noise."""
    for block, by_plan in blocks.items():
        for a, b in combinations(PLANS, 2):
            apart = by_plan[a].measured / by_plan[b].measured - 1
            mean = float(apart.mean())
            if np.prod(np.sign(apart)) > 0 and abs(mean) > abs(apart[0] - apart[1]):
                yield Pair(block, a, b, mean, by_plan[a].predicted / by_plan[b].predicted - 1)


def plans_table(report: Path) -> str:
    """The slowest rank under each placement, microseconds."""
    blocks = slowest(*load(report))
    apart = list(pairs(blocks))
    lines = ["| model | group | step | " + " | ".join(PLANS) + " | order of pairs right |"]
    lines[0] += " predicted best over measured best |"
    lines += ["|---|---|---|" + "---|" * 7]
    for block in sorted(blocks):
        model, group, phase = block
        cells = [
            f"{s.measured.mean():.0f} ({s.predicted:.0f})"
            for s in (blocks[block][plan] for plan in PLANS)
        ]
        own = [p.right for p in apart if p.block == block]
        chosen = min(blocks[block].values(), key=lambda s: s.predicted).measured.mean()
        best = min(s.measured.mean() for s in blocks[block].values())
        lines.append(
            f"| {model} | EP{group} | {phase} | {' | '.join(cells)} | {sum(own)} of {len(own)} |"
            f" {chosen / best - 1:+.1%} |"
        )
    return "\n".join(lines)


def errors_table(report: Path) -> str:
    """Errors of single ranks, and what two captures of the same rank differ by."""
    raw, said = load(report)
    lines = ["| model | step | ranks | median error | 90th percentile | bias | two captures |"]
    lines[0] += " `h200-vllm` alone |"
    lines += ["|---|---|---|---|---|---|---|---|"]
    for model, record in raw.items():
        for phase in ("prefill", "decode"):
            errors: dict[str, list[float]] = {"now": [], "before": []}
            noise = []
            for key in (k for k in record["passes"][0] if k.split("/")[1] == phase):
                first, second = (middle(times, key) for times in record["passes"])
                for rank, us in first.items():
                    noise.append(second[rank] / us - 1)
                    for which, found in errors.items():
                        mean = (us + second[rank]) / 2
                        found.append(said[model][which][key][rank] / mean - 1)
            e, before = np.array(errors["now"]), np.abs(errors["before"])
            lines.append(
                f"| {model} | {phase} | {len(e)} | {np.median(np.abs(e)):.1%} |"
                f" {np.percentile(np.abs(e), 90):.1%} | {np.median(e):+.1%} |"
                f" {np.median(np.abs(noise)):.2%}, {np.percentile(np.abs(noise), 90):.2%} |"
                f" {np.median(before):.1%}, {np.percentile(before, 90):.1%} |"
            )
    return "\n".join(lines)


def orders_table(report: Path) -> str:
    """Pairs in the predicted order, by how much they differ."""
    apart = list(pairs(slowest(*load(report))))
    lines = [
        "| pairs that differ by | prefill | decode | all | largest difference of a wrong pair |"
    ]
    lines += ["|---|---|---|---|---|"]
    for least in LEAST:
        own = [p for p in apart if abs(p.measured) > least]
        cells = []
        for phases in (("prefill",), ("decode",), ("prefill", "decode")):
            told = [p.right for p in own if p.block[2] in phases]
            cells.append(f"{sum(told)} of {len(told)} ({np.mean(told):.0%})")
        wrong = max((abs(p.measured) for p in own if not p.right), default=0.0)
        lines.append(f"| {NAMES[least]} | {' | '.join(cells)} | {wrong:.1%} |")
    return "\n".join(lines)


def wrong_table(report: Path) -> str:
    """Every pair in the wrong order."""
    lines = ["| model | group | step | pair | measured | predicted |", "|---|---|---|---|---|---|"]
    for p in pairs(slowest(*load(report))):
        if not p.right:
            model, group, phase = p.block
            lines.append(
                f"| {model} | EP{group} | {phase} | {p.a} over {p.b} | {p.measured:+.1%} |"
                f" {p.predicted:+.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    tables = {
        "rank errors": errors_table(args.report),
        "rank orders": orders_table(args.report),
        "ranks": plans_table(args.report),
        "wrong pairs": wrong_table(args.report),
    }
    put(args.report, tables, write=args.write)


if __name__ == "__main__":
    main()
