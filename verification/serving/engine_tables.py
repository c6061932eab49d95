"""Reading the kernel tables of one serving engine and version out of aiconfigurator's tree.

`SOURCES` says which version's table stands for which part: the version nearest to those of the
measured serving rows whose table holds the shapes needed. All tables are CUDA-graph timings of
github.com/ai-dynamo/aiconfigurator @095f58a, `aic-core/src/aiconfigurator_core/systems/data`
(Apache-2.0); its `collector/` folder says what the columns mean.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibration"))

from loads import rank0_counts
from tables import DensePoints, ExpertPoints, _dense_points, _expert_fit, alternate

SYSTEM = {
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
TABLE_DTYPE = {
    "bf16": "bfloat16",
    "nvfp4": "nvfp4",
    "int4": "int4_wo",
    "mxfp4": "w4a16_mxfp4",
}
NOT_SWIGLU = {(2688, 1856, 6, 128), (4096, 2688, 22, 512)}
# vLLM 0.24.0 chooses DeepSeek-V3's experts among groups: the loads are not those asked for (half of
# the experts took as long as all of them).
GROUP_LIMITED = {("0.24.0", 7168, 2048, 8, 256)}
MIN_SHARD = 128  # experts cut finer are another kernel's business
MAX_SHARDS = 8
MAX_POINTS = 700


@dataclass(frozen=True)
class EngineTables:
    """Versions by part; experts by weight dtype.

    vLLM's tables of block-scaled fp8 GEMMs are bound by host launches (16 us and more whatever the
    shape), which a CUDA graph removes; SGLang's of the same DeepGEMM kernels stand in. So are its
    latent attention modules (77 us and more); TensorRT-LLM's stand in, as they do for SGLang, which
    has none. Its int4 experts are those of the compressed-tensors Marlin class, which only the
    later table names. On Blackwell it is the same: 150 us and more for a block-scaled fp8 GEMM, 95
    us and more for a latent attention module.
    """

    gemm: str
    attention: str
    all_reduce: str
    experts: dict[str, str]
    mla: tuple[str, str] | None = None  # engine and version of the module table
    fp8_gemm: tuple[str, str] | None = None  # where the engine's own table does not serve
    gemm_dtypes: tuple[str, ...] = ("bf16", "fp8")
    parallel: tuple[str, ...] = ("tp", "ep")  # the first is the default of other engines
    fp8_name: str = "fp8_block"  # of the GEMMs and experts taken; "fp8" has one scale per tensor

    def named(self, dtype: str) -> str:
        return self.fp8_name if dtype == "fp8" else TABLE_DTYPE[dtype]


SOURCES: dict[tuple[str, str], EngineTables] = {
    ("h200", "vllm"): EngineTables(
        gemm="0.19.0",
        attention="0.18.0",
        all_reduce="0.18.0",
        experts={"fp8": "0.18.0", "bf16": "0.18.0", "int4": "0.24.0", "mxfp4": "0.24.0"},
        mla=("trtllm", "1.3.0rc10"),
        fp8_gemm=("sglang", "0.5.9"),
    ),
    ("h100", "vllm"): EngineTables(
        gemm="0.19.0",
        attention="0.19.0",
        all_reduce="0.19.0",
        experts={"fp8": "0.19.0", "bf16": "0.19.0", "int4": "0.24.0", "mxfp4": "0.24.0"},
        mla=("trtllm", "1.3.0rc10"),
        fp8_gemm=("sglang", "0.5.9"),
    ),
    **dict.fromkeys(
        [(gpu, "vllm") for gpu in ("b200", "b300", "gb200", "gb300")],
        EngineTables(
            gemm="0.24.0",
            attention="0.24.0",
            all_reduce="0.24.0",
            experts=dict.fromkeys(("fp8", "nvfp4", "bf16", "int4", "mxfp4"), "0.24.0"),
            mla=("trtllm", "1.3.0rc20"),
            fp8_gemm=("sglang", "0.5.14"),
            gemm_dtypes=("bf16", "fp8", "nvfp4"),
            parallel=("ep", "tp"),
        ),
    ),
    # No table of this GPU has block-scaled fp8 kernels but for 518 GEMMs.
    ("rtx-pro-6000", "vllm"): EngineTables(
        gemm="0.24.0",
        attention="0.24.0",
        all_reduce="0.24.0",
        experts=dict.fromkeys(("fp8", "nvfp4", "bf16", "int4", "mxfp4"), "0.24.0"),
        mla=("trtllm", "1.3.0rc20"),
        gemm_dtypes=("bf16", "fp8", "nvfp4"),
        parallel=("ep", "tp"),
        fp8_name="fp8",
    ),
    ("h200", "sglang"): EngineTables(
        gemm="0.5.9",
        attention="0.5.9",
        all_reduce="0.5.9",
        experts={"fp8": "0.5.9", "bf16": "0.5.9", "int4": "0.5.9"},
        mla=("trtllm", "1.3.0rc10"),
    ),
    ("h200", "trtllm"): EngineTables(
        gemm="1.2.0rc5",
        attention="1.2.0rc5",
        all_reduce="1.2.0rc5",
        experts={"fp8": "1.2.0rc5", "bf16": "1.2.0rc5", "mxfp4": "1.2.0rc5"},
        mla=("trtllm", "1.3.0rc10"),
    ),
    ("h100", "trtllm"): EngineTables(
        gemm="1.2.0rc5",
        attention="1.2.0rc5",
        all_reduce="1.2.0rc5",
        experts={"fp8": "1.2.0rc5", "bf16": "1.2.0rc5", "mxfp4": "1.2.0rc5"},
        mla=("trtllm", "1.3.0rc10"),
    ),
}


def read(root: Path, gpu: str, part: str, engine: str, version: str, name: str) -> pd.DataFrame:
    """One table of the tree, without rows that hold no time."""
    table = pd.read_parquet(root / SYSTEM[gpu] / part / engine / version / f"{name}.parquet")
    return table[np.isfinite(table["latency"]) & (table["latency"] > 0)]


def all_reduce_table(root: Path, gpu: str, engine: str) -> pd.DataFrame:
    """`num_gpus`, `bytes`, `us` of the engine's own all-reduce, replayed from a CUDA graph.

    `message_size` is in elements of two bytes: `collector/network/collect_all_reduce.py` makes
    bfloat16 tensors of that many. Its times at 64 Mi are those of NCCL's table at 64 Mi elements.
    """
    version = SOURCES[gpu, engine].all_reduce
    table = read(root, gpu, "comm", engine, version, "custom_allreduce_perf")
    table = table[~table["kernel_source"].str.contains("eager")]
    return pd.DataFrame(
        {
            "num_gpus": table["num_gpus"],
            "bytes": 2.0 * table["message_size"].astype(float),
            "us": table["latency"] * 1e3,
        }
    )


def gemm_points(root: Path, gpu: str, engine: str, dtype: str) -> DensePoints:
    """Dense GEMMs of n and k from 128 to 20000; every other m is held out."""
    used = SOURCES[gpu, engine]
    source = used.fp8_gemm if dtype == "fp8" and used.fp8_gemm else (engine, used.gemm)
    table = read(root, gpu, "gemm", *source, "gemm_perf")
    wide = table["n"].between(128, 20000) & table["k"].between(128, 20000)
    table = table[(table["gemm_dtype"] == used.named(dtype)) & wide & (table["m"] > 0)]
    return _dense_points(table.groupby(["m", "n", "k"], as_index=False)["latency"].min(), "m")


def attention_points(
    root: Path, gpu: str, engine: str, phase: str
) -> dict[tuple[int, str], DensePoints]:
    """Attention kernels by (head size, cache dtype), of head sizes 64 and 128."""
    name = "generation_attention_perf" if phase == "decode" else "context_attention_perf"
    table = read(root, gpu, "attention", engine, SOURCES[gpu, engine].attention, name)
    table = table[table["head_dim"].isin([64, 128]) & table["attn_dtype"].eq("bfloat16")]
    if "window_size" not in table:
        table = table.assign(window_size=0)
    size = "step" if phase == "decode" else "isl"
    names = {"bfloat16": "bf16", "fp8": "fp8"}
    return {
        (int(head_dim), names[kv]): _dense_points(rows, size)
        for (head_dim, kv), rows in table.groupby(["head_dim", "kv_cache_dtype"])
    }


def mla_points(
    root: Path, gpu: str, engine: str, phase: str
) -> dict[tuple[str, str], DensePoints] | None:
    """DeepSeek-V3 attention modules by (dense dtype, cache dtype), None where not measured."""
    source = SOURCES[gpu, engine].mla
    if source is None:
        return None
    name = "mla_generation_module_perf" if phase == "decode" else "mla_context_module_perf"
    try:
        table = read(root, gpu, "mla", *source, name)
    except FileNotFoundError:
        return None
    size = "step" if phase == "decode" else "isl"
    names = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8", "nvfp4": "nvfp4"}
    return {
        (names[gemm], names[kv]): _dense_points(rows, size)
        for (gemm, kv), rows in table.groupby(["gemm_type", "kv_cache_dtype"])
    }


def expert_points(
    root: Path,
    gpu: str,
    engine: str,
    dtype: str,
    weight_bytes: float,
    shape: tuple[int, int] | None = None,
    *,
    parallel: str = "tp",
) -> ExpertPoints | None:
    """Fused expert layers of a dtype, of one (hidden, intermediate) where given; None if none.

    parallel: "tp", every expert on the rank, whole or cut; "ep", a share of the experts, for which
    engines take another path (masked routing).

    `num_tokens` is the input of the one measured rank. Every other token count is held out.
    """
    used = SOURCES[gpu, engine]
    version = used.experts[dtype]
    table = read(root, gpu, "moe", engine, version, "moe_perf")
    shard = table["inter_size"] // table["moe_tp_size"]
    table = table[
        (table["moe_dtype"] == used.named(dtype))
        & (table["moe_tp_size"] <= MAX_SHARDS)
        & (shard >= MIN_SHARD)
        & (table["moe_ep_size"].between(2, 16) if parallel == "ep" else table["moe_ep_size"] == 1)
        & table["kernel_source"].map(lambda s: "min_latency" not in s)
    ]
    if shape is not None:
        table = table[(table["hidden_size"] == shape[0]) & (table["inter_size"] == shape[1])]
    keys = zip(
        table["hidden_size"], table["inter_size"], table["topk"], table["num_experts"], strict=True
    )
    table = table[[key not in NOT_SWIGLU and (version, *key) not in GROUP_LIMITED for key in keys]]
    columns = [
        "num_tokens",
        "hidden_size",
        "inter_size",
        "topk",
        "num_experts",
        "moe_tp_size",
        "moe_ep_size",
        "distribution",
    ]
    if table.empty:
        return None
    table = table.groupby(columns, as_index=False)["latency"].min()
    table = table.iloc[:: len(table) // MAX_POINTS + 1]
    frame = table.assign(
        hidden=table["hidden_size"],
        intermediate=table["inter_size"] // table["moe_tp_size"],
        us=table["latency"] * 1e3,
        token_rows=table["num_tokens"] * table["topk"],
        counts=[
            rank0_counts(
                row.distribution, row.num_tokens, row.num_experts, row.topk, row.moe_ep_size
            )
            for row in table.itertuples()
        ],
    )
    busy = np.array([sum(c.sum() for c in draws) > 0 for draws in frame["counts"]])
    frame = frame[busy].reset_index(drop=True)
    train = alternate(frame["num_tokens"].to_numpy())
    return ExpertPoints(_expert_fit(frame, weight_bytes), frame, train)
