"""What each rank of an expert-parallel group receives under several placements; predicted times.

    python verification/engine/ranks_prepare.py FOLDER --data DIR --out predictions_ranks.json

Plans are `moesim plan`'s on half of the requests, batches come from the other half. Replicas are
chosen as vLLM's router does: by a hash of the token's number on its home rank. Predicted is what
`serve` takes for vLLM's experts on an H200, and what the calibration `h200-vllm` alone would say
("before"). Writes FOLDER/MODEL.ranks.npz with one array of slots [tokens, K] for every group,
phase, plan and layer. The requests and layers are others than those of raw/ranks-cached.json.gz.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
from cases import MODELS, RANK_MODELS
from prepare import cut, trace_of

from moesim.cost.calibration import Calibration, load_calibration
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.engine.model_folder import hf_config, spec_of
from moesim.jobs.inputs import cluster_of
from moesim.model.names import load_model
from moesim.placement import Placement
from moesim.planning.case import token_case
from moesim.planning.request import PlanRequest
from moesim.serving.deployment import calibration_of, deploy
from moesim.solvers.base import run_solver
from moesim.solvers.registry import find_solver
from moesim.trace.batches import draw_batches, index_requests, split_requests
from moesim.trace.format import Trace, load_token_trace

PLANS = ("linear", "eplb", "ours", "eplb+", "ours+")
"""Without replicas and, "+", with one redundant slot on every GPU."""
SOLVERS = {"linear": "linear", "eplb": "eplb", "ours": "local_search"}
GROUPS = (8, 16)
TIME_LIMIT_S = 20.0
PHASES = {"prefill": 512, "decode": 64}
"""Tokens per home rank."""
LAYERS = 4
KNUTH = 2654435769
RENUMBERED = 100_000
"""Added to the numbers of DeepSeek-V2-Lite's requests, of which there are few: they then fall into
other halves."""


def trace_for(key: str, data: Path, folder: Path) -> Trace:
    """The routing of a model: requests that the earlier ranks did not have, where there are."""
    model = MODELS[key]
    if key == "olmoe":
        return cut(load_token_trace(data / "debian-moe.npz", "this study"))
    if key == "gpt-oss-20b":
        whole = load_token_trace(data / f"{key}.npz", "this study")
        earlier = np.unique(trace_of(model, data, folder).request_ids)
        return cut(whole.take(np.flatnonzero(~np.isin(whole.request_ids, earlier))))
    trace = trace_of(model, data, folder)
    if key == "dsv2-lite":
        return replace(trace, request_ids=np.asarray(trace.request_ids) + RENUMBERED)
    return trace


def placements_of(trace: Trace, preset: str, gpus: int) -> dict[str, Placement]:
    """Placements on `gpus` GPUs, each solver's answer to the case that `moesim plan` makes."""
    made: dict[str, Placement] = {}
    for extra in ("", "+"):
        request = PlanRequest.of(
            trace,
            cluster_of("h200-sxm-ib", gpus, {}),
            load_model(preset),
            redundant_experts=gpus if extra else 0,
            time_limit_s=TIME_LIMIT_S,
            check_memory=False,
        )
        problem = token_case(request).problem
        for name, solver in SOLVERS.items():
            if name + extra in PLANS:
                made[name + extra] = run_solver(find_solver(solver), problem).placement
    return made


def slots_of(experts: np.ndarray, row: np.ndarray, token: np.ndarray) -> np.ndarray:
    """[n, K] slots of `experts` under one layer's physical_to_logical `row` [P], the replica by the
    token's number on its home rank (vLLM 0.23, base_router.py)."""
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(row.max() + 1))
    count = np.bincount(row)
    hashed = (token.astype(np.uint64) * KNUTH) & 0xFFFFFFFF
    return order[first[experts] + (hashed[:, None] % count[experts].astype(np.uint64)).astype(int)]


def served_with(preset: str) -> Calibration:
    """The kernels that `serve` takes for this model in vLLM on an H200."""
    spec = spec_of(hf_config(preset), preset)
    sizes = {"expert_dtype": "bf16", "dense_dtype": "bf16"}
    return calibration_of(deploy(spec, "h200-sxm-ib", engine="vllm", tp=1, **sizes))  # type: ignore[arg-type]


def times_of(
    kernel: ExpertGemmModel, local: np.ndarray, received: list[int], top_k: int, sizes: list[int]
) -> list[float]:
    """Microseconds of every rank: `local` [ranks, slots] choices, `received` tokens."""
    work = kernel.slots_time_us(local.astype(float), *sizes, 3)
    extra = [kernel.token_overhead_us(n, top_k, sizes[0]) for n in received]
    return [round(float(t), 3) for t in kernel.layer_launch_us() + work + np.array(extra)]


def prepare(key: str, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """{name of the calibration: {group/phase/plan/layer: microseconds by rank}} of one model."""
    spec = spec_of(hf_config(MODELS[key].preset), key)
    sizes = [spec.hidden_size, spec.moe_intermediate_size]
    calibrations = {"now": served_with(MODELS[key].preset), "before": load_calibration("h200-vllm")}
    kernels = {
        name: c.expert_ffn("bf16", "vllm_ep", shape=(sizes[0], sizes[1]))
        for name, c in calibrations.items()
    }
    trace = trace_for(key, args.data, args.folder)
    picked = np.linspace(0, trace.num_layers - 1, 2 * LAYERS + 1)[1::2].astype(int)
    arrays: dict[str, np.ndarray] = {}
    slots_by_plan: dict[str, int] = {}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in kernels}
    for group in GROUPS:
        plans = placements_of(trace, MODELS[key].preset, group)
        for phase, each in PHASES.items():
            held = split_requests(index_requests(trace, phase)[0])[1]  # type: ignore[arg-type]
            tokens = draw_batches(held, phase, each * group, 1, 1)[0]  # type: ignore[arg-type]
            per_rank = len(tokens) // group
            tokens = tokens[: per_rank * group]
            for plan in PLANS:
                table = plans[plan].physical_to_logical
                slots_by_plan[f"{group}/{plan}"] = table.shape[1]
                for layer in picked:
                    experts = np.asarray(trace.expert_ids[tokens, layer]).astype(int)
                    slots = slots_of(experts, table[layer], np.arange(len(tokens)) % per_rank)
                    name = f"{group}/{phase}/{plan}/{layer}"
                    arrays[name.replace("/", "_")] = slots.astype(np.int16)
                    local = np.bincount(slots.ravel(), minlength=table.shape[1])
                    local = local.reshape(group, -1)
                    here = slots // local.shape[1]
                    got = [int((here == g).any(axis=1).sum()) for g in range(group)]
                    for which, kernel in kernels.items():
                        times[which][name] = times_of(kernel, local, got, trace.top_k, sizes)
    np.savez_compressed(
        args.folder / f"{key}.ranks.npz",
        sizes=np.array(sizes),
        plans=np.array(list(slots_by_plan)),
        slots=np.array(list(slots_by_plan.values())),
        **arrays,  # type: ignore[arg-type]
    )
    return times


def main() -> None:
    """All models; the slowest rank of every plan on stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    predicted: dict[str, dict[str, dict[str, list[float]]]] = {}
    for key in RANK_MODELS:
        predicted[key] = times = prepare(key, args)
        worst: dict[str, list[float]] = {}
        for name, by_rank in times["now"].items():
            worst.setdefault(name.rpartition("/")[0], []).append(max(by_rank))
        print(key, {n: round(float(np.mean(w)), 1) for n, w in worst.items()}, flush=True)
        args.out.write_text(json.dumps(predicted) + "\n")


if __name__ == "__main__":
    main()
