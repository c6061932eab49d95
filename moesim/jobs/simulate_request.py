"""What is asked of a simulation of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moesim.choices import Fidelity, Phase, ReplicaPolicy
from moesim.placement import Plan
from moesim.sim.capacity import DropPolicy
from moesim.sim.faults import Fault, Recovery
from moesim.sim.rebalance import Rebalance
from moesim.sim.stragglers import SlowWindow
from moesim.trace.format import Trace

if TYPE_CHECKING:
    from moesim.caching.batching import Batching
    from moesim.caching.plan import CachePlan
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec

DEFAULT_STEPS = 16
DEFAULT_PARTS = 3


@dataclass(frozen=True, slots=True)
class FaultSpec:
    """Faults of GPUs and nodes, of links, and at a rate, and what is done about them."""

    faults: tuple[Fault, ...] = ()
    mtbf_us: float = math.inf
    repair_us: float = math.inf
    recovery: Recovery = field(default_factory=Recovery)

    @property
    def none(self) -> bool:
        return not self.faults and math.isinf(self.mtbf_us)


@dataclass(frozen=True, slots=True, eq=False)
class SimRequest:
    """What to simulate; None means the stated default.

    plan: None for the linear placement. compare: solvers whose placements are simulated beside,
    with as many slots. home_ranks: whether attention, gate and dense layers count. drift: steps
    take the trace's domains one after the other. num_chunks: None tries DEGREES. reduce: share of
    the hidden size that is exchanged (BigMac). slow, speed_*: see GpuSpeeds. rebalance: the first
    placement is simulated once more, with new placements by `rebalance_solver` on the way.
    expert_gpus: so many of the last GPUs hold the experts and nothing else, and a step goes between
    them and the others in `micro_batches` parts; None where attention is on the experts' GPUs.
    mtp: a step drafts a token: each multi-token-prediction layer once over all rows, and the head.
    network_scale: all links are taken as so many times faster, for what-if studies. caches: one
    cache plan a GPU, where experts do not all fit; the steps are then those of a decode stream.
    batching: how its batches are formed, None for a request a place of the batch.
    """

    trace: Trace
    cluster: Cluster
    model: ModelSpec
    plan: Plan | None = None
    compare: tuple[str, ...] = ()
    phase: Phase | None = None
    batch_tokens: int | None = None
    num_steps: int = DEFAULT_STEPS
    all_to_all: str | None = None
    schedule: str = "sequential"
    num_chunks: int | None = None
    reduce: float = 1.0
    fidelity: Fidelity = "event"
    replica_policy: ReplicaPolicy | None = None
    context_tokens: int | None = None
    home_ranks: bool = True
    seed: int = 0
    timeline_steps: int = 0
    slow: tuple[SlowWindow, ...] = ()
    speed_sigma: float = 0.0
    speed_period_us: float = math.inf
    drop: DropPolicy | None = None
    drift: bool = False
    faults: FaultSpec = field(default_factory=FaultSpec)
    rebalance: Rebalance | None = None
    rebalance_solver: str = "eplb"
    network_scale: float = 1.0
    caches: tuple[CachePlan, ...] = ()
    batching: Batching | None = None
    expert_gpus: int | None = None
    micro_batches: int = DEFAULT_PARTS
    mtp: bool = False

    @property
    def attention_gpus(self) -> int:
        """GPUs without experts; 0 where attention is on the experts' GPUs."""
        return 0 if self.expert_gpus is None else self.cluster.num_gpus - self.expert_gpus

    def settings(self) -> dict[str, str]:
        """What was asked that changes the result and is no default: for titles, texts and JSON."""
        out: dict[str, str] = {}
        for window in self.slow:
            out["slow"] = ", ".join(filter(None, (out.get("slow"), str(window))))
        if self.speed_sigma:
            out["speed spread"] = f"{self.speed_sigma:g}"
            if math.isfinite(self.speed_period_us):
                out["speed spread"] += f" every {self.speed_period_us / 1e3:g} ms"
        given = {
            "all-to-all": self.all_to_all,
            "chunks": self.num_chunks,
            "replica policy": self.replica_policy,
            "context": None if self.context_tokens is None else f"{self.context_tokens} tokens",
            "fidelity": self.fidelity if self.fidelity != "event" else None,
            "batching": self.batching.order if self.batching is not None else None,
        }
        out |= {name: str(value) for name, value in given.items() if value is not None}
        if self.schedule != "sequential":
            out["schedule"] = self.schedule
        if self.expert_gpus is not None:
            out["experts apart"] = (
                f"{self.attention_gpus} GPUs of attention, {self.expert_gpus} of experts,"
                f" {self.micro_batches} parts"
            )
        if self.mtp:
            out["multi-token prediction"] = "one token drafted"
        if self.reduce != 1.0:
            out["reduce"] = f"{self.reduce:g}"
        if self.drop is not None:
            out["capacity factor"] = f"{self.drop.gamma:g} ({self.drop.keep})"
        if self.drift:
            out["drift"] = "domain by domain"
        if self.faults.faults:
            out["faults"] = f"{len(self.faults.faults)} given"
        if math.isfinite(self.faults.mtbf_us):
            out["mean time between failures"] = f"{self.faults.mtbf_us / 1e3:g} ms"
        if self.rebalance is not None:
            out["rebalance"] = f"every {self.rebalance.every_steps} steps, {self.rebalance_solver}"
            if self.rebalance.through is not None:
                out["rebalance"] += f", weights through {self.rebalance.through} as measured"
        if not self.home_ranks:
            out["parts"] = "MoE layers only"
        if self.network_scale != 1.0:
            out["network"] = f"{self.network_scale:g} times as fast"
        return out
