"""The prompt's experts for everything that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.routing.base import Choices, Rule, Work
from moesim.trace.format import DECODE, PREFILL, Trace
from moesim.types import Array, IntArray


@dataclass(frozen=True, slots=True)
class Freeze(Rule):
    """A request's decode tokens take the experts of its prompt: the K with most choices in the
    prompt (`by` prompt; the lower id among equals), or those of its `last` token. Requests without
    a prompt in the trace keep theirs; the note counts their decode tokens. Gate weights are equal,
    of the same sum as before, or the last token's."""

    by: Literal["prompt", "last"] = "prompt"

    NAME = "freeze"
    TITLE = "decode with the experts that the prompt chose"
    PAPER = "MiLoRA (Zhang et al., arXiv:2410.18035; abstract read)"
    LEFT_OUT = (
        "experts are LoRA modules there, routed once by a pooled prompt: the prompt's most chosen"
        " experts stand in"
    )

    def apply(self, work: Work) -> Choices:
        trace = work.trace
        phases = np.asarray(trace.phases)
        _, request = np.unique(np.asarray(trace.request_ids), return_inverse=True)
        prompt = np.flatnonzero(phases == PREFILL)
        has = np.zeros(int(request.max(initial=-1)) + 1, bool)
        has[request[prompt]] = True
        decode = np.flatnonzero((phases == DECODE) & has[request])
        notes = {"decode_tokens_without_prompt": float(((phases == DECODE) & ~has[request]).sum())}
        ids = work.ids.copy()
        gates = None if work.gates is None else work.gates.copy()
        if self.by == "last":
            last = _last_token(np.asarray(trace.positions), request, prompt, len(has))
            ids[decode] = work.ids[last[request[decode]]]
            if gates is not None and work.gates is not None:
                gates[decode] = work.gates[last[request[decode]]]
            return Choices(ids, gates, notes)
        for layer in range(trace.num_layers):
            table = _most_chosen(work.ids[prompt, layer], request[prompt], len(has), trace)
            ids[decode, layer] = table[request[decode]]
        if gates is not None and work.gates is not None:
            chosen = ids[decode] >= 0
            share = work.gates[decode].sum(axis=2) / np.maximum(chosen.sum(axis=2), 1)
            gates[decode] = np.where(chosen, share[..., None], 0)
        return Choices(ids, gates, notes)


def _last_token(positions: Array, request: IntArray, prompt: IntArray, count: int) -> IntArray:
    """[R] token of largest position in each request's prompt; 0 without one."""
    last = np.zeros(count, np.int64)
    order = prompt[np.argsort(positions[prompt], kind="stable")]
    last[request[order]] = order
    return last


def _most_chosen(ids: Array, request: IntArray, count: int, trace: Trace) -> Array:
    """[R, K] the experts that each request's tokens chose most; -1 where there are fewer."""
    experts, top_k = trace.num_experts, trace.top_k
    cell = (request[:, None] * experts + ids)[ids >= 0]
    load = np.bincount(cell, minlength=count * experts).reshape(count, experts)
    order = np.argsort(-load, axis=1, kind="stable")[:, :top_k]
    return np.where(np.take_along_axis(load, order, 1) > 0, order, -1).astype(np.int16)


RULE = Freeze
