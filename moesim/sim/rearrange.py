"""What a rearrangement of experts takes: one model for `simulate`, `serve` and `balance`.

Time to compute the placement, host time for each layer that moves, and the weights, layer after
layer over the busiest link, or at the rate at which a GPU receives them where a library carries
them by another way. Host time per layer is measured where it was for this GPU type (NCCL in vLLM,
reports/engine-vllm-x2), else LAYER_US.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesim.cost.calibration import calibration_names, load_calibration
from moesim.cost.copies import WeightMove
from moesim.errors import InputError
from moesim.sim.links import link_table
from moesim.sim.migrate import build_mover

if TYPE_CHECKING:
    from moesim.choices import MoveThrough
    from moesim.cluster import Cluster
    from moesim.cost.step import StepModel

PLAN_US = 10_000.0
"""Computing a placement: vLLM pull request 28369 (DeepSeek-V2-Lite, 8 GPUs; 80 ms before it)."""
LAYER_US = 9_000.0
"""Host time of a layer that moves, fitted to the same pull request: 260 ms in all for 26 layers on
8 H100s, of which 10 are the plan and 12 the weights. 32 GB200s took 15 per layer (its 43219)."""


def weight_move(
    cluster: Cluster,
    asynchronous: bool,
    through: MoveThrough | None = None,
    layer_us: float | None = None,
) -> WeightMove:
    """Host time and rate of moving weights on the cluster's GPUs.

    through: as that library was measured, else over the links. layer_us: in place of what is known
    of the host. Raises InputError where `through` was not measured.
    """
    gpu = " and ".join(dict.fromkeys(gpu.name for gpu in cluster.gpus))
    name = f"{gpu.split('-')[0]}-vllm-engine"
    known = name in calibration_names() and " and " not in gpu
    moves = load_calibration(name).rearrangements if known else ()
    measured = {(move.through, move.asynchronous): move for move in moves}
    if through is not None:
        if layer_us is not None:
            raise InputError(
                "both `rebalance_layer` and `rebalance_through`, which has measured times",
                "leave out one of them",
            )
        if (through, asynchronous) in measured:
            return measured[through, asynchronous]
        when = "beside the steps" if asynchronous else "in the step"
        raise InputError(
            f"moving weights through {through} {when} was not measured on {gpu}",
            "leave the library out: weights then go over the links",
        )
    if layer_us is not None:
        return WeightMove("links", asynchronous, layer_us, basis="assumed", source="as given")
    if ("nccl", False) in measured:
        host = measured["nccl", False].layer_us
        return WeightMove(
            "links", asynchronous, host, source=f"measured in vLLM on {gpu}, NCCL in the step"
        )
    return WeightMove(
        "links",
        asynchronous,
        LAYER_US,
        basis="assumed",
        source="fitted to vLLM pull request 28369 on 8 H100s",
    )


def said(move: WeightMove, plan_us: float) -> str:
    """For people: what a rearrangement is taken to cost, and where that is from."""
    if move.gb_per_s is not None:
        way = f"{move.gb_per_s:g} GB/s into a GPU through {move.through}, measured in vLLM"
    else:
        source = move.source if move.through == "links" else "measured in vLLM"
        way = f"{move.layer_us / 1e3:g} ms per layer that moves ({source}), weights over the links"
    return f"{plan_us / 1e3:g} ms for the placement, {way}"


def full_rearrangement_us(
    cluster: Cluster,
    step: StepModel,
    expert_bytes: float,
    layers: int,
    experts: int,
    slots: int,
    move: WeightMove,
) -> float:
    """Microseconds that serving stops for, if every GPU's `slots` of a layer get experts as if GPUs
    were numbered at random: it lacks 1 - slots/experts of them. So EPLB moves in vLLM, which does
    not look for a numbering that keeps experts in place (reports/engine-vllm-x2)."""
    gpus = cluster.num_gpus
    lacks = slots * (1.0 - slots / experts)
    if gpus == 1 or lacks <= 0:
        return PLAN_US
    if move.gb_per_s is not None:
        weights = lacks * expert_bytes / (move.gb_per_s * 1e3)
    else:
        mover = build_mover(cluster, link_table(cluster, step), expert_bytes)
        pairs = 1 - np.eye(gpus, dtype=np.int32)
        each = lacks / (gpus - 1) * expert_bytes
        latency = float(cluster.routes().latency_us.max(initial=0.0))
        weights = float((step.link_messages(pairs) * mover.us_per_byte).max()) * each + latency
    return PLAN_US + layers * (move.layer_us + weights)
