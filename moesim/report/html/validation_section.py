"""Validation on hardware: predicted beside measured."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.draw.figures import percent, significant
from moesim.draw.validate import BAND, layer_scatter, measured_bars, stride
from moesim.report.html.fields import Fields
from moesim.report.html.parts import Card, Cards, Figure, Figures, Note, Section, Table, TableBlock
from moesim.report.html.runs import Run


def validation_section(run: Run) -> Section:
    """One `moesim validate --json`."""
    data = run.data
    device = (data.maybe("environment") or Fields({}, run.name)).text("device", "hardware")
    section = Section(f"Predicted and measured on {device}", sources=(run.name,))
    good = data.flag("within_tolerance")
    tolerance = data.maybe("tolerance") or Fields({}, run.name)
    section.lead = (
        "Plans were replayed with real collectives and expert kernels, and every layer's time"
        " compared with the cost model's."
    )
    cards = [
        Card(
            "verdict",
            "within tolerance" if good else "out of tolerance",
            f"median error up to {percent(tolerance.number('median_error', 0.1), 0)}, p90 up to"
            f" {percent(tolerance.number('p90_error', 0.2), 0)}",
            "measured",
        )
    ]
    for mode, errors in (data.maybe("errors") or Fields({}, run.name)).members():
        cards.append(
            Card(
                f"median error, {mode}",
                percent(errors.number("median")),
                f"90th percentile {percent(errors.number('p90'))}",
                "measured",
            )
        )
    section.headline = cards[:1]
    section.blocks.append(Cards(cards))
    figures = [_scatter(data)] if data.values("cases") else []
    section.blocks.append(Figures([*figures, *_speedups(data)]))
    section.blocks.append(_groups(data))
    section.blocks += [Note(f"Out of tolerance: {text}.") for text in data.texts("failures")]
    section.blocks += [Note(text) for text in data.texts("notes")]
    return section


def _scatter(data: Fields) -> Figure:
    groups: dict[str, tuple[list[float], list[float], list[str]]] = {}
    rows = []
    for case in data.children("cases"):
        measured, predicted = case.numbers("measured_us"), case.numbers("predicted_us")
        if len(measured) != len(predicted) or not measured:
            raise case.bad("predicted_us", "as long as measured_us")
        tokens, plan = case.whole("tokens_per_rank", 0), case.text("plan", "")
        name = f"{tokens:,} tokens per GPU, {case.text('mode', '')}"
        xs, ys, hints = groups.setdefault(name, ([], [], []))
        for layer, (x, y) in enumerate(zip(measured, predicted, strict=True)):
            if x > 0 and y > 0:
                xs.append(x)
                ys.append(y)
                hints.append(f"{plan}, layer {layer}: {x:,.1f} us measured, {y:,.1f} predicted")
        errors = sorted(abs(y / x - 1) for x, y in zip(measured, predicted, strict=True) if x > 0)
        rows.append(
            [
                plan,
                name,
                str(case.whole("batch", 0)),
                significant(sum(measured) / len(measured)),
                significant(sum(predicted) / len(predicted)),
                percent(errors[len(errors) // 2] if errors else 0.0),
            ]
        )
    every = stride(groups)
    thinned = f" One layer in {every} is drawn." if every > 1 else ""
    picture = layer_scatter(groups)
    return Figure(
        picture.title,
        picture,
        Table(
            ["plan", "case", "batch", "measured (us)", "predicted (us)", "median error"],
            rows,
            frozenset({1}),
        ),
        f"A point a layer; on the line the two agree, in the band within {BAND:.0%}.{thinned}",
        "measured",
    )


def _speedups(data: Fields) -> list[Figure]:
    out = []
    for group in data.children("groups"):
        speedup = group.maybe("speedup")
        if speedup is None or len(speedup.raw) < 2:
            continue
        pairs = {}
        for name in speedup.raw:
            pair = speedup.numbers(name)
            if len(pair) != 2:
                raise speedup.bad(name, "[measured, predicted]")
            pairs[name] = (pair[0], pair[1])
        title = (
            f"Faster than linear: {group.whole('tokens_per_rank', 0):,} tokens,"
            f" {group.text('mode', '')}"
        )
        axis = "times as fast as the linear plan"
        rows = [[name, f"{real:.3f}", f"{said:.3f}"] for name, (real, said) in pairs.items()]
        table = Table(["plan", "measured", "predicted"], rows)
        drawn = measured_bars(title, pairs, axis, linear=True)
        out.append(Figure(title, drawn, table, "", "measured"))
    return out


def _groups(data: Fields) -> TableBlock:
    rows = []
    for g in data.children("groups"):
        order = g.raw.get("spearman")
        rows.append(
            [
                f"{g.whole('tokens_per_rank', 0):,} tokens per GPU, {g.text('mode', '')}",
                str(g.whole("num_plans", 0)),
                percent(g.number("median_error")),
                percent(g.number("p90_error")),
                percent(g.number("noise", 0.0)),
                percent(g.number("spread", 0.0)),
                "too few plans" if order is None else f"{g.number('spearman'):.2f}",
            ]
        )
    columns = ["case", "plans", "median error", "p90", "noise", "plans differ by", "Spearman"]
    return TableBlock("Errors by case", Table(columns, rows), "measured")


def cache_validation_section(run: Run) -> Section:
    """One `moesim validate --cache-plan --json`."""
    data = run.data
    device = (data.maybe("environment") or Fields({}, run.name)).text("device", "hardware")
    rows = data.children("caches")
    section = Section(f"Cache plans replayed on {device}", sources=(run.name,))
    verdict = "within tolerance" if data.flag("within_tolerance") else "out of tolerance"
    section.headline = [Card("verdict on cache plans", verdict, "", "measured")]
    section.blocks += [Cards(section.headline), _cache_bars(rows)]
    section.blocks += [Note(text) for text in data.texts("notes")]
    return section


def _cache_bars(rows: Sequence[Fields]) -> Figures:
    pairs, table = {}, []
    for r in rows:
        name = r.text("cache")
        pairs[name] = (r.number("measured_us") / 1e3, r.number("predicted_us") / 1e3)
        copies = significant(r.number("copies_per_token", 0.0), 3)
        error = percent(r.number("error", 0.0))
        table.append([name, copies, *map(significant, pairs[name]), error])
    title = "Time of a token, predicted and measured"
    columns = ["cache", "copies per token", "measured (ms)", "predicted (ms)", "error"]
    drawn = measured_bars(title, pairs, "time per token (ms)", "ms")
    return Figures([Figure(title, drawn, Table(columns, table), "", "measured")])
