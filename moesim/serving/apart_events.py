"""A step between two pools of GPUs, event by event, its exchange as flows over the cluster's links.

The step is that of `moesim simulate` (`sim.schedules.ping_pong`), with a pool as one GPU: each pool
computes one part after another. Dispatch and combine are the messages that the exchange's kernels
send (C2) for the expected choices of the tokens, timed as the cost model times them (C3).

Taken over from the closed form `ping_pong_us`: what a pool computes for a part (`EngineStepCost`),
layers alike, equal parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.cost.step import StepModel, build_step_model
from moesim.errors import InputError
from moesim.serving.apart import ping_pong_us
from moesim.serving.batch import BatchShape
from moesim.serving.step_cost import EngineStepCost
from moesim.sim.collectives.base import Stage, make_stage
from moesim.sim.engine import Engine
from moesim.sim.event import run_step
from moesim.sim.links import link_table
from moesim.sim.schedules.ping_pong import PingPong
from moesim.sim.work import Chunk, HomeWork, StepWork
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment


@dataclass(frozen=True, slots=True, eq=False)
class ApartStep:
    """step_us: all MoE layers' shares of all layers, without head and host. attention_busy,
    experts_busy: share of it that a pool computes. link_bytes: [links] carried; peak_used: [links],
    the most of each in use at a time, 1 is all of it. exchange_us: dispatch and combine of one part
    with nothing else on the network, the mean over layers."""

    step_us: float
    attention_busy: float
    experts_busy: float
    link_bytes: FloatArray
    peak_used: FloatArray
    exchange_us: tuple[float, float]


def simulate_apart(cost: EngineStepCost, batch: BatchShape) -> ApartStep:
    """One step of `batch`, one row of ranks [D]. Raises InputError without two pools."""
    d = cost.deployment
    if d.expert_gpus is None:
        raise InputError("attention and experts share their GPUs", "give `expert_gpus`")
    parts, layers = d.micro_batches, d.model.num_moe_layers
    part = batch.cut(parts)
    own, experts, _ = (float(t) / layers for t in cost._own_experts_and_comm_us(part))
    dispatch, combine = exchange_stages(cost, part)
    none = np.zeros((layers, 2))
    attention = np.tile([own, 0.0], (layers, 1))
    home = HomeWork(attention, none, none, none[0], none, none)
    chunk = Chunk(0, np.tile([0.0, experts], (layers, 1)), [dispatch], [combine], home)
    work = StepWork(layers, 2, round(float(batch.rows.sum())), home, (chunk,) * parts)
    engine = Engine(dispatch.link_bytes.shape[-1])
    step = run_step(engine, PingPong(parts), work).us
    busy = [parts * layers * us / step for us in (own, experts)]
    alone = float(dispatch.us.mean()), float(combine.us.mean())
    network = engine.network
    return ApartStep(step, busy[0], busy[1], network.bytes, network.peak_used, alone)


def pools_record(deployment: Deployment, rows: float, context: float) -> dict[str, float]:
    """A decode step of `rows` sequences per attention rank with `context` cached tokens each: what
    the pools and the network do in it, and the same step by the closed form. Times in seconds."""
    cost = EngineStepCost(deployment)
    ones = np.ones(deployment.dp)
    batch = BatchShape.of(rows * ones, rows * context * ones)
    run = simulate_apart(cost, batch)
    parts, layers = deployment.micro_batches, deployment.model.num_moe_layers
    times = cost._own_experts_and_comm_us(batch.cut(parts))
    closed = float(ping_pong_us(*times, parts, layers))
    exchange_us = sum(run.exchange_us)
    return {
        "sequences_per_rank": rows,
        "context_tokens": context,
        "attention_gpus": deployment.tp * deployment.dp,
        "expert_gpus": deployment.expert_gpus or 0,
        "parts": parts,
        "step_s": run.step_us / 1e6,
        "step_closed_form_s": closed / 1e6,
        "attention_busy": run.attention_busy,
        "experts_busy": run.experts_busy,
        "exchange_share": parts * layers * exchange_us / 2.0 / run.step_us,
    }


def exchange_stages(cost: EngineStepCost, part: BatchShape) -> tuple[Stage, Stage]:
    """Dispatch and combine of a part in every MoE layer, as a batch of one."""
    d, moe = cost.deployment, cost._of_moe
    comm = moe.comm("prefill" if part.prefill_tokens.max() > 0 else "decode")
    step = build_step_model(
        d.cluster,
        d.model,
        all_to_all=comm,  # type: ignore[arg-type]
        expert_dtype=d.expert_dtype,
        calibration=moe.links,
    )
    links = link_table(d.cluster, step)
    sampled = _messages(cost, part, step)
    layers = np.arange(d.model.num_moe_layers) % len(sampled)
    out = sampled[None, layers]
    back = np.swapaxes(out, -1, -2)
    return (
        make_stage(step, links, step.dispatch, out, step.dispatch_bytes),
        make_stage(step, links, step.combine, back, step.combine_bytes),
    )


def _messages(cost: EngineStepCost, part: BatchShape, step: StepModel) -> FloatArray:
    """[X, G, G]: expected rows from each attention GPU to each GPU, in each of the layers that the
    load of experts samples; counted as `route` counts them for the kernels' deduplication."""
    d, moe = cost.deployment, cost._of_moe
    rows = np.repeat(part.rows.reshape(-1) / d.tp, d.tp)
    first, gpus, per_node = len(rows), d.num_gpus, d.cluster.gpus_per_node
    chosen = moe.chosen_by_rank if step.dedup == "none" else moe.chosen_share
    out = np.zeros((len(chosen), gpus, gpus))
    out[:, :first, first:] = rows[:, None] * chosen[:, None, :]
    if step.dedup != "node":
        return out
    node = np.arange(gpus) // per_node
    straight, out = out, np.zeros_like(out)
    for at in np.unique(node[first:]):
        there = np.flatnonzero(node == at)
        reached = 1.0 - np.prod(1.0 - chosen[:, there[there >= first] - first], axis=1)
        for home in range(first):
            via = home if node[home] == at else int(there[home % per_node % len(there)])
            if via != home:
                out[:, home, via] += rows[home] * reached
            out[:, via, there] += straight[:, home, there]
    diagonal = np.arange(gpus)
    out[:, diagonal, diagonal] = 0.0
    return out
