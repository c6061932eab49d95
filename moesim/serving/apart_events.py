"""A step between two pools of GPUs, event by event, its exchange as flows over the cluster's links.

`ping_pong_us` takes the exchange's time as given and lets one part after another through. Here
every part's rows are messages from each attention GPU to each expert GPU (M2N, as StepMesh and
MegaScale-Infer send them: straight, once per GPU that holds a chosen expert), on the links of their
routes, and exchanges of different parts share links fairly (`moesim.sim.network`). The pools
compute one part after another, first come, first served.

Taken over from the closed form: what a pool computes for a part (`EngineStepCost`), layers alike,
equal parts. A link gives what the exchange's kernels reach on large transfers; each exchange begins
after their latency.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from moesim.cost.curves import BYTES_PER_US_AT_1_GB_PER_S
from moesim.cost.step import BYTES_PER_ELEMENT, KINDS_OF, OTHER_LINK_EFFICIENCY
from moesim.errors import InputError
from moesim.serving.apart import ping_pong_us
from moesim.serving.batch import BatchShape
from moesim.serving.step_cost import EngineStepCost
from moesim.sim.links import asymptotic_gb_per_s
from moesim.sim.network import Flow, Network
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cost.collective import CollectiveCurve
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
    exchange_us: tuple[float, ...]


def simulate_apart(cost: EngineStepCost, batch: BatchShape) -> ApartStep:
    """One step of `batch`, one row of ranks [D]. Raises InputError without two pools."""
    d = cost.deployment
    if d.expert_gpus is None:
        raise InputError("attention and experts share their GPUs", "give `expert_gpus`")
    parts, layers = d.micro_batches, d.model.num_moe_layers
    part = batch.cut(parts)
    own, experts, _ = (float(t) / layers for t in cost._own_experts_and_comm_us(part))
    sampled = exchange_flows(cost, part)
    flows = [sampled[layer % len(sampled)] for layer in range(layers)]
    env = simpy.Environment()
    network = Network(env, cost.deployment.cluster.routes().num_links)
    pools = simpy.Resource(env), simpy.Resource(env)

    def compute(pool: simpy.Resource, us: float) -> Iterator[Any]:
        with pool.request() as turn:
            yield turn
            yield env.timeout(us)

    def through() -> Iterator[Any]:
        for dispatch, combine in flows:
            yield from compute(pools[0], own)
            yield network.send(dispatch)
            yield from compute(pools[1], experts)
            yield network.send(combine)

    env.run(simpy.AllOf(env, [env.process(through()) for _ in range(parts)]))
    step = float(env.now)
    busy = [parts * layers * us / step for us in (own, experts)]
    alone = [[flow.latency_us + flow.alone_us for flow in pair] for pair in flows]
    exchange_us = tuple(np.mean(alone, axis=0).tolist())
    return ApartStep(step, busy[0], busy[1], network.bytes, network.peak_used, exchange_us)


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


def exchange_flows(cost: EngineStepCost, part: BatchShape) -> list[tuple[Flow, Flow]]:
    """Dispatch and combine of a part, in each of the layers that the load of experts samples."""
    d = cost.deployment
    prefill = bool(part.prefill_tokens.max() > 0)
    comm = cost._of_moe.comm("prefill" if prefill else "decode")
    group = d.tp * d.dp + (d.expert_gpus or 0)
    rows = np.repeat(part.rows.reshape(-1) / d.tp, d.tp)
    sizes = [BYTES_PER_ELEMENT["fp8" if "deepep" in comm else "bf16"], BYTES_PER_ELEMENT["bf16"]]
    ways = [cost._of_moe.curve(kind, group, cost._of_moe.links) for kind in KINDS_OF[comm]]
    out = []
    for chosen in cost._of_moe.chosen_share:
        elements = np.outer(rows, np.repeat(chosen, d.moe_tp)) * d.model.expert_hidden
        pair = [_flow(cost, elements * sizes[i], ways[i], back=i == 1) for i in range(2)]
        out.append((pair[0], pair[1]))
    return out


def _flow(cost: EngineStepCost, sent: FloatArray, curve: CollectiveCurve, *, back: bool) -> Flow:
    """`sent` [attention GPUs, expert GPUs] bytes, or as many back."""
    routes = cost.deployment.cluster.routes()
    carried = np.zeros(routes.num_links)
    first = len(sent)
    for a, e in np.ndindex(*sent.shape):
        pair = (first + e, a) if back else (a, first + e)
        carried[routes.links(*pair)] += sent[a, e]
    names = np.array(routes.link_class_names)[routes.link_class]
    rate = routes.link_gb_per_s * OTHER_LINK_EFFICIENCY
    rate = np.where(names == "nvlink", asymptotic_gb_per_s(curve.nvlink), rate)
    if curve.nic is not None:
        rate = np.where(names == "nic", asymptotic_gb_per_s(curve.nic), rate)
    used = np.flatnonzero(carried)
    busy = carried[used] / (rate[used] * BYTES_PER_US_AT_1_GB_PER_S)
    name = "combine" if back else "dispatch"
    return Flow(name, name, used, carried[used], busy, curve.latency_us, float(busy.max()))
