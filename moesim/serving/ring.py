"""One long prompt over many GPUs: what attention takes when keys, or queries, go round.

The prompt is cut into equal shares, two stripes for each GPU so that causal work is even (zigzag).
GPUs step together, P of them in P rounds, each round a block of queries against a block of keys:

- `ring`: keys and values go to the next GPU while the round computes (Ring Attention, Liu et al.,
  arXiv:2310.01889; known from summaries);
- `token-ring`: queries go one way while partial outputs with their log-sum-exp come back the other
  way (TokenRing, Wang et al., arXiv:2412.20501; abstract read);
- `all-gather`: every GPU gathers all keys and values first, nothing overlaps.

    round = max(attention of a block, sending), all but the last of P

Sending is a point-to-point transfer, both directions of a link at once. Ignored: the time to merge
partial outputs, contention of a GPU's links, states of linear attention. Windowed layers pass all
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from moesim.cost.dense import KV_ELEMENT_BYTES, causal_pairs
from moesim.serving.batch import BatchShape, chunk_pairs
from moesim.serving.step_cost import EngineStepCost
from moesim.serving.step_parts import ELEMENT_BYTES

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment

SCHEDULES = ("all-gather", "ring", "token-ring")
LSE_BYTES = 4.0


@dataclass(frozen=True, slots=True)
class PromptTime:
    """Microseconds of one prompt: attention's own work, what of sending it does not hide, and all
    else (dense layers, experts with dispatch and combine, host)."""

    attention_us: float
    exposed_us: float
    other_us: float

    @property
    def total_us(self) -> float:
        return self.attention_us + self.exposed_us + self.other_us


def block_bytes(deployment: Deployment, tokens: float) -> tuple[float, float, float]:
    """(keys and values, queries, partial outputs) of `tokens` in one layer."""
    spec = deployment.model.attention
    kept = KV_ELEMENT_BYTES[deployment.kv_dtype] * tokens
    if spec.kind == "mla":
        keys = (spec.kv_lora_rank + spec.qk_rope_head_dim) * kept
        query = spec.num_heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim)
        value = spec.v_head_dim
    else:
        keys = 2 * spec.num_kv_heads * spec.head_dim * kept
        query, value = spec.num_heads * spec.head_dim, spec.head_dim
    out = spec.num_heads * (value * ELEMENT_BYTES + LSE_BYTES)
    return keys, query * ELEMENT_BYTES * tokens, out * tokens


def rounds_us(num_gpus: int, compute_us: float, send_us: float, back_us: float = 0.0) -> float:
    """What P rounds take beyond their own work: all but the last wait for what is sent, and the
    last partial output still has to come back (`back_us`)."""
    return (num_gpus - 1) * max(0.0, send_us - compute_us) + back_us


def prompt_us(cost: EngineStepCost, tokens: int) -> dict[str, PromptTime]:
    """By schedule, for a prompt of `tokens` over the P = dp ranks (tp 1) of a deployment; `one
    rank`: on one of them while the others wait, as a request is served without a schedule."""
    d = cost.deployment
    ranks, share = d.dp, tokens / d.dp
    alone = np.zeros(ranks)
    alone[0] = tokens
    whole = BatchShape.of(prefill_tokens=alone, prefill_pairs=chunk_pairs(alone))
    even = BatchShape.of(prefill_tokens=np.full(ranks, share))
    out = {"one rank": _split(cost, whole)}
    other = _split(cost, even).other_us
    nodes = ceil(ranks / d.cluster.gpus_per_node)
    nic = d.cluster.nic_gb_per_s

    def send(size: float) -> float:
        curve = cost.calibration.collective("p2p", 2, min(2, nodes), nic_gb_per_s=nic)
        return float(curve.time_us(0.0 if nodes > 1 else size, size if nodes > 1 else 0.0))

    keys, queries, outputs = block_bytes(d, share)
    elsewhere = keys * (ranks - 1)
    gather = cost.calibration.collective("all_gather", ranks, nodes, nic_gb_per_s=nic)
    gather_us = float(gather.time_us(elsewhere, elsewhere if nodes > 1 else 0.0))
    for name in SCHEDULES:
        work = exposed = 0.0
        for terms in cost.attention:
            every = replace(terms, window=0, chosen=0)
            pairs = float(causal_pairs(tokens, terms.window)) / ranks
            if name == "all-gather":
                one, hidden = every.one_us(0, 0, share, pairs), gather_us
            else:
                block = every.one_us(0, 0, share, pairs / ranks)
                one = ranks * block
                both = send(max(queries, outputs))
                hidden = rounds_us(ranks, block, send(keys))
                if name == "token-ring":
                    hidden = rounds_us(ranks, block, both, send(outputs))
            work += terms.num_layers * one
            exposed += terms.num_layers * hidden
        out[name] = PromptTime(work, exposed, other)
    return out


def _split(cost: EngineStepCost, batch: BatchShape) -> PromptTime:
    parts = cost.breakdown(batch)
    attention = float(np.asarray(parts.pop("attention")).max())
    return PromptTime(attention, 0.0, float(sum(np.asarray(v).max() for v in parts.values())))
