"""Plans: held-out figures beside the baselines', with their intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesim.draw.charts import Interval, intervals
from moesim.draw.colours import PARTS, series_of
from moesim.draw.figures import minus, percent, significant
from moesim.draw.plan import STEP_PARTS
from moesim.draw.simulate import breakdown
from moesim.errors import FormatError
from moesim.figures import GOALS, PLACEMENT_FIGURES, figure
from moesim.placement import Plan, parse_plan
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

DRAWN = ("step_us", "imbalance", "fan_out", "inter_node_bytes")


@dataclass(frozen=True, slots=True, eq=False)
class PlanView:
    """A plan from its file, from what `plan --json` printed, or from both."""

    head: Fields
    evaluation: Fields
    plan: Plan | None
    printed: Fields | None
    sources: tuple[str, ...]

    @property
    def own(self) -> str:
        return self.head.text("solver", "") or "plan"

    @property
    def basis(self) -> str:
        return predicted(self.evaluation.text("basis", "") or "assumed")

    @property
    def title(self) -> str:
        name = self.head.text("model", "") or "unnamed model"
        gpus = f" on {self.plan.placement.num_gpus} GPUs" if self.plan is not None else ""
        return f"Plan: {name}{gpus}"


def plan_views(runs: Sequence[Run]) -> list[PlanView]:
    """One view a plan: printed results join the plan file that has the same evaluation."""
    printed = {_key(r.data): r for r in runs if r.format == "moesim-plan-run"}
    views = []
    for run in runs:
        if run.format != "moesim-plan":
            continue
        try:
            plan = parse_plan(run.data.raw)
        except FormatError as error:
            raise FormatError(f"{run.name}: {error.cause}", error.remedy) from None
        other = printed.pop(_key(run.data), None)
        names = (run.name,) if other is None else (run.name, other.name)
        views.append(
            PlanView(
                run.data, _evaluation(run.data), plan, None if other is None else other.data, names
            )
        )
    views += [
        PlanView(run.data, _evaluation(run.data), None, run.data, (run.name,))
        for run in printed.values()
    ]
    return views


def _key(data: Fields) -> str:
    parts = [data.raw.get(name) for name in ("model", "solver", "objective_value", "evaluation")]
    return json.dumps(parts, sort_keys=True)


def _evaluation(data: Fields) -> Fields:
    return (
        data.child("evaluation") if data.has("evaluation") else Fields({}, data.text("model", ""))
    )


def plan_section(view: PlanView) -> Section:
    """Everything about a plan that its files hold; maps are added by `add_maps`."""
    head, evaluation = view.head, view.evaluation
    section = Section(view.title, sources=view.sources)
    section.lead = _lead(view)
    plans = evaluation.maybe("plans")
    if plans is None or not plans.raw:
        section.blocks.append(
            Note("The plan holds no evaluation, so there are no figures to compare.", left_out=True)
        )
        return section
    names = list(plans.raw)
    series = series_of(names, view.own)
    found = {name: _figures(fields) for name, fields in plans.members()}
    cards = _cards(view, found)
    section.headline = cards[:1]
    section.blocks.append(Cards(cards))
    section.blocks.append(Figures(_interval_figures(view, names, series, found)))
    section.blocks.append(_table(view, names, found))
    if view.printed is None:
        section.blocks.append(
            Note(
                "Differences paired batch by batch are left out: the plan file does not hold them."
                " Give what moesim plan --json printed as well.",
                left_out=True,
            )
        )
    if head.has("bound") and head.has("objective_value"):
        section.blocks.append(Note(_bound_text(view)))
    return section


def _figures(fields: Fields) -> dict[str, tuple[float, float, float]]:
    out = {}
    for name in PLACEMENT_FIGURES:
        figure = fields.maybe(name)
        if figure is not None:
            value = figure.number("value")
            out[name] = (value, figure.number("low", value), figure.number("high", value))
    return out


def _lead(view: PlanView) -> str:
    head, evaluation = view.head, view.evaluation
    parts = []
    if view.plan is not None:
        placement = view.plan.placement
        parts.append(
            f"{placement.num_layers} MoE layers of {placement.num_experts} experts in"
            f" {placement.num_slots} slots on {_count(placement.num_gpus, 'GPU')} of"
            f" {_count(placement.num_nodes, 'node')}."
        )
        if view.plan.attention_gpus:
            behind = _count(view.plan.attention_gpus, "GPU")
            parts.append(f"They hold nothing else; attention is on {behind} before them.")
    objective = head.text("objective", "")
    if objective:
        parts.append(f"Objective {objective}, found by {view.own}, {head.text('status', '')}.")
    if evaluation.has("num_requests"):
        parts.append(
            f"Figures are of {evaluation.whole('num_requests'):,} requests that the solver never"
            f" saw, in {evaluation.whole('num_batches', 0)} {evaluation.text('phase', '')} batches"
            f" of {evaluation.whole('batch_tokens', 0):,} tokens; intervals are 95% bootstrap"
            " intervals over requests."
        )
    if evaluation.has("reroute"):
        parts.append(f"The trace was {evaluation.text('reroute')}.")
    own = evaluation.maybe("own_schedule")
    if own is not None:
        times = own.child("step_us")
        shown = ", ".join(f"{name} {times.number(name) / 1e3:.3f}" for name in times.raw)
        parts.append(
            f"{view.own} is made for schedule {own.text('schedule')}; under it, over"
            f" {own.text('all_to_all')}, the MoE part of held-out steps takes (ms): {shown}."
            " All other figures are of the sequential schedule."
        )
    return " ".join(parts)


def _cards(view: PlanView, found: dict[str, dict[str, tuple[float, float, float]]]) -> list[Card]:
    own = found.get(view.own)
    if own is None:
        return []
    baseline = next((n for n in ("eplb", "greedy", "linear") if n in found and n != view.own), None)
    goal = GOALS.get(view.head.text("objective", ""), "imbalance")
    order = sorted((n for n in DRAWN if n in own), key=lambda n: n != goal)
    cards = []
    for name in order:
        label, unit, factor, basis = _about(name, view)
        value = own[name][0] * factor
        if name == "inter_node_bytes" and value == 0:
            continue
        detail = ""
        if baseline is not None and found[baseline].get(name, (0.0,))[0]:
            detail = f"{baseline}: {_said(found[baseline][name][0] * factor, unit)}"
            change = own[name][0] / found[baseline][name][0] - 1
            detail += f", so {_signed(change)}"
            delta = _improvement(view, name)
            if delta is not None:
                base = found[baseline][name][0]
                detail += f" ({_signed(delta[1] / base)} to {_signed(delta[2] / base)})"
        cards.append(Card(label, _said(value, unit), detail, basis))
    if view.head.has("gap"):
        kind = view.printed.text("bound_kind", "") if view.printed is not None else ""
        cards.append(
            Card(
                "room left at most",
                percent(view.head.number("gap")),
                "distance of the plan's tuning objective to a bound that no placement is below"
                + (f" ({kind})" if kind else ""),
                view.basis if view.head.text("objective", "") != "balance" else "counted",
            )
        )
    return cards


def _improvement(view: PlanView, name: str) -> tuple[float, float, float] | None:
    if view.printed is None or not view.printed.has("improvement"):
        return None
    figure = view.printed.child("improvement").maybe(name)
    if figure is None:
        return None
    return figure.number("value"), figure.number("low"), figure.number("high")


def _about(name: str, view: PlanView) -> tuple[str, str, float, str]:
    known = figure(name)
    timed = name.endswith("_us") or name.startswith("step_us")
    return known.label, known.unit, known.factor, view.basis if timed else "counted"


def _interval_figures(
    view: PlanView,
    names: list[str],
    series: Mapping[str, int],
    found: dict[str, dict[str, tuple[float, float, float]]],
) -> list[Figure]:
    out = []
    for name in DRAWN:
        if not all(name in found[n] for n in names):
            continue
        label, unit, factor, basis = _about(name, view)
        if name == "inter_node_bytes" and not any(found[n][name][0] for n in names):
            continue
        rows = [_interval(n, found[n][name], factor, series[n], unit) for n in names]
        out.append(
            Figure(
                label[0].upper() + label[1:],
                intervals(label, rows, _axis(label, unit)),
                _interval_table(rows, unit),
                "Mean and 95% interval.",
                basis,
            )
        )
    out += _paired(view, found)
    parts = _step_parts(view, names, found)
    return [*out, parts] if parts is not None else out


def _paired(
    view: PlanView, found: dict[str, dict[str, tuple[float, float, float]]]
) -> list[Figure]:
    baseline = next((n for n in ("eplb", "greedy") if n in found), None)
    if baseline is None or baseline == view.own:
        return []
    rows = []
    for name in PLACEMENT_FIGURES:
        delta = _improvement(view, name)
        base = found[baseline].get(name, (0.0, 0.0, 0.0))[0]
        if delta is None or not base or not any(delta) or figure(name).better != "low":
            continue
        rows.append(
            Interval(
                figure(name).label,
                100 * delta[0] / base,
                100 * delta[1] / base,
                100 * delta[2] / base,
                0,
                _signed(delta[0] / base),
            )
        )
    if not rows:
        return []
    title = f"{view.own} against {baseline}"
    return [
        Figure(
            title,
            intervals(title, rows, "difference (%)", mark=(0.0, "no difference")),
            _interval_table(rows, "%"),
            "Paired batch by batch, 95% interval. To the left is better.",
            view.basis,
        )
    ]


def _step_parts(
    view: PlanView, names: list[str], found: dict[str, dict[str, tuple[float, float, float]]]
) -> Figure | None:
    if not all(f"{part}_us" in found[n] for n in names for part in STEP_PARTS):
        return None
    parts_us = {n: {p: found[n][f"{p}_us"][0] for p in STEP_PARTS} for n in names}
    title = "Where the MoE time of a step goes"
    table = [
        [n, *(significant(us / 1e3) for us in (*parts.values(), sum(parts.values())))]
        for n, parts in parts_us.items()
    ]
    return Figure(
        title,
        breakdown(title, parts_us, "time per step (ms)"),
        Table(["placement", *(f"{PARTS[p][0]} (ms)" for p in STEP_PARTS), "total (ms)"], table),
        "The closed-form cost: dispatch, experts, combine, each waiting for the slowest.",
        view.basis,
    )


def _interval(
    name: str, figure: tuple[float, float, float], factor: float, series: int, unit: str
) -> Interval:
    value, low, high = (x * factor for x in figure)
    return Interval(name, value, low, high, series, _said(value, unit))


def _interval_table(rows: Sequence[Interval], unit: str) -> Table:
    suffix = f" ({unit})" if unit else ""
    return Table(
        ["", f"value{suffix}", "low", "high"],
        [[r.name, *(minus(significant(x)) for x in (r.value, r.low, r.high))] for r in rows],
    )


def _table(
    view: PlanView, names: list[str], found: dict[str, dict[str, tuple[float, float, float]]]
) -> TableBlock:
    rows = []
    for name in PLACEMENT_FIGURES:
        if not all(name in found[n] for n in names):
            continue
        cells = []
        known = figure(name)
        for n in names:
            value, low, high = (x * known.factor for x in found[n][name])
            half = (high - low) / 2
            cells.append(significant(value) + (f" ±{significant(half, 2)}" if half else ""))
        rows.append([known.heading, *cells, _about(name, view)[3]])
    return TableBlock(
        "All held-out figures",
        Table(["figure", *names, "basis"], rows, frozenset({len(names) + 1})),
    )


def _bound_text(view: PlanView) -> str:
    head = view.head
    unit = "max/mean load" if head.text("objective", "") == "balance" else "us per layer"
    text = (
        f"On the tuning data the plan's objective is {significant(head.number('objective_value'))}"
        f" {unit}; no placement is below {significant(head.number('bound'))}"
    )
    return f"{text}, a gap of {percent(head.number('gap'))}." if head.has("gap") else f"{text}."


def _said(value: float, unit: str) -> str:
    return significant(value) + (f" {unit}" if unit else "")


def _axis(label: str, unit: str) -> str:
    return f"{label} ({unit})" if unit else label


def _signed(share: float) -> str:
    return minus(f"{100 * share:+.1f}%")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
