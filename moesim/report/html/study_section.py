"""What-if studies: the answer, the Pareto front, and how far the answer depends on each input."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.draw.figures import significant
from moesim.draw.study import Scaled, front, front_groups, plain, scaled, sensitivity, shown_figure
from moesim.report.html.fields import Fields
from moesim.report.html.parts import (
    Block,
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


def study_section(run: Run) -> Section:
    """One `moesim whatif --json`, or the file that it wrote."""
    data = run.data
    name, basis = data.text("name", ""), predicted(data.text("basis", "assumed"))
    question = data.child("question")
    asked = question.text("text", "") if question.flag("asked") else ""
    title = name or asked or data.text("evaluator", "what if")
    section = Section(f"Study: {title}", sources=(run.name,))
    found = [p for p in data.children("points") if p.text("status", "") == "ok"]
    _check_drawn(data, found)
    section.lead = _lead(data, question, found)
    answer = data.maybe("answer")
    cards = _cards(data, question, answer, found, basis)
    section.headline = cards[:1]
    section.blocks.append(Cards(cards))
    figures = [*_front(data, basis), *_sensitivity(data, basis)]
    section.blocks.append(Figures(figures))
    section.blocks.append(_table(data, question, found, basis))
    section.blocks += _not_answered(data)
    section.blocks += _prices(data)
    section.blocks += [Note(text) for text in data.texts("notices")]
    return section


def _check_drawn(data: Fields, found: Sequence[Fields]) -> None:
    """Raise FormatError unless what `moesim.draw.study` takes has the types that a study writes."""
    for _, figure in data.child("figures").members():
        figure.text("unit", "")
        figure.text("label", "")
    question, answer = data.child("question"), data.maybe("answer")
    names = [a.text("figure") for a in data.child("pareto").children("axes")]
    names.append(question.text("goal", ""))
    for bound in question.children("slo"):
        names.append(bound.text("figure"))
        bound.number("limit")
    for point in [*found, *([answer] if answer is not None else [])]:
        _check_figures(point, names)
        point.child("params")
    for point in found:
        point.text("key")
        point.flag("keeps", True)
        point.flag("pareto")
    for row in data.child("sensitivity").children("rows"):
        _check_figures(row, names)
        row.text("input")
        row.number("factor")
        row.flag("changed")
        row.number("value", 0.0)
    data.texts("varied")


def _check_figures(holder: Fields, names: Sequence[str]) -> None:
    figures = holder.child("figures")
    for name in names:
        figures.number(name, 0.0)


def _named(name: str, data: Fields) -> Scaled:
    return scaled(data.raw, name)


def _lead(data: Fields, question: Fields, found: Sequence[Fields]) -> str:
    about = data.text("about", "")
    text = f"{about[:1].upper()}{about[1:]}. " if about else ""
    if question.flag("asked"):
        text += f"Question: {question.text('text', '')}. "
    varied = data.texts("varied")
    total, grid = data.whole("num_points", 0), data.whole("num_grid", 0)
    of_grid = f" of a grid of {grid:,}" if grid > total else ""
    text += f"{len(found):,} of {total:,} points{of_grid} evaluated"
    return text + (f", varying {', '.join(varied)}." if varied else ".")


def _cards(
    data: Fields, question: Fields, answer: Fields | None, found: Sequence[Fields], basis: str
) -> list[Card]:
    cards = []
    goal = question.text("goal", "")
    per = data.text("per", "") if data.has("per") else ""
    if per:
        for one in data.children("answers"):
            name = f"{plain(per)} {plain(one.raw.get('value'))}"
            cards.append(_answer_card(name, one.maybe("answer"), goal, data, basis))
    elif answer is not None:
        cards.append(_answer_card("answer", answer, goal, data, basis))
    elif question.flag("asked"):
        nearest = data.maybe("nearest")
        missed = ", ".join(nearest.texts("missed")) if nearest is not None else ""
        detail = f"the nearest misses {missed}" if missed else ""
        cards.append(Card("answer", "none", f"no point keeps the promises; {detail}", basis))
    front = data.child("pareto").values("points")
    cards.append(
        Card("on the Pareto front", str(len(front)), f"of {len(found):,} points evaluated", basis)
    )
    rows = data.child("sensitivity").children("rows")
    if rows:
        changed = {r.text("input") for r in rows if r.flag("changed")}
        inputs = list(dict.fromkeys(r.text("input") for r in rows))
        shown = "the same" if not changed else f"changes with {len(changed)} of {len(inputs)}"
        detail = (
            f"asked again with {', '.join(inputs)} lower and higher"
            if not changed
            else f"it depends on {', '.join(sorted(changed))}"
        )
        cards.append(Card("answer under other inputs", shown, detail, basis))
    return cards


def _answer_card(name: str, answer: Fields | None, goal: str, data: Fields, basis: str) -> Card:
    if answer is None:
        return Card(name, "none", "no point keeps the promises", basis)
    params = answer.child("params")
    detail = ", ".join(f"{plain(k)} {plain(v)}" for k, v in params.raw.items())
    value = answer.number("value") if answer.has("value") else None
    shown = _named(goal, data).said(value) if value is not None else "see below"
    return Card(f"{name}: {_named(goal, data).label}", shown, detail, basis)


def _front(data: Fields, basis: str) -> list[Figure]:
    picture = front(data.raw)
    if picture is None:
        return []
    axes = data.child("pareto").children("axes")[:2]
    scales = [_named(a.text("figure"), data) for a in axes]
    better = [
        f"{'higher' if a.text('better', '') == 'high' else 'lower'} {s.label}"
        for a, s in zip(axes, scales, strict=True)
    ]
    rows = [
        [kind, said, significant(x), significant(y)]
        for kind, own in reversed(front_groups(data.raw).items())
        for x, y, said in own
    ]
    table = Table(["", "point", *(s.axis for s in scales)], rows, frozenset({1}))
    caption = (
        f"Better: {' and '.join(better)}. No point of the front is worse than another in both."
    )
    return [Figure(picture.title, picture, table, caption, basis)]


def _sensitivity(data: Fields, basis: str) -> list[Figure]:
    picture = sensitivity(data.raw)
    if picture is None:
        return []
    name = shown_figure(data.raw)
    shown, goal = _named(name, data), _named(data.child("question").text("goal", ""), data)
    rows = [
        [
            f"{row.text('input')} x {row.number('factor'):g}",
            _value(row.child("figures"), name, shown),
            _value(row, "value", goal),
            "another point" if row.flag("changed") else "the same point",
        ]
        for row in data.child("sensitivity").children("rows")
    ]
    columns = ["input", f"{shown.axis} of the answer", f"best {goal.axis}", "answer"]
    caption = (
        f"{shown.label} of the answer's own point with each input lower and higher; at the right"
        " whether it is still the answer."
    )
    table = Table(columns, rows, frozenset({3}))
    return [Figure(picture.title, picture, table, caption[:1].upper() + caption[1:], basis)]


def _value(holder: Fields, name: str, figure: Scaled) -> str:
    return significant(holder.number(name) * figure.factor) if holder.has(name) else "none"


def _table(data: Fields, question: Fields, found: Sequence[Fields], basis: str) -> TableBlock:
    varied = data.texts("varied")
    wanted = [question.text("goal", "")]
    wanted += [b.text("figure") for b in question.children("slo")]
    wanted += [a.text("figure") for a in data.child("pareto").children("axes")]
    shown = [n for n in dict.fromkeys(wanted) if n and n not in varied]
    answer = data.maybe("answer")
    chosen = answer.text("point", "") if answer is not None else None
    rows = []
    for point in found:
        params, figures = point.child("params"), point.child("figures")
        marks = "front" if point.flag("pareto") else ""
        if point.text("key", "") == chosen:
            marks = "the answer" + (", front" if marks else "")
        if not point.flag("keeps", True):
            marks = "misses " + ", ".join(point.texts("missed"))
        cells = [
            significant(figures.number(n) * _named(n, data).factor) if figures.has(n) else "–"
            for n in shown
        ]
        rows.append([*_values(params, varied), *cells, marks])
    columns = [*(varied or ["point"]), *(_named(n, data).axis for n in shown), ""]
    texts = frozenset({len(columns) - 1, *range(1, len(varied))})
    return TableBlock("Points evaluated", Table(columns, rows, texts), basis)


def _values(params: Fields, varied: Sequence[str]) -> list[str]:
    return [plain(params.raw.get(name)) for name in varied] or ["–"]


def _not_answered(data: Fields) -> list[Block]:
    """Points that have no figures, with the reason."""
    varied = data.texts("varied")
    failed = {f.text("point", ""): f.text("error", "") for f in data.children("failures")}
    rows = []
    for point in data.children("points"):
        status = point.text("status", "")
        if status in ("ok", "not evaluated"):
            continue
        params = point.child("params")
        reason = point.text("cause", "") or failed.get(point.text("key", ""), status)
        rows.append([*_values(params, varied), status, reason])
    if not rows:
        return []
    columns = [*(varied or ["point"]), "", "reason"]
    texts = frozenset(range(1, len(columns)))
    return [TableBlock("Points without figures", Table(columns, rows, texts))]


def _prices(data: Fields) -> list[Block]:
    prices = data.maybe("prices")
    if prices is None or not prices.raw:
        return []
    rows = [
        [
            name,
            significant(price.number("usd_per_gpu_hour"), 3),
            price.text("kind", "assumed"),
            price.text("source", ""),
        ]
        for name, price in prices.members()
    ]
    columns = ["GPU", "dollars per hour", "basis", "source"]
    return [TableBlock("Prices", Table(columns, rows, frozenset({2, 3})))]
