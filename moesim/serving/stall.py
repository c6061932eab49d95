"""How long a new placement of experts stops an engine, where it is not given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesim.cost.step import build_step_model
from moesim.errors import InputError
from moesim.serving.config import Stall
from moesim.sim.rearrange import PLAN_US, full_rearrangement_us, said, weight_move

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment


def stalls_of(
    every: Sequence[int], ms: Sequence[float], engines: Sequence[Deployment]
) -> tuple[Stall, ...]:
    """Of the engines that take requests, then of those that decode; without `ms` as long as a
    rearrangement takes. Raises InputError where the numbers do not go together."""
    if len(ms) not in (0, len(every)) or len(every) > len(engines) or (ms and not every):
        raise InputError(
            f"{len(every)} numbers in `rebalance_every` and {len(ms)} in `rebalance_stall`",
            "give one of each, or with `decode_gpus` two: of prompt and of decoding engines",
        )
    if not every:
        return ()
    steps = every if len(every) == len(engines) else [every[0]] * len(engines)
    if not ms:
        return tuple(rearrangement_stall(e, n) for e, n in zip(engines, steps, strict=True))
    long = ms if len(ms) == len(engines) else [ms[0]] * len(engines)
    return tuple(Stall(n, us * 1e3) for n, us in zip(steps, long, strict=True))


def rearrangement_stall(deployment: Deployment, every_steps: int) -> Stall:
    """A synchronous rearrangement of all layers (`sim.rearrange`) every so many steps.

    Raises InputError where the engine's GPUs do not hold different experts each: pipeline stages,
    experts cut or apart.
    """
    model, cluster, ep = deployment.model, deployment.cluster, deployment.ep
    if ep != cluster.num_gpus:
        raise InputError(
            f"how long a placement stops an engine is known for experts over all of its GPUs, and"
            f" ep is {ep} of {cluster.num_gpus}",
            "give `rebalance_stall` in ms",
        )
    slots = -(-(model.num_experts + (deployment.redundant_experts or 0)) // ep)
    if deployment.plan is not None:
        slots = deployment.plan.placement.slots_per_gpu
    move = weight_move(cluster, False)
    us = full_rearrangement_us(
        cluster,
        build_step_model(cluster, model, phase="decode"),
        float(model.expert_bytes(deployment.expert_dtype)),
        model.num_moe_layers,
        model.num_experts,
        slots,
        move,
    )
    return Stall(every_steps, us, said(move, PLAN_US))
