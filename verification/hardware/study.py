"""The study of a validation on hardware, from its raw records: tables, plots, figures.

    python verification/hardware/study.py reports/hardware-h200x2 [--pack run1=FOLDER ...]
        [--inputs FOLDER] [--calibration FILE_OR_NAME] [--fewer REPORT]

`--pack` first compresses what a run wrote into the report's `raw/`. Then everything else is made
from `raw/`: results.json, the plots, and the tables between markers in README.md. `--inputs` is
what prepare.py wrote; with it the offloading is also predicted from the calibration alone.
`--fewer` names the report of a host with fewer GPUs, whose errors are put beside these.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import study_plots
import study_tables

from moesim.cluster import load_cluster
from moesim.cost.calibration import Calibration, load_calibration
from moesim.replay.cache_schedule import calibrated_costs
from moesim.replay.cases import longest_first
from moesim.replay.compare import Comparison, compare, load_measured
from moesim.replay.make_schedule import lru_schedule
from moesim.replay.predict import build_predictor
from moesim.replay.records import read_record
from moesim.replay.schedule import Schedule, load_schedule, predict_tokens_us
from moesim.replay.shape import ExpertShape, parse_shape
from moesim.replay.tables import load_raw, merge_raw
from moesim.trace.format import load_token_trace

CLUSTER = "h200-sxm-ib"
APART = (0.0, 0.01, 0.02, 0.05, 0.1)
OFFLOAD_LAYERS, OFFLOAD_TOKENS = 6, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--pack", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--calibration", default="h200-torch")
    parser.add_argument("--fewer", type=Path)
    arguments = parser.parse_args()
    raw = arguments.report / "raw"
    for item in arguments.pack:
        name, _, folder = item.partition("=")
        pack(Path(folder), raw / name)
    calibration = load_calibration(arguments.calibration)
    found = compare_all(raw, calibration)
    measured = merge_raw([load_raw(p) for p in sorted(raw.glob("run*/calibration*.json.gz"))])
    offload = offloading(raw, calibration, arguments.inputs, arguments.report / "results.json")
    results = {
        "models": {c.model: summary(c) for c in found},
        "overall": overall(found),
        "pairs": [pairs(found, mode, by) for mode in ("graph", "eager") for by in APART],
        "disjoint": disjoint(raw, measured),
        "offload": offload,
        "throttling": throttling(measured),
    }
    if arguments.fewer is not None:
        results["fewer"] = growth(arguments.fewer / "results.json", results)
    text = json.dumps(rounded(results), indent=1, allow_nan=False)
    (arguments.report / "results.json").write_text(text + "\n", encoding="utf-8")
    study_tables.fill(arguments.report / "README.md", results, calibration)
    study_plots.draw(arguments.report, found, offload)


def rounded(value: Any) -> Any:
    """Numbers to ten significant digits, so that any machine writes the same file."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def pack(source: Path, target: Path) -> None:
    """Every record of a run, compressed so that the same record is the same file."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        data = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
        (target / f"{path.name}.gz").write_bytes(gzip.compress(data, 9, mtime=0))


def models_of(raw: Path) -> list[str]:
    """Models that the first run replayed, by the size of an expert."""
    found = {}
    for path in (raw / "run1").glob("*.json.gz"):
        model = path.name.removesuffix(".json.gz")
        if not model.startswith(("calibration", "offload")):
            found[model] = parse_shape(load_measured(path)["model"]).expert_bytes
    return sorted(found, key=lambda model: (found[model], model))


def growth(before: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors of the models that both reports have, from CUDA graphs, by model and size."""
    fewer = json.loads(before.read_text(encoding="utf-8"))["models"]
    out = []
    for model, entry in results["models"].items():
        if model not in fewer:
            continue
        known = {g["tokens_per_rank"]: g for g in fewer[model]["groups"] if g["mode"] == "graph"}
        for group in (g for g in entry["groups"] if g["mode"] == "graph"):
            other = known[group["tokens_per_rank"]]
            names = ("median_error", "p90_error", "bias", "spearman")
            row = {"model": model, "tokens_per_rank": group["tokens_per_rank"]}
            row |= {n: group[n] for n in names} | {f"fewer_{n}": other[n] for n in names}
            out.append(row)
    return out


def compare_all(raw: Path, calibration: Calibration) -> list[Comparison]:
    out = []
    for model in models_of(raw):
        record = load_measured(raw / "run1" / f"{model}.json.gz")
        again = raw / "run2" / f"{model}.json.gz"
        cluster = load_cluster(CLUSTER, num_gpus=int(record["environment"]["num_ranks"]))
        shape = parse_shape(record["model"])
        predictor = build_predictor(shape, calibration, cluster, record["options"]["dedup"])
        repeat = load_measured(again) if again.exists() else None
        out.append(compare(record, predictor, repeat=repeat))
    return out


def summary(found: Comparison) -> dict[str, Any]:
    """What results.json holds of a model."""
    errors = {mode: signed(found, mode) for mode in found.modes}
    return {
        "failures": found.failures(),
        "notes": list(found.notes),
        "errors": {mode: figures(values) for mode, values in errors.items()},
        "groups": [
            {**asdict(g), "bias": bias(found, g.mode, g.tokens_per_rank)} for g in found.groups
        ],
    }


def signed(found: Comparison, mode: str) -> np.ndarray:
    """Predicted / measured - 1 of every layer of a mode."""
    cases = [c for c in found.cases if c.mode == mode]
    return np.concatenate([c.predicted_us / c.measured_us - 1 for c in cases])


def bias(found: Comparison, mode: str, tokens: int) -> float:
    cases = [c for c in found.cases if (c.mode, c.tokens_per_rank) == (mode, tokens)]
    return float(np.median(np.concatenate([c.predicted_us / c.measured_us - 1 for c in cases])))


def figures(values: np.ndarray) -> dict[str, float]:
    size = np.abs(values)
    return {
        "layers": len(values),
        "median": float(np.median(size)),
        "p90": float(np.percentile(size, 90)),
        "largest": float(size.max()),
        "bias": float(np.median(values)),
    }


def overall(found: list[Comparison]) -> dict[str, Any]:
    """Errors over all models, by mode and by mode and size; and the orders of plans."""
    out: dict[str, Any] = {}
    for mode in ("graph", "eager"):
        out[mode] = figures(np.concatenate([signed(c, mode) for c in found]))
        for tokens in sorted({g.tokens_per_rank for c in found for g in c.groups}):
            cases = [
                x for c in found for x in c.cases if (x.mode, x.tokens_per_rank) == (mode, tokens)
            ]
            values = np.concatenate([x.predicted_us / x.measured_us - 1 for x in cases])
            out[f"{mode} {tokens}"] = figures(values)
        orders = [g.spearman for c in found for g in c.groups if g.mode == mode]
        known = [rho for rho in orders if rho is not None]
        out[mode]["orders"] = len(known)
        out[mode]["orders_met"] = sum(rho >= 0.95 for rho in known)
    return out


def pairs(found: list[Comparison], mode: str, apart: float) -> dict[str, Any]:
    """Pairs of plans of a group that differ by more than the noise and `apart`, and how many of
    them are predicted in the wrong order."""
    count = wrong = 0
    for group in (g for c in found for g in c.groups if g.mode == mode):
        least = 1.0 + max(apart, group.noise)
        for one, two in combinations(group.mean_us.values(), 2):
            (low, first), (high, second) = sorted((one, two))
            if high > low * least:
                count += 1
                wrong += second <= first
    return {"mode": mode, "apart": apart, "pairs": count, "wrong": wrong}


def disjoint(raw: Path, measured: dict[str, Any]) -> dict[str, int]:
    """How many validated loads and messages coincide with calibrated ones."""
    loads = {_load(r["hidden"], r["intermediate"], r["counts"]) for r in measured["tables"]["ffn"]}
    sizes = {(int(r["bytes"])) for r in measured["tables"]["all_to_all_v"]}
    out = {"loads": 0, "loads_in_both": 0, "messages": 0, "messages_in_both": 0}
    for model in models_of(raw):
        record = load_measured(raw / "run1" / f"{model}.json.gz")
        shape = parse_shape(record["model"])
        num_ranks = int(record["environment"]["num_ranks"])
        for result in record["results"]:
            rows = np.array(result["slot_rows"])
            for load in rows.reshape(len(rows) * num_ranks, -1):
                key = _load(shape.hidden_size, shape.moe_intermediate_size, load.tolist())
                out["loads"] += 1
                out["loads_in_both"] += key in loads
            for message in np.array(result["messages"]):
                sent = int((message.sum(axis=1) - np.diag(message)).max()) * shape.row_bytes
                out["messages"] += 1
                out["messages_in_both"] += sent in sizes
    return out


def _load(hidden: int, intermediate: int, counts: Iterable[int]) -> tuple[int, ...]:
    return (hidden, intermediate, *sorted(c for c in counts if c > 0))


def throttling(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The bare expert kernel beside the same call in a layer's company, if both were measured."""
    inside = {
        (r["shape"], tuple(r["counts"])): r["us"]
        for r in measured["tables"]["ffn"]
        if "less_us" in r
    }
    return [
        {
            "shape": r["shape"],
            "rows": r["tokens"],
            "alone_us": r["us"],
            "in_company_us": inside[(r["shape"], tuple(r["counts"]))],
        }
        for r in measured["tables"].get("ffn_alone", [])
        if r["mode"] == "graph" and (r["shape"], tuple(r["counts"])) in inside
    ]


def offloading(
    raw: Path, calibration: Calibration, inputs: Path | None, before: Path
) -> list[dict[str, Any]]:
    """Measured and predicted time per token of each cache, of the last run that measured it.

    Predicted from the run's own copy and kernel times, and from the calibration, for which the
    schedule must be at hand; else the figure of the results before is kept, where the copies agree.
    """
    known = {}
    if before.exists():
        known = {row["label"]: row for row in json.loads(before.read_text())["offload"]}
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for path in sorted(raw.glob("run*/offload*.json.gz")):
        record = read_record(path, "moesim-offload-measured", "pack it again")
        found |= {r["label"]: (record, r) for r in record["results"]}
    out = []
    for label, (record, result) in found.items():
        shape = parse_shape(record["model"])
        schedule = at_hand(inputs, shape, result)
        row = {
            "label": label,
            "num_slots": result["num_slots"],
            "copies_per_token": result["copies_per_token"],
            "measured_us": result["token_us"]["mean"],
            "runs_us": result["token_us"]["mean_of_each_run"],
            "own_us": result["predicted_us"],
            "calibrated_us": None,
        }
        if schedule is not None:
            times = predict_tokens_us(schedule, calibrated_costs(shape, calibration, schedule))
            row["calibrated_us"] = float(times[-result["num_tokens"] :].mean())
        elif known.get(label, {}).get("copies_per_token") == result["copies_per_token"]:
            row["calibrated_us"] = known[label]["calibrated_us"]
        out.append(row)
    return out


def at_hand(inputs: Path | None, shape: ExpertShape, result: dict[str, Any]) -> Schedule | None:
    """The schedule that was replayed, None where it cannot be had again."""
    if inputs is None:
        return None
    folder = inputs / shape.name
    made = [load_schedule(path) for path in sorted(folder.glob("cache/*.npz"))]
    trace = load_token_trace(folder / "trace.npz", "study")
    tokens = longest_first(trace, OFFLOAD_TOKENS)
    experts = np.asarray(trace.expert_ids[tokens, :OFFLOAD_LAYERS])
    if shape.top_k * OFFLOAD_LAYERS <= result["num_slots"] < OFFLOAD_LAYERS * shape.num_experts:
        slots = result["num_slots"] // OFFLOAD_LAYERS
        made += [lru_schedule(experts, shape.num_experts, slots, lookahead=n) for n in (0, 1)]
    for schedule in made:
        copies = schedule.copies_per_token.tolist()
        if schedule.label == result["label"] and copies == result["copies"]:
            return schedule
    return None


if __name__ == "__main__":
    main()
