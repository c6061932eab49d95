"""vLLM's expert kernels, as two_kernels.py timed them, into a calibration file.

    python verification/engine/fit_kernels.py reports/engine-vllm-x2
        [--out topologies/calibration/h200-vllm-engine.yaml]

First an entry for any shape, its errors those of a shape left out. Then one for each shape, fitted
to ranks under the trace's and uniform routing in groups of 1, 2, 8 and 16; the loads "spread" and
"bad", and all of the group of 4, are held out and give the stated errors. `vllm_tp`, where one rank
holds all experts and masks none, differs by its launch.
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from two_tables import cycles_of

from moesim.cost.calibration import load_calibration
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.fitting import ExpertFit, round_significant
from moesim.files import atomic_write

TOP_K = {"dsv2-lite": 6, "gpt-oss-20b": 4, "qwen3-30b": 8}
SEEN_LOADS, UNSEEN_GROUP = ("linear", "uniform"), 4
REGIMES = {"up to 32": (0, 33), "128 and 512": (33, 1025), "2048 and more": (1025, 1 << 30)}
"""Tokens of the step."""
HELD_OUT = "loads spread and bad, and the group of 4"
PARAMETERS = ("launch_us", "weight_gb_per_s", "tflops", "half_tokens", "sharpness")
SEEN_CYCLES = {"sync": 3, "async": 1, "sync-nccl": 3}
PLAN_S, LAYERS = 0.010, 26
LINK_GB_PER_S = 309.3
"""Point to point between two H200s, as the simulation moves weights."""
OPTIONAL = ("row_gb_per_s", "token_gb_per_s")


@dataclass(frozen=True, eq=False)
class Points:
    """Ranks of one shape that hold a routed row: their fit, tokens of the step, group, which were
    seen."""

    fit: ExpertFit
    tokens: np.ndarray
    group: np.ndarray
    seen: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(hidden, intermediate)."""
        return int(self.fit.hidden[0]), int(self.fit.intermediate[0])


def rows_of(report: Path) -> dict[str, list[Any]]:
    """By model."""
    rows: dict[str, list[Any]] = {}
    for path in sorted((report / "raw").glob("kernels.*.json.gz")):
        for row in json.loads(gzip.decompress(path.read_bytes()))["points"]:
            if sum(row[11]):
                rows.setdefault(row[0], []).append(row)
    return {key: rows[key] for key in TOP_K}


def points_of(rows: list[Any]) -> Points:
    counts = [np.array([n for n in row[11] if n], float) for row in rows]
    fit = ExpertFit(
        point_idx=np.repeat(np.arange(len(rows)), [len(c) for c in counts]).astype(float),
        tokens=np.concatenate(counts),
        weight=np.ones(sum(len(c) for c in counts)),
        hidden=np.array([row[1] for row in rows], float),
        intermediate=np.array([row[2] for row in rows], float),
        times_us=np.array([np.median(row[12]) for row in rows]),
        token_rows=np.array([row[9] * TOP_K[row[0]] for row in rows], float),
        weight_bytes_per_param=2.0,
    )
    group = np.array([row[4] for row in rows])
    seen = np.array([row[5] in SEEN_LOADS for row in rows]) & (group != UNSEEN_GROUP)
    return Points(fit, np.array([row[3] for row in rows]), group, seen)


def fit_ranks(points: Points) -> ExpertGemmModel:
    """From the seen points."""
    return points.fit.subset(points.seen).fit(
        dtype="bf16", kernel="vllm_ep", start_tflops=600.0, start_gb_per_s=3500.0
    )


def fitted(points: Points) -> tuple[ExpertGemmModel, ExpertGemmModel]:
    """(of expert-parallel ranks, of one rank with all experts) from the seen points."""
    masked = fit_ranks(points)
    alone = points.fit.subset(points.seen & (points.group == 1))
    rest = alone.predict_us(masked) - masked.launch_us
    launches = np.arange(0.0, 60.0, 0.1)
    misses = [np.minimum(np.abs(np.log((rest + v) / alone.times_us)), 0.2) for v in launches]
    best = launches[int(np.argmin([m.mean() for m in misses]))]
    return masked, replace(masked, kernel="vllm_tp", launch_us=round(float(best), 1))


def errors(points: Points, model: ExpertGemmModel, keep: np.ndarray) -> np.ndarray:
    """Signed relative errors of the points where `keep`."""
    return (points.fit.predict_us(model) / points.fit.times_us - 1)[keep]


def reports(points: Points, model: ExpertGemmModel, alone: bool) -> list[dict[str, Any]]:
    """Held-out errors by tokens of the step."""
    found = []
    for regime, (low, high) in REGIMES.items():
        keep = ~points.seen & ((points.group == 1) == alone)
        keep &= (points.tokens >= low) & (points.tokens < high)
        size = np.abs(errors(points, model, keep))
        found.append(
            {
                "regime": f"steps of {regime} tokens",
                "held_out": HELD_OUT,
                "points": len(size),
                "median_error": round(float(np.median(size)), 4),
                "p90_error": round(float(np.percentile(size, 90)), 4),
            }
        )
    return found


def general(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """The entry for any shape, with the errors of each shape under the others' fit."""
    found = []
    for key, own in rows.items():
        others = points_of([r for k, more in rows.items() for r in more if k != key])
        points = points_of(own)
        size = np.abs(errors(points, fit_ranks(others), points.group > 1))
        found.append(
            {
                "regime": f"shape {points.shape[0]}x{points.shape[1]}",
                "held_out": "the shape",
                "points": len(size),
                "median_error": round(float(np.median(size)), 4),
                "p90_error": round(float(np.percentile(size, 90)), 4),
            }
        )
    everything = points_of([r for more in rows.values() for r in more])
    return _entry(everything, fit_ranks(everything), "vllm_ep") | {"fit": found}


def entry(points: Points, model: ExpertGemmModel) -> dict[str, Any]:
    """The calibration's entry of one shape."""
    hidden, width = points.shape
    found = _entry(points, model, f"{model.kernel} {hidden}x{width}")
    found["shape"] = [hidden, width]
    found["fit"] = reports(points, model, alone=model.kernel == "vllm_tp")
    return found


def _entry(points: Points, model: ExpertGemmModel, kernel: str) -> dict[str, Any]:
    found = {
        "dtype": "bf16",
        "kernel": kernel,
        "basis": "measured",
        "source": "vllm_engine",
        "weight_bytes_per_param": 2.0,
        **{name: getattr(model, name) for name in PARAMETERS},
    }
    found |= {n: getattr(model, n) for n in OPTIONAL if getattr(model, n) is not None}
    params = 3 * points.fit.hidden * points.fit.intermediate
    found["ranges"] = {
        "tokens_per_expert": [1.0, float(points.fit.tokens.max())],
        "params_per_expert": [float(params.min()), float(params.max())],
    }
    return found


def rearrangements(report: Path) -> list[dict[str, Any]]:
    """Entries of what vLLM's balancer took. Through gloo the time goes with the bytes, whatever the
    layers; through NCCL it is what `LINK_GB_PER_S` and `PLAN_S` leave, shared over the layers. The
    first `SEEN_CYCLES` give the figure, the others the error."""
    found = []
    for way, cycles in cycles_of(report).items():
        kept = SEEN_CYCLES[way]
        gb, took = (np.array(v) for v in zip(*[(g, t) for g, t, _ in cycles], strict=True))
        own: dict[str, float] = {"layer_us": 0.0}
        if way == "sync-nccl":
            rest = took - PLAN_S - gb / LINK_GB_PER_S
            own["layer_us"] = round(float(np.median(rest[:kept])) / LAYERS * 1e6, -1)
            said = PLAN_S + gb / LINK_GB_PER_S + LAYERS * own["layer_us"] / 1e6
        else:
            own["gb_per_s"] = round_significant(float(np.median((gb / (took - PLAN_S))[:kept])), 3)
            said = PLAN_S + gb / own["gb_per_s"]
        size = np.abs(said / took - 1)[kept:]
        errors = {"median_error": np.median(size), "p90_error": np.percentile(size, 90)}
        found.append(
            {
                "through": "nccl" if way == "sync-nccl" else "gloo",
                "asynchronous": way == "async",
                "basis": "measured",
                "source": "vllm_engine",
                **own,
                "fit": [
                    {
                        "held_out": "later rearrangements",
                        "points": len(size),
                        **{n: round(float(v), 4) for n, v in errors.items()},
                    }
                ],
            }
        )
    return found


def main() -> None:
    """Prints held-out errors beside the public table's; writes the file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    public, rows = load_calibration("h200-vllm"), rows_of(args.report)
    entries = [general(rows)]
    print("| shape | kernel | steps | points | `h200-vllm` | fitted |\n|---|---|---|---|---|---|")
    for points in map(points_of, rows.values()):
        for model in fitted(points):
            made = entry(points, model)
            entries.append(made)
            old = reports(
                points, public.expert_ffn("bf16", model.kernel), model.kernel == "vllm_tp"
            )
            for before, after in zip(old, made["fit"], strict=True):
                cells = [f"{r['median_error']:.1%}, {r['p90_error']:.1%}" for r in (before, after)]
                name = f"{points.shape[0]} x {points.shape[1]} | {model.kernel}"
                about = f"{name} | {after['regime'][9:-7]} | {after['points']}"
                print(f"| {about} | {' | '.join(cells)} |")
    if args.out is None:
        return
    source = "fused_experts of vLLM 0.23.0 on one H200, driver 580.159.04, weights out of the cache"
    file = {
        "format": "moesim-calibration",
        "version": 1,
        "name": args.out.stem,
        "gpu": "NVIDIA H200",
        "description": "Expert kernels of vLLM by rank, three shapes, and its moves of weights",
        "sources": {
            "vllm_engine": f"{source}; its balancer on two; 2026-11-30 (reports/engine-vllm-x2)"
        },
        "expert_ffn": entries,
        "rearrangements": rearrangements(args.report),
    }
    text = yaml.safe_dump(file, sort_keys=False, width=100, default_flow_style=None)
    atomic_write(args.out, text.encode())


if __name__ == "__main__":
    main()
