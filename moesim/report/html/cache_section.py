"""Expert offloading: speed and hits of the plan, of what others do, and of the offline bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.report.html.charts import (
    Axes,
    Bar,
    Line,
    bars,
    legend,
    lines,
    percent,
)
from moesim.report.html.fields import Fields, is_number
from moesim.report.html.heatmap import Colours, Side, heat_map
from moesim.report.html.palette import series_of
from moesim.report.html.parts import Card, Cards, Figure, Figures, Note, Section, Table, TableBlock
from moesim.report.html.runs import Run
from moesim.report.html.svg import significant

OWN = "this plan"
BOUND = "offline bound"


def cache_section(run: Run) -> Section:
    """One `moesim cache --json`, or a cache plan alone."""
    whole = run.format == "moesim-cache-run"
    plan = run.data.child("plan") if whole else run.data
    predicted = plan.maybe("predicted") or Fields({}, run.name)
    basis = (run.data if whole else predicted).text("basis", "assumed")
    gpu = plan.text("gpu", "")
    section = Section(f"Experts in memory on {gpu or 'one GPU'}", sources=(run.name,))
    section.lead = _lead(plan, predicted)
    results = run.data.children("results") if whole else []
    bound = run.data.maybe("offline_bound") if whole else None
    cards = _cards(predicted, results, bound, basis)
    section.headline = cards[:1]
    section.blocks.append(Cards(cards))
    figures: list[Figure] = []
    if results:
        figures += [_speed(results, bound, basis), _hits(results)]
    sweep = run.data.maybe("sweep") if whole else None
    if sweep is not None:
        figures.append(_sweep(sweep, plan, basis))
    figures += _layers(plan)
    section.blocks.append(Figures(figures))
    if results:
        section.blocks.append(_table(results, basis))
    if not whole:
        text = "What others do with the same memory is left out: give moesim cache --json as well."
        section.blocks.append(Note(text, left_out=True))
    elif sweep is None:
        text = "Speed against memory is left out: moesim cache works it out where --plot is given."
        section.blocks.append(Note(text, left_out=True))
    return section


def _lead(plan: Fields, predicted: Fields) -> str:
    memory = plan.maybe("memory") or Fields({}, "memory")
    text = (
        f"{memory.whole('num_slots', 0)} experts stay in {memory.number('hbm_bytes', 0) / 1e9:g} GB"
        f" of GPU memory, beside {significant(memory.number('dense_bytes', 0) / 1e9, 3)} GB of"
        f" other weights and {significant(memory.number('kv_bytes', 0) / 1e9, 3)} GB of KV cache."
        f" Policy {plan.text('policy', 'none')}"
    )
    prefetch = plan.maybe("prefetch")
    if prefetch is not None:
        text += f", prefetch by {prefetch.text('predictor', '')}"
    text += ", the CPU computes misses." if plan.text("cpu", "off") == "auto" else "."
    if predicted.has("num_tokens"):
        text += f" Figures are of {predicted.whole('num_tokens'):,} held-out tokens."
    return text


def _cards(
    predicted: Fields, results: Sequence[Fields], bound: Fields | None, basis: str
) -> list[Card]:
    if not predicted.has("tokens_per_s"):
        return []
    speed = predicted.number("tokens_per_s")
    others = [r for r in results if r.text("name") != OWN and "optimum" not in r.text("name")]
    detail = ""
    if others:
        best = max(others, key=lambda r: r.number("tokens_per_s"))
        rate = best.number("tokens_per_s")
        if rate > 0:
            detail = f"{speed / rate:.2f} times the next best, {best.text('name')}"
    cards = [Card("tokens a second", significant(speed), detail, basis)]
    if predicted.has("hit_rate"):
        of_bound = ""
        if bound is not None:
            of_bound = f"of any policy at most {percent(bound.number('hit_rate', 0.0))}"
        hit = percent(predicted.number("hit_rate"))
        cards.append(Card("experts found in memory", hit, of_bound, "counted"))
    if predicted.has("bytes_per_token"):
        value = f"{predicted.number('bytes_per_token') / 1e6:.1f} MB"
        cards.append(Card("over the host link a token", value, "", "counted"))
    return cards


def _speed(results: Sequence[Fields], bound: Fields | None, basis: str) -> Figure:
    rows = [
        Bar(
            r.text("name"),
            [("", _series(r.text("name")), r.number("tokens_per_s"))],
            significant(r.number("tokens_per_s")),
        )
        for r in results
    ]
    mark = None
    if bound is not None and bound.has("tokens_per_s"):
        value = bound.number("tokens_per_s")
        mark = (value, f"{BOUND} {significant(value)}")
    title = "Speed with the same memory"
    return Figure(
        title,
        bars(title, rows, "tokens a second", mark=mark),
        Table(["way", "tokens/s"], [[b.name, b.text] for b in rows]),
        "No policy is faster than the offline bound, which knows the future.",
        basis,
    )


def _series(name: str) -> int:
    return 0 if name == OWN else 7


def _hits(results: Sequence[Fields]) -> Figure:
    parts = (("hit_rate", "found in memory", 0), ("prefetch_hit_rate", "prefetched", 5))
    extra = (("cpu_share", "on the CPU", 2),)
    rows = []
    for r in results:
        values = [(label, s, 100 * r.number(key, 0.0)) for key, label, s in (*parts, *extra)]
        left = max(0.0, 100 - sum(v for *_, v in values))
        bar = [*values, ("fetched on demand", 1, left)]
        rows.append(Bar(r.text("name"), bar, f"{percent(r.number('hit_rate', 0.0))} hits"))
    names = [(label, s) for _, label, s in (*parts, *extra)] + [("fetched on demand", 1)]
    title = "Where a token's experts are found"
    return Figure(
        title,
        bars(title, rows, "share of expert uses (%)"),
        Table(
            ["way", *(n for n, _ in names)],
            [[b.name, *(f"{v:.1f}%" for *_, v in b.parts)] for b in rows],
        ),
        "",
        "counted",
        legend(names),
    )


def _sweep(sweep: Fields, plan: Fields, basis: str) -> Figure:
    memory = sweep.numbers("hbm_gb")
    speeds = sweep.child("tokens_per_s")
    names = list(speeds.raw)
    series = dict(series_of([n for n in names if n != BOUND], OWN)) | {BOUND: 7}
    drawn, rows = [], [[f"{x:.3g}"] for x in memory]
    for name in names:
        values = speeds.values(name)
        if len(values) != len(memory) or any(v is not None and not is_number(v) for v in values):
            raise speeds.bad(name, "as many numbers as hbm_gb has")
        kept = [(x, float(v)) for x, v in zip(memory, values, strict=True) if v is not None]
        drawn.append(Line(name, [x for x, _ in kept], [y for _, y in kept], series[name]))
        for row, v in zip(rows, values, strict=True):
            row.append("does not fit" if v is None else significant(v))
    marks = []
    own = plan.maybe("memory")
    if own is not None and own.has("hbm_bytes"):
        size = own.number("hbm_bytes") / 1e9
        marks.append((size, f"{size:.3g} GB"))
    title = "Speed against memory"
    return Figure(
        title,
        lines(
            title,
            drawn,
            Axes("GPU memory for the model (GB)", "tokens a second", log_y=True, marks_x=marks),
        ),
        Table(["GB", *names], rows),
        "Each point is a plan of its own for that much memory.",
        basis,
        legend([(n, series[n]) for n in names], "line"),
    )


def _layers(plan: Fields) -> list[Figure]:
    slots = plan.numbers("slots")
    if not slots or not sum(slots):
        return []
    layers = [str(x) for x in plan.values("layer_ids")] or [str(i) for i in range(len(slots))]
    if len(layers) != len(slots):
        raise plan.bad("slots", "as long as layer_ids")
    pinned = [len(x) if isinstance(x, list) else 0 for x in plan.values("pinned")]
    pinned += [0] * (len(slots) - len(pinned))
    title = "Slots of each layer"
    values = np.array([slots, pinned], np.float64)
    return [
        Figure(
            title,
            heat_map(
                title,
                values,
                Side("", ["slots", "pinned"]),
                Side("MoE layer", layers),
                Colours(float(values.max())),
                "experts",
            ),
            Table(
                ["layer", "slots", "pinned"],
                [
                    [layer, f"{s:.0f}", str(p)]
                    for layer, s, p in zip(layers, slots, pinned, strict=False)
                ],
            ),
            "Room for experts in GPU memory, and how many of them never leave it.",
            "counted",
        )
    ]


def _table(results: Sequence[Fields], basis: str) -> TableBlock:
    rows = [
        [
            r.text("name"),
            significant(r.number("tokens_per_s")),
            percent(r.number("hit_rate", 0.0)),
            percent(r.number("prefetch_hit_rate", 0.0)),
            percent(r.number("cpu_share", 0.0)),
            f"{r.number('bytes_per_token', 0.0) / 1e6:.1f}",
            f"{r.number('wasted_bytes_per_token', 0.0) / 1e6:.1f}",
        ]
        for r in results
    ]
    columns = ["way", "tokens/s", "hits", "prefetched", "on CPU", "MB a token", "of it wasted"]
    return TableBlock("All held-out figures", Table(columns, rows), basis)
