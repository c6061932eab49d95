"""The host link of this machine's first GPU: one large copy from pinned memory."""

from __future__ import annotations

import time

COPY_BYTES = 256 << 20
REPEATS = 5


def measure_link() -> tuple[float, str] | None:
    """GB/s to the GPU and its name; None without torch or without a CUDA device."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        device.copy_(host)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return COPY_BYTES / min(times) / 1e9, str(torch.cuda.get_device_name(0))
