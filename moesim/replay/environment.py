"""Which machine and software a measurement was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from moesim.replay.process import Context

SETTINGS = ("NCCL_", "TORCH_NCCL_", "CUDA_", "OMP_NUM_THREADS", "PYTORCH_", "TORCH_SYMM_MEM")


def describe(ctx: Context) -> dict[str, Any]:
    """JSON data: device, driver, versions, settings that matter, date (UTC); no host name."""
    out: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": platform.processor() or platform.machine(),
        "backend": "nccl" if ctx.is_cuda else "gloo",
        "num_ranks": ctx.num_ranks,
        "num_nodes": num_nodes_of(ctx.num_ranks),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
    }
    if ctx.is_cuda:
        properties = torch.cuda.get_device_properties(ctx.device)
        out |= {
            "device": properties.name,
            "num_sms": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", 0),
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": _driver(),
        }
    return out


def ranks_per_node() -> int:
    """Ranks that torchrun started on this host."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def num_nodes_of(num_ranks: int) -> int:
    """Hosts over which the first `num_ranks` ranks lie."""
    return -(-num_ranks // ranks_per_node())


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n")[0].strip()
