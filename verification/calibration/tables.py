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
from routing_bytes import (
    BF16_ROW,
    FP8_ROW,
    GPUS_PER_NODE,
    LL_HEADER,
    expected_other_groups,
    expected_spread,
    trtllm_other_ranks,
)

from moesim.cost.fitting import ExpertFit, drop_spikes
from moesim.model.names import WEIGHT_BYTES

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
    Experts cut finer than in four are left out: nothing here shards an expert.
    """
    table = pd.read_parquet(data / "h100_vllm_moe.parquet")
    table = table[
        (table["moe_dtype"] == dtype)
        & table["kernel_source"].str.contains(kernel_contains)
        & (table["moe_tp_size"] <= 4)
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


@dataclass(frozen=True)
class DeepEpPoints:
    """DeepEP kernel times of one kind, node count and SM share, with the bytes they moved."""

    points: SizePoints
    nic_bytes: FloatArray
    num_experts: tuple[int, ...]


def _deepep_table(data: Path, gpu: str, mode: str, column: str) -> pd.DataFrame:
    """One node of 8 GPUs and, where measured, several, as `node_num` says."""
    single = pd.read_parquet(data / f"{gpu}_deepep_{mode}_1node.parquet")
    several = data / f"{gpu}_deepep_{mode}_multinode.parquet"
    if several.exists():
        multi = pd.read_parquet(several)
        single = pd.concat([single, multi[multi["node_num"] > 1]], ignore_index=True)
    return single[single["num_experts"] >= 128].dropna(subset=[column])


def deepep_normal_points(
    data: Path, phase: str, gpu: str = "h100"
) -> dict[tuple[int, int], DeepEpPoints]:
    """DeepEP normal mode by (nodes, SMs); phase "dispatch" (fp8) or "combine" (bf16).

    The time is transmit plus notify, one after the other: at 8 nodes the wait for slower ranks
    shows up in either, and only the sum is proportional to bytes. One node: `num_token` per rank on
    8 ranks, from the table swept over shapes; several nodes: hidden 7168, top 8 of 256.
    """
    element = FP8_ROW if phase == "dispatch" else BF16_ROW
    table = _deepep_table(data, gpu, "normal", f"{phase}_transmit_us")
    keys = ["node_num", f"{phase}_sms"]
    found = {}
    for (nodes, sms), rows in table.groupby(keys):
        row_bytes = rows["num_token"] * rows["hidden_size"] * element
        shape = list(zip(rows["num_experts"], rows["num_topk"], strict=True))
        if nodes == 1:
            spread = [expected_other_groups(e, k, GPUS_PER_NODE) for e, k in shape]
            nvlink = row_bytes.to_numpy() * np.array(spread)
            nic = np.zeros(len(rows))
        else:
            both = np.array([expected_spread(e, k, int(nodes)) for e, k in shape])
            nic = row_bytes.to_numpy() * both[:, 0]
            relayed = both[:, 0] * nodes / (nodes - 1) * both[:, 1] * (1 - 1 / GPUS_PER_NODE)
            nvlink = row_bytes.to_numpy() * relayed
        us = (rows[f"{phase}_transmit_us"] + rows[f"{phase}_notify_us"].fillna(0)).to_numpy()
        size = nvlink if nodes == 1 else nic
        keep = drop_spikes_by_shape(rows, size, us)
        found[int(nodes), int(sms)] = DeepEpPoints(
            SizePoints(
                num_bytes=nvlink[keep],
                times_us=us[keep],
                train=alternate(rows["num_token"].to_numpy())[keep],
                dropped=int((~keep).sum()),
            ),
            nic_bytes=nic[keep],
            num_experts=tuple(sorted(set(rows["num_experts"]))),
        )
    return found


def deepep_ll_points(data: Path, phase: str, gpu: str = "h100") -> dict[int, DeepEpPoints]:
    """DeepEP low latency by nodes; every choice is a message of its own (no dedup).

    Shapes with fewer than 128 experts are left out: those few-expert kernels fill less of the GPU.
    """
    column = f"{phase}_avg_t_us"
    table = _deepep_table(data, gpu, "low_latency", column)
    found = {}
    for nodes, rows in table.groupby("node_num"):
        hidden = rows["hidden_size"].to_numpy(dtype=np.float64)
        message = hidden * FP8_ROW + LL_HEADER if phase == "dispatch" else hidden * BF16_ROW
        total = rows["num_token"].to_numpy() * rows["num_topk"].to_numpy() * message
        nvlink = total / nodes * (1 - 1 / GPUS_PER_NODE)
        nic = total * (nodes - 1) / nodes
        us = rows[column].to_numpy()
        keep = drop_spikes_by_shape(rows, total, us)
        found[int(nodes)] = DeepEpPoints(
            SizePoints(
                num_bytes=nvlink[keep],
                times_us=us[keep],
                train=alternate(rows["num_token"].to_numpy())[keep],
                dropped=int((~keep).sum()),
            ),
            nic_bytes=nic[keep],
            num_experts=tuple(sorted(set(rows["num_experts"]))),
        )
    return found


def drop_spikes_by_shape(rows: pd.DataFrame, size: FloatArray, us: FloatArray) -> FloatArray:
    """`drop_spikes` within each (hidden, top-k, experts), where times must grow with tokens."""
    keep = np.ones(len(rows), dtype=bool)
    shapes = rows[["hidden_size", "num_topk", "num_experts"]].to_numpy()
    for shape in np.unique(shapes, axis=0):
        at = np.flatnonzero((shapes == shape).all(axis=1))
        keep[at] = drop_spikes(size[at], us[at])
    return keep


def trtllm_points(data: Path, phase: str, kernel: str = "NVLinkTwoSided") -> dict[int, SizePoints]:
    """TensorRT-LLM's NVLink all-to-all on GB200 by ranks; phase "dispatch" or "combine".

    `num_tokens` is per rank, 7168 wide, top 8 of 256. Dispatch moves bf16, fp8 or nvfp4 rows (a
    scale byte per 16) plus 8 bytes a choice of ids and weights, and two-sided includes the
    "prepare" kernel that exchanges counts; combine always moves bf16. One-sided (`kernel`
    "NVLinkOneSided") was measured with nvfp4 rows alone.
    """
    table = pd.read_parquet(data / "gb200_trtllm_alltoall.parquet")
    table = table[table["kernel_source"] == kernel]
    index = ["moe_dtype", "moe_ep_size", "num_tokens"]
    us = table.pivot_table(index=index, columns="op_name", values="latency") * 1e3
    times = us[f"alltoall_{phase}"]
    if phase == "dispatch" and "alltoall_prepare" in us:
        times = times + us["alltoall_prepare"]
    frame = times.rename("us").reset_index()
    width = {"bfloat16": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}
    row = np.array([width[d] for d in frame["moe_dtype"]]) * 7168 + 8 * 8
    if phase == "combine":
        row = np.full(len(frame), 2.0 * 7168)
    found = {}
    for ep in sorted(set(frame["moe_ep_size"])):
        at = (frame["moe_ep_size"] == ep).to_numpy()
        tokens = frame["num_tokens"].to_numpy()[at]
        size = tokens * row[at] * trtllm_other_ranks(int(ep), 8)
        time = frame["us"].to_numpy()[at]
        dtypes = frame["moe_dtype"].to_numpy()[at]
        keep = np.ones(len(time), dtype=bool)
        for dtype in set(dtypes):
            of = np.flatnonzero(dtypes == dtype)
            keep[of] = drop_spikes(size[of], time[of])
        found[int(ep)] = SizePoints(
            size[keep], time[keep], alternate(tokens)[keep], int((~keep).sum())
        )
    return found


def wideep_points(data: Path, phase: str) -> ExpertPoints:
    """SGLang's DeepEP expert kernel (DeepGEMM, fp8) on an H100; phase "decode" or "prefill".

    `collector/wideep/sglang/collect_deepep_moe.py`: `num_tokens` is the global count, tokens a rank
    times ranks; the GPU plays the rank with the largest load. Decode is the masked kernel in a CUDA
    graph, prefill the contiguous one launched eagerly, with its scatter and gather over all tokens,
    every expert's rows padded to 128. Prefill rows with uniform loads below 128 tokens an expert
    are left out: there the counts were not padded, so most experts' weights were never read.
    """
    table = pd.read_parquet(data / f"h100_wideep_{phase}_moe.parquet")
    per_expert = table["num_tokens"] * table["topk"] // table["num_experts"]
    uniform = table["distribution"] == "uniform"
    if phase == "prefill":
        table = table[~uniform | (per_expert >= 128)]
    counts = []
    for row in table.itertuples():
        local = row.num_experts // row.moe_ep_size
        if row.distribution != "uniform":
            draws = rank0_counts(
                row.distribution, row.num_tokens, row.num_experts, row.topk, row.moe_ep_size
            )
        else:
            each = row.num_tokens * row.topk // row.num_experts
            first = np.arange(local) < row.num_tokens // row.moe_ep_size * row.topk
            draws = (np.full(local, each) if each else first.astype(np.int64),)
        counts.append(draws)
    frame = table.assign(
        hidden=table["hidden_size"],
        intermediate=table["inter_size"],
        us=table["latency"] * 1e3,
        token_rows=table["num_tokens"] if phase == "prefill" else 0,
        counts=counts,
    ).reset_index(drop=True)
    train = alternate(frame["num_tokens"].to_numpy())
    if phase == "decode":
        train = train & (frame["distribution"] == "uniform").to_numpy()
    else:
        train = train & (frame["distribution"] != "power_law_1.2").to_numpy()
    fit = _expert_fit(frame, WEIGHT_BYTES["fp8"])
    fit.tile_tokens = 128 if phase == "prefill" else 64
    return ExpertPoints(fit, frame, train)


OWN_SOURCE = "own measurement on two H100 80GB HBM3, torch 2.11, NCCL, eager (CC0-1.0)"


def own_all_to_all(data: Path) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """The project's own `all_to_all_single` calls on two H100s, bf16, eager: (bytes to the other
    rank, bytes that stay, us, train). Even rows list the whole send buffer, of which half stays."""
    lists = json.loads((data / "h100x2_own.json").read_text())["data"]
    remote, local, us = [], [], []
    for total, time in lists["a2a_even_us"]:
        remote.append(total / 2)
        local.append(total / 2)
        us.append(time)
    for fraction, rows, hidden, time in lists["a2a_uneven_us"]:
        remote.append(fraction * rows * hidden * 2)
        local.append((1 - fraction) * rows * hidden * 2)
        us.append(time)
    train = np.arange(len(us)) % 2 == 0
    return np.array(remote), np.array(local), np.array(us), train


@dataclass(frozen=True)
class DensePoints:
    """Times of dense kernels; `frame` has one row a point, the table's own columns."""

    frame: pd.DataFrame
    times_us: FloatArray
    train: FloatArray


def _dense_points(table: pd.DataFrame, size: str) -> DensePoints:
    table = table.reset_index(drop=True)
    us = table["latency"].to_numpy() * 1e3
    return DensePoints(table, us, alternate(table[size].to_numpy()))


def gemm_points(data: Path, dtype: str) -> DensePoints:
    """Dense GEMMs on an H100 (vLLM kernels, CUDA graph), n and k from 256 to 20000; of repeated
    shapes the fastest. Every other m is held out."""
    table = pd.read_parquet(data / "h100_vllm_gemm.parquet")
    wide = table["n"].between(256, 20000) & table["k"].between(256, 20000)
    table = table[(table["gemm_dtype"] == dtype) & wide]
    return _dense_points(table.groupby(["m", "n", "k"], as_index=False)["latency"].min(), "m")


def attention_points(data: Path, phase: str) -> dict[tuple[int, str], DensePoints]:
    """FlashAttention-3 on an H100 by (head_dim, cache dtype); heads are those of one rank. Decode
    has `step` tokens cached before the new one and holds out every other step, prefill every
    other prompt length `isl`. Head size 512 (another kernel, far from any roofline) is left out."""
    table = pd.read_parquet(data / f"h100_vllm_{phase}_attention.parquet")
    table = table[table["head_dim"] <= 256]
    size = "step" if phase == "decode" else "isl"
    names = {"bfloat16": "bf16", "fp8": "fp8"}
    return {
        (int(head_dim), names[kv]): _dense_points(rows, size)
        for (head_dim, kv), rows in table.groupby(["head_dim", "kv_cache_dtype"])
    }


def mla_points(data: Path, phase: str) -> dict[tuple[str, str], DensePoints]:
    """DeepSeek-V3 attention modules on an H100 by (dense dtype, cache dtype), 1 to 128 heads."""
    table = pd.read_parquet(data / f"h100_vllm_{phase}_mla.parquet")
    size = "step" if phase == "decode" else "isl"
    names = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8"}
    return {
        (names[gemm], names[kv]): _dense_points(rows, size)
        for (gemm, kv), rows in table.groupby(["gemm_type", "kv_cache_dtype"])
    }
