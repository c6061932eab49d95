"""What a replay needs on each GPU, worked out and compared before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from moesim.errors import InputError
from moesim.replay.process import Context
from moesim.replay.shape import ExpertShape

RUNTIME_BYTES = 2 << 30
CPU_RUNTIME_BYTES = 64 << 20
SLACK = 1.25


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes on one GPU: weights, activations (with slack for the allocator), and the runtime's
    own (context, NCCL buffers, library workspaces; assumed)."""

    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.runtime_bytes


def memory_need(
    shape: ExpertShape,
    slots_per_rank: int,
    num_sets: int,
    home_tokens: int,
    gemm_rows: int,
    *,
    num_pools: int = 1,
    on_gpu: bool = True,
) -> MemoryNeed:
    """What the engine allocates at its fullest.

    home_tokens: tokens of a rank. gemm_rows: rows that the busiest rank's experts serve. A rank
    holds two input sets, rows in flight in both directions (at most home tokens plus GEMM rows
    each), and the expanded rows, their two intermediate activations and the result. num_pools:
    eager calls and every CUDA graph have activations of their own.
    """
    weights = shape.expert_bytes * slots_per_rank * num_sets
    rows = 2 * home_tokens + 3 * (home_tokens + gemm_rows) + 2 * gemm_rows + home_tokens
    activations = rows * shape.row_bytes
    activations += 3 * gemm_rows * shape.moe_intermediate_size * shape.element_bytes
    runtime = RUNTIME_BYTES if on_gpu else CPU_RUNTIME_BYTES
    return MemoryNeed(weights, int(activations * SLACK) * num_pools, runtime)


def free_bytes(ctx: Context, limit_bytes: int | None = None) -> int:
    """Memory that this rank may take: free GPU memory, or its share of the host's available
    memory; never more than `limit_bytes`."""
    if ctx.is_cuda:
        free = int(torch.cuda.mem_get_info(ctx.device)[0])
    else:
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = available_host_bytes() // num_local
    return free if limit_bytes is None else min(free, limit_bytes)


def require_memory(ctx: Context, need: MemoryNeed, limit_bytes: int | None, what: str) -> None:
    """Raise InputError on every rank when one of them has too little; collective."""
    free = free_bytes(ctx, limit_bytes)
    table = ctx.gather([need.total_bytes, free])
    short = (table[:, 0] - table[:, 1]).argmax()
    wanted, there = (int(x) for x in table[short])
    if wanted <= there:
        return
    raise InputError(
        f"{what} needs {_gb(wanted)} on each GPU ({_gb(need.weight_bytes)} weights,"
        f" {_gb(need.activation_bytes)} activations, {_gb(need.runtime_bytes)} runtime), but rank"
        f" {int(short)} has {_gb(there)}",
        "use more GPUs, fewer slots, fewer tokens per rank (--tokens) or --weight-sets 1",
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def available_host_bytes() -> int:
    """What the host can still give, at most the memory limit of this process's control group;
    on machines whose memory grows as it is used, the total may be far more than is reported."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62
