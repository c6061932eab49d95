"""Choices by name, as command line, library and files spell them. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

Objective = Literal["balance", "traffic", "time"]
Phase = Literal["prefill", "decode"]
ReplicaPolicy = Literal["split", "hash", "nearest", "lp"]
Dedup = Literal["gpu", "node", "none"]
AllToAll = Literal["nccl", "deepep", "deepep_ll", "deepep_v2", "nvlink", "nvlink_one_sided"]
Fidelity = Literal["event", "analytic"]
Keep = Literal["score", "random", "first", "last", "position"]
Scope = Literal["step", "gpu"]
OnLoss = Literal["reload", "replan", "wait", "fail"]
Order = Literal["fifo", "pre-gated", "predicted"]
Router = Literal["round_robin", "least_loaded", "length_aware"]
MoveThrough = Literal["nccl", "gloo"]
MoeComm = Literal[
    "all_reduce",
    "all_gather",
    "nccl",
    "deepep",
    "deepep_ll",
    "deepep_auto",
    "deepep_v2",
    "nvlink",
    "nvlink_one_sided",
]
Overlap = Literal["off", "prefill", "decode", "both"]
Basis = Literal["measured", "datasheet", "assumed"]
Vectors = Literal["avx2", "avx_vnni", "avx512", "amx", "neon"]
