"""What-if studies: the answer, the Pareto front, and how far the answer depends on each input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesim.report.html.charts import Axes, Interval, Points, intervals, legend, points
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
)
from moesim.report.html.runs import Run, plain
from moesim.report.html.svg import significant

MAX_DRAWN = 1500


@dataclass(frozen=True, slots=True)
class Scaled:
    """A figure as readers see it: its name, unit and the factor to that unit."""

    label: str
    unit: str
    factor: float

    @property
    def axis(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def said(self, value: float) -> str:
        return significant(value * self.factor) + (f" {self.unit}" if self.unit else "")


def study_section(run: Run) -> Section:
    """One `moesim whatif --json`, or the file that it wrote."""
    data = run.data
    name, basis = data.text("name", ""), data.text("basis", "assumed")
    question = data.child("question")
    asked = question.text("text", "") if question.flag("asked") else ""
    title = name or asked or data.text("evaluator", "what if")
    section = Section(f"Study: {title}", sources=(run.name,))
    found = [p for p in data.children("points") if p.text("status", "") == "ok"]
    about = _about(data)
    section.lead = _lead(data, question, found)
    answer = data.maybe("answer")
    cards = _cards(data, question, answer, found, about, basis)
    section.headline = cards[:1]
    section.blocks.append(Cards(cards))
    figures = [*_front(data, answer, found, about, basis), *_sensitivity(data, about, basis)]
    section.blocks.append(Figures(figures))
    section.blocks.append(_table(data, question, found, about, basis))
    section.blocks += _not_answered(data)
    section.blocks += _prices(data)
    section.blocks += [Note(text) for text in data.texts("notices")]
    return section


def _about(data: Fields) -> Mapping[str, Scaled]:
    out = {}
    for name, figure in data.child("figures").members():
        unit, label = figure.text("unit", ""), figure.text("label", name)
        if unit == "s":
            out[name] = Scaled(label, "ms", 1e3)
        else:
            out[name] = Scaled(label, unit, 1.0)
    return out


def _named(name: str, about: Mapping[str, Scaled]) -> Scaled:
    return about.get(name, Scaled(name, "", 1.0))


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
    data: Fields,
    question: Fields,
    answer: Fields | None,
    found: Sequence[Fields],
    about: Mapping[str, Scaled],
    basis: str,
) -> list[Card]:
    cards = []
    goal = question.text("goal", "")
    if answer is not None:
        params = answer.child("params")
        detail = ", ".join(f"{plain(k)} {plain(v)}" for k, v in params.raw.items())
        value = answer.number("value") if answer.has("value") else None
        shown = _named(goal, about).said(value) if value is not None else "see below"
        cards.append(Card(f"answer: {_named(goal, about).label}", shown, detail, basis))
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


def _front(
    data: Fields,
    answer: Fields | None,
    found: Sequence[Fields],
    about: Mapping[str, Scaled],
    basis: str,
) -> list[Figure]:
    axes = data.child("pareto").children("axes")
    if len(axes) < 2 or not found:
        return []
    names = [a.text("figure") for a in axes[:2]]
    x, y = (_named(n, about) for n in names)
    chosen = answer.text("point", "") if answer is not None else ""
    groups: dict[str, list[tuple[float, float, str]]] = {}
    varied = data.texts("varied")
    for point in found:
        figures = point.child("figures")
        if not all(figures.has(n) for n in names):
            continue
        kind = "other points" if point.flag("keeps", True) else "misses a promise"
        if point.flag("pareto"):
            kind = "Pareto front"
        px, py = (figures.number(n) * s.factor for n, s in zip(names, (x, y), strict=True))
        params = point.child("params").raw
        said = ", ".join(f"{n} {plain(params.get(n))}" for n in varied)
        groups.setdefault(kind, []).append((px, py, said))
        if point.text("key", "") == chosen:
            groups.setdefault("the answer", []).append((px, py, said))
    if not groups:
        return []
    looks = {
        "misses a promise": (7, False),
        "other points": (5, False),
        "the answer": (1, True),
        "Pareto front": (0, False),
    }
    drawn = []
    for name, (series, big) in looks.items():
        own = groups.get(name, [])[:MAX_DRAWN]
        if own:
            xs, ys, hints = ([p[i] for p in own] for i in range(3))
            drawn.append(Points(name, xs, ys, series, hints, big))  # type: ignore[arg-type]
    wide = [
        _wide(values)
        for values in ([v for g in drawn for v in g.x], [v for g in drawn for v in g.y])
    ]
    better = [
        f"{'higher' if a.text('better', '') == 'high' else 'lower'} {s.label}"
        for a, s in zip(axes, (x, y), strict=False)
    ]
    rows = [
        [g.name, hint, significant(px), significant(py)]
        for g in reversed(drawn)
        for px, py, hint in zip(g.x, g.y, g.hints, strict=False)
    ]
    title = "Pareto front"
    front = drawn[-1].name == "Pareto front"
    return [
        Figure(
            title,
            points(title, drawn, Axes(x.axis, y.axis, log_x=wide[0], log_y=wide[1]), front=front),
            Table(["", "point", x.axis, y.axis], rows, frozenset({1})),
            f"Better: {' and '.join(better)}. No point of the front is worse than another in both.",
            basis,
            legend([(g.name, g.series) for g in drawn], "point"),
        )
    ]


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 20


def _sensitivity(data: Fields, about: Mapping[str, Scaled], basis: str) -> list[Figure]:
    goal = _named(data.child("question").text("goal", ""), about)
    answer = data.maybe("answer")
    if answer is None or not answer.has("value"):
        return []
    base = answer.number("value") * goal.factor
    by_input: dict[str, list[Fields]] = {}
    for row in data.child("sensitivity").children("rows"):
        by_input.setdefault(row.text("input"), []).append(row)
    rows, table = [], []
    for name, tried in by_input.items():
        values = [r.number("value") * goal.factor for r in tried if r.has("value")]
        none = len(values) < len(tried)
        changed = any(r.flag("changed") for r in tried)
        said = "no answer" if none else "another" if changed else "same"
        reach = [base, *values]
        rows.append(Interval(name, base, min(reach), max(reach), 1 if changed else 0, said))
        table += [
            [
                f"{name} x {r.number('factor'):g}",
                "none" if not r.has("value") else significant(r.number("value") * goal.factor),
                "another point" if r.flag("changed") else "the same point",
            ]
            for r in tried
        ]
    if not rows:
        return []
    title = "What the answer depends on"
    return [
        Figure(
            title,
            intervals(title, rows, goal.axis, mark=(base, "answer"), compact=True),
            Table(["input", goal.axis, "answer"], table, frozenset({2})),
            "The answer's value with each input lower and higher; at the right whether the same"
            " point answers.",
            basis,
        )
    ]


def _table(
    data: Fields,
    question: Fields,
    found: Sequence[Fields],
    about: Mapping[str, Scaled],
    basis: str,
) -> TableBlock:
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
            significant(figures.number(n) * _named(n, about).factor) if figures.has(n) else "–"
            for n in shown
        ]
        rows.append([*_values(params, varied), *cells, marks])
    columns = [*(varied or ["point"]), *(_named(n, about).axis for n in shown), ""]
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
    columns = ["GPU", "dollars an hour", "basis", "source"]
    return [TableBlock("Prices", Table(columns, rows, frozenset({2, 3})))]
