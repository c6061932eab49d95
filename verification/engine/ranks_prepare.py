"""What each rank of an expert-parallel group receives under several placements; predicted times.

    python verification/engine/ranks_prepare.py FOLDER --data DIR --out predictions.json

Batches come from the requests that the plans were not tuned on. Replicas are chosen as vLLM's
router does: by a hash of the token's number on its home rank. Writes FOLDER/MODEL.ranks.npz with
one array of slots [tokens, K] for every group, plan, phase and layer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
from cases import MODELS
from prepare import GROUPS, PLANS, trace_of

from moesim.cost.calibration import load_calibration
from moesim.trace.batches import draw_batches, index_requests, split_requests

PHASES = {"prefill": 512, "decode": 64}
"""Tokens per home rank."""
LAYERS = 4
KNUTH = 2654435769


def slots_of(experts: np.ndarray, row: np.ndarray, token: np.ndarray) -> np.ndarray:
    """[n, K] slots of `experts` under one layer's physical_to_logical `row` [P], the replica by the
    token's number on its home rank (vLLM 0.23, base_router.py)."""
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(row.max() + 1))
    count = np.bincount(row)
    hashed = (token.astype(np.uint64) * KNUTH) & 0xFFFFFFFF
    return order[first[experts] + (hashed[:, None] % count[experts].astype(np.uint64)).astype(int)]


def main() -> None:
    """All models of the plans that prepare.py made."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    predicted: dict[str, dict[str, list[float]]] = {}
    calibration = load_calibration("h200-vllm")
    for path in sorted(args.folder.glob("*.plans.json")):
        key = path.name.removesuffix(".plans.json")
        raw = json.loads(path.read_text())
        hidden, width = raw["sizes"]["hidden"], raw["sizes"]["width"]
        kernel = calibration.expert_ffn("bf16", "vllm_ep", shape=(hidden, width))
        trace = trace_of(MODELS[key], args.data, args.folder)
        picked = np.linspace(0, trace.num_layers - 1, LAYERS).astype(int)
        arrays, times = {}, {}
        for group in GROUPS:
            for phase, each in PHASES.items():
                held = split_requests(index_requests(trace, phase)[0])[1]  # type: ignore[arg-type]
                tokens = draw_batches(held, phase, each * group, 1, 0)[0]  # type: ignore[arg-type]
                per_rank = len(tokens) // group
                tokens = tokens[: per_rank * group]
                for plan in PLANS:
                    table = np.array(raw["plans"][f"{group}/{plan}"])
                    for layer in picked:
                        experts = np.asarray(trace.expert_ids[tokens, layer]).astype(int)
                        number = np.arange(len(tokens)) % per_rank
                        slots = slots_of(experts, table[layer], number)
                        name = f"{group}/{phase}/{plan}/{layer}"
                        arrays[name] = slots.astype(np.int16)
                        counts = np.bincount(slots.ravel(), minlength=table.shape[1])
                        local = counts.reshape(group, -1)
                        here = slots // local.shape[1]
                        got = [(here == g).any(axis=1).sum() for g in range(group)]
                        work = kernel.slots_time_us(local.astype(float), hidden, width, 3)
                        extra = [kernel.token_overhead_us(n, trace.top_k, hidden) for n in got]
                        total = kernel.layer_launch_us() + work + np.array(extra)
                        times[name] = [round(float(t), 3) for t in total]
        np.savez_compressed(
            args.folder / f"{key}.ranks.npz",
            sizes=np.array([hidden, width]),
            plans=np.array(list(raw["plans"])),
            slots=np.array([len(rows[0]) for rows in raw["plans"].values()]),
            **{name.replace("/", "_"): a for name, a in arrays.items()},
        )
        predicted[key] = times
        for group in GROUPS:
            for phase in PHASES:
                worst = {
                    plan: round(
                        sum(max(times[f"{group}/{phase}/{plan}/{x}"]) for x in picked) / LAYERS, 1
                    )
                    for plan in PLANS
                }
                print(key, group, phase, worst, flush=True)
    args.out.write_text(json.dumps(predicted) + "\n")


if __name__ == "__main__":
    main()
