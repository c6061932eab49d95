"""What `moesim cache` says beside its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.caching.planner import Planned
from moesim.caching.policies import POLICIES
from moesim.caching.workload import Request
from moesim.cluster import Machine
from moesim.model.weights import Weights
from moesim.trace.format import Trace

if TYPE_CHECKING:
    from moesim.jobs.cache import CacheOptions


def notes_of(
    options: CacheOptions, request: Request, machine: Machine, weights: Weights, uniform: bool
) -> list[str]:
    """What the user should know of what was asked."""
    gpu = machine.gpus[0]
    notes = [
        f"{name} needs the future: this is a bound, not a plan that a server can run"
        for name in (options.policy, options.prefetch)
        if name == "oracle" or (name in POLICIES and POLICIES[name].offline)
    ]
    if options.hbm_gb is not None and request.hbm_gb > gpu.hbm_gb:
        notes.append(f"{request.hbm_gb:g} GB are more than the {gpu.hbm_gb:g} GB of one {gpu.name}")
    if uniform:
        notes.append(
            "no trace: routing is assumed uniform, so caches gain nothing from what is chosen"
            " often; `trace` gives the model's own"
        )
    if options.quant is None and not weights.from_file and options.engines != ("vLLM",):
        notes.append("weights as the checkpoint has them; most GGUF files are `quant` Q4_K_M")
    if len(machine.gpus) > 1:
        notes.append("the caching plan takes the GPUs' memories as one, at the first one's rates")
    return notes


def few_slots(trace: Trace, planned: Planned) -> list[str]:
    """A note where the slots are fewer than one token's experts."""
    slots, used = planned.memory.num_slots, trace.num_layers * trace.top_k
    if slots >= used or planned.memory.everything_fits:
        return []
    return [
        f"{slots} slots are fewer than one token's {used} experts: most experts are moved or"
        " computed on the CPU for every token"
    ]
