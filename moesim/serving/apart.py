"""Attention and experts apart: two pools of GPUs, and a step that goes back and forth between them.

A step's rows are cut in parts. In every MoE layer a part is computed by the attention pool
(attention, norms, router, shared experts), sent to the expert pool, computed there and sent back,
while the other parts are elsewhere on that way: the ping-pong pipeline of MegaScale-Infer
(arXiv:2504.02263, section 4), whose two conditions, exchange hidden and pipeline full, are the two
cases of `ping_pong_us`; Step-3 has the same with three parts (arXiv:2507.19427, section 4). Each
pool, and the network in each direction, does one part after another, first come, first served. A
step is not cut where it is faster whole.

Assumed and ignored: layers are alike, so that dense ones are spread over the MoE layers; an
exchange takes what an all-to-all of as many GPUs takes for the bytes of a GPU of the smaller pool,
half of it in each direction, and leaves the pools' own kernels alone; parts are equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment


def ping_pong_us(
    attention_us: FloatArray,
    experts_us: FloatArray,
    exchange_us: FloatArray,
    parts: int,
    num_layers: int,
    one_way_us: FloatArray | None = None,
) -> FloatArray:
    """All layers of all `parts`; the times are those of one part, summed over `num_layers`.

    One part alone takes a + e + x in a layer. With p parts a layer takes the longer of that and p
    times the busiest of a, e and the slower way of x, half of it unless `one_way_us` is given; the
    last part is p - 1 turns of the busiest behind the first.
    """
    one_way = exchange_us / 2 if one_way_us is None else one_way_us
    every = (attention_us, experts_us, exchange_us, one_way)
    a, e, x, way = (np.asarray(t) / num_layers for t in every)
    through = a + e + x
    busiest = np.maximum(np.maximum(a, e), way)
    layer = np.maximum(parts * busiest, through)
    return np.asarray(through + (num_layers - 1) * layer + (parts - 1) * busiest, np.float64)


class Spread(NamedTuple):
    """How far the rows of a MoE layer go.

    senders: GPUs that the rows are spread over, as few as either side has. receivers: GPUs with
    experts; nodes: nodes of those. elsewhere, other_nodes: share of the pairs of a sender and a
    receiver that are two GPUs, and that are on two nodes.
    """

    senders: int
    receivers: int
    nodes: int
    elsewhere: float
    other_nodes: float


def spread_of(deployment: Deployment) -> Spread:
    """Of a deployment: its pools, attention's GPUs first in the cluster, or all GPUs to all."""
    attention, per_node = deployment.tp * deployment.dp, deployment.cluster.gpus_per_node
    experts = deployment.expert_gpus
    if experts is None:
        nodes = max(1, -(-attention // per_node))
        return Spread(attention, attention, nodes, (attention - 1) / attention, (nodes - 1) / nodes)
    node = np.arange(attention + experts) // per_node
    held = np.bincount(node[attention:], minlength=node[-1] + 1)
    sent = np.bincount(node[:attention], minlength=node[-1] + 1)
    same = float(sent @ held) / (attention * experts)
    return Spread(min(attention, experts), experts, int((held > 0).sum()), 1.0, 1.0 - same)
