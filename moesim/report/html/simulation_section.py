"""Simulated steps: how long they take, where the time goes, GPUs and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moesim.draw.colours import PARTS
from moesim.draw.figures import minus, percent, significant
from moesim.draw.simulate import breakdown, gpus_busy, step_times, used_parts
from moesim.draw.study import plain
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
from moesim.report.html.serving_section import pools_block

MAX_TABLE_GPUS = 64
MAX_LINKS = 3


def simulation_section(run: Run) -> Section:
    """One `moesim simulate --json`."""
    data = run.data
    plans = dict(data.child("plans").members())
    if not plans:
        raise data.bad("plans", "an object that names at least one plan")
    names = list(plans)
    basis = predicted(data.text("basis", "assumed"))
    gpus, cluster = data.whole("num_gpus", 0), data.text("cluster", "")
    asked = data.maybe("settings")
    settings = "" if asked is None else "; ".join(f"{plain(k)} {asked.text(k)}" for k in asked.raw)
    title = f"Simulated steps on {cluster or 'the cluster'}" + (f", {settings}" if settings else "")
    section = Section(title, sources=(run.name,))
    first = plans[names[0]]
    section.lead = (
        f"{first.whole('num_steps', 0)} {data.text('phase', '')} steps of"
        f" {significant(first.number('tokens_per_step', 0.0))} tokens on {gpus} GPUs of"
        f" {cluster}, from {data.whole('num_requests', 0):,} requests that planning never saw;"
        f" {first.text('fidelity', '')} simulation, schedule {first.text('schedule', '')},"
        f" all-to-all {first.text('all_to_all', '')}."
    )
    if settings:
        section.lead += f" Settings: {settings}."
    cards = _cards(names, plans, basis)
    section.headline = cards[:1]
    section.blocks += [
        Cards(cards),
        Figures(
            [
                _breakdown(names, plans, basis),
                _times(names, plans, basis),
                *_busy(names, plans, basis),
            ]
        ),
        _links(names, plans, basis),
    ]
    section.blocks += [
        pools_block(pools, basis, f"Of the mean step of {n} in {pools.whole('parts', 1)} parts.")
        for n in names
        if (pools := plans[n].maybe("pools")) is not None
    ]
    section.blocks += _events(names, plans, basis)
    return section


def _cards(names: Sequence[str], plans: Mapping[str, Fields], basis: str) -> list[Card]:
    own = plans[names[0]]
    mean = own.child("step_us").number("mean")
    others = []
    for n in names[1:]:
        other = plans[n].child("step_us").number("mean")
        change = minus(f"{100 * (other / mean - 1):+.1f}%") if mean > 0 else "–"
        others.append(f"{n}: {significant(other / 1e3)} ms ({change})")
    parts = own.child("breakdown_us")
    sent = sum(parts.number(p, 0.0) for p in ("dispatch", "combine", "other"))
    return [
        Card(f"mean step, {names[0]}", f"{significant(mean / 1e3)} ms", "; ".join(others), basis),
        Card(
            "tokens per second", f"{own.number('tokens_per_s'):,.0f}", "of the whole group", basis
        ),
        Card(
            "spent on communication",
            percent(sent / mean if mean else 0.0),
            "dispatch, combine and other transfers, as a share of the step",
            basis,
        ),
        Card("balancedness", f"{own.number('balancedness'):.3f}", "1 is perfect", "counted"),
    ]


def _breakdown(names: Sequence[str], plans: Mapping[str, Fields], basis: str) -> Figure:
    parts_us = {}
    for n in names:
        own = plans[n].child("breakdown_us")
        parts_us[n] = {part: own.number(part, 0.0) for part in PARTS}
    used = used_parts(parts_us)
    table = [
        [n, *(significant(us / 1e3) for us in (*(parts[p] for p in used), sum(parts.values())))]
        for n, parts in parts_us.items()
    ]
    title = "Where the time of a step goes"
    return Figure(
        title,
        breakdown(title, parts_us, "mean step (ms)"),
        Table(["plan", *(f"{PARTS[p][0]} (ms)" for p in used), "total (ms)"], table),
        "Parts as the slowest rank of each layer sees them; they add up to the mean step.",
        basis,
    )


def _times(names: Sequence[str], plans: Mapping[str, Fields], basis: str) -> Figure:
    spread, table = {}, []
    for n in names:
        step = plans[n].child("step_us")
        mean, p50, p99 = (step.number(k) for k in ("mean", "p50", "p99"))
        spread[n] = (mean, p50, p99)
        times = (*spread[n], step.number("max", p99))
        table.append([n, *(significant(us / 1e3) for us in times)])
    picture = step_times(spread)
    return Figure(
        picture.title,
        picture,
        Table(["plan", "mean (ms)", "p50 (ms)", "p99 (ms)", "largest (ms)"], table),
        "Mark: mean. Line: from the median to the 99th percentile of steps.",
        basis,
    )


def _busy(names: Sequence[str], plans: Mapping[str, Fields], basis: str) -> list[Figure]:
    busy = {n: plans[n].numbers("gpu_busy") for n in names}
    counts = {len(v) for v in busy.values()}
    if len(counts) != 1 or counts == {0}:
        return []
    if counts.pop() <= MAX_TABLE_GPUS:
        rows = [
            [str(g), *map(percent, shares)]
            for g, shares in enumerate(zip(*busy.values(), strict=True))
        ]
        table = Table(["GPU", *names], rows)
    else:
        rows = []
        for n, shares in busy.items():
            values = np.array(shares)
            low, high = int(values.argmin()), int(values.argmax())
            ends = (percent(shares[low]), str(low), percent(shares[high]), str(high))
            rows.append([n, percent(float(values.mean())), *ends])
        table = Table(["plan", "mean", "least", "GPU", "most", "GPU"], rows)
    picture = gpus_busy(busy)
    caption = (
        "Mark: mean of all GPUs. Line: from the least to the most busy GPU. The rest is"
        " communication and waiting."
    )
    return [Figure(picture.title, picture, table, caption, basis)]


def _links(names: Sequence[str], plans: Mapping[str, Fields], basis: str) -> Block:
    rows: list[list[str]] = []
    for n in names:
        rows += [
            [
                n,
                link.text("link", ""),
                link.text("class", ""),
                percent(link.number("busy", 0.0)),
                significant(link.number("gb_per_s", 0.0), 3),
            ]
            for link in plans[n].children("busiest_links")[:MAX_LINKS]
        ]
    columns = ["plan", "link", "class", "busy", "GB/s"]
    return TableBlock("Busiest links", Table(columns, rows, frozenset({1, 2})), basis)


def _events(names: Sequence[str], plans: Mapping[str, Fields], basis: str) -> list[Block]:
    """Dropped choices, faults and new placements, where the run had any."""
    out: list[Block] = []
    drops = {n: d for n in names if (d := plans[n].maybe("drops")) is not None}
    if drops:
        rows = [
            [
                n,
                percent(d.number("dropped_share", 0.0), 2),
                f"{d.number('dropped', 0.0):,.0f}",
                f"{d.number('substituted', 0.0):,.0f}",
            ]
            for n, d in drops.items()
        ]
        table = Table(["plan", "dropped", "choices dropped", "choices substituted"], rows)
        out.append(TableBlock("Choices beyond the experts' capacity", table, "counted"))
    rows = []
    for n in names:
        faults = plans[n].maybe("faults")
        if faults is None:
            continue
        out.append(
            Note(
                f"{n}: available {percent(faults.number('availability', 0.0))} of the time,"
                f" {faults.whole('steps_retried', 0)} steps run again."
            )
        )
        for outage in faults.children("outages"):
            recover = outage.raw.get("time_to_recover_us")
            rows.append(
                [
                    n,
                    outage.text("fault", ""),
                    significant(outage.number("at_us", 0.0) / 1e3),
                    str(outage.whole("lost_experts", 0)),
                    "not recovered"
                    if recover is None
                    else significant(outage.number("time_to_recover_us") / 1e3),
                ]
            )
    if rows:
        columns = ["plan", "fault", "at (ms)", "experts lost", "recovered after (ms)"]
        out.append(TableBlock("Faults", Table(columns, rows, frozenset({1})), basis))
    for n in names:
        anew = plans[n].maybe("rebalance")
        if anew is not None:
            out.append(
                Note(
                    f"{n}: {anew.whole('num_plans', 0)} new placements"
                    f" ({anew.text('mode', '')}), {anew.number('bytes_from_gpus', 0.0) / 1e6:,.0f}"
                    f" MB moved, serving stopped {percent(anew.number('stall_share', 0.0))} of the"
                    " time."
                )
            )
    return out
