"""Experts that a chunk of drafted tokens activates together, from a routing trace.

Tokens next to each other in a request share experts more often than tokens of different requests,
so that verifying drafts reads fewer experts' weights than as many independent tokens would: the
chunk-level sparsity of BlockFFN (arXiv:2507.08771, section 1), which its kernels for speculative
decoding rest on. Here a step of n chunks of c tokens has, for each expert, a binomial number of
chunks that activate it, each with the chunk's mean number of tokens for it.
Ignored: that drafts which are not accepted may choose other experts than the text of the trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.serving.moe_load import MoeLoad
from moesim.trace.batches import index_requests
from moesim.trace.format import DECODE
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.serving.step_cost import EngineStepCost
    from moesim.trace.format import Trace

MAX_CHUNKS = 16_384


@dataclass(frozen=True, eq=False)
class ChunkLoad(MoeLoad):
    """`inclusion` [X, E]: probability that a chunk of `chunk` tokens activates an expert;
    tokens_per_hit [X, E]: tokens that one which does has for it, on average."""

    tokens_per_hit: FloatArray
    chunk: int

    def counts(self, num_tokens: float, seed: int = 0) -> FloatArray:
        """[X, E] tokens of every expert in a step of `num_tokens` / chunk chunks."""
        return super().counts(num_tokens / self.chunk, seed) * self.tokens_per_hit


def chunk_inclusion(trace: Trace, chunk: int) -> FloatArray | None:
    """[L, E] share of the chunks of `chunk` consecutive tokens of a request, without overlap, that
    choose an expert at least once: of decode where the trace has it, else of prompts; None where no
    request is as long. At most MAX_CHUNKS chunks, evenly picked."""
    phase = "decode" if bool((np.asarray(trace.phases) == DECODE).any()) else "prefill"
    index, _ = index_requests(trace, phase)  # type: ignore[arg-type]
    lengths = np.diff(index.indptr) // chunk
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    first = np.repeat(index.indptr[:-1], lengths) + within * chunk
    first = first[:: max(1, -(-len(first) // MAX_CHUNKS))]
    if not len(first):
        return None
    tokens = index.token_idx[first[:, None] + np.arange(chunk)]
    out = np.zeros((trace.num_layers, trace.num_experts))
    for layer in range(trace.num_layers):
        ids = np.asarray(trace.expert_ids[:, layer])[tokens].astype(np.int64)
        hit = np.zeros((len(first), trace.num_experts + 1), bool)
        np.put_along_axis(hit, ids.reshape(len(first), -1), True, axis=1)
        out[layer] = hit[:, :-1].mean(axis=0)
    return out


def chunked(load: MoeLoad, inclusion: FloatArray, chunk: int) -> ChunkLoad:
    """Chunks that choose experts as often as the tokens of `load`, with `inclusion` [L, E]."""
    tokens = chunk * load.inclusion
    # A load that was spread out may be above what the trace's chunks hold, or below one each.
    hit = np.clip(inclusion, tokens / chunk, np.minimum(tokens, 1.0))
    each = np.divide(tokens, hit, out=np.zeros_like(tokens), where=hit > 0)
    return ChunkLoad(hit, f"{load.source}, chunks of {chunk}", each, chunk)


def chunk_saves(cost: EngineStepCost, max_drafts: int) -> FloatArray:
    """[max_drafts + 1, points]: of all MoE layers' time for independent tokens, what chunks of
    1 + k tokens take less, on the token counts of `cost`'s own table; below 0 where chunks burden
    the busiest GPU more. 0 without a trace, and for chunks longer than its requests."""
    grid = cost.moe_counts
    out = np.zeros((max_drafts + 1, len(grid)))
    trace = cost.deployment.trace
    if trace is None:
        return out
    layers, load = cost.deployment.model.num_moe_layers, cost.experts.load

    def experts_us(of: MoeLoad) -> FloatArray:
        return np.maximum.accumulate([cost.experts.experts_us(n, of) for n in grid])

    single = experts_us(load)
    for drafts in range(1, max_drafts + 1):
        inclusion = chunk_inclusion(trace, drafts + 1)
        if inclusion is not None:
            chunks = experts_us(chunked(load, inclusion, drafts + 1))
            out[drafts] = layers * (single - chunks)
    return out
