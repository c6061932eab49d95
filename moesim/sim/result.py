"""What a simulation found, step by step, and its summary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cluster import LINK_CLASSES
from moesim.sim.engine import CATEGORIES
from moesim.sim.links import LinkTable
from moesim.types import FloatArray

NUM_BUSIEST = 5


@dataclass(frozen=True, slots=True, eq=False)
class SimResult:
    """S simulated steps of one placement.

    step_us: [S]; parts_us: [S, categories] mean over GPUs, in the order of CATEGORIES;
    waiting_us, overlapped_us: [S] likewise; gpu_busy: [S, G] share of the step in which the GPU
    ran a kernel; link_bytes, link_busy_us: [links] summed over all steps, busy at the rate that
    the traffic reaches alone. tokens: [S]; balancedness: [S] mean over layers.
    elapsed_us: all steps and whatever happened between them.
    extra: figures of stragglers, drops, faults or rebalancing.
    """

    fidelity: str
    schedule: str
    exchange: str
    step_us: FloatArray
    parts_us: FloatArray
    waiting_us: FloatArray
    overlapped_us: FloatArray
    gpu_busy: FloatArray
    link_bytes: FloatArray
    link_busy_us: FloatArray
    tokens: npt.NDArray[np.int64]
    balancedness: FloatArray
    elapsed_us: float
    num_events: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def breakdown_us(self) -> dict[str, float]:
        """Mean microseconds of a step by part; the parts add up to the mean step."""
        parts = dict(zip(CATEGORIES, self.parts_us.mean(axis=0).tolist(), strict=True))
        return {n: v for n, v in parts.items() if v > 0} | {
            "waiting": float(self.waiting_us.mean())
        }

    def bytes_by_class(self, links: LinkTable) -> dict[str, float]:
        """Bytes a step that crossed links of each class, every crossing counted."""
        classes = np.array(links.classes)
        out = {
            name: float(self.link_bytes[classes == name].sum() / len(self.step_us))
            for name in LINK_CLASSES
        }
        return {name: value for name, value in out.items() if value > 0}

    def busiest_links(self, links: LinkTable, count: int = NUM_BUSIEST) -> list[dict[str, Any]]:
        """Links by the share of all time that they were busy, most first."""
        order = np.lexsort((np.arange(len(self.link_busy_us)), -self.link_busy_us))[:count]
        total = max(self.elapsed_us, 1e-300)
        return [
            {
                "link": links.names[i],
                "class": links.classes[i],
                "busy": float(self.link_busy_us[i] / total),
                "gb_per_s": float(self.link_bytes[i] / total / 1e3),
            }
            for i in order.tolist()
            if self.link_busy_us[i] > 0
        ]

    def to_json(self, links: LinkTable) -> dict[str, Any]:
        """Everything a user sees, as plain data."""
        step = self.step_us
        return {
            "fidelity": self.fidelity,
            "schedule": self.schedule,
            "all_to_all": self.exchange,
            "num_steps": len(step),
            "tokens_per_step": float(self.tokens.mean()),
            "step_us": {
                "mean": float(step.mean()),
                "p50": float(np.percentile(step, 50)),
                "p99": float(np.percentile(step, 99)),
                "max": float(step.max()),
            },
            "tokens_per_s": float(self.tokens.sum() / max(self.elapsed_us, 1e-300) * 1e6),
            "breakdown_us": self.breakdown_us(),
            "overlapped_us": float(self.overlapped_us.mean()),
            "balancedness": float(self.balancedness.mean()),
            "gpu_busy": self.gpu_busy.mean(axis=0).tolist(),
            "bytes_by_link_class": self.bytes_by_class(links),
            "busiest_links": self.busiest_links(links),
            "elapsed_us": self.elapsed_us,
            **self.extra,
        }
