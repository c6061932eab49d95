"""The time of a step as tables for the compiled loop, and the loop's view of it.

`tables_of` copies what a `EngineStepCost` reduces a deployment to; `step_us` then gives what
`EngineStepCost.one_us` gives (the tests hold the two together), with the routed experts' part by
the domains of the step's tokens where the routing of domains is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moesim.kernels import kernel
from moesim.serving.chunks import chunk_saves
from moesim.serving.graphs import graph_rows
from moesim.serving.state import INTERNAL
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
)


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


@kernel(**INTERNAL)
def _locate(x: Any, count: float) -> tuple[int, float]:
    """Left point of the interval of `count`, and the weight of the right one."""
    last = len(x) - 1
    if count <= x[0]:
        return 0, 0.0
    if count >= x[last]:
        return last, 0.0
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        if x[middle] <= count:
            low = middle
        else:
            high = middle
    return low, (count - x[low]) / (x[high] - x[low])


@kernel(**INTERNAL)
def _table(x: Any, y: Any, count: float) -> float:
    if count <= 0:
        return 0.0
    last = len(x) - 1
    if count > x[last]:
        return y[last] * count / x[last]
    i, w = _locate(x, count)
    return y[i] if w == 0.0 else y[i] + w * (y[i + 1] - y[i])


@kernel(**INTERNAL)
def _layer_us(
    term: Any, rows: float, context: float, repeated: float, prompt: float, pairs: float
) -> float:
    """Attention of one layer."""
    window, time = term[1], 0.0
    if rows > 0:
        seen = min(context, rows * window) if window > 0 else context
        time += term[2] + term[3] * (seen + term[4] * rows)
        if window == 0:
            time -= (term[3] - term[9]) * repeated
    if prompt > 0:
        inside = pairs
        if window > 0:
            length = max(2.0 * pairs / prompt - 1.0, 1.0)
            n = min(length, window)
            inside = prompt / length * (n * (n + 1.0) / 2.0 + (length - n) * n)
        a, b = term[6] * prompt, term[7] * inside
        high, low = max(a, b), min(a, b)
        if high > 0:
            high *= (1.0 + (low / high) ** term[8]) ** (1.0 / term[8])
        time += term[5] + high
    return time


@kernel(**INTERNAL)
def _attention_us(
    terms: Any, rows: float, context: float, repeated: float, prompt: float, pairs: float
) -> float:
    total = 0.0
    for q in range(len(terms)):
        if terms[q, 0] > 0:
            total += terms[q, 0] * _layer_us(terms[q], rows, context, repeated, prompt, pairs)
    return total


@kernel(**INTERNAL)
def _moe_us(tables: Any, m: int, total: float, shares: Any) -> float:
    """All MoE layers for `total` tokens, a share of them from each domain.

    A step of mixed tokens is better balanced than the steps of its domains on their own. What the
    mean over domains lies too high is known for equal shares; for others it is taken in proportion
    to 1 - sum of squared shares, which is 0 for one domain alone.
    """
    x = tables.moe_x[m]
    domains = tables.moe_us.shape[1]
    if domains == 1:
        return _table(x, tables.moe_us[m, 0], total)
    mean, evenly, squares = 0.0, 0.0, 0.0
    for d in range(domains):
        time = _table(x, tables.moe_us[m, d], total)
        mean += shares[d] * time
        evenly += time / domains
        squares += shares[d] * shares[d]
    gap = evenly - _table(x, tables.even_us[m], total)
    return mean - gap * (1.0 - squares) / (1.0 - 1.0 / domains)


@kernel(**INTERNAL)
def _chunk_saved(tables: Any, m: int, drafts: int, verified: float) -> float:
    saves = tables.chunk_saves_us[m]
    if drafts == 0 or drafts >= len(saves):
        return 0.0
    return _table(tables.moe_x[m], saves[drafts], verified)


@kernel(**INTERNAL)
def _ranks_us(
    tables: Any,
    m: int,
    ranks: Any,
    first: int,
    last: int,
    drafts: int,
    extra_context: float,
    part: float,
    padded: float,
) -> tuple[float, float]:
    """What ranks compute on their own for `part` of their step: summed over them, and the most.
    padded: rows that each of them computes, 0 for its own."""
    total, slowest = 0.0, 0.0
    for rank in range(first, last):
        rows = ranks[rank].decode_rows * (1.0 + drafts) * part
        prompt = float(ranks[rank].prefill_rows) * part
        if rows + prompt == 0:
            continue
        context = ranks[rank].decode_context * (1.0 + extra_context * drafts) * part
        repeated = ranks[rank].decode_repeated * part
        pairs = ranks[rank].prefill_pairs * part
        computed = padded * part if padded > 0 else rows + prompt
        time = _table(tables.row_x[m], tables.row_us[m], computed)
        time += _attention_us(tables.terms[m], rows, context, repeated, prompt, pairs)
        slowest = max(slowest, time)
        total += time
    return total, slowest


@kernel(**INTERNAL)
def _apart_us(
    tables: Any, m: int, own: float, total: float, prefill: bool, shares: Any, saved: float
) -> float:
    """`moesim.serving.apart.ping_pong_us` of parts whose slowest rank computes `own`, `total` rows
    of all ranks in each, whose experts take `saved` less than for independent tokens."""
    parts, layers = tables.parts[m], tables.overlap[m, 4]
    comm = _table(tables.moe_x[m], tables.comm_us[m], total)
    experts = _moe_us(tables, m, total, shares) - comm - saved
    if not prefill:
        comm -= _table(tables.moe_x[m], tables.decode_saves_us[m], total)
    through = (own + experts + comm) / layers
    busiest = max(own, experts, comm / 2.0) / layers
    layer = max(parts * busiest, through)
    return through + (layers - 1.0) * layer + (parts - 1.0) * busiest


@kernel(**INTERNAL)
def step_us(
    tables: Any,
    m: int,
    ranks: Any,
    first: int,
    last: int,
    drafts: int,
    extra_context: float,
    shares: Any,
) -> tuple[float, float, float]:
    """Microseconds of a step of ranks `first` to `last`, as their sums in `ranks` say; and what the
    mean rank and the slowest one compute on their own.

    drafts: further tokens that each decoding sequence verifies. They are rows like others; cached
    tokens are read once more for each with `extra_context` 1, not again with 0.
    """
    sampled, total, verified, prefill, largest = 0.0, 0.0, 0.0, False, 0.0
    for rank in range(first, last):
        rows = ranks[rank].decode_rows * (1.0 + drafts)
        prompt = float(ranks[rank].prefill_rows)
        sampled = max(sampled, rows + ranks[rank].prefill_sequences)
        largest = max(largest, rows + prompt)
        total += rows + prompt
        verified += rows
        prefill = prefill or prompt > 0
    if total == 0:
        return 0.0, 0.0, 0.0
    kind = 0 if prefill else 1
    overlaps = total / (last - first) >= tables.overlap[m, kind]
    padded = 0.0
    if largest <= tables.graph_limit[m]:
        padded = graph_rows(largest, tables.graph_limit[m])
        total = padded * (last - first)
    mean, slowest = _ranks_us(tables, m, ranks, first, last, drafts, extra_context, 1.0, padded)
    if overlaps:
        mean, slowest = _ranks_us(tables, m, ranks, first, last, drafts, extra_context, 0.5, padded)
        mean, slowest = 2.0 * mean, 2.0 * slowest
        comm = 2.0 * _table(tables.moe_x[m], tables.comm_us[m], total / 2.0)
        time = slowest + 2.0 * _moe_us(tables, m, total / 2.0, shares) - comm
        time -= 2.0 * _chunk_saved(tables, m, drafts, verified / 2.0)
        if not prefill:
            comm -= 2.0 * _table(tables.moe_x[m], tables.decode_saves_us[m], total / 2.0)
        time = max(time + tables.overlap[m, 2 + kind] * min(time, comm), comm)
        time += comm / (2.0 * tables.overlap[m, 4])
    else:
        time = slowest + _moe_us(tables, m, total, shares)
        time -= _chunk_saved(tables, m, drafts, verified)
        if not prefill:
            time -= _table(tables.moe_x[m], tables.decode_saves_us[m], total)
    parts = tables.parts[m]
    if parts > 1:
        _, own = _ranks_us(tables, m, ranks, first, last, drafts, extra_context, 1.0 / parts, 0.0)
        saved = _chunk_saved(tables, m, drafts, verified / parts)
        time = min(time, _apart_us(tables, m, own, total / parts, prefill, shares, saved))
    time += _table(tables.head_x[m], tables.head_us[m], sampled)
    if prefill and padded == 0.0:
        time = max(time + tables.eager_us[m], tables.least_us[m])
    time += tables.host_us[m] + tables.sequence_us[m] * sampled
    return time, mean / (last - first), slowest


@kernel(**INTERNAL)
def _drafting_pass_us(
    tables: Any,
    m: int,
    ranks: Any,
    first: int,
    last: int,
    drafts: int,
    extra_context: float,
    prompts: bool,
    shares: Any,
) -> float:
    """The multi-token-prediction layer over `1 + drafts` rows of each decoding sequence, and over
    the prompts' rows."""
    term = tables.terms[m, int(tables.drafting[m, 1])]
    total, slowest, prefill = 0.0, 0.0, False
    for rank in range(first, last):
        rows = ranks[rank].decode_rows * (1.0 + drafts)
        prompt = float(ranks[rank].prefill_rows) if prompts else 0.0
        if rows + prompt == 0:
            continue
        context = ranks[rank].decode_context * (1.0 + extra_context * drafts)
        time = _table(tables.row_x[m], tables.drafting_us[m], rows + prompt)
        time += _layer_us(term, rows, context, 0.0, prompt, ranks[rank].prefill_pairs)
        slowest = max(slowest, time)
        total += rows + prompt
        prefill = prefill or prompt > 0
    if total == 0:
        return 0.0
    moe = _moe_us(tables, m, total, shares)
    if not prefill:
        moe -= _table(tables.moe_x[m], tables.decode_saves_us[m], total)
    return slowest + tables.drafting[m, 2] * moe


@kernel(**INTERNAL)
def drafting_us(
    tables: Any,
    m: int,
    ranks: Any,
    first: int,
    last: int,
    drafts: int,
    extra_context: float,
    shares: Any,
) -> float:
    """`EngineStepCost.drafting_us` of the step of ranks `first` to `last`."""
    if tables.drafting[m, 0] == 0.0:
        return 0.0
    time = _drafting_pass_us(tables, m, ranks, first, last, drafts, extra_context, True, shares)
    if drafts > 0:
        most = 0.0
        for rank in range(first, last):
            most = max(most, float(ranks[rank].decode_rows))
        time += drafts * _table(tables.head_x[m], tables.head_us[m], most)
    if drafts > 1:
        one = _drafting_pass_us(tables, m, ranks, first, last, 0, 0.0, False, shares)
        time += (drafts - 1.0) * one
    return time
