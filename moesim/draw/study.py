"""What-if studies: the points with the Pareto front, and what the answer depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.draw.axes import Axes
from moesim.draw.charts import Interval, Points, intervals, points
from moesim.draw.figures import significant
from moesim.draw.picture import Picture, poster

MAX_DRAWN = 1500
WIDE = 20.0
"""Largest over smallest value from which an axis is logarithmic."""
SHOWN = {"s": ("ms", 1e3), "us": ("ms", 1e-3), "share": ("%", 100.0)}
"""Unit that readers see, and the factor to it, of the units that values have."""
LOOKS = {
    "misses a promise": (7, False),
    "other points": (5, False),
    "Pareto front": (0, False),
    "the answer": (1, True),
}
"""Series of each kind of point, and whether it is a ring; in the order that they are drawn."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A figure as readers see it: its name, unit and the factor to that unit."""

    label: str
    unit: str = ""
    factor: float = 1.0

    @property
    def axis(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def said(self, value: float) -> str:
        return significant(value * self.factor) + (f" {self.unit}" if self.unit else "")


def scaled(data: Mapping[str, Any], name: str) -> Scaled:
    """Figure `name` of the study `data`, times in milliseconds and shares in per cent."""
    figure = data["figures"].get(name, {})
    label, unit = str(figure.get("label", name)), str(figure.get("unit", ""))
    shown, factor = SHOWN.get(unit, (unit, 1.0))
    return Scaled(label, shown, factor)


def front_groups(data: Mapping[str, Any]) -> dict[str, list[tuple[float, float, str]]]:
    """(x, y, parameters in words) of the points of each kind of LOOKS, in its order."""
    names = [axis["figure"] for axis in data["pareto"]["axes"][:2]]
    if len(names) < 2:
        return {}
    x, y = (scaled(data, name) for name in names)
    answer = (data.get("answer") or {}).get("point")
    groups: dict[str, list[tuple[float, float, str]]] = {kind: [] for kind in LOOKS}
    for point in data["points"]:
        if point["status"] != "ok" or any(point["figures"].get(n) is None for n in names):
            continue
        kind = "other points" if point.get("keeps", True) else "misses a promise"
        if point.get("pareto"):
            kind = "Pareto front"
        said = ", ".join(f"{n} {plain(point['params'].get(n))}" for n in data["varied"])
        at = (point["figures"][names[0]] * x.factor, point["figures"][names[1]] * y.factor, said)
        groups[kind].append(at)
        if point["key"] == answer:
            groups["the answer"].append(at)
    return {kind: found[:MAX_DRAWN] for kind, found in groups.items() if found}


def front(data: Mapping[str, Any]) -> Picture | None:
    """Points by the two figures of the front, the front joined, promises as dashed lines; None
    where the study has no two figures."""
    groups = front_groups(data)
    if not groups:
        return None
    drawn = [
        Points(kind, [p[0] for p in own], [p[1] for p in own], *_look(kind, [p[2] for p in own]))
        for kind, own in groups.items()
    ]
    names = [axis["figure"] for axis in data["pareto"]["axes"][:2]]
    x, y = (scaled(data, name) for name in names)
    wide = [_wide([v for g in drawn for v in (g.x, g.y)[i]]) for i in (0, 1)]
    marks: list[list[tuple[float, str]]] = [
        [
            (bound["limit"] * figure.factor, "promise")
            for bound in data["question"]["slo"]
            if bound["figure"] == name
        ]
        for name, figure in zip(names, (x, y), strict=True)
    ]
    axes = Axes(x.axis, y.axis, wide[0], wide[1], marks_x=marks[0], marks_y=marks[1])
    return points("Pareto front", drawn, axes, joined="Pareto front")


def shown_figure(data: Mapping[str, Any]) -> str:
    """The figure that the sensitivity shows: the tightest promise's, else the goal's."""
    question, answer = data["question"], data.get("answer")
    if not answer or not question["slo"]:
        return str(question["goal"])

    def slack(bound: Mapping[str, Any]) -> float:
        value = answer["figures"].get(bound["figure"])
        if value is None or not bound["limit"]:
            return float("inf")
        return float(abs(bound["limit"] - value) / abs(bound["limit"]))

    return str(min(question["slo"], key=slack)["figure"])


def sensitivity(data: Mapping[str, Any]) -> Picture | None:
    """How `shown_figure` of the answer's own point changes with each input lower and higher, and
    whether another point becomes the answer; None where nothing was asked again."""
    name, answer = shown_figure(data), data.get("answer")
    if not answer or answer["figures"].get(name) is None:
        return None
    figure = scaled(data, name)
    base = answer["figures"][name] * figure.factor
    by_input: dict[str, list[Mapping[str, Any]]] = {}
    for row in data["sensitivity"]["rows"]:
        by_input.setdefault(row["input"], []).append(row)
    rows = []
    for label, tried in by_input.items():
        own = [r["figures"].get(name) for r in tried]
        reach = [base, *(v * figure.factor for v in own if v is not None)]
        changed = any(r["changed"] for r in tried)
        none = any(r["value"] is None for r in tried)
        said = "no answer" if none else "another answers" if changed else "still the answer"
        span = f"{label} x {' or '.join(format(r['factor'], 'g') for r in tried)}"
        rows.append(Interval(span, base, min(reach), max(reach), 1 if changed else 0, said))
    if not rows:
        return None
    mark = (base, f"the answer: {significant(base, 3)}")
    return intervals("What the answer depends on", rows, figure.axis, mark=mark)


def study_poster(data: Mapping[str, Any]) -> Picture:
    """A study's result (see `moesim.studies.result`): its front, and what its answer depends on."""
    found = [p for p in (front(data), sensitivity(data)) if p is not None]
    if not found:
        names = ", ".join(axis["figure"] for axis in data["pareto"]["axes"])
        found = [points("Pareto front", [], Axes(names, ""))]
    asked = data["question"]["text"]
    return poster(data["name"] or asked, [found], asked if data["name"] else "")


def plain(value: Any) -> str:
    """A JSON value as one line of text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(ch if ch.isprintable() else " " for ch in text[:2000])


def _look(kind: str, hints: Sequence[str]) -> tuple[int, Sequence[str], bool]:
    series, ring = LOOKS[kind]
    return series, hints, ring


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > WIDE
