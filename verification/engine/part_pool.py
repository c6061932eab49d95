"""Random values on the GPU for parts.py, and what its parts share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

BF16 = torch.bfloat16
Made = Iterator[tuple[str, list[Any], Callable[[], list[Callable[[], Any]]], bool]]
"""(kernel, sizes, what makes the calls, whether it is timed held too)."""
HELD_ROWS = 2048
HEADS = ((32, 4, 128), (64, 4, 128), (16, 16, 128), (64, 8, 64), (8, 1, 128), (32, 4, 64))
"""[heads, KV heads, width of a head]."""
COLD_BYTES = 240e6
"""Four times the L2 cache of an H200."""


class Pool:
    """Random bf16 values of the GPU, handed out as views, from the start again at every point."""

    def __init__(self, num_bytes: float) -> None:
        self.flat = torch.empty(int(num_bytes) // 2, device="cuda", dtype=BF16)
        for part in self.flat.split(1 << 29):
            part.normal_(0.0, 0.02)
        self.at = 0

    def start(self) -> None:
        """Hand out from the start."""
        self.at = 0

    def take(self, *shape: int) -> torch.Tensor:
        """The next values in this shape."""
        size = int(np.prod(shape))
        if self.at + size > len(self.flat):
            raise MemoryError(f"{shape} is more than the pool has left")
        view = self.flat[self.at : self.at + size].view(*shape)
        self.at += -(-size // 64) * 64
        return view


def copies_of(bytes_each: float, most: int = 48) -> int:
    """Calls of a graph, so that what they read is well beyond the cache."""
    return int(max(2, min(most, COLD_BYTES // max(bytes_each, 1.0) + 1)))
