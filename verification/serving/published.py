"""Throughput that others published of their deployments, beside what moesim predicts for the same
settings: `python verification/serving/published.py --out reports/published-deployments`.

Nothing is fitted to them. A case is a steady batch: every rank computes `tokens` prompt tokens in
prompts of `length`, or `sequences` decode with `length` tokens cached; the rate is the batch over
the time of its step, with the engine's shipped constants. Variants take one thing of the setting
away, to say what it is worth.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesim.files import atomic_write
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import deploy
from moesim.serving.memory import gpu_memory
from moesim.serving.step_cost import EngineStepCost

H100 = "h100-sxm-ib"
GB200 = "gb200-nvl72"
LMSYS_H100 = "lmsys.org/blog/2025-05-05-large-scale-ep; github.com/sgl-project/sglang/issues/6017"
LMSYS_GB200_1 = "lmsys.org/blog/2025-06-16-gb200-part-1"
LMSYS_GB200_2 = "lmsys.org/blog/2025-09-25-gb200-part-2; github.com/shifangx/Scripts-SGLang"
DEEPSEEK = "DeepSeek, Open-Source Week day 6: DeepSeek-V3/R1 inference system overview, 2025-03-01"
VLLM_GB200 = "blog.vllm.ai/2026/02/03/dsr1-gb200-part1"
FP4 = {"expert_dtype": "nvfp4", "kv_dtype": "fp8"}


@dataclass(frozen=True)
class Case:
    """One published figure. published: tokens/s per `per` GPUs. unknown: what the source leaves
    open and is assumed here; a case with such is marked in the table."""

    name: str
    published: float
    per: int
    source: str
    cluster: str
    engine: str
    dp: int
    length: int
    tokens: int = 0
    sequences: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    unknown: str = ""


def wide(overlap: str = "off", redundant: int | None = 32, **more: Any) -> dict[str, Any]:
    return {"redundant_experts": redundant, "two_batch_overlap": overlap, **more}


CASES = (
    Case(
        "SGLang, 96 H100, prefill on 4 nodes", 52_300, 8, LMSYS_H100, H100, "sglang", 32, 2000,
        tokens=16_384, options=wide("prefill", moe_comm="deepep"),
    ),
    Case(
        "SGLang, 96 H100, decode on 9 nodes", 22_300, 8, LMSYS_H100, H100, "sglang", 72, 2050,
        sequences=256, options=wide("decode", moe_comm="deepep_ll"),
    ),
    Case(
        "DeepSeek, H800, prefill on 4 nodes", 73_700 * (1 - 0.563), 8, DEEPSEEK, H100, "sglang", 32,
        4096, tokens=16_384, options=wide("prefill", moe_comm="deepep"),
        unknown="an average day, 56.3 % of its 73,700 were cache hits; batch and prompt lengths; "
        "H100 for H800",
    ),
    Case(
        "DeepSeek, H800, decode on 18 nodes", 14_800, 8, DEEPSEEK, H100, "sglang", 144, 4989,
        sequences=88, options=wide("decode", moe_comm="deepep_ll"),
        unknown="an average day; 88 sequences per GPU from 21 tokens/s each; H100 for H800",
    ),
    Case(
        "SGLang, GB200, decode on 48, fp8", 7_583, 1, LMSYS_GB200_1, GB200, "sglang", 48, 2050,
        sequences=768, options=wide(),
    ),
    Case(
        "SGLang, GB200, decode on 48, fp8, three months later", 9_087, 1, LMSYS_GB200_2, GB200,
        "sglang", 48, 2050, sequences=768, options=wide(),
    ),
    Case(
        "SGLang, GB200, decode on 48, nvfp4", 13_386, 1, LMSYS_GB200_2, GB200, "sglang", 48, 2050,
        sequences=1408, options=wide(**FP4),
    ),
    Case(
        "SGLang, GB200, decode on 48, nvfp4, a log of others", 13_127, 1, LMSYS_GB200_2, GB200,
        "sglang", 48, 2133, sequences=1024, options=wide(**FP4),
    ),
    Case(
        "SGLang, GB200, prefill on 4, fp8", 18_471, 1, LMSYS_GB200_2, GB200, "sglang", 4, 2000,
        tokens=16_384, options=wide(redundant=None), unknown="tokens per step",
    ),
    Case(
        "SGLang, GB200, prefill on 4, nvfp4", 26_156, 1, LMSYS_GB200_2, GB200, "sglang", 4, 2000,
        tokens=16_384, options=wide(redundant=None, **FP4), unknown="tokens per step",
    ),
    Case(
        "vLLM, GB200, prefill on 2, nvfp4", 26_200, 1, VLLM_GB200, GB200, "vllm", 2, 2000,
        tokens=16_384, options=wide(redundant=None, **FP4),
        unknown="tokens per step; weights offloaded, which is ignored",
    ),
    Case(
        "vLLM, GB200, decode on 8, nvfp4", 10_100, 1, VLLM_GB200, GB200, "vllm", 8, 3000,
        options=wide(redundant=None, **FP4), unknown="batch: as many as fit, at most 1,024",
    ),
)  # fmt: skip
"""lengths: prompts, or prompt and half of the answer (SGLang 2000 + 100, vLLM 2000 + 2000)."""


def cost_of(case: Case, options: dict[str, Any]) -> EngineStepCost:
    limits = {"max_batch_tokens": case.tokens} if case.tokens else {"max_sequences": 1408}
    deployment = deploy(
        "DeepSeek-V3",
        case.cluster,
        engine=case.engine,
        tp=1,
        dp=case.dp,
        ep=case.dp,
        **limits,
        **options,
    )
    return EngineStepCost(deployment)


def rate(case: Case, options: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Tokens/s per `case.per` GPUs, and milliseconds of the step by part."""
    cost = cost_of(case, options)
    count = float(case.tokens)
    shape = (1, case.dp)
    if case.tokens:
        prompts = case.tokens / case.length
        batch = BatchShape.of(
            prefill_tokens=np.full(shape, count),
            prefill_pairs=np.full(shape, prompts * case.length * (case.length + 1) / 2),
            prefill_sequences=np.full(shape, prompts),
        )
    else:
        fit = gpu_memory(cost.deployment).kv_token_capacity // case.length
        count = float(case.sequences or min(1024, fit))
        batch = BatchShape.of(np.full(shape, count), np.full(shape, count * case.length))
    step_us = float(np.ravel(cost.step_us(batch))[0])
    parts = {n: float(np.ravel(v)[0]) / 1e3 for n, v in cost.breakdown(batch).items()}
    return count * case.per / step_us * 1e6, {n: round(v, 2) for n, v in parts.items() if v > 0.005}


def variants(case: Case) -> dict[str, dict[str, Any]]:
    """The options as published, and with one thing taken away."""
    out = {"as published": case.options}
    if case.options["two_batch_overlap"] != "off":
        out["without overlap"] = {**case.options, "two_batch_overlap": "off"}
    if case.options["redundant_experts"]:
        out["without EPLB"] = {**case.options, "redundant_experts": None}
    if len(out) == 3:
        out["with neither"] = {**out["without overlap"], "redundant_experts": None}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = []
    for case in CASES:
        row: dict[str, Any] = {"name": case.name, "published": round(case.published)}
        row |= {"per": case.per, "source": case.source, "unknown": case.unknown}
        for name, options in variants(case).items():
            predicted, parts = rate(case, options)
            row[name] = round(predicted)
            row.setdefault("parts_ms", parts)
        row["error"] = round(row["as published"] / case.published - 1, 3)
        found.append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "results.json", json.dumps(found, indent=1) + "\n")
    atomic_write(args.out / "tables.md", tables(found))
    print(tables(found))


def tables(found: list[dict[str, Any]]) -> str:
    lines = [
        "| deployment | tokens/s, published | predicted | | without overlap | without EPLB "
        "| with neither |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        per = "per node" if row["per"] == 8 else "per GPU"
        names = ("without overlap", "without EPLB", "with neither")
        less = [f"{row[n]:,}" if n in row else "" for n in names]
        star = " *" if row["unknown"] else ""
        lines.append(
            f"| {row['name']}{star} | {row['published']:,} {per} | {row['as published']:,} | "
            f"{row['error']:+.0%} | {' | '.join(less)} |"
        )
    sizes = [abs(row["error"]) for row in found]
    known = [abs(row["error"]) for row in found if not row["unknown"]]
    lines += [
        "",
        f"Median of all {len(sizes)}: {np.median(sizes):.0%}, largest {max(sizes):.0%}; of the "
        f"{len(known)} whose settings are all known: {np.median(known):.0%}, {max(known):.0%}.",
        "",
        "\\* not all settings are published:",
        "",
        *[f"- {row['name']}: {row['unknown']}." for row in found if row["unknown"]],
        "",
        "| deployment | milliseconds of the step, by part | source |",
        "|---|---|---|",
    ]
    for row in found:
        parts = ", ".join(f"{n.replace('_', ' ')} {v:g}" for n, v in row["parts_ms"].items())
        lines.append(f"| {row['name']} | {parts} | {row['source']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
