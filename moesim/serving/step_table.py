"""The time of a step as tables for the compiled loop.

`tables_of` copies what a `EngineStepCost` reduces a deployment to; `step_kernel.step_us` then gives
what `EngineStepCost.one_us` gives (the tests hold the two together), with the routed experts' part
by the domains of the step's tokens where the routing of domains is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moesim.serving.chunks import chunk_saves
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.serving.step_cost import EngineStepCost

TERM_FIELDS = (
    "num_layers",
    "window",
    "decode_launch_us",
    "us_per_seen",
    "extra_tokens",
    "prefill_launch_us",
    "us_per_row",
    "us_per_pair",
    "sharpness",
    "us_per_repeat",
    "chosen",
    "index_decode_us",
    "us_per_indexed",
    "index_prefill_us",
    "us_per_choosing_row",
    "us_per_index_pair",
)
TERM_TIMES = tuple(
    i for i, name in enumerate(TERM_FIELDS) if name.startswith("us_per_") or name.endswith("_us")
)
"""Columns of `StepTables.terms` that are times."""


class StepTables(NamedTuple):
    """M deployments (roles). Tables are piecewise linear in a count, `*_x` [M, points].

    row_us: one rank's work by its rows; moe_us: [M, W, points], all MoE layers by the tokens of all
    ranks, for each of W domains; even_us: the same for tokens of all domains in equal shares;
    head_us: by sampled rows. terms: [M, Q, TERM_FIELDS], attention; unused ones have no layers.
    decode_saves_us: [M, points] by the tokens of all ranks, what a step without prompt tokens takes
    less than `moe_us` says. comm_us: [M, points], dispatch and combine in `moe_us`.
    overlap: [M, 5], see `EngineStepCost.overlap`. parts: [M], of a step between two pools of GPUs,
    0 where there is one. drafting_us: [M, points], what one rank computes by its rows in the
    multi-token-prediction layer that drafts; drafting: [M, 3], `EngineStepCost.drafting`.
    chunk_saves_us: [M, drafts + 1, points] by verified rows of all ranks, what experts take less
    than `moe_us` says where a sequence's rows come in chunks (`moesim.serving.chunks`).
    eager_us: added to steps with prompt tokens that no graph replays, which take least_us at least;
    host_us, sequence_us: added to every step, and for every sampled row of the rank that has most.
    graph_limit: the largest step that is padded (`moesim.serving.graphs`).
    """

    row_x: FloatArray
    row_us: FloatArray
    moe_x: FloatArray
    moe_us: FloatArray
    even_us: FloatArray
    head_x: FloatArray
    head_us: FloatArray
    terms: FloatArray
    eager_us: FloatArray
    least_us: FloatArray
    host_us: FloatArray
    sequence_us: FloatArray
    decode_saves_us: FloatArray
    comm_us: FloatArray
    overlap: FloatArray
    parts: FloatArray
    drafting_us: FloatArray
    drafting: FloatArray
    chunk_saves_us: FloatArray
    graph_limit: FloatArray


def tables_of(
    costs: Sequence[EngineStepCost],
    domains: Sequence[FloatArray] | None = None,
    max_drafts: int = 0,
) -> StepTables:
    """Tables of one deployment or two (front and decode instances of a disaggregated service).

    domains: for each deployment [W + 1, points] times of all MoE layers on its `moe_x`, W domains
    and then equal shares of all; None for the routing that the deployment itself has. max_drafts:
    of speculative decoding, whose chunks activate experts as the deployment's trace does.
    """
    rows, moes, heads, evens, by_domain = [], [], [], [], []
    for i, cost in enumerate(costs):
        rows.append((cost._rows_total.counts, cost._rows_total.times_us))
        heads.append((cost._head.counts, cost._head.times_us))
        own = cost._moe_total
        given = domains[i] if domains is not None else np.stack([own.times_us, own.times_us])
        moes.append((own.counts, given[-1]))
        evens.append(given[-1])
        by_domain.append(given[:-1])
    row_x, row_us = _padded(rows)
    head_x, head_us = _padded(heads)
    moe_x, even_us = _padded(moes)
    moe_us = np.stack(
        [
            np.stack([_padded_to(cost._moe_total.counts, us, moe_x.shape[1])[1] for us in part])
            for cost, part in zip(costs, by_domain, strict=True)
        ]
    )
    most = max(len(cost.attention) for cost in costs)
    terms = np.zeros((len(costs), most, len(TERM_FIELDS)))
    for i, cost in enumerate(costs):
        for q, term in enumerate(cost.attention):
            terms[i, q] = [getattr(term, name) for name in TERM_FIELDS]
    deployments = [cost.deployment for cost in costs]
    profiles = [d.engine for d in deployments]
    layers = [d.model.num_hidden_layers for d in deployments]
    eager = [p.prompt_added_us(n) for p, n in zip(profiles, layers, strict=True)]
    least = [p.prompt_least_us(n) for p, n in zip(profiles, layers, strict=True)]
    return StepTables(
        row_x,
        row_us,
        moe_x,
        moe_us,
        even_us,
        head_x,
        head_us,
        terms,
        np.array(eager, np.float64),
        np.array(least, np.float64),
        np.array([p.step_host_us for p in profiles], np.float64),
        np.array([p.sequence_host_us for p in profiles], np.float64),
        _padded([(cost._decode_saves.counts, cost._decode_saves.times_us) for cost in costs])[1],
        _padded([(c._moe_total.counts, c._moe["communication"].times_us) for c in costs])[1],
        np.stack([cost.overlap for cost in costs]),
        np.array([d.micro_batches if d.expert_gpus else 0.0 for d in deployments], np.float64),
        _padded([(cost._drafting.counts, cost._drafting.times_us) for cost in costs])[1],
        np.array([cost.drafting for cost in costs], np.float64),
        np.stack([_chunk_saves(cost, max_drafts, moe_x.shape[1]) for cost in costs]),
        np.array([cost.graph_limit for cost in costs], np.float64),
    )


def _chunk_saves(cost: EngineStepCost, max_drafts: int, size: int) -> FloatArray:
    saves = chunk_saves(cost, max_drafts)
    return np.stack([_padded_to(cost.moe_counts, us, size)[1] for us in saves])


def _padded_to(counts: FloatArray, times: FloatArray, size: int) -> tuple[FloatArray, FloatArray]:
    """`size` points: beyond the last given one times are in proportion to the count, as they are
    when a table is asked beyond its end."""
    factor = 2.0 ** np.arange(1, size - len(counts) + 1)
    return (
        np.concatenate([counts, counts[-1] * factor]),
        np.concatenate([times, times[-1] * factor]),
    )


def _padded(tables: Sequence[tuple[FloatArray, FloatArray]]) -> tuple[FloatArray, FloatArray]:
    size = max(2, *(len(counts) for counts, _ in tables))
    both = [_padded_to(counts, times, size) for counts, times in tables]
    return np.stack([x for x, _ in both]), np.stack([y for _, y in both])
