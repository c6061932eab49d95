"""What a fault did, and what is left of slots and messages while GPUs are down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.routing import Routed
from moesim.placement import EMPTY

Table = npt.NDArray[np.int32]


@dataclass(slots=True)
class Outage:
    """One fault as it went: `recovered_us` is the end of the first step after it."""

    name: str
    at_us: float
    lost_experts: int = 0
    bytes_from_gpus: float = 0.0
    bytes_from_host: float = 0.0
    wasted_us: float = 0.0
    recovered_us: float = math.nan

    def to_json(self) -> dict[str, Any]:
        done = math.isfinite(self.recovered_us)
        return {
            "fault": self.name,
            "at_us": self.at_us,
            "lost_experts": self.lost_experts,
            "bytes_from_gpus": self.bytes_from_gpus,
            "bytes_from_host": self.bytes_from_host,
            "wasted_us": self.wasted_us,
            "time_to_recover_us": self.recovered_us - self.at_us if done else None,
        }


def widened(table: Table, width: int) -> Table:
    """Slots [L, G, S] with empty ones added up to `width`."""
    out = np.full((*table.shape[:2], width), EMPTY, np.int32)
    out[:, :, : table.shape[2]] = table
    return out


def bypass(routed: Routed, dead: list[int], node_of_gpu: npt.NDArray[np.int64]) -> None:
    """Give messages that would be relayed by a GPU that is down to the next one up in its node,
    in place. A GPU that is down holds no expert and no token, so relaying is all it could do."""
    for gpu in dead:
        mates = [g for g in np.flatnonzero(node_of_gpu == node_of_gpu[gpu]) if g not in dead]
        if not mates:
            continue
        stand_in = min(mates, key=lambda g: (g - gpu) % len(node_of_gpu))
        messages = routed.messages
        messages[:, :, stand_in, :] += messages[:, :, gpu, :]
        messages[:, :, :, stand_in] += messages[:, :, :, gpu]
        messages[:, :, gpu, :] = 0
        messages[:, :, :, gpu] = 0
        messages[:, :, stand_in, stand_in] = 0
