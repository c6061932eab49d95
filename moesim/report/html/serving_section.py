"""Served requests: latencies as distributions, throughput, queues and memory over time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from moesim.draw.figures import percent, significant
from moesim.draw.serving import (
    LATENCIES,
    OVER_TIME,
    distribution,
    latency_unit,
    over_time,
    promises,
    time_unit,
)
from moesim.figures import SERVICE_FIGURES, figure
from moesim.report.html.fields import Fields
from moesim.report.html.parts import (
    Card,
    Cards,
    Figure,
    Figures,
    Note,
    Section,
    Table,
    TableBlock,
    predicted,
)
from moesim.report.html.runs import Run

STATS = ("mean", "p50", "p90", "p95", "p99", "max")


def serving_section(run: Run) -> Section:
    """One `moesim serve --json`."""
    data = run.data
    metrics, basis = data.child("metrics"), predicted(data.text("basis", "assumed"))
    where = data.text("name", "the deployment")
    section = Section(f"Requests served by {where}", sources=(run.name,))
    section.lead = _lead(data)
    cards = _cards(data, metrics, basis)
    section.headline = cards[:1]
    section.blocks.append(Cards(cards))
    section.blocks.append(Figures(_distributions(data, basis)))
    section.blocks.append(_latencies(metrics, basis))
    section.blocks.append(Figures(_over_time(data, basis)))
    section.blocks.append(_table(metrics, basis))
    section.blocks += _pools(data, basis)
    section.blocks += _levels(data, basis)
    section.blocks += [Note(text) for text in data.texts("notices")]
    return section


def _lead(data: Fields) -> str:
    asked = data.child("requests")
    counts = data.maybe("counts") or Fields({}, "counts")
    text = (
        f"{asked.whole('num_requests', 0):,} requests of {asked.text('source', '')}"
        f" ({asked.text('basis', 'assumed')}) arrive at"
        f" {significant(asked.number('rate_per_s', 0.0), 3)} a second over"
        f" {significant(asked.number('span_s', 0.0), 4)} s."
    )
    prompt, output = asked.maybe("prompt_tokens"), asked.maybe("output_tokens")
    if prompt is not None and output is not None:
        text += (
            f" Prompts have {significant(prompt.number('mean', 0.0))} tokens and answers"
            f" {significant(output.number('mean', 0.0))}, on average."
        )
    said = [f"{counts.whole(k):,} {k}" for k in counts.raw if counts.number(k)]
    return f"{text} Of the requests, {', '.join(said)}." if said else text


def _cards(data: Fields, metrics: Fields, basis: str) -> list[Card]:
    cards = []
    slo = data.maybe("slo")
    if slo is not None:
        good, missed = slo.child("goodput"), slo.children("missed")
        kept = "kept" if not missed else "missed: " + ", ".join(m.text("promise") for m in missed)
        cards.append(
            Card(
                "requests that keep their promises",
                percent(good.number("share")),
                f"{slo.text('text', '')}; promises over all requests {kept}",
                basis,
            )
        )
    for name, label, _ in LATENCIES[:2]:
        if metrics.has(f"{name}_p99"):
            value, unit = _timed(metrics.number(f"{name}_p99"))
            median, median_unit = _timed(metrics.number(f"{name}_p50", 0.0))
            detail = f"median {significant(median, 3)} {median_unit}"
            cards.append(
                Card(f"{label.lower()}, p99", f"{significant(value, 3)} {unit}", detail, basis)
            )
    if metrics.has("output_tokens_per_s_per_gpu"):
        gpus = data.whole("num_gpus", 0)
        rate = significant(metrics.number("output_tokens_per_s_per_gpu"), 3)
        cards.append(Card("output tokens/s per GPU", rate, f"on {gpus} GPUs", basis))
    return cards


def _timed(seconds: float) -> tuple[float, str]:
    return (seconds * 1e3, "ms") if seconds < 1 else (seconds, "s")


def _distributions(data: Fields, basis: str) -> list[Figure]:
    quantiles = data.child("cdf")
    _checked_promises(data)
    out = []
    for name, title, _ in LATENCIES:
        values = quantiles.numbers(name)
        if len(values) < 2:
            continue
        if any(b < a for a, b in pairwise(values)):
            raise quantiles.bad(name, "quantiles in ascending order")
        factor, unit = latency_unit(values)
        rows = [
            [f"{100 * i / (len(values) - 1):g}%", significant(value * factor)]
            for i, value in enumerate(values)
        ]
        caption = "Of finished requests."
        drawn = distribution(name, values, promises(data.raw, name))
        out.append(
            Figure(title, drawn, Table(["requests", f"up to ({unit})"], rows), caption, basis)
        )
    return out


def _checked_promises(data: Fields) -> None:
    """Raise FormatError unless the promises are those that a run writes."""
    slo = data.maybe("slo")
    for bound in slo.children("promises") if slo is not None else ():
        bound.text("latency")
        bound.number("limit_s")
        bound.text("stat", "")


def _latencies(metrics: Fields, basis: str) -> TableBlock:
    rows = []
    for name, title, _ in LATENCIES:
        values = [
            metrics.number(f"{name}_{s}") * 1e3 if metrics.has(f"{name}_{s}") else None
            for s in STATS
        ]
        rows.append(
            [f"{title.lower()} (ms)", *("–" if v is None else significant(v) for v in values)]
        )
    return TableBlock("Latencies of finished requests", Table(["", *STATS], rows), basis)


def _over_time(data: Fields, basis: str) -> list[Figure]:
    roles = dict(data.child("series").members())
    columns = ["time_s", *(column for _, some, _ in OVER_TIME for column, *_ in some)]
    series = {role: {c: own.numbers(c) for c in columns} for role, own in roles.items()}
    for role, own in series.items():
        for column, values in own.items():
            if len(values) != len(own["time_s"]):
                raise roles[role].bad(column, "as long as time_s")
    _, unit = time_unit(series)
    out = []
    for picture, drawn in over_time(series):
        table: dict[float, list[str]] = {}
        for line in drawn:
            stride = max(1, len(line.x) // 40)
            for at, value in list(zip(line.x, line.y, strict=True))[::stride]:
                table.setdefault(at, []).append(significant(value, 3))
        rows = [
            [significant(at, 3), *row]
            for at, row in sorted(table.items())
            if len(row) == len(drawn)
        ]
        caption = f"Means over {significant(data.number('bin_s', 0.0), 3)} s."
        columns = [f"time ({unit})", *(line.name for line in drawn)]
        out.append(Figure(picture.title, picture, Table(columns, rows), caption, basis))
    return out


def _table(metrics: Fields, basis: str) -> TableBlock:
    rows = [
        [figure(name).heading, significant(metrics.number(name) * figure(name).factor)]
        for name in SERVICE_FIGURES
        if metrics.has(name)
    ]
    return TableBlock("Throughput, use and queues", Table(["figure", "value"], rows), basis)


def _pools(data: Fields, basis: str) -> Sequence[TableBlock]:
    """Attention and experts apart: what each pool does in a decode step."""
    pools = data.maybe("pools")
    if pools is None:
        return []
    step = (
        f"with {significant(pools.number('sequences_per_rank'), 3)} sequences per attention rank of"
        f" {significant(pools.number('context_tokens'), 3)} tokens. Layers take"
        f" {significant(pools.number('step_s') * 1e3, 3)} ms with the exchange as flows over the"
        f" network, {significant(pools.number('step_closed_form_s') * 1e3, 3)} by the closed form"
        " that the service is simulated with."
    )
    return [
        pools_block(pools, basis, f"Of a decode step in {pools.whole('parts', 1)} parts {step}")
    ]


def pools_block(pools: Fields, basis: str, caption: str) -> TableBlock:
    """Attention and experts apart: share of a step that each pool and the network work."""
    rows = [
        [f"{name}, {pools.whole(gpus, 0)} GPUs", percent(pools.number(f"{name}_busy"))]
        for name, gpus in (("attention", "attention_gpus"), ("experts", "expert_gpus"))
    ]
    rows.append(["exchange, each way", percent(pools.number("exchange_share"))])
    table = Table(["pool", "share of the step that it works"], rows)
    return TableBlock("Attention and experts apart", table, basis, caption)


def _levels(data: Fields, basis: str) -> Sequence[TableBlock]:
    rows = [
        [
            str(level.whole("priority")),
            f"{level.whole('requests', 0):,}",
            f"{level.whole('finished', 0):,}",
            *(
                significant(level.number(f"{name}_p99") * 1e3) if level.has(f"{name}_p99") else "–"
                for name, *_ in LATENCIES
            ),
        ]
        for level in data.children("by_level")
    ]
    if not rows:
        return []
    columns = ["priority", "requests", "finished", *(f"{n}, p99 (ms)" for n, *_ in LATENCIES)]
    return [TableBlock("By priority, the first the most urgent", Table(columns, rows), basis)]
