"""Expert kernels fitted to what ranks took in the engine: held-out errors, orders of placements.

    python verification/engine/fit_ranks.py reports/engine-vllm FOLDER

FOLDER holds the MODEL.ranks.npz of ranks_prepare.py. Fitted to the ranks of the placements linear,
eplb and eplb+, judged on those of ours and ours+, whose loads it has not seen.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from tables import interval, ranks

from moesim.cost.calibration import load_calibration
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.fitting import ExpertFit

SEEN = ("linear", "eplb", "eplb+")


@dataclass(frozen=True, eq=False)
class Points:
    """Ranks of one model: their fit, which were seen, the phase and the layer of each."""

    fit: ExpertFit
    seen: np.ndarray
    phase: np.ndarray
    block: np.ndarray


def points_of(report: Path, folder: Path, model: str) -> Points:
    """Every rank that received a token."""
    raw = json.loads(gzip.decompress((report / "raw" / "ranks.json.gz").read_bytes()))[model]
    inputs = np.load(folder / f"{model}.ranks.npz")
    hidden, width = (int(v) for v in inputs["sizes"])
    slots_of = dict(zip(inputs["plans"].tolist(), inputs["slots"].tolist(), strict=True))
    entries, times, rows, seen, phase, block = [], [], [], [], [], []
    for key, by_rank in raw.items():
        group, kind, plan, layer = key.split("/")
        slots = inputs[key.replace("/", "_")]
        counts = np.bincount(slots.ravel(), minlength=slots_of[f"{group}/{plan}"])
        local = counts.reshape(int(group), -1)
        for rank, (received, rounds) in by_rank.items():
            if received:
                held = local[int(rank)]
                entries.append(held[held > 0])
                times.append(float(np.median(rounds)))
                rows.append(received * slots.shape[1])
                seen.append(plan in SEEN)
                phase.append(kind)
                block.append(f"{group}/{kind}/{plan}/{layer}")
    tokens = np.concatenate(entries)
    count = len(times)
    fit = ExpertFit(
        point_idx=np.repeat(np.arange(count), [len(e) for e in entries]).astype(float),
        tokens=tokens.astype(float),
        weight=np.ones(len(tokens)),
        hidden=np.full(count, float(hidden)),
        intermediate=np.full(count, float(width)),
        times_us=np.array(times),
        token_rows=np.array(rows, dtype=float),
        weight_bytes_per_param=2.0,
    )
    return Points(fit, np.array(seen), np.array(phase), np.array(block))


def fitted(points: Points, keep: np.ndarray, name: str) -> ExpertGemmModel:
    """The model of the points where `keep`."""
    part = points.fit.subset(keep)
    return part.fit(dtype="bf16", kernel=name, start_tflops=600.0, start_gb_per_s=3500.0)


def errors(points: Points, model: ExpertGemmModel, phase: str) -> np.ndarray:
    """Signed errors of the ranks of the unseen placements."""
    keep = (~points.seen) & (points.phase == phase)
    return (points.fit.predict_us(model) / points.fit.times_us - 1)[keep]


def slowest(points: Points, model: ExpertGemmModel) -> dict[str, float]:
    """{group/phase/plan: predicted slowest rank, mean over layers}."""
    times = points.fit.predict_us(model)
    worst: dict[str, list[float]] = {}
    for block in dict.fromkeys(points.block):
        worst.setdefault(block.rpartition("/")[0], []).append(times[points.block == block].max())
    return {name: float(np.mean(values)) for name, values in worst.items()}


def pairs_right(report: Path, model: str, wanted: dict[str, float]) -> tuple[int, int]:
    """(in order, all) of the pairs with a placement of ours that differ by more than noise."""
    cases = ranks(report)[model]
    middle = {k: interval(c["measured"].max(axis=2).mean(axis=0)) for k, c in cases.items()}
    good = apart = 0
    for a, b in combinations(cases, 2):
        same = a.rpartition("/")[0] == b.rpartition("/")[0]
        unseen = any(k.rpartition("/")[2] not in SEEN for k in (a, b))
        x, y = middle[a], middle[b]
        if same and unseen and (x[1] > y[2] or x[2] < y[1]):
            apart += 1
            good += (x[0] > y[0]) == (wanted[a] > wanted[b])
    return good, apart


def main() -> None:
    """Two tables on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    bundled = load_calibration("h200-vllm")
    lines = ["| model | `h200-vllm` | fitted to other placements |", "|---|---|---|"]
    print("| ranks of | step | points | `h200-vllm` | fitted to other placements |")
    print("|---|---|---|---|---|")
    for name in ("dsv2-lite", "gpt-oss-20b"):
        points = points_of(args.report, args.folder, name)
        shape = (int(points.fit.hidden[0]), int(points.fit.intermediate[0]))
        part = points.fit.subset(points.seen)
        models = (
            bundled.expert_ffn("bf16", "vllm_ep", shape=shape),
            part.fit(dtype="bf16", kernel="own", start_tflops=600.0, start_gb_per_s=3500.0),
        )
        for phase in ("prefill", "decode"):
            sizes = [np.abs(errors(points, model, phase)) for model in models]
            cells = [f"{np.median(e):.1%}, {np.percentile(e, 90):.1%}" for e in sizes]
            print(f"| {name} | {phase} | {len(sizes[0])} | {' | '.join(cells)} |")
        orders = [pairs_right(args.report, name, slowest(points, model)) for model in models]
        lines.append(f"| {name} | {' | '.join(f'{g} of {n}' for g, n in orders)} |")
        print(f"{name}: weights at {models[1].weight_gb_per_s:.0f} GB/s", file=sys.stderr)
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
