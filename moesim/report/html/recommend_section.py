"""Recommendations: what you get, what was tried, the next best, and how firm it is."""

from __future__ import annotations

from moesim.draw.recommend import promises, tried
from moesim.figures import figure
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

SHOWN = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")
TRIED = ("ttft_p99", "tpot_p99")


def recommend_section(run: Run) -> Section:
    """One `moesim recommend --json`, or the file in the folder that it wrote."""
    data = run.data
    asked = data.child("asked")
    answers = data.children("answers")
    names = ", ".join(f"{a.text('model')} on {a.text('gpu')}" for a in answers)
    section = Section(f"Recommendation: {names}", sources=(run.name,))
    section.lead = f"Asked: {asked.text('text')}."
    for answer in answers:
        _check_drawn(asked, answer)
        cards = _cards(asked, answer)
        section.headline = section.headline or cards[:1]
        section.blocks.append(Cards(cards))
        section.blocks.append(Figures(_figures(asked, answer)))
        section.blocks.append(_options(answer))
        section.blocks += _also(answer)
    section.blocks += [
        Note(f"{one.text('model')} on {one.text('gpu')}: {one.text('cause')}", left_out=True)
        for one in data.children("refused")
    ]
    section.blocks += [Note(text) for text in data.texts("notices")]
    return section


def _cards(asked: Fields, answer: Fields) -> list[Card]:
    basis = predicted(answer.text("basis"))
    best = answer.children("options")[0]
    binds = answer.child("binds")
    verdict = "" if answer.flag("kept") else " (misses a promise)"
    cards = [
        Card(
            f"what you get{verdict}",
            f"{best.whole('num_gpus')} x {answer.text('gpu')}",
            f"{best.text('layout')}, {answer.text('engine')}; {best.number('requests_per_s'):.3g}"
            " requests/s",
            basis,
        )
    ]
    if best.has("usd_per_hour"):
        kinds = {kind.text("kind") for _, kind in answer.child("prices").members()}
        cards.append(
            Card(
                "what it costs",
                f"${best.number('usd_per_hour'):,.0f}/h",
                f"${best.number('usd_per_million_output_tokens'):.2f} per million output tokens;"
                f" prices {', '.join(sorted(kinds))}",
                predicted("assumed"),
            )
        )
    used = f"{binds.number('used'):.0%} of the limit" if binds.has("used") else "without end"
    cards.append(Card("what binds", binds.text("what"), f"{binds.text('promise')}: {used}", basis))
    firm = answer.maybe("firm")
    if firm is not None and firm.has("if_steps_differ_by"):
        row = firm.child("if_steps_differ_by").child("median")
        slow = f"{row.whole('slower_gpus')}" if row.has("slower_gpus") else "none of this kind"
        low = f"{row.whole('faster_gpus')}"
        cards.append(
            Card(
                "how firm",
                f"{low} GPUs" if low == slow else f"{low} to {slow} GPUs",
                f"steps {row.number('error'):.0%} quicker or slower, the median error held out",
                basis,
            )
        )
    return cards


def _figures(asked: Fields, answer: Fields) -> list[Figure]:
    basis = predicted(answer.text("basis"))
    points = [
        [
            p.text("layout"),
            f"{p.whole('num_gpus')}",
            f"{p.number('requests_per_s'):.3g}",
            *(_shown(p, name) for name in TRIED),
            "kept" if p.flag("kept") else "missed",
        ]
        for p in answer.children("tried")
    ]
    columns = ["layout", "GPUs", "requests/s", *(figure(n).heading for n in TRIED), "promises"]
    rows = [
        [o.text("layout"), *(f"{name}: {_share(o, name)}" for name in o.child("promises").raw)]
        for o in answer.children("options")
    ]
    widest = max(len(row) for row in rows)
    shares = Table(["layout", *[""] * (widest - 1)], rows)
    first, second = tried(asked.raw, answer.raw), promises(answer.raw)
    said = "Every layout that was simulated; the others were ruled out by closed forms."
    return [
        Figure(first.title, first, Table(columns, points, frozenset({5})), said, basis),
        Figure(second.title, second, shares, "Share of the limit in use.", basis),
    ]


def _check_drawn(asked: Fields, answer: Fields) -> None:
    """Raise FormatError unless what `moesim.draw.recommend` takes has the types written."""
    asked.need("maximize")
    asked.need_lists("promises")
    answer.need_lists("tried", "options")
    for promise in asked.children("promises"):
        promise.text("figure")
        promise.text("text")
        promise.number("limit_s")
    for point in answer.children("tried"):
        point.need(*TRIED, "kept")
        point.flag("kept")
        point.text("layout")
        point.whole("num_gpus")
        point.number("requests_per_s")
        for name in TRIED:
            point.number(name, 0.0)
    for option in answer.children("options"):
        option.need("kept")
        option.flag("kept")
        option.text("layout")
        option.whole("num_gpus")
        option.number("requests_per_s")
        for _, role in option.child("roles").members():
            for name in ("engines", "gpus", "tp"):
                role.whole(name)
        for name in option.child("promises").raw:
            option.child("promises").number(name, 0.0)


def _share(option: Fields, name: str) -> str:
    promises_of = option.child("promises")
    return f"{promises_of.number(name):.0%}" if promises_of.has(name) else "never served"


def _shown(holder: Fields, name: str) -> str:
    return figure(name).text(holder.number(name)) if holder.has(name) else "–"


def _options(answer: Fields) -> TableBlock:
    """The options in order, the answer first."""
    rows = []
    for option in answer.children("options"):
        figures = option.child("figures")
        rows.append(
            [
                option.text("layout"),
                f"{option.whole('num_gpus')}",
                f"{option.number('usd_per_hour'):,.0f}" if option.has("usd_per_hour") else "–",
                f"{option.number('requests_per_s'):.3g}",
                f"{option.number('output_tokens_per_s_per_gpu'):,.0f}",
                *(_shown(figures, name) for name in SHOWN),
            ]
        )
    columns = ["layout", "GPUs", "$/h", "requests/s", "output tokens/s per GPU"]
    columns += [f"{a.upper()} {b}, ms" for a, _, b in (n.partition("_") for n in SHOWN)]
    return TableBlock("Options, best first", Table(columns, rows), predicted(answer.text("basis")))


def _also(answer: Fields) -> list[TableBlock]:
    """What was searched beside it and not chosen; nothing of files of before."""
    rows = []
    for other in answer.children("also") if answer.has("also") else []:
        option = other.maybe("option")
        found = ["no better", "–", "–", "–"]
        if option is not None:
            dollars = option.number("usd_per_hour") if option.has("usd_per_hour") else None
            found = [
                option.text("layout"),
                f"{option.whole('num_gpus')}",
                "–" if dollars is None else f"{dollars:,.0f}",
                f"{option.number('requests_per_s'):.3g}",
            ]
        rows.append([other.text("name"), *found, other.text("ask"), other.text("rests_on")])
    if not rows:
        return []
    columns = ["with", "layout", "GPUs", "$/h", "requests/s", "asked for by", "rests on"]
    basis = predicted("assumed")
    return [TableBlock("Searched beside it, for you to choose", Table(columns, rows), basis)]
