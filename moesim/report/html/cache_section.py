"""Expert offloading: speed and hits of the plan, of what others do, and of the offline bound."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.draw.cache import (
    FOUND,
    OWN,
    found_shares,
    slots_of_layers,
    speed_by_memory,
    speeds,
    where_found,
)
from moesim.draw.figures import percent, significant
from moesim.report.html.fields import Fields, is_number
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


def cache_section(run: Run) -> Section:
    """One `moesim cache --json`, or a cache plan alone."""
    whole = run.format == "moesim-cache-run"
    plan = run.data.child("plan") if whole else run.data
    found = plan.maybe("predicted") or Fields({}, run.name)
    basis = predicted((run.data if whole else found).text("basis", "assumed"))
    gpu = plan.text("gpu", "")
    section = Section(f"Experts in memory on {gpu or 'one GPU'}", sources=(run.name,))
    section.lead = _lead(plan, found)
    results = run.data.children("results") if whole else []
    bound = run.data.maybe("offline_bound") if whole else None
    cards = _cards(found, results, bound, basis)
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


def _lead(plan: Fields, found: Fields) -> str:
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
    if found.has("num_tokens"):
        text += f" Figures are of {found.whole('num_tokens'):,} held-out tokens."
    return text


def _cards(
    found: Fields, results: Sequence[Fields], bound: Fields | None, basis: str
) -> list[Card]:
    if not found.has("tokens_per_s"):
        return []
    speed = found.number("tokens_per_s")
    others = [r for r in results if r.text("name") != OWN and "optimum" not in r.text("name")]
    detail = ""
    if others:
        best = max(others, key=lambda r: r.number("tokens_per_s"))
        rate = best.number("tokens_per_s")
        if rate > 0:
            detail = f"{speed / rate:.2f} times the next best, {best.text('name')}"
    cards = [Card("tokens/s", significant(speed), detail, basis)]
    if found.has("hit_rate"):
        of_bound = ""
        if bound is not None:
            of_bound = f"of any policy at most {percent(bound.number('hit_rate', 0.0))}"
        hit = percent(found.number("hit_rate"))
        cards.append(Card("experts found in memory", hit, of_bound, "counted"))
    if found.has("bytes_per_token"):
        value = f"{found.number('bytes_per_token') / 1e6:.1f} MB"
        cards.append(Card("over the host link per token", value, "", "counted"))
    return cards


def _speed(results: Sequence[Fields], bound: Fields | None, basis: str) -> Figure:
    ways = {r.text("name"): r.number("tokens_per_s") for r in results}
    limit = None
    if bound is not None and bound.has("tokens_per_s"):
        limit = bound.number("tokens_per_s")
    picture = speeds(ways, limit)
    rows = [[name, significant(v)] for name, v in ways.items()]
    caption = "No policy is faster than the offline bound, which knows the future."
    return Figure(picture.title, picture, Table(["way", "tokens/s"], rows), caption, basis)


def _hits(results: Sequence[Fields]) -> Figure:
    ways = {r.text("name"): {key: r.number(key, 0.0) for key, *_ in FOUND} for r in results}
    picture = where_found(ways)
    names = [name for name, *_ in found_shares({})]
    rows = [[way, *(f"{v:.1f}%" for *_, v in found_shares(own))] for way, own in ways.items()]
    return Figure(picture.title, picture, Table(["way", *names], rows), "", "counted")


def _sweep(sweep: Fields, plan: Fields, basis: str) -> Figure:
    memory = sweep.numbers("hbm_gb")
    curves = sweep.child("tokens_per_s")
    speed = {}
    for name in curves.raw:
        values = curves.values(name)
        if len(values) != len(memory) or any(v is not None and not is_number(v) for v in values):
            raise curves.bad(name, "as many numbers as hbm_gb has")
        speed[name] = values
    own = plan.maybe("memory")
    size = own.number("hbm_bytes") / 1e9 if own is not None and own.has("hbm_bytes") else None
    picture = speed_by_memory(memory, speed, size)
    rows = [
        [f"{gb:.3g}", *("does not fit" if v is None else significant(v) for v in at)]
        for gb, *at in zip(memory, *speed.values(), strict=True)
    ]
    caption = "Each point is a plan of its own for that much memory."
    return Figure(picture.title, picture, Table(["GB", *speed], rows), caption, basis)


def _layers(plan: Fields) -> list[Figure]:
    slots = plan.numbers("slots")
    if not slots or not sum(slots):
        return []
    layers = [str(x) for x in plan.values("layer_ids")] or [str(i) for i in range(len(slots))]
    if len(layers) != len(slots):
        raise plan.bad("slots", "as long as layer_ids")
    pinned = [float(len(x)) if isinstance(x, list) else 0.0 for x in plan.values("pinned")]
    pinned = [*pinned, *[0.0] * len(slots)][: len(slots)]
    picture = slots_of_layers(layers, slots, pinned)
    rows = [[x, f"{s:.0f}", f"{p:.0f}"] for x, s, p in zip(layers, slots, pinned, strict=True)]
    caption = "Room for experts in GPU memory, and how many of them never leave it."
    table = Table(["layer", "slots", "pinned"], rows)
    return [Figure(picture.title, picture, table, caption, "counted")]


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
    columns = ["way", "tokens/s", "hits", "prefetched", "on CPU", "MB per token", "of it wasted"]
    return TableBlock("All held-out figures", Table(columns, rows), basis)
