"""A step's time from the tables of `moesim.serving.step_table`, for the compiled loop."""

from __future__ import annotations

from typing import Any

from moesim.kernels import kernel
from moesim.serving.graphs import graph_rows
from moesim.serving.state import INTERNAL


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
    window, chosen, time = term[1], term[10], 0.0
    if rows > 0:
        most = max(window, chosen)
        seen = min(context, rows * most) if most > 0 else context
        time += term[2] + term[3] * (seen + term[4] * rows)
        time += term[11] + term[12] * context
        if most == 0:
            time -= (term[3] - term[9]) * repeated
    if prompt > 0 and chosen > 0 and pairs > prompt * (chosen + 1.0) / 2.0:
        time += term[5] + term[13] + term[14] * prompt + term[15] * pairs
    elif prompt > 0:
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
    prompts: bool,
    layer: int,
    padded: float,
) -> tuple[float, float]:
    """What ranks compute on their own for `part` of their step, its prompts too where `prompts`:
    summed over them, and the most. layer: the place in `terms` of the one layer that drafts, below
    0 for all layers of the model. padded: rows that each of them computes, 0 for its own."""
    rows_us = tables.row_us[m] if layer < 0 else tables.drafting_us[m]
    total, slowest = 0.0, 0.0
    for rank in range(first, last):
        rows = ranks[rank].decode_rows * (1.0 + drafts) * part
        prompt = float(ranks[rank].prefill_rows) * part if prompts else 0.0
        if rows + prompt == 0:
            continue
        context = ranks[rank].decode_context * (1.0 + extra_context * drafts) * part
        pairs = ranks[rank].prefill_pairs * part
        computed = padded * part if padded > 0 else rows + prompt
        time = _table(tables.row_x[m], rows_us, computed)
        if layer < 0:
            repeated = ranks[rank].decode_repeated * part
            time += _attention_us(tables.terms[m], rows, context, repeated, prompt, pairs)
        else:
            time += _layer_us(tables.terms[m, layer], rows, context, 0.0, prompt, pairs)
        slowest = max(slowest, time)
        total += time
    return total, slowest


@kernel(**INTERNAL)
def _rows_of(
    ranks: Any, first: int, last: int, drafts: int, prompts: bool
) -> tuple[float, float, float, float, bool]:
    """Of ranks `first` to `last`: most rows that one samples, most that one has, rows of all, rows
    that verify, and whether there are prompts."""
    sampled, largest, total, verified, prefill = 0.0, 0.0, 0.0, 0.0, False
    for rank in range(first, last):
        rows = ranks[rank].decode_rows * (1.0 + drafts)
        prompt = float(ranks[rank].prefill_rows) if prompts else 0.0
        sampled = max(sampled, rows + ranks[rank].prefill_sequences)
        largest = max(largest, rows + prompt)
        total += rows + prompt
        verified += rows
        prefill = prefill or prompt > 0
    return sampled, largest, total, verified, prefill


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
    sampled, largest, total, verified, prefill = _rows_of(ranks, first, last, drafts, True)
    if total == 0:
        return 0.0, 0.0, 0.0
    kind = 0 if prefill else 1
    halved = total / (last - first) >= tables.overlap[m, kind]
    part, padded = 0.5 if halved else 1.0, 0.0
    if largest <= tables.graph_limit[m]:
        padded = graph_rows(largest, tables.graph_limit[m])
        total = padded * (last - first)
    mean, slowest = _ranks_us(
        tables, m, ranks, first, last, drafts, extra_context, part, True, -1, padded
    )
    if halved:
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
        _, own = _ranks_us(
            tables, m, ranks, first, last, drafts, extra_context, 1.0 / parts, True, -1, 0.0
        )
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
    _, _, total, _, prefill = _rows_of(ranks, first, last, drafts, prompts)
    if total == 0:
        return 0.0
    layer = int(tables.drafting[m, 1])
    _, slowest = _ranks_us(
        tables, m, ranks, first, last, drafts, extra_context, 1.0, prompts, layer, 0.0
    )
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
