"""Latent attention over keys that an indexer chooses, fitted to SGLang's modules: `python
verification/serving/fit_indexed.py --systems SYSTEMS --gpu h200 --base h200-sglang` writes the
section `indexed` of topologies/calibration/h200.yaml.

SYSTEMS is the folder `aiconfigurator_core/systems/data` of aiconfigurator 0.12.0 (Apache-2.0),
whose `sparse_attention/sglang/0.5.14` times whole modules of DeepSeek-V3.2 and GLM-5 on H100 and
H200, by heads, sequences, tokens and context. What is fitted is what they take beside the
projections and, in decode, the attention of `base`'s latent modules. Prefill is fitted to steps of
3,000 tokens and more of up to 16 prompts: below, the host sets the pace (1.3 ms per module). Every
other row is held out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.optimize import least_squares

sys.path.insert(0, str(Path(__file__).resolve().parent))

from moesim.cost.calibration import load_calibration
from moesim.cost.dense import IndexedModule
from moesim.files import atomic_write
from moesim.model.names import load_model
from moesim.serving.attention_us import AttentionTerms, attention_terms
from moesim.serving.deployment import deploy
from moesim.serving.row_cost import RowCost
from moesim.serving.step_parts import Sources

CALIBRATIONS = Path(__file__).resolve().parents[2] / "topologies" / "calibration"
MODELS = {"GlmMoeDsaForCausalLM": "GLM-5", "DeepseekV32ForCausalLM": "DeepSeek-V3.2"}
TABLE = {"decode": "dsa_generation_module_perf", "prefill": "dsa_context_module_perf"}
KV = {"bf16": "bfloat16", "fp8": "fp8"}
LEAST_PROMPT = 3000
MOST_PROMPTS = 16
"""Hundreds of pieces of a few tokens, each with a long context, take several times as long."""
STALLED_MS = 1.0
"""Decodes of 512 sequences and more ran without a CUDA graph."""
PADDED_HEADS = 64
"""FlashMLA's sparse kernel has 64 heads or 128 (github.com/deepseek-ai/FlashMLA)."""


def points(systems: Path, gpu: str, phase: str, kv_dtype: str) -> pd.DataFrame:
    """Modules with fp8 projections that ran an indexer; one row per shape."""
    name = f"{gpu}_sxm/sparse_attention/sglang/0.5.14/{TABLE[phase]}.parquet"
    f = pd.read_parquet(systems / name)
    f = f[(f.gemm_type == "fp8_block") & (f.kv_cache_dtype == KV[kv_dtype])]
    f = f[f.kernel_source.str.contains("indexer") & ~f.kernel_source.str.contains("skip")]
    prompts = (f.batch_size * f.isl >= LEAST_PROMPT) & (f.batch_size <= MOST_PROMPTS)
    f = f[f.latency < STALLED_MS] if phase == "decode" else f[prompts]
    shape = ["architecture", "num_heads", "batch_size", "isl", "step"]
    return f.groupby(shape, as_index=False).latency.median()


def terms_of(architecture: str, heads: int, kv_dtype: str, base: str) -> tuple[Any, AttentionTerms]:
    """A rank's projections by rows, and its attention without an indexer."""
    model = load_model(MODELS[architecture])
    cut = replace(model.attention, num_heads=heads, num_kv_heads=heads, chosen_keys=0)
    deployment = deploy(
        replace(model, attention=cut),
        "h200-sxm-ib",
        engine="sglang",
        tp=1,
        dense_dtype="fp8",
        kv_dtype=kv_dtype,
        calibration=load_calibration(base),
    )
    rows = RowCost(deployment, load_calibration(base), Sources(["assumed"]))
    terms, _, _ = attention_terms(deployment, load_calibration(base).dense)
    return rows._projections_us, terms[0]


def fit(systems: Path, gpu: str, base: str, phase: str, kv_dtype: str) -> dict[str, Any]:
    """One entry, with its held-out error."""
    f = points(systems, gpu, phase, kv_dtype)
    measured = f.latency.to_numpy() * 1e3
    count, tokens, step = (f[c].to_numpy(float) for c in ("batch_size", "isl", "step"))
    known = np.zeros(len(f))
    parts: list[tuple[np.ndarray, Any, int, np.ndarray, np.ndarray]] = []
    for (architecture, heads), at in f.groupby(["architecture", "num_heads"]).indices.items():
        spec = load_model(MODELS[architecture]).attention
        projections, terms = terms_of(architecture, int(heads), kv_dtype, base)
        rows = count[at] * tokens[at]
        pairs = count[at] * (tokens[at] * (tokens[at] + 1) / 2 + tokens[at] * step[at])
        known[at] = projections(rows)
        if phase == "decode":
            pairs = count[at] * (step[at] + 1)
            known[at] += terms.decode_us(count[at], np.minimum(pairs, count[at] * spec.chosen_keys))
        parts.append((at, spec, int(heads), rows, pairs))

    def predict(p: np.ndarray) -> np.ndarray:
        module = made(p)
        time = known + module.launch_us
        for at, spec, heads, rows, pairs in parts:
            time[at] += module.index_us(spec) * pairs
            if phase == "prefill":
                time[at] += module.chosen_us(spec, heads) * rows
        return time

    names = ("launch_us", "index_tflops", "attention_tflops", "row_us")
    names = names[:2] if phase == "decode" else names
    fixed: dict[str, Any] = {"phase": phase, "kv_dtype": kv_dtype}
    if phase == "prefill":
        fixed["min_heads"] = PADDED_HEADS
    made: Callable[[np.ndarray], IndexedModule] = lambda p: IndexedModule(  # noqa: E731
        **fixed, **dict(zip(names, np.exp(p), strict=True))
    )
    train = np.arange(len(f)) % 2 == 0
    start = np.log([20.0, 100.0, 550.0, 0.05][: len(names)])
    found = least_squares(lambda p: np.arcsinh(5 * np.log(predict(p) / measured)[train]), start).x
    error = np.abs(predict(found) / measured - 1)[~train]
    return {
        **fixed,
        "basis": "measured",
        "source": f"sglang_indexed_{gpu}",
        **{n: round(float(f"{v:.4g}"), 6) for n, v in zip(names, np.exp(found), strict=True)},
        "fit": [
            {
                "regime": "all",
                "held_out": "every other row",
                "points": len(f),
                "median_error": round(float(np.median(error)), 4),
                "p90_error": round(float(np.quantile(error, 0.9)), 4),
            }
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", type=Path, required=True)
    parser.add_argument("--gpu", required=True, choices=("h100", "h200"))
    parser.add_argument("--base", required=True, help="calibration with latent modules")
    args = parser.parse_args()
    entries = [
        fit(args.systems, args.gpu, args.base, phase, kv)
        for phase in ("decode", "prefill")
        for kv in KV
    ]
    path = CALIBRATIONS / f"{args.gpu}.yaml"
    source = "aiconfigurator 0.12.0 (Apache-2.0), {}_sxm/sparse_attention/sglang/0.5.14"
    line = f"  sglang_indexed_{args.gpu}: '{source.format(args.gpu)}'\n"
    text = path.read_text().split("\nindexed:\n")[0].rstrip("\n")
    if line not in text:
        text = text.replace("sources:\n", f"sources:\n{line}", 1)
    dumped = yaml.safe_dump({"indexed": entries}, sort_keys=False, default_flow_style=None)
    atomic_write(path, f"{text}\n{dumped}")
    print(dumped)


if __name__ == "__main__":
    main()
