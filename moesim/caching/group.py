"""Caching plans for the GPUs of one expert-parallel group, each for the experts it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.caching.compare import Result, result
from moesim.caching.plan import CachePlan, parse_cache_plan
from moesim.caching.planner import plan_cache
from moesim.caching.rates import rates_on, torch_kernels
from moesim.caching.workload import Request, Workload, make_workload
from moesim.cluster.machine import Machine
from moesim.cluster.types import GpuSpec
from moesim.errors import FormatError
from moesim.model.names import ModelSpec
from moesim.placement import EMPTY, Placement
from moesim.trace.format import Trace

FORMAT = "moesim-cache-group"
VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """plans, results: one a GPU, in order; `notes` are for the user's eyes."""

    plans: tuple[CachePlan, ...]
    results: tuple[Result, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON data for `Plan.cache`: the cache plan itself for one GPU, a list for more."""
        if len(self.plans) == 1:
            return self.plans[0].to_dict()
        return {"format": FORMAT, "version": VERSION, "gpus": [p.to_dict() for p in self.plans]}


def parse_group(raw: Any) -> tuple[CachePlan, ...]:
    """The cache plans in `Plan.cache`, one a GPU. Raises FormatError."""
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        return (parse_cache_plan(raw),)
    gpus = raw.get("gpus")
    if raw.get("version") != VERSION or not isinstance(gpus, list) or not gpus:
        raise FormatError(
            f"not a cache group of version {VERSION} with a list of gpus",
            "make it again with moesim plan --offload",
        )
    return tuple(parse_cache_plan(row) for row in gpus)


def hosted_experts(placement: Placement) -> npt.NDArray[np.bool_]:
    """[G, L, E]: whether a GPU has a slot of an expert."""
    out = np.zeros((placement.num_gpus, placement.num_layers, placement.num_experts), bool)
    layer, slot = np.nonzero(placement.physical_to_logical != EMPTY)
    expert = placement.physical_to_logical[layer, slot]
    out[placement.gpu_of_slot[slot], layer, expert] = True
    return out


def plan_group(
    trace: Trace,
    placement: Placement,
    model: ModelSpec,
    gpus: tuple[GpuSpec, ...],
    request: Request,
    machine: Machine | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GroupPlan:
    """A caching plan for every GPU of a placement.

    request.hbm_gb is each GPU's memory, request.batch_size the group's batch: every GPU sees the
    choices of all its tokens, and holds the dense weights and its share of the KV cache. A replica
    counts on every GPU that has one. Ask for no prefetch on several GPUs: what other ranks' tokens
    choose reaches a GPU with the dispatch, too late to fetch ahead.
    machine: what the GPUs are in, None for a cluster; it decides whose kernels are taken
    (`torch_kernels`).
    Speeds leave the network out: a GPU's tokens per second are what its experts alone would allow.

    Raises what plan_cache raises, of the first GPU that does not fit.
    """
    plans, results, notes = [], [], []
    made = {} if torch_kernels(machine) or machine is None else {
        "machine": machine.name,
        "kernels": "engine",
    }  # fmt: skip
    share = -(-request.batch_size // placement.num_gpus)
    at_once = placement.num_gpus // placement.num_nodes
    for g, hosted in enumerate(hosted_experts(placement)):
        rates = rates_on(model, gpus[g], machine, num_gpus=at_once)
        here = replace(request, home_requests=share)
        work: Workload = make_workload(trace, here, hosted)
        planned = plan_cache(work, rates, here)
        size = float(planned.memory.slot_bytes)
        figures = result(f"GPU {g}", planned.timeline, size)
        plans.append(
            replace(
                planned.plan,
                predicted=asdict(figures)
                | {
                    "num_tokens": work.held_out.num_tokens,
                    "batch_size": request.batch_size,
                    "context_tokens": request.context_tokens,
                },
                provenance={"seed": request.seed, "max_steps": request.max_steps, **made},
            )
        )
        results.append(figures)
        notes += [n for n in work.notes if n not in notes]
        if progress is not None:
            progress(g + 1, placement.num_gpus)
    return GroupPlan(tuple(plans), tuple(results), tuple(notes))
