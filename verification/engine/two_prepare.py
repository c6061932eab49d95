"""Plans, replay files and predictions for two GPUs, written before anything is measured.

    python verification/engine/two_prepare.py FOLDER --data DIR --out predictions.json

Plans are tuned on the tuning half of the requests, as `moesim plan` does by default; the engine
replays, and the prediction sees, the other half. Predictions: `serve`'s step model with the plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
from cases import MODELS as ALL
from predict import HOST
from prepare import trace_of
from two_cases import (
    CASES,
    MAX_BATCH_TOKENS,
    MAX_SEQUENCES,
    MEMORY_FRACTION,
    MODELS,
    MODES,
    REDUNDANT,
    context_of,
)

from moesim.engine.content import Content, build_content, save_content
from moesim.engine.model_folder import hf_config, spec_of, write_model_folder
from moesim.engine.schedule import PhaseRows
from moesim.placement import Placement, Plan, load_plan
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import deploy
from moesim.serving.engines import engine_profile
from moesim.serving.memory import gpu_memory
from moesim.serving.step_cost import EngineStepCost
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import Trace, save_trace

DRIFT = ("intent", "summary")
"""Domains of DeepSeek-V2-Lite's trace between which the routing drifts."""


def plans_of(trace: Trace, key: str, folder: Path) -> dict[str, Plan]:
    """Every placement by name; kept in FOLDER as it is made."""
    from moesim.cli.main import run

    made: dict[str, Plan] = {}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "t.npz"
        save_trace(trace, source)
        for extra in (0, REDUNDANT[key]) if key in REDUNDANT else (0,):
            for plan in ("linear", "eplb", "time", "balance"):
                out = folder / f"{key}.{plan}{'+' if extra else ''}.json"
                if not out.exists():
                    args = ["plan", "--trace", str(source), "--gpus", "2", "--out", str(out)]
                    args += ["--model", ALL[key].preset, "--cluster", "h200-sxm-ib"]
                    args += ["--redundant-experts", str(extra), "--replica-policy", "hash"]
                    args += ["--ignore-memory", "--time-limit", "20", "--json"]
                    solver = plan if plan in ("linear", "eplb") else "local_search"
                    objective = "balance" if plan == "balance" else "time"
                    code = run([*args, "--solver", solver, "--objective", objective])
                    if code:
                        raise SystemExit(f"{key} {plan}: exit code {code}")
                made[plan + ("+" if extra else "")] = load_plan(out)
            base = made["linear+" if extra else "linear"]
            made["bad+" if extra else "bad"] = bad_plan(base, trace, extra)
    return made


def bad_plan(base: Plan, trace: Trace, extra: int) -> Plan:
    """The busiest experts together on the first GPU; redundant slots take, there, the next busiest,
    and on the second GPU copies of the first's least busy."""
    experts = trace.num_experts
    half = (experts + extra) // 2
    table = []
    for layer in range(trace.num_layers):
        count = np.bincount(np.asarray(trace.expert_ids[:, layer]).ravel(), minlength=experts)
        order = np.argsort(-count, kind="stable")
        copies = order[:half][::-1][:extra]
        table.append(np.concatenate([order[:half], order[half:], copies]))
    placement = Placement(
        np.array(table, dtype=np.int32), base.placement.num_gpus, base.placement.num_nodes, experts
    )
    return replace(base, placement=placement, solver="bad on purpose")


def held_out(trace: Trace, layers: tuple[int, ...]) -> tuple[Trace, Content]:
    """The held-out requests, and the routing for the engine: the whole table, their rows."""
    index = split_requests(index_requests(trace)[0])[1]
    rows = np.sort(index.token_idx)
    part = phases_of(trace, layers, rows)
    whole = build_content(trace, layers)
    return trace.take(rows), replace(whole, prefill=part["prefill"], decode=part["decode"])


def phases_of(trace: Trace, layers: tuple[int, ...], rows: np.ndarray) -> dict[str, PhaseRows]:
    """Order and starts of the requests of some rows of the trace, by phase."""
    part = build_content(trace.take(rows), layers)
    return {
        name: PhaseRows(rows[given.order].astype(np.int32), given.starts)
        for name, given in (("prefill", part.prefill), ("decode", part.decode))
    }


def drift(trace: Trace, layers: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Order and starts of two domains' requests, by domain and phase."""
    found: dict[str, np.ndarray] = {}
    domains = list(trace.meta.domains)
    for name in DRIFT:
        rows = np.flatnonzero(np.asarray(trace.domain_ids) == domains.index(name))
        for phase, given in phases_of(trace, layers, rows).items():
            found[f"{name}_{phase}_order"] = given.order
            found[f"{name}_{phase}_starts"] = given.starts
    return found


def shape_of(case: Any, dp: int) -> BatchShape:
    """The step that a case times: of every rank under DP."""
    n, prompt = case.requests, case.prompt
    each = np.full(dp, 1.0)
    if case.phase == "decode":
        return BatchShape.of(
            decode_tokens=n * each, decode_context_tokens=n * context_of(case) * each
        )
    return BatchShape.of(
        prefill_tokens=n * prompt * each,
        prefill_pairs=n * prompt * (prompt + 1) / 2 * each,
        prefill_sequences=n * each,
    )


def predictions(spec: Any, trace: Trace, plans: dict[str, Plan]) -> dict[str, Any]:
    """{mode: {placement: {case: ms and parts}}}."""
    found: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    for mode, parallel in MODES.items():
        for name in plans:
            cost = EngineStepCost(
                deploy(
                    spec,
                    "h200-sxm-ib",
                    engine="vllm",
                    ep=2,
                    moe_tp=1,
                    expert_dtype="bf16",
                    dense_dtype="bf16",
                    max_batch_tokens=MAX_BATCH_TOKENS,
                    max_sequences=MAX_SEQUENCES,
                    memory_fraction=MEMORY_FRACTION,
                    trace=trace,
                    plan=plans[name],
                    **parallel,  # type: ignore[arg-type]
                )
            )
            hosted = cost.with_engine(engine_profile(str(HOST)))
            rows = {}
            for case in CASES:
                shape = shape_of(case, parallel["dp"])  # type: ignore[arg-type]
                parts = cost.breakdown(shape)
                step = {k: round(float(v.sum()) / 1e3, 4) for k, v in parts.items()}
                rows[case.key] = {"ms": round(sum(step.values()), 4), "parts_ms": step}
                rows[case.key]["host_ms"] = round(float(hosted.step_us(shape)) / 1e3, 4)
            found.setdefault(mode, {})[name] = rows
            if name.startswith("linear"):
                memory.setdefault(mode, {})[name] = kv_bytes(cost)
    return {"basis": cost.basis, "memory": memory, "modes": found}


def kv_bytes(cost: EngineStepCost) -> dict[str, float]:
    """Bytes of a GPU's weights and KV cache."""
    memory = gpu_memory(cost.deployment)
    weights = memory.expert_weight_bytes + memory.other_weight_bytes
    return {"weights": weights, "kv_cache": memory.kv_cache_bytes}


def main() -> None:
    """Everything, printed as it is made."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    found: dict[str, Any] = {"commit": commit.strip(), "models": {}}
    for key in MODELS:
        trace = trace_of(ALL[key], args.data, args.folder)
        config = hf_config(ALL[key].preset, ALL[key].layers)
        spec = spec_of(config, key)
        plans = plans_of(trace, key, args.folder)
        kept, content = held_out(trace, spec.moe_layer_ids)
        write_model_folder(config, args.folder / key)
        save_content(content, args.folder / f"{key}.replay.npz")
        np.savez_compressed(
            args.folder / f"{key}.plans.npz",
            **{n: p.placement.physical_to_logical.astype(np.int16) for n, p in plans.items()},
        )
        if key == "dsv2-lite":
            rows = drift(trace, spec.moe_layer_ids)
            np.savez_compressed(args.folder / f"{key}.drift.npz", **rows)
        found["models"][key] = predictions(spec, kept, plans)
        print(key, kept.num_tokens, content.table.shape, flush=True)
        for mode, by_plan in found["models"][key]["modes"].items():
            for case in CASES:
                ms = {n: r[case.key]["ms"] for n, r in by_plan.items()}
                print(mode, case.key, ms, flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
