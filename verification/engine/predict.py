"""What moesim predicts for every case of the study, written down before it is measured.

    python verification/engine/predict.py FOLDER --data DIR --out predictions.json

Step times from `serve`: TP1 on one H200, bf16, engine profile vllm as it is; host_ms: with this
machine's host. And the memory of the GPU. The routing is the trace's popularity per layer, as
`load_of_trace` takes it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
from cases import (
    CASES,
    MAX_BATCH_TOKENS,
    MAX_SEQUENCES,
    MEMORY_FRACTION,
    MODELS,
    ROUTINGS_OF,
    Case,
    context_of,
)
from prepare import trace_of

from moesim.engine.model_folder import hf_config, spec_of
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.engines import engine_profile
from moesim.serving.memory import gpu_memory
from moesim.serving.step_cost import EngineStepCost
from moesim.trace.format import Trace

HOST = Path(__file__).resolve().parents[2] / "reports/engine-vllm/host.yaml"
"""vLLM's profile with the host of these machines."""


def routed(trace: Trace, routing: str) -> Trace:
    """The trace, every token's experts drawn uniformly, or the same experts for all."""
    if routing == "trace":
        return trace
    tokens, layers, k = 4096, trace.num_layers, trace.top_k
    if routing == "uniform":
        noise = np.random.default_rng(0).random((tokens, layers, trace.num_experts))
        ids = np.argpartition(noise, k, axis=2)[:, :, :k]
    else:
        ids = np.broadcast_to(np.arange(k), (tokens, layers, k))
    cut = trace.take(np.arange(tokens))
    return replace(cut, expert_ids=np.ascontiguousarray(ids).astype(trace.expert_ids.dtype))


def shape_of(case: Case, name: str = "first") -> BatchShape:
    """The step that a case of a set times."""
    n, prompt = case.requests, case.prompt
    if case.phase == "decode":
        return BatchShape.of(decode_tokens=n, decode_context_tokens=n * context_of(case, name))
    return BatchShape.of(
        prefill_tokens=n * prompt,
        prefill_pairs=n * prompt * (prompt + 1) / 2,
        prefill_sequences=n,
    )


def deployment(key: str, trace: Trace) -> Deployment:
    """One H200, TP1, bf16, the study's limits."""
    model = MODELS[key]
    return deploy(
        spec_of(hf_config(model.preset, model.layers), key),
        "h200-sxm-ib",
        engine="vllm",
        tp=1,
        expert_dtype="bf16",
        dense_dtype="bf16",
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_sequences=MAX_SEQUENCES,
        memory_fraction=MEMORY_FRACTION,
        trace=trace,
    )


def main() -> None:
    """All models, cases and routings."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    found: dict[str, object] = {"commit": commit.strip(), "models": {}}
    for key, model in MODELS.items():
        trace = trace_of(model, args.data, args.folder)
        steps: dict[str, dict[str, object]] = {}
        for routing in ROUTINGS_OF[model.set]:
            cost = EngineStepCost(deployment(key, routed(trace, routing)))
            if not model.compile:
                cost.graph_limit = 0.0  # decode alone is graphed, and its added rows wake no expert
            hosted = cost.with_engine(engine_profile(str(HOST)))
            for case in CASES[model.set]:
                parts = cost.breakdown(shape_of(case, model.set))
                step = {name: round(float(v.sum()) / 1e3, 4) for name, v in parts.items()}
                hosted_ms = float(hosted.step_us(shape_of(case, model.set))) / 1e3
                row = {"ms": round(sum(step.values()), 4), "parts_ms": step}
                steps.setdefault(case.key, {})[routing] = row | {"host_ms": round(hosted_ms, 4)}
        memory = gpu_memory(cost.deployment)
        found["models"][key] = {  # type: ignore[index]
            "basis": cost.basis,
            "memory": asdict(memory)
            | {
                "kv_cache_bytes": memory.kv_cache_bytes,
                "kv_token_capacity": memory.kv_token_capacity,
            },
            "steps": steps,
        }
        print(key, {c: {r: s["ms"] for r, s in v.items()} for c, v in steps.items()}, flush=True)  # type: ignore[index]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
