"""Small whole files of every kind that moesim reads, and commands that read them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.cli.main import run
from moesim.trace.format import LoadTrace, Trace, TraceMeta, save_trace

LAYERS, EXPERTS, TOP_K, GPUS = 2, 8, 2, 2
MODEL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}
STUDY = """
name: s
evaluator: static
fixed: {model: config.json, cluster: h200-sxm-ib, input_tokens: 64, output_tokens: 4}
grid:
  gpus: [2, 4]
  concurrency: {from: 1, to: 4, times: 2}
slo: tpot_p99<50ms
minimize: gpus
sensitivity: false
seed: 0
"""
SHAPE = ["--num-experts", str(EXPERTS), "--top-k", str(TOP_K)]
SIZES = ["--num-gpus", str(GPUS), "--num-experts", str(EXPERTS), "--layer-ids", "0-1"]
ENGINES = {
    "sglang": ".json",
    "tensorrt-llm": ".yaml",
    "vllm": ".yaml",
    "vllm-pr41141": ".jsonl",
    "vllm-ascend": ".json",
    "omni-infer": ".npy",
    "eplb": ".npz",
}


@dataclass(frozen=True, slots=True)
class Seed:
    """A file or folder, and the commands that read it.

    In a command `{file}` stands for the file, `{out}` for what is written; other names are files
    of the corpus, which stay whole.
    """

    kind: str
    path: str
    commands: tuple[tuple[str, ...], ...]


def make_corpus(folder: Path) -> list[Seed]:
    """Write the files into `folder`, which must be the current one; returns what to try."""
    from verification.fuzz.seeds_more import more

    made = [*_routing(folder), *_descriptions(folder), *_dumps(folder), *_records(folder)]
    return [*made, *_placements(folder), *more(folder)]


def _routing(folder: Path) -> list[Seed]:
    rng = np.random.default_rng(0)
    tokens = 64
    meta = TraceMeta("toy", EXPERTS, TOP_K, tuple(range(LAYERS)), ("a", "b"))
    ids = rng.random((tokens, LAYERS, EXPERTS)).argsort(axis=2)[:, :, :TOP_K].astype(np.uint8)
    trace = Trace(
        expert_ids=ids,
        request_ids=(np.arange(tokens) // 4).astype(np.int32),
        positions=(np.arange(tokens) % 4).astype(np.int32),
        phases=(np.arange(tokens) % 4 > 1).astype(np.uint8),
        meta=meta,
        gate_weights=rng.random(ids.shape).astype(np.float32),
        domain_ids=(np.arange(tokens) // 32).astype(np.int16),
    )
    save_trace(trace, folder / "trace.npz")
    save_trace(trace, folder / "trace")
    counts = rng.integers(0, 50, (3, LAYERS, EXPERTS))
    save_trace(LoadTrace(counts, meta), folder / "load.npz")
    np.save(folder / "bits.npy", rng.random((LAYERS, EXPERTS, 3)))
    (folder / "config.json").write_text(json.dumps(MODEL))
    token = (
        ("trace", "info", "{file}", "--json"),
        ("trace", "info", "{file}"),
        ("trace", "check", "{file}", "--json"),
        ("trace", "slice", "{file}", "--requests", "3", "--out", "{out}.npz"),
        ("trace", "merge", "{file}", "trace.npz", "--out", "{out}.npz"),
        (*_plan("{file}"), "--json"),
        (*_SIMULATE, "--trace", "{file}", "--plan", "plan.json", "--json"),
        ("cache", "--trace", "{file}", *_CACHE, "--out", "{out}.json", "--json"),
    )
    bits = ("cache", "--trace", "trace.npz", *_CACHE, "--bits", "2", "--bit-errors", "{file}")
    return [
        Seed("trace (npz)", "trace.npz", token),
        Seed("trace (folder)", "trace", token[:6]),
        Seed("load trace", "load.npz", (token[0], token[1], token[2], token[5])),
        Seed("bit errors", "bits.npy", ((*bits, "--json"),)),
    ]


_SIMULATE = ("simulate", "--model", "config.json", "--steps", "2")
_CACHE = ("--model", "config.json", "--hbm", "1.05", "--steps", "16", "--prefetch", "none")


def _plan(trace: str, **more: str) -> tuple[str, ...]:
    fixed = {"gpus": str(GPUS), "solver": "linear", "model": "config.json", "cluster": "c.yaml"}
    options = [part for n, v in {**fixed, **more}.items() for part in (f"--{n}", v)]
    return ("plan", "--trace", trace, *options, "--out", "{out}.json")


def _descriptions(folder: Path) -> list[Seed]:
    kept(folder / "c.yaml", "topology", "show", "h200-sxm-ib", "--gpus", "2", "--yaml")
    (folder / "cal.yaml").write_text(_CALIBRATION)
    (folder / "study.yaml").write_text(STUDY)
    log = [
        {"timestamp": 100 * i, "input_length": 20 + i, "output_length": 2, "hash_ids": [i, i + 1]}
        for i in range(8)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    azure = [f"2024-05-10 00:00:0{i}.009930,{10 + i},2" for i in range(8)]
    (folder / "log.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(azure) + "\n"
    )
    serve = ("serve", "--requests", "{file}", "--model", "config.json", "--gpus", "1")
    kept(None, "trace", "synth", "--like", "trace.npz", "--tokens", "32",
          "--save-spec", "spec.json", "--out", "s.npz")  # fmt: skip
    return [
        Seed(
            "cluster",
            "c.yaml",
            (
                ("topology", "check", "{file}", "--json"),
                ("topology", "show", "{file}"),
                ("topology", "show", "{file}", "--json"),
                (*_plan("trace.npz", cluster="{file}"), "--json"),
            ),
        ),
        Seed(
            "calibration",
            "cal.yaml",
            (
                ("validate", "--measured", "measured.json", "--calibration", "{file}", "--json"),
                ("validate", "--measured", "measured.json", "--calibration", "{file}"),
            ),
        ),
        Seed(
            "model",
            "config.json",
            (
                ("model", "show", "{file}", "--json"),
                ("model", "show", "{file}"),
                (*_plan("trace.npz", model="{file}"), "--json"),
                ("serve", "--requests", "log.csv", "--model", "{file}", "--gpus", "1", "--json"),
            ),
        ),
        Seed(
            "study",
            "study.yaml",
            (("whatif", "{file}", "--backend", "serial", "--out", "{out}.json", "--json"),),
        ),
        Seed("request log", "log.jsonl", ((*serve, "--json"), serve)),
        Seed("request log", "log.csv", ((*serve, "--json"), serve)),
        Seed(
            "synth spec",
            "spec.json",
            (("trace", "synth", "--spec", "{file}", "--tokens", "16", "--out", "{out}.npz"),),
        ),
    ]


_CALIBRATION = """
format: moesim-calibration
version: 1
name: toy
gpu: toy
overheads: {issue_us: {collective: 20, ffn: 60, permute: 8, reduce: 12}}
collectives:
- {kind: all_to_all_v, group_size: 2, nvlink: [[5, 2]]}
- {kind: all_gather, group_size: 2, table: [[1000, 5, 1], [100000, 9, 1]]}
expert_ffn:
- {dtype: bf16, kernel: toy, weight_bytes_per_param: 2, launch_us: 10, weight_gb_per_s: 1200,
   tflops: 1.0e+9, sharpness: 64}
copies:
- {direction: permute, latency_us: 1, gb_per_s: 4}
- {direction: reduce, latency_us: 2, gb_per_s: 8}
"""


def _dumps(folder: Path) -> list[Seed]:
    rng = np.random.default_rng(1)

    def routed(tokens: int = 6) -> Any:
        return rng.random((tokens, LAYERS, EXPERTS)).argsort(axis=2)[:, :, :TOP_K]

    def npy(array: Any) -> str:
        out = io.BytesIO()
        np.save(out, array.astype(np.uint8))
        return base64.b64encode(out.getvalue()).decode()

    usage = {"prompt_tokens": 4, "completion_tokens": 3}
    vllm = [
        {"choices": [{"index": 0, "routed_experts": npy(routed())}], "usage": usage}
        for _ in range(3)
    ]
    raw = [base64.b64encode(routed().astype("<i4").tobytes()).decode() for _ in range(3)]
    sglang = [{"meta_info": {**usage, "routed_experts": text}} for text in raw]
    stats: list[Any] = [{"record_type": "eplb_load_meta", "version": 1}]
    stats += [
        {
            "record_type": "eplb_load_stats",
            "version": 1,
            "step": step,
            "num_logical_experts": EXPERTS,
            "model_name": "toy",
            "p2l_map": [list(range(EXPERTS))] * LAYERS,
            "expert_load": rng.integers(0, 9, (LAYERS, EXPERTS)).tolist(),
        }
        for step in range(3)
    ]
    counts = {"logical_count": rng.integers(0, 9, (2, LAYERS, EXPERTS)).tolist()}
    table = [
        {"request": t // 3, "position": t % 3, "layer": layer, "experts": row.tolist()}
        for t, rows in enumerate(routed(9))
        for layer, row in enumerate(rows)
    ]
    lines = {"vllm.jsonl": vllm, "sglang.jsonl": sglang, "stats.jsonl": stats, "table.jsonl": table}
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "count.json").write_text(json.dumps(counts))
    np.savez(folder / "plain.npz", expert_ids=routed(12), request_ids=np.arange(12) // 4)
    into = ("trace", "import", "{file}", *SHAPE, "--out", "{out}.npz")
    columns = "request=request,position=position,layer=layer,experts=experts"
    sources = {
        "vllm.jsonl": ("vllm", ()),
        "sglang.jsonl": ("sglang", ("--num-hidden-layers", str(LAYERS))),
        "stats.jsonl": ("vllm-eplb-stats", ()),
        "table.jsonl": ("table", ("--columns", columns)),
        "count.json": ("sglang-recorder", ()),
        "plain.npz": ("npz", ()),
    }
    return [
        Seed(f"dump ({of})", name, ((*into, "--from", of, *more), (*into, *more, "--json")))
        for name, (of, more) in sources.items()
    ]


def _records(folder: Path) -> list[Seed]:
    shape = {"name": "toy", "hidden_size": 1000, "moe_intermediate_size": 100}
    shape |= {"num_experts": 4, "top_k": 2, "dtype": "bf16"}  # type: ignore[dict-item]
    environment = {"device": "toy", "backend": "nccl", "num_ranks": 2, "torch": "2", "date": ""}

    def result(plan: str, us: float) -> dict[str, Any]:
        spread = {"median": [5 * us], "p10": [4.9 * us], "p90": [5.1 * us]}
        return {
            "plan": plan,
            "tokens_per_rank": 6,
            "mode": "graph",
            "batch": 0,
            "phase_us": [[[us] * 5, [us] * 5]],
            "layer_us": spread,
            "step_us": spread,
            "slot_rows": [[8, 4, 12, 0]],
            "messages": [[[4, 2], [3, 5]]],
        }

    measured = {
        "format": "moesim-measured",
        "version": 1,
        "environment": {**environment, "backend": "gloo"},
        "options": {"dedup": "gpu"},
        "model": shape,
        "phases": ["permute", "dispatch", "compute", "combine", "unpermute"],
        "notes": ["a note"],
        "complete": True,
        "results": [result(p, 10.0 + i) for i, p in enumerate(("linear", "a", "b", "c"))],
    }
    (folder / "measured.json").write_text(json.dumps(measured))
    (folder / "raw.json").write_text(json.dumps(_raw(environment, shape)))
    judge = ("validate", "--calibration", "cal.yaml")
    return [
        Seed(
            "validate record",
            "measured.json",
            (
                (*judge, "--measured", "{file}", "--json"),
                (*judge, "--measured", "{file}"),
                (*judge, "--measured", "measured.json", "--repeat", "{file}", "--json"),
                ("validate", "--measured", "{file}"),
            ),
        ),
        Seed(
            "calibrate record",
            "raw.json",
            (("calibrate", "--from-raw", "{file}", "--out", "{out}.yaml", "--json"),) * 2
            + (("calibrate", "--from-raw", "{file}", "--out", "{out}.yaml"),),
        ),
    ]


def _raw(environment: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    def timed(us: float, **row: Any) -> dict[str, Any]:
        return {**row, "mode": "graph", "us": us, "p10_us": us * 0.9, "p90_us": us * 1.1}

    def sized(**row: Any) -> list[dict[str, Any]]:
        return [timed(5.0 * n, bytes=1000 * n, **row) for n in (1, 10, 100)]

    experts = [
        timed(
            10.0 + 2 * n,
            shape="toy",
            hidden=64,
            intermediate=32,
            dtype="bf16",
            kernel="loop",
            active=2,
            tokens=2 * n,
            max_tokens=n,
            counts=[n, n, 0, 0],
            less_us=3.0 * n,
        )
        for n in (1, 2, 4, 8, 16, 32, 64)
    ]
    return {
        "format": "moesim-calibration-raw",
        "version": 1,
        "environment": environment,
        "kernels": {"ffn": "loop", "reduce": "embedding_bag", "graphs": True},
        "options": {"shapes": [shape]},
        "notes": [],
        "tables": {
            "launch": [timed(3.0, what="layer, host time to enqueue")],
            "permute": [*sized(op="gather", fan=1), *sized(op="reduce", fan=1)],
            "ffn": experts,
            "ffn_alone": experts,
            "copies": sized(direction="h2d", pinned=True, num_gpus_at_once=1),
            "fetch": [timed(8.0)],
            "all_to_all_v": sized(share=1.0),
            "collectives": sized(kind="all_gather"),
            "subgroups": sized(kind="all_to_all_v", group_size=2, num_nodes=1, share=1.0),
        },
    }


def _placements(folder: Path) -> list[Seed]:
    kept(None, *(part.replace("{out}", "plan") for part in _plan("trace.npz")))
    more = {"solver": "greedy", "redundant-experts": "2"}
    kept(None, *(part.replace("{out}", "two") for part in _plan("trace.npz", **more)))
    cache = ("cache", "--trace", "trace.npz", *_CACHE)
    kept(None, *cache, "--out", "cache.json")
    both = (*_SIMULATE, "--trace", "trace.npz")
    plan = (
        (*both, "--plan", "{file}", "--json"),
        (*both, "--plan", "{file}"),
        ("report", "{file}", "--out", "{out}.html"),
        (*_plan("trace.npz"), "--from", "{file}"),
        *(
            ("export", "{file}", "--to", engine, "-m", "config.json", "-o", "{out}" + suffix)
            for engine, suffix in ENGINES.items()
        ),
    )
    out = [
        Seed("plan", "two.json", plan),
        Seed("plan", "plan.json", plan),
        Seed("cache plan", "cache.json", ((*both, "--plan", "{file}", "--json"), plan[2])),
    ]
    for engine, suffix in ENGINES.items():
        source = "plan.json" if engine in ("vllm", "vllm-ascend") else "two.json"
        name = f"placed-{engine}{suffix}"
        kept(None, "export", source, "--to", engine, "-m", "config.json", "-o", name)
        back = ("import-plan", "{file}", "--from", engine, *SIZES, "--out", "{out}.json")
        out.append(Seed(f"engine file ({engine})", name, (back,)))
    return out


def kept(file: Path | None, *args: str, call: Callable[..., int] = run) -> None:
    """Run a command that must succeed, and keep what it prints in `file`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call(list(args))
    if code:
        raise RuntimeError(f"moesim {' '.join(args)}: {code}\n{err.getvalue()}")
    if file is not None:
        file.write_text(out.getvalue())
