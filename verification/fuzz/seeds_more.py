"""Seeds of what recommends, balances, replays and offloads, and of dumps in binary forms."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from verification.fuzz.seeds import EXPERTS, LAYERS, SHAPE, TOP_K, Seed, kept

SLO = "ttft_p99<9s,tpot_p99<900ms"
RULES = ("drop:factor=1", "base", "bias:rate=0.1,passes=2", "top-p:p=0.8,most=1", "freeze")
BENCH: Mapping[str, Any] = {
    "backend": "vllm", "request_rate": 5.0, "max_concurrency": None, "completed": 20,
    "total_input_tokens": 2000, "total_output_tokens": 100,
    "mean_ttft_ms": 9.0, "median_ttft_ms": 9.0, "p99_ttft_ms": 12.0,
    "mean_tpot_ms": 0.7, "median_tpot_ms": 0.7, "p99_tpot_ms": 0.9,
}  # fmt: skip
MACHINE = """
format: moesim-machine
version: 1
name: mine
gpus: [rtx-4090]
host:
  name: box
  title: a box
  memory: {source: s, kind: datasheet, dram_gb: 64, dram_gb_per_s: 76.8}
  cpu: {source: s, kind: datasheet, cores: 8, ghz: 4, vectors: avx2}
  link: {source: s, kind: datasheet, pcie_gb_per_s: 26}
  kernels: {source: s, kind: measured, call_us: 60, read_gb_per_s: 50, tflops: 0.8}
"""
ENGINE = "{name: vllm, request_ms: 3.0, kernel_us: 2.0, basis: measured, source: mine}\n"
_SERVE = ("serve", "--requests", "log.csv", "--model", "config.json", "--gpus", "1")


def more(folder: Path) -> list[Seed]:
    """Write the files into `folder`, where those of `make_corpus` are already."""
    return [*_services(folder), *_machines(folder), *_binary(folder), *_commands(folder)]


def _services(folder: Path) -> list[Seed]:
    (folder / "engine.yaml").write_text(ENGINE)
    (folder / "bench.json").write_text(json.dumps(BENCH))
    sent = {**BENCH, "backend": "sglang", "dataset_name": "random", "mean_itl_ms": 0.7}
    (folder / "bench.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (BENCH, sent)))
    recommend = ("recommend", "--model", "config.json", "--cluster", "c.yaml", "--slo", SLO)
    kept(None, *recommend, "--rate", "5", "--gpus", "1", "--prompt", "20", "--output", "4",
         "--out", "answer")  # fmt: skip
    (folder / "answer.json").write_bytes((folder / "answer" / "recommendation.json").read_bytes())
    kept(None, *recommend, "--rate", "5", "--gpus", "1", "--prompt", "20", "--output", "4",
         "--engine", "sglang", "--out", "sglang-answer")  # fmt: skip
    judged = {"bench.json": "answer", "bench.jsonl": "sglang-answer"}
    of_log = ("--requests", "log.csv", "--gpus", "1")
    return [
        Seed("engine constants", "engine.yaml", ((*_SERVE, "--engine", "{file}", "--json"),)),
        *(
            Seed("benchmark", name, ((*judge, "--json"), (*judge, "--out", "{out}.yaml")))
            for name, answer in judged.items()
            for judge in (("recommend", "--answer", answer, "--measured", "{file}"),)
        ),
        Seed(
            "recommendation",
            "answer",
            (("recommend", "--answer", "{file}", "--measured", "bench.json", "--json"),),
        ),
        Seed("recommendation", "answer.json", (("report", "{file}", "--out", "{out}.html"),)),
        Seed(
            "request log",
            "log.csv",
            (
                (*recommend, "--requests", "{file}", "--gpus", "1", "--json"),
                ("balance", "--trace", "trace.npz", "--gpus", "2", *_BALANCE, "--requests",
                 "{file}", "--schemes", "plan", "--json"),
            ),
        ),
        Seed("model", "config.json", ((*recommend[:1], "--model", "{file}", *recommend[3:],
                                       *of_log, "--json"),)),
    ]  # fmt: skip


_BALANCE = ("--model", "config.json", "--cluster", "c.yaml", "--steps", "60", "--time-limit", "1")


def _machines(folder: Path) -> list[Seed]:
    (folder / "machine.yaml").write_text(MACHINE)
    (folder / "model.gguf").write_bytes(_gguf())
    cache = ("cache", "--machine", "{file}", "--model", "config.json", "--context", "64")
    return [
        Seed(
            "machine",
            "machine.yaml",
            ((*cache, "--json"), cache, ("topology", "show", "{file}")),
        ),
        Seed(
            "GGUF",
            "model.gguf",
            (
                ("model", "show", "{file}", "--json"),
                ("model", "show", "{file}"),
                ("cache", "--machine", "machine.yaml", "--model", "{file}", "--context", "64",
                 "--json"),
            ),
        ),
    ]  # fmt: skip


def _gguf() -> bytes:
    """Two layers of hidden 256, 4 query and 2 KV heads of 64, 4 experts of width 256, in q8_0
    (ggml-org/ggml, docs/gguf.md)."""
    arch: dict[str, int] = {
        "block_count": 2, "embedding_length": 256, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 64, "attention.value_length": 64,
        "expert_count": 4, "expert_used_count": 2,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (256, 512), "output": (256, 512)}
    for layer in range(2):
        wide = {"attn_q": (256, 256), "attn_k": (256, 128), "attn_v": (256, 128),
                "attn_output": (256, 256), "ffn_gate_inp": (256, 4)}  # fmt: skip
        wide |= {f"ffn_{part}_exps": (256, 256, 4) for part in ("gate", "up", "down")}  # type: ignore[dict-item]
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in wide.items()}

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(arch) + 1)
    head += text("general.architecture") + struct.pack("<I", 8) + text("qwen3moe")
    for key, number in arch.items():
        head += text(f"qwen3moe.{key}") + struct.pack("<II", 4, number)
    offset = 0
    for name, shape in shapes.items():
        head += text(f"{name}.weight")
        head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 8, offset)
        offset += int(np.prod(shape)) // 32 * 34
    return head + bytes(-len(head) % 32) + bytes(offset)


def _binary(folder: Path) -> list[Seed]:
    rng = np.random.default_rng(2)

    def routed(tokens: int, top_k: int = TOP_K, experts: int = EXPERTS) -> Any:
        return rng.random((tokens, LAYERS, experts)).argsort(axis=2)[:, :, :top_k]

    into = ("trace", "import", "{file}", *SHAPE, "--out", "{out}.npz")
    sources = {"statistic": "tensorrt-llm", "raw": "tensorrt-llm", "router.jsonl": "megatron"}
    for name in ("statistic", "raw"):
        _statistic(folder / name, routed, raw=name == "raw")
    rows = [
        {"step": step, "rank": rank, "layer": layer, "top_indices": routed(4)[:, 0].tolist()}
        for step in range(2)
        for rank in range(2)
        for layer in range(LAYERS)
    ]
    (folder / "router.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources |= _torch(folder, routed) | _parquet(folder, routed)
    return [
        Seed(f"dump ({of}, {name})", name, ((*into, "--from", of), (*into, "--json")))
        for name, of in sources.items()
    ]


def _statistic(folder: Path, routed: Any, raw: bool) -> None:
    from moesim.safetensors_file import TensorInfo, write_header

    folder.mkdir()
    meta = {"num_experts": EXPERTS, "num_experts_per_token": TOP_K}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for rank in range(2):
        ids = [routed(6).astype(np.int32) for _ in range(2)]
        kinds: dict[str, tuple[str, list[Any]]] = {
            "": ("I64", [np.bincount(i[:, 0].ravel(), minlength=EXPERTS) for i in ids])
        }
        if raw:
            kinds["_raw"] = ("I32", [i[:, 0] for i in ids])
        for end, (dtype, arrays) in kinds.items():
            tensors = {f"{7 + i}_{layer}": a for i, a in enumerate(arrays) for layer in (3, 4)}
            infos = {n: TensorInfo(dtype, a.shape, 0, a.nbytes) for n, a in tensors.items()}
            with (folder / f"rank{rank}{end}.safetensors").open("wb") as file:
                write_header(file, infos, {})
                file.write(b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values()))


def _torch(folder: Path, routed: Any) -> dict[str, str]:
    """SGLang's recorder and Megatron's lists; nothing without torch."""
    try:
        import torch
    except ImportError:
        return {}
    layers = [torch.tensor(routed(6)[:, layer]) for layer in range(LAYERS)]
    torch.save([layers, layers], folder / "replay.pt")
    mapping = torch.arange(EXPERTS).repeat(LAYERS, 1)
    records = [
        {
            "forward_pass_id": i,
            "rank": 0,
            "gatherer_key": "primary",
            "topk_ids_of_layer": torch.tensor(routed(4).transpose(1, 0, 2)),
            "input_ids": [5, 6, 7, 8],
            "positions": [0, 1, 2, 3],
            "forward_mode": 1,
            "extend_seq_lens": [4],
            "misc_objects": [],
            "global_physical_count": torch.ones((LAYERS, EXPERTS), dtype=torch.int32),
        }
        for i in range(2)
    ]
    tokens = {"records": records, "last_physical_to_logical_map": mapping}
    torch.save(tokens, folder / "tokens.pt")
    counts = torch.randint(1, 9, (2, LAYERS, EXPERTS), generator=torch.Generator().manual_seed(0))
    torch.save({"rank": 0, "logical_count": counts}, folder / "counts.pt")
    return {"replay.pt": "megatron", "tokens.pt": "sglang-recorder", "counts.pt": "sglang-recorder"}


def _parquet(folder: Path, routed: Any) -> dict[str, str]:
    """FLAME-MoE's; nothing without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return {}
    inner = folder / "iter_0005"
    inner.mkdir()
    for layer in (2, 3):
        ids = routed(9)[:, 0].astype(np.int16)
        scores = np.full(ids.shape, 0.1, np.float16)
        columns = {
            "indices": pa.array(list(ids), pa.list_(pa.int16())),
            "scores": pa.array(list(scores), pa.list_(pa.float16())),
        }
        pq.write_table(pa.table(columns), inner / f"layer_{layer:02}.parquet")
    return {"iter_0005": "flame-moe"}


def _commands(folder: Path) -> list[Seed]:
    """Commands on traces and plans that `make_corpus` has not."""
    from moesim.trace.format import load_token_trace, save_trace

    trace = load_token_trace("trace.npz", "fuzz")
    order = np.random.default_rng(3).random((*trace.expert_ids.shape[:2], EXPERTS)).argsort(axis=2)
    scores = np.sort(np.random.default_rng(4).random(order.shape))[..., ::-1] / EXPERTS
    scored = replace(
        trace,
        expert_ids=order[..., :TOP_K].astype(np.uint8),
        candidate_ids=order[..., :6].astype(np.uint8),
        candidate_scores=scores[..., :6].astype(np.float16),
    )
    save_trace(scored, folder / "scored.npz")
    balance = ("balance", "--trace", "{file}", "--gpus", "2", *_BALANCE)
    replay = ("engine", "replay", "--trace", "{file}", "--model", "config.json", "--out", "{out}")
    validate = ("validate", "--trace", "{file}", "--cache-plan", "cache.json", "--device", "cpu",
                "--model", "config.json")  # fmt: skip
    token = (
        (*balance, "--schemes", "plan,eplb-vllm,none", "--json"),
        (*balance, "--schemes", "eplb-sglang+r,online+r", "--interval", "20"),
        (*replay, "--json"),
        validate,
        *(("trace", "reroute", "{file}", "--as", rule, "--gpus", "2", "--model", "config.json",
           "--out", "{out}.npz", "--json") for rule in RULES),
    )  # fmt: skip
    rule = ("trace", "reroute", "scored.npz", "--gpus", "2", "--model", "config.json", "--json")
    return [
        Seed("trace (npz)", "scored.npz", token),
        Seed("rule", "scored.npz", tuple((*rule, "--as", text) for text in RULES)),
        Seed("plan", "two.json", ((*replay[:3], "trace.npz", "--plan", "{file}", *replay[4:]),
                                  (*rule, "--as", "base", "--plan", "{file}"))),
        Seed("cache plan", "cache.json", ((*validate[:2], "trace.npz", "--cache-plan", "{file}",
                                           *validate[5:]),)),
        Seed("service", "log.csv", (
            ("recommend", "--model", "config.json", "--cluster", "c.yaml", "--slo", SLO, "--rate",
             "5", "--gpus", "1", "--prompt", "20", "--output", "4", "--json"),
            ("serve", "--requests", "poisson:rate=5,requests=20,prompt=20,output=4", "--model",
             "config.json", "--gpus", "1", "--json"),
        )),
    ]  # fmt: skip
