"""vLLM's kernels as parts.py timed them, into a calibration file that fit_kernels.py wrote.

    python verification/engine/fit_parts.py reports/engine-vllm
        [--into topologies/calibration/h200-vllm-engine.yaml]

Every other number of rows, context or prompt length is fitted; those between are held out and give
the stated errors. Of steps of 2,048 rows and more the times under lasting load count ("held").
Latent attention is a sum of its pieces: products, absorbing products, attention, and small kernels
(`SMALL_US` per layer; `SMALL_NS` per token and head, read from a profile of DeepSeek-V2-Lite).
Experts: an entry for each shape that the file has none for, ranks of a group of 4 held out; printed
beside is what the file's entry for any shape, fitted to others, says of the same ranks.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moesim.cost.calibration import Calibration, build_calibration, checked_file
from moesim.cost.dense import AttentionKernel, GemmModel, MlaModule
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.fitting import ExpertFit, robust_fit, round_significant
from moesim.files import atomic_write
from moesim.model.attention import AttentionSpec

SOURCE = "vllm_engine_parts"
SMALL_US, SMALL_NS = 9.0, 0.97
UNSEEN_GROUP = 4
FILE = Path("topologies/calibration/h200-vllm-engine.yaml")
PARAMETERS = (
    "launch_us",
    "weight_gb_per_s",
    "tflops",
    "half_tokens",
    "sharpness",
    "row_gb_per_s",
    "token_gb_per_s",
)
Rows = list[list[Any]]


@dataclass(frozen=True, eq=False)
class Points:
    """Times, and which are fitted."""

    times_us: np.ndarray
    train: np.ndarray


def parts_of(report: Path) -> dict[str, Rows]:
    """{part: [kernel, sizes, us]}, times under lasting load where there are any."""
    raw = json.loads(gzip.decompress((report / "raw" / "parts.json.gz").read_bytes()))["parts"]
    return {
        name: [[p[0], p[1], float(np.median(p[4] or p[3]))] for p in part["points"]]
        for name, part in raw.items()
    }


def alternate(sizes: np.ndarray) -> np.ndarray:
    """True for every other distinct size, the smallest and so on."""
    return np.isin(sizes, np.unique(sizes)[0::2])


def fit(
    points: Points,
    starts: Mapping[str, float],
    predict: Callable[[Mapping[str, float], np.ndarray], np.ndarray],
) -> dict[str, float]:
    """Parameters by name; those called *sharpness are fitted as 1 + exp(x), the others as exp."""
    at = np.flatnonzero(points.train)

    def unpack(logs: np.ndarray) -> dict[str, float]:
        values = dict(zip(starts, np.exp(logs), strict=True))
        return {k: min(1.0 + v, 64.0) if k.endswith("sharpness") else v for k, v in values.items()}

    first = [np.log(v - 1.0 if k.endswith("sharpness") else v) for k, v in starts.items()]
    found, _ = robust_fit(
        lambda p: np.log(predict(unpack(p), at) / points.times_us[at]), [first], loss_scale=0.1
    )
    return {k: round_significant(v) for k, v in unpack(found).items()}


def _errors(
    points: Points, said: np.ndarray, regimes: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    found = []
    for name, keep in regimes.items():
        at = keep & ~points.train
        if at.any():
            size = np.abs(said[at] / points.times_us[at] - 1)
            median, p90 = np.median(size), np.percentile(size, 90)
            found.append(
                {
                    "regime": name,
                    "held_out": "every other size",
                    "points": int(at.sum()),
                    "median_error": round(float(median), 4),
                    "p90_error": round(float(p90), 4),
                }
            )
    return found


def gemm_entry(rows: Rows) -> dict[str, Any]:
    """bf16 products."""
    m, n, k = np.array([r[1] for r in rows], float).T
    points = Points(np.array([r[2] for r in rows]), alternate(m))
    fixed = {"dtype": "bf16", "weight_bytes_per_param": 2.0}
    starts = {
        "launch_us": 3.0,
        "gb_per_s": 3500.0,
        "tflops": 700.0,
        "sharpness": 2.5,
        "k_per_us": 1800.0,
        "k_sharpness": 1.5,
    }

    def predict(p: Mapping[str, float], at: np.ndarray) -> np.ndarray:
        return GemmModel(**fixed, **p).time_us(m[at], n[at], k[at])  # type: ignore[arg-type]

    params = fit(points, starts, predict)
    said = predict(params, np.arange(len(m)))
    regimes = {
        "m up to 64": m <= 64,
        "m 65 to 1024": (m > 64) & (m <= 1024),
        "m above 1024": m > 1024,
    }
    return {
        "dtype": "bf16",
        "basis": "measured",
        "source": SOURCE,
        **params,
        "fit": _errors(points, said, regimes),
    }


def attention_entries(parts: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """FlashAttention 3 by phase and width of a head."""
    found = []
    for phase, name in (("decode", "decodes"), ("prefill", "prompts")):
        for dim in (64, 128):
            rows = [r for r in parts[name] if r[1][4] == dim]
            sizes = np.array([r[1] for r in rows], float)
            points = Points(np.array([r[2] for r in rows]), alternate(sizes[:, 0] * sizes[:, 1]))
            fixed = {"phase": phase, "head_dim": dim, "kv_dtype": "bf16"}

            def predict(
                p: Mapping[str, float], at: np.ndarray, s: Any = sizes, fixed: Any = fixed
            ) -> np.ndarray:
                kernel = AttentionKernel(**fixed, **p)
                return np.array(
                    [
                        float(kernel.time_us(b, n, int(h), int(g), window=int(w)))
                        for b, n, h, g, _, w in s[at]
                    ]
                )

            starts = {"launch_us": 8.0, "gb_per_s": 4000.0, "tflops": 500.0, "sharpness": 2.0}
            if phase == "decode":
                starts["extra_tokens"] = 64.0
            params = fit(points, starts, predict)
            windowed = sizes[:, 5] > 0
            said = predict(params, np.arange(len(rows)))
            regimes = {"full": ~windowed, "windowed": windowed}
            found.append(
                {
                    **fixed,
                    "basis": "measured",
                    "source": SOURCE,
                    **params,
                    "fit": _errors(points, said, regimes),
                }
            )
    return found


def latent_points(rows: Rows, phase: str) -> list[tuple[AttentionSpec, int, int, int, float]]:
    """(cut attention, hidden, batch, tokens, us) of whole layers of latent attention."""
    linear: dict[tuple[int, ...], dict[int, dict[tuple[int, int], float]]] = {}
    absorb: dict[tuple[int, ...], dict[int, float]] = {}
    for kernel, s, us in rows:
        if kernel == "latent_linear":
            linear.setdefault(tuple(s[:3]), {}).setdefault(s[3], {})[s[4], s[5]] = us
        elif kernel == "latent_absorb":
            absorb.setdefault(tuple(s[:3]), {})[s[3]] = us
    found = []
    wanted = "latent_decode" if phase == "decode" else "latent_prompt"
    for shape, by_rows in linear.items():
        hidden, heads, rank = shape
        spec = AttentionSpec(
            kind="mla",
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=192,
            q_lora_rank=rank,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        )
        expand = (heads * 256, 512)
        for kernel, size, us in rows:
            if kernel != wanted or size[2] != heads:
                continue
            batch, tokens, _ = size
            n = batch if phase == "decode" else batch * tokens
            near = sorted(by_rows, key=lambda r, n=n: abs(np.log(r / n)))[0]
            if not 0.2 < near / n < 5:
                continue
            time = us + SMALL_US + SMALL_NS * 1e-3 * n * heads
            time += sum(t for size, t in by_rows[near].items() if size != expand)
            time += absorb[shape][near] if phase == "decode" else by_rows[near][expand]
            found.append((spec, hidden, batch, tokens, time))
    return found


def mla_entries(rows: Rows) -> list[dict[str, Any]]:
    """Whole layers of latent attention by phase."""
    found = []
    for phase in ("decode", "prefill"):
        made = latent_points(rows, phase)
        sizes = np.array([b * n for _, _, b, n, _ in made])
        points = Points(np.array([m[4] for m in made]), alternate(sizes))
        fixed = {"phase": phase, "dense_dtype": "bf16", "kv_dtype": "bf16"}

        def predict(
            p: Mapping[str, float], at: np.ndarray, made: Any = made, fixed: Any = fixed
        ) -> np.ndarray:
            module = MlaModule(**fixed, weight_bytes_per_param=2.0, **p)
            picked = [made[i] for i in at]
            return np.array([float(module.time_us(b, n, s, h)) for s, h, b, n, _ in picked])

        starts = {
            "launch_us": 40.0,
            "weight_gb_per_s": 3500.0,
            "dense_tflops": 600.0,
            "kv_gb_per_s": 3000.0,
            "attention_tflops": 500.0,
            "sharpness": 3.0,
        }
        if phase == "decode":
            starts["extra_tokens"] = 128.0
        params = fit(points, starts, predict)
        said = predict(params, np.arange(len(made)))
        heads = np.array([m[0].num_heads for m in made])
        regimes = {"16 heads": heads == 16, "32 heads and more": heads > 16}
        found.append(
            {
                **fixed,
                "basis": "measured",
                "source": SOURCE,
                **params,
                "fit": _errors(points, said, regimes),
            }
        )
    return found


def expert_entries(rows: Rows, before: Calibration) -> list[dict[str, Any]]:
    """Of each shape that `before` has no entry for; the loads "same" are left out: below a quarter
    as many choices as experts vLLM reads weights for every choice, shared expert or not."""
    found = []
    kept = [r for r in rows if r[1][5] != "same"]
    for name in dict.fromkeys(r[1][0] for r in kept):
        own = [r for r in kept if r[1][0] == name]
        hidden, width = own[0][1][1:3]
        general = before.expert_ffn("bf16", "vllm_ep", shape=(hidden, width))
        seen = np.array([r[1][4] != UNSEEN_GROUP for r in own])
        ranks = ranks_of(own)
        if general.shape is not None:
            print(f"{name}: the file's own shape", _size(ranks, general, seen | ~seen))
            continue
        model = ranks.subset(seen).fit(
            dtype="bf16", kernel="vllm_ep", start_tflops=600.0, start_gb_per_s=3500.0
        )
        print(name, "any shape", _size(ranks, general, ~seen), _size(ranks, model, ~seen))
        median, p90 = _size(ranks, model, ~seen)
        params = {p: getattr(model, p) for p in PARAMETERS if getattr(model, p) is not None}
        found += [
            {
                "dtype": "bf16",
                "kernel": f"{kernel} {hidden}x{width}",
                "shape": [hidden, width],
                "basis": "measured",
                "source": SOURCE,
                "weight_bytes_per_param": 2.0,
                **params,
                "ranges": {
                    "tokens_per_expert": [1.0, float(ranks.tokens.max())],
                    "params_per_expert": [3.0 * hidden * width] * 2,
                },
                "fit": [
                    {
                        "regime": "steps of 1 to 16384 tokens",
                        "held_out": "the group of 4",
                        "points": int((~seen).sum()),
                        "median_error": median,
                        "p90_error": p90,
                    }
                ],
            }
            for kernel in ("vllm_ep", "vllm_tp")
        ]
    return found


def ranks_of(rows: Rows) -> ExpertFit:
    """Their loads and times."""
    counts = [np.array([n for n in r[1][8] if n], float) for r in rows]
    return ExpertFit(
        point_idx=np.repeat(np.arange(len(rows)), [len(c) for c in counts]).astype(float),
        tokens=np.concatenate(counts),
        weight=np.ones(sum(len(c) for c in counts)),
        hidden=np.array([r[1][1] for r in rows], float),
        intermediate=np.array([r[1][2] for r in rows], float),
        times_us=np.array([r[2] for r in rows]),
        token_rows=np.array([r[1][6] * r[1][7] for r in rows], float),
        weight_bytes_per_param=2.0,
    )


def _size(ranks: ExpertFit, model: ExpertGemmModel, keep: np.ndarray) -> tuple[float, float]:
    size = np.abs(ranks.predict_us(model) / ranks.times_us - 1)[keep]
    return round(float(np.median(size)), 4), round(float(np.percentile(size, 90)), 4)


def main() -> None:
    """Prints entries with their held-out errors; puts them into the file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    parts, path = parts_of(args.report), args.into or FILE
    file = yaml.safe_load(path.read_text())
    file["expert_ffn"] = [e for e in file["expert_ffn"] if e["source"] != SOURCE]
    before = build_calibration(checked_file(file, path.name, ""))
    made = {
        "gemm": [gemm_entry(parts["products"])],
        "attention": attention_entries(parts),
        "mla": mla_entries(parts["latent"]),
    }
    for entry in (e for section in made.values() for e in section):
        print({k: v for k, v in entry.items() if k not in ("fit", "source", "basis")})
        print(
            "  ",
            [(f["regime"], f["points"], f["median_error"], f["p90_error"]) for f in entry["fit"]],
        )
    file["expert_ffn"] += expert_entries(parts["experts"], before)
    file["sources"][SOURCE] = (
        "products of torch 2.11.0, FlashAttention 3 and fused_experts of vLLM 0.23.0 on one H200,"
        " driver 580.159.04; weights and caches out of the L2 cache, 2,048 rows and more under"
        " lasting load; 2026-11-30 (reports/engine-vllm)"
    )
    file["description"] = (
        "vLLM's kernels: experts by rank, products, attention; its moves of weights"
    )
    if args.into:
        moves = {"rearrangements": file.pop("rearrangements")}
        text = yaml.safe_dump(
            file | made | moves, sort_keys=False, width=100, default_flow_style=None
        )
        atomic_write(args.into, text.encode())


if __name__ == "__main__":
    main()
