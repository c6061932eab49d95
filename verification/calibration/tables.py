"""Reading the measured tables: units and traps in one place.

Sources are the tables of github.com/ai-dynamo/aiconfigurator at commit 095f58a (Apache-2.0) and the
project's own measurement on two H100s. What the columns mean was read off the scripts that
collected them (its `collector/` folder), named at each reader.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from loads import rank0_counts

from moesim.cost.fitting import ExpertFit, drop_spikes

FloatArray = np.ndarray


@dataclass(frozen=True)
class SizePoints:
    """Time by bytes for one collective and group; `train` marks every other size."""

    num_bytes: FloatArray
    times_us: FloatArray
    train: FloatArray
    dropped: int


def alternate(sizes: FloatArray) -> FloatArray:
    """True for every other distinct size, the smallest and so on: the training half."""
    distinct = np.unique(sizes)
    return np.isin(sizes, distinct[0::2])


def nccl_points(data: Path, gpu: str) -> dict[tuple[str, int], SizePoints]:
    """NCCL collectives by (kind, ranks), one node.

    `collector/network/collect_nccl.py` runs nccl-tests with `-b SIZE`, one process with a thread a
    GPU, 60 or 100 calls back to back. SIZE is the send buffer of an all-to-all, the gathered result
    of an all-gather, the input of a reduce-scatter, the tensor of an all-reduce; `message_size` is
    that in elements and `latency` the out-of-place time in ms. Half and int8 rows of one byte count
    are pooled by their smaller time, except for the reductions, where only half counts (int8
    arithmetic is not what a model does). Points slower than 1.15 x any larger size are dropped.
    """
    table = pd.read_parquet(data / f"{gpu}_nccl.parquet")
    width = np.where(table["nccl_dtype"] == "half", 2, 1)
    table = table.assign(size=table["message_size"] * width, us=table["latency"] * 1e3)
    kinds = {"alltoall": "all_to_all"}
    points = {}
    for (op, ranks), rows in table.groupby(["op_name", "num_gpus"]):
        if op in ("all_reduce", "reduce_scatter"):
            rows = rows[rows["nccl_dtype"] == "half"]
        best = rows.groupby("size")["us"].min()
        size = best.index.to_numpy(dtype=np.float64)
        time = best.to_numpy()
        keep = drop_spikes(size, time)
        kind = kinds.get(op, op)
        others = 1.0 if kind == "all_reduce" else (ranks - 1) / ranks
        points[kind, int(ranks)] = SizePoints(
            num_bytes=size[keep] * others,
            times_us=time[keep],
            train=alternate(size)[keep],
            dropped=int((~keep).sum()),
        )
    return points


def relative_errors(predicted: FloatArray, measured: FloatArray) -> tuple[float, float]:
    """Median and 90th percentile of |predicted / measured - 1|."""
    error = np.abs(predicted / measured - 1.0)
    return float(np.median(error)), float(np.quantile(error, 0.9))


# Shapes whose rows the SwiGLU model cannot read: no gate projection (Nemotron: squared ReLU), or
# routing limited to groups of experts, which changes the loads (DeepSeek-V3 in vLLM).
_NOT_SWIGLU = {(2688, 1856, 6, 128), (1024, 2688, 22, 512), (2048, 5120, 22, 512)}
_GROUP_LIMITED = {(7168, 2048, 8, 256)}


@dataclass(frozen=True)
class ExpertPoints:
    """Layer times with the loads behind them; `frame` has one row a point."""

    fit: ExpertFit
    frame: pd.DataFrame
    train: FloatArray


def _expert_fit(frame: pd.DataFrame, weight_bytes_per_param: float) -> ExpertFit:
    """Loads of every row; `frame` needs counts (a tuple of draws), hidden, intermediate, us and
    token_rows."""
    point_idx, tokens, weight = [], [], []
    for idx, draws in enumerate(frame["counts"]):
        for draw in draws:
            distinct, times = np.unique(draw[draw > 0], return_counts=True)
            point_idx.append(np.full(len(distinct), idx))
            tokens.append(distinct)
            weight.append(times / len(draws))
    return ExpertFit(
        point_idx=np.concatenate(point_idx),
        tokens=np.concatenate(tokens),
        weight=np.concatenate(weight),
        hidden=frame["hidden"].to_numpy(),
        intermediate=frame["intermediate"].to_numpy(),
        times_us=frame["us"].to_numpy(),
        token_rows=frame["token_rows"].to_numpy(),
        weight_bytes_per_param=weight_bytes_per_param,
    )


def vllm_moe_points(
    data: Path, dtype: str, kernel_contains: str, weight_bytes_per_param: float
) -> ExpertPoints:
    """vLLM fused-MoE layers on an H100, CUDA graph (`collector/vllm/collect_moe.py`).

    `num_tokens` is the input of the one measured rank, which holds its share of the experts (EP)
    or of every expert's intermediate dimension (TP). `latency` (ms) spans top-k selection,
    alignment, activation quantization, both GEMMs and the top-k reduction, not the router's GEMM.
    """
    table = pd.read_parquet(data / "h100_vllm_moe.parquet")
    table = table[
        (table["moe_dtype"] == dtype) & table["kernel_source"].str.contains(kernel_contains)
    ]
    keys = zip(
        table["hidden_size"], table["inter_size"], table["topk"], table["num_experts"], strict=True
    )
    usable = [key not in _NOT_SWIGLU and key not in _GROUP_LIMITED for key in keys]
    table = table[usable].reset_index(drop=True)
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
    train = alternate(frame["num_tokens"].to_numpy()) & (frame["distribution"] == "balanced")
    return ExpertPoints(_expert_fit(frame, weight_bytes_per_param), frame, train.to_numpy())


OWN_SHAPES = {
    "mixtral": (4096, 14336),
    "qwen3-30b": (2048, 768),
    "olmoe": (2048, 1024),
    "dsv3": (7168, 2048),
}


def own_grouped_points(data: Path) -> ExpertPoints:
    """The project's own `torch._grouped_mm` SwiGLU calls on an H100, bf16, eager.

    Rows hold the routed tokens, the active experts and the largest load of a Zipf draw; the other
    loads are taken in proportion to rank ** -exponent.
    """
    rows = json.loads((data / "h100x2_own.json").read_text())["data"]["ffn_grouped_us"]
    frame = pd.DataFrame(
        rows, columns=["shape", "experts", "tokens", "zipf", "active", "max_tokens", "us"]
    )
    counts = []
    for row in frame.itertuples():
        share = np.arange(2.0, row.active + 1.0) ** -row.zipf
        rest = share / share.sum() * (row.tokens - row.max_tokens) if row.active > 1 else share
        counts.append((np.concatenate([[float(row.max_tokens)], rest]),))
    frame = frame.assign(
        hidden=[OWN_SHAPES[s][0] for s in frame["shape"]],
        intermediate=[OWN_SHAPES[s][1] for s in frame["shape"]],
        token_rows=0,
        counts=counts,
        distribution="zipf",
        num_tokens=frame["tokens"],
    )
    return ExpertPoints(_expert_fit(frame, 2.0), frame, alternate(frame["tokens"].to_numpy()))
