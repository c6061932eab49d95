"""Charts: bars, stacked bars, intervals, lines, points. Each returns one SVG drawing.

All are drawn 360 wide with text of 12, which a phone shows nearly as it is; pages with more room
put several side by side. Colour is never the only sign: lines have dashes, points have shapes,
stacked parts have a legend in their order and a gap between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from moesim.report.html.parts import LegendItem
from moesim.report.html.svg import (
    DASHES,
    Scale,
    drawing,
    element,
    fit,
    hint,
    label,
    minus,
    number,
    padded,
    text_width,
    tick_labels,
)

WIDTH = 360.0
PAD = 8.0
ROW = 42.0
COMPACT_ROW = 25.0
NAMES = 142.0
VALUES = 52.0
BAR = 16.0
MAX_POINTS = 400
CROWDED = 150
SHAPES = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a bar chart: its parts are (name, series number, value), drawn end to end."""

    name: str
    parts: Sequence[tuple[str, int, float]]
    text: str


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its interval."""

    name: str
    value: float
    low: float
    high: float
    series: int
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """Points of a line in order of x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    series: int
    step: bool = False


@dataclass(frozen=True, slots=True)
class Points:
    """A group of points, each with the text a pointer shows; `big` ones are set off."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    series: int
    hints: Sequence[str] = ()
    big: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """Titles with units, and how the axes run. Limits default to what is drawn."""

    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    height: float = 230.0
    marks_y: Sequence[tuple[float, str]] = field(default=())
    marks_x: Sequence[tuple[float, str]] = field(default=())


def bars(
    title: str, rows: Sequence[Bar], axis: str, *, mark: tuple[float, str] | None = None
) -> Markup:
    """Horizontal bars, stacked where a row has several parts. `mark`: a line across all rows, such
    as a bound, with its name."""
    most = max([sum(v for *_, v in row.parts) for row in rows] + [mark[0] if mark else 0.0])
    scale = Scale(0.0, most * 1.02 or 1.0, PAD, WIDTH - PAD)
    top = 20.0 if mark else 4.0
    body = _x_axis(scale, top, top + ROW * len(rows), axis)
    for i, row in enumerate(rows):
        y = top + ROW * i
        body += _row_text(row.name, row.text, y)
        at = 0.0
        for name, series, value in row.parts:
            if value <= 0:
                continue
            x0, x1 = scale(at), scale(at + value)
            gap = 1.0 if len(row.parts) > 1 and x1 - x0 > 3 else 0.0
            said = f"{row.name}: {name} {value:,.4g}" if name else f"{row.name}: {row.text}"
            body.append(
                element(
                    "rect",
                    hint(said),
                    x=x0,
                    y=y + 19,
                    width=max(0.5, x1 - x0 - gap),
                    height=BAR,
                    rx=1.5,
                    class_=f"mark s{series}",
                )
            )
            at += value
    if mark is not None:
        spans = [(top + ROW * i + 17, top + ROW * i + 21 + BAR) for i in range(len(rows))]
        body += _marked(scale(mark[0]), spans, mark[1])
    said = "; ".join(f"{row.name}: {row.text}" for row in rows[:12])
    return drawing(title, said, WIDTH, top + ROW * len(rows) + 36, *body)


def intervals(
    title: str,
    rows: Sequence[Interval],
    axis: str,
    *,
    mark: tuple[float, str] | None = None,
    compact: bool = False,
) -> Markup:
    """A point and its interval a row. `mark`: a line across all rows with its name. `compact`:
    names beside the intervals, not above."""
    ends = [x for row in rows for x in (row.low, row.high, row.value)]
    ends += [mark[0]] if mark else []
    low, high = padded(min(ends), max(ends))
    beside = max(VALUES, *(text_width(row.text) + PAD for row in rows)) + 12
    start, end = (NAMES + 8, WIDTH - beside) if compact else (PAD + 4, WIDTH - PAD - 4)
    scale = Scale(low, high, start, end)
    top = 20.0 if mark else 4.0
    each = COMPACT_ROW if compact else ROW
    bottom = top + each * len(rows)
    body = _x_axis(scale, top, bottom, axis)
    if mark is not None and compact:
        body += _vertical(scale(mark[0]), top, bottom, mark[1])
    elif mark is not None:
        body += _marked(
            scale(mark[0]),
            [(top + each * i + 18, top + each * i + 36) for i in range(len(rows))],
            mark[1],
        )
    for i, row in enumerate(rows):
        y = top + each * i
        middle = y + (each / 2 if compact else 27)
        if compact:
            body.append(label(PAD, middle, fit(row.name, NAMES - PAD), class_="row-name"))
            body.append(label(WIDTH - PAD, middle, row.text, "end", "value"))
        else:
            body += _row_text(row.name, row.text, y)
        x0, x1 = scale(row.low), scale(row.high)
        said = f"{row.name}: {row.text}"
        body.append(
            element(
                "g",
                hint(said),
                element("line", x1=x0, x2=x1, y1=middle, y2=middle, class_="whisker"),
                *(
                    element("line", x1=x, x2=x, y1=middle - 5, y2=middle + 5, class_="whisker")
                    for x in (x0, x1)
                ),
                shape(row.series, scale(row.value), middle, 5.5),
                class_=f"mark l{row.series}",
            )
        )
    said = "; ".join(f"{row.name}: {row.text}" for row in rows[:12])
    return drawing(title, said, WIDTH, bottom + 36, *body)


def lines(title: str, series: Sequence[Line], axes: Axes) -> Markup:
    """Lines over common axes; what lies outside of log axes' reach is left out."""
    drawn = [_usable(line, axes) for line in series]
    plane, body = _plane(axes, [x for s in drawn for x in s.x], [y for s in drawn for y in s.y])
    for line in drawn:
        if not line.x:
            continue
        body.append(
            element(
                "path",
                hint(line.name),
                d=_path(line, plane),
                class_=f"mark line{' thin' if len(line.x) > CROWDED else ''} l{line.series}",
                stroke_dasharray=DASHES[line.series % len(DASHES)],
            )
        )
        if len(line.x) <= 24 and not line.step:
            body += [
                element(
                    "g",
                    hint(f"{line.name}: {x:,.4g}, {y:,.4g}"),
                    shape(line.series, plane.x(x), plane.y(y), 3.2),
                    class_="point",
                )
                for x, y in zip(line.x, line.y, strict=True)
            ]
    said = f"{axes.y} against {axes.x}: " + ", ".join(line.name for line in drawn[:12])
    return drawing(title, said, WIDTH, axes.height, *body)


def points(
    title: str,
    groups: Sequence[Points],
    axes: Axes,
    *,
    band: float | None = None,
    front: bool = False,
) -> Markup:
    """Points over common axes. `band`: the diagonal with a band of that relative width, on equal
    axes. `front`: the points of the last group are joined."""
    xs = [x for g in groups for x in g.x]
    ys = [y for g in groups for y in g.y]
    if band is not None:
        low, high = min(xs + ys) / 1.15, max(xs + ys) * 1.15
        axes = Axes(
            axes.x, axes.y, axes.log_x, axes.log_y, (low, high), (low, high), height=WIDTH - 10
        )
    plane, body = _plane(axes, xs, ys)
    if band is not None:
        low, high = plane.x.low, plane.x.high
        upper = [(low, low * (1 + band)), (high / (1 + band), high)]
        lower = [(high, high * (1 - band)), (low / (1 - band), low)]
        corner = [(high, high)]
        outline = [*upper, *corner, *lower, (low, low)]
        body.append(
            element(
                "polygon",
                points=" ".join(f"{number(plane.x(x))},{number(plane.y(y))}" for x, y in outline),
                class_="band",
            )
        )
        body.append(
            element(
                "line",
                x1=plane.x(low),
                y1=plane.y(low),
                x2=plane.x(high),
                y2=plane.y(high),
                class_="axis-line",
            )
        )
    for i, group in enumerate(groups):
        order = sorted(range(len(group.x)), key=lambda k, g=group: (g.x[k], g.y[k]))  # type: ignore[misc]
        if front and i == len(groups) - 1 and len(order) > 1:
            joined = Line(
                group.name,
                [group.x[k] for k in order],
                [group.y[k] for k in order],
                group.series,
            )
            body.append(
                element("path", d=_path(joined, plane), class_=f"line thin l{group.series}")
            )
        for k in range(len(group.x)):
            said = group.hints[k] if group.hints else f"{group.x[k]:,.4g}, {group.y[k]:,.4g}"
            body.append(
                element(
                    "g",
                    hint(f"{group.name}: {said}" if group.name else said),
                    shape(
                        group.series,
                        plane.x(group.x[k]),
                        plane.y(group.y[k]),
                        5.0 if group.big else 3.2,
                    ),
                    class_="mark point" + ("" if group.big else " faint"),
                )
            )
    said = f"{axes.y} against {axes.x}, {len(xs)} points"
    return drawing(title, said, WIDTH, axes.height, *body)


def shape(series: int, x: float, y: float, size: float) -> Markup:
    """The mark of a series: its colour and its shape."""
    fill = f"s{series}"
    kind = SHAPES[series % len(SHAPES)]
    if kind == "circle":
        return element("circle", cx=x, cy=y, r=size, class_=fill)
    if kind == "square":
        side = size * 0.9
        return element("rect", x=x - side, y=y - side, width=2 * side, height=2 * side, class_=fill)
    far = size * 1.25
    corners = [(0, -far), (far, 0), (0, far), (-far, 0)]
    if kind == "triangle":
        corners = [(0, -far), (far, far * 0.8), (-far, far * 0.8)]
    text = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in corners)
    return element("polygon", points=text, class_=fill)


def legend(names: Sequence[tuple[str, int]], kind: str = "bar") -> list[LegendItem]:
    """What (name, series) stand for, drawn as in the chart: kind is bar, line or point."""
    out = []
    for name, series in names:
        if kind == "bar":
            mark = element(
                "rect", x=2.0, y=2.0, width=16.0, height=10.0, rx=1.5, class_=f"s{series}"
            )
        elif kind == "line":
            mark = element(
                "path",
                d="M1 7h26",
                class_=f"line l{series}",
                stroke_dasharray=DASHES[series % len(DASHES)],
            )
        else:
            mark = shape(series, 9.0, 7.0, 5.0)
        wide = 28 if kind == "line" else 20
        swatch = element(
            "svg", mark, viewBox=f"0 0 {wide} 14", width=wide, height=14, aria_hidden="true"
        )
        out.append(LegendItem(name, swatch))
    return out


@dataclass(frozen=True, slots=True)
class _Plane:
    x: Scale
    y: Scale


def _plane(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> tuple[_Plane, list[Markup]]:
    """Scales over the drawing area, and the axes drawn."""
    x_low, x_high = axes.x_range or _range(xs, axes.log_x)
    y_low, y_high = axes.y_range or _range(ys, axes.log_y)
    y_ticks = Scale(y_low, y_high, 0, 1, axes.log_y).ticks()
    texts = tick_labels(y_ticks)
    left = max(30.0, 12 + max(text_width(t, 11) for t in texts))
    top, bottom, right = 24.0, axes.height - 42, WIDTH - 14
    x = Scale(x_low, x_high, left, right, axes.log_x)
    y = Scale(y_low, y_high, bottom, top, axes.log_y)
    body = [label(2, 8, fit(axes.y, WIDTH - 4), class_="axis")]
    for value, text in zip(y_ticks, texts, strict=True):
        at = y(value)
        body.append(element("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
        body.append(label(left - 5, at, text, "end", "tick", 11))
    x_ticks = x.ticks()
    x_texts = tick_labels(x_ticks)
    while len(x_ticks) > 2 and sum(text_width(t, 11) + 10 for t in x_texts) > right - left:
        x_ticks, x_texts = x_ticks[::2], x_texts[::2]
    for value, text in zip(x_ticks, x_texts, strict=True):
        at = x(value)
        body.append(element("line", x1=at, x2=at, y1=top, y2=bottom, class_="grid"))
        body.append(_tick(at, bottom + 12, text))
    body.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis-line"))
    body.append(label(right, axes.height - 10, fit(axes.x, WIDTH - 16), "end", "axis"))
    for value, name in axes.marks_y:
        if y_low <= value <= y_high:
            at = y(value)
            body.append(element("line", x1=left, x2=right, y1=at, y2=at, class_="limit"))
            body.append(label(right, at - 8, name, "end", "tick", 11))
    for value, name in axes.marks_x:
        if x_low <= value <= x_high:
            near_end = x(value) + text_width(name, 11) + 6 > right
            body.append(
                element("line", x1=x(value), x2=x(value), y1=top, y2=bottom, class_="limit")
            )
            body.append(
                label(
                    x(value) + (-4 if near_end else 4),
                    bottom - 8,
                    name,
                    "end" if near_end else "start",
                    "tick",
                    11,
                )
            )
    return _Plane(x, y), body


def _tick(x: float, y: float, text: str) -> Markup:
    """A label under an axis that stays inside the drawing."""
    half = text_width(text, 11) / 2
    return label(min(max(x, half), WIDTH - half - 1), y, text, "middle", "tick", 11)


def _x_axis(scale: Scale, top: float, bottom: float, title: str) -> list[Markup]:
    ticks = scale.ticks()
    texts = tick_labels(ticks)
    while len(ticks) > 2 and sum(text_width(t, 11) + 10 for t in texts) > scale.end - scale.start:
        ticks, texts = ticks[::2], texts[::2]
    body = []
    for value, text in zip(ticks, texts, strict=True):
        at = scale(value)
        body.append(element("line", x1=at, x2=at, y1=top, y2=bottom, class_="grid"))
        body.append(_tick(at, bottom + 9, text))
    body.append(label(WIDTH - PAD, bottom + 26, fit(title, WIDTH - 16), "end", "axis"))
    return body


def _row_text(name: str, text: str, y: float) -> list[Markup]:
    wide = text_width(text)
    shown = fit(name, WIDTH - 2 * PAD - wide - 12)
    first = label(PAD, y + 10, shown, class_="row-name")
    return [first, label(WIDTH - PAD, y + 10, text, "end", "value")]


def _vertical(x: float, top: float, bottom: float, name: str) -> list[Markup]:
    half = text_width(name, 11) / 2
    at = min(max(x, half + 2), WIDTH - half - 2)
    return [
        element("line", x1=x, x2=x, y1=top - 4, y2=bottom, class_="limit"),
        label(at, top - 11, fit(name, WIDTH - 8, 11), "middle", "tick", 11),
    ]


def _marked(x: float, spans: Sequence[tuple[float, float]], name: str) -> list[Markup]:
    """A line across the marks of every row, clear of their texts, with its name on top."""
    half = text_width(name, 11) / 2
    at = min(max(x, half + 2), WIDTH - half - 2)
    body = [element("line", x1=x, x2=x, y1=y0, y2=y1, class_="limit") for y0, y1 in spans]
    return [*body, label(at, 9, fit(name, WIDTH - 8, 11), "middle", "tick", 11)]


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    usable = [v for v in values if v > 0] if log else list(values)
    if not usable:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(usable), max(usable)
    if log:
        return (low / 1.25, high * 1.25)
    if 0 <= low < 0.4 * high:
        return (0.0, high * 1.05)
    return padded(low, high)


def _usable(line: Line, axes: Axes) -> Line:
    """The line without points that log axes cannot show, thinned to MAX_POINTS."""
    keep = [
        (x, y)
        for x, y in zip(line.x, line.y, strict=True)
        if (x > 0 or not axes.log_x) and (y > 0 or not axes.log_y)
    ]
    if len(keep) > MAX_POINTS:
        last = len(keep) - 1
        chosen = sorted({round(i * last / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})
        keep = [keep[i] for i in chosen]
    return Line(line.name, [x for x, _ in keep], [y for _, y in keep], line.series, line.step)


def _path(line: Line, plane: _Plane) -> str:
    def clamp(value: float, scale: Scale) -> float:
        low, high = sorted((scale.start, scale.end))
        return min(max(scale(value), low), high)

    parts = []
    before = 0.0
    for i, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        px, py = clamp(x, plane.x), clamp(y, plane.y)
        if line.step and i:
            parts.append(f"L{number(px)} {number(before)}")
        parts.append(f"{'L' if i else 'M'}{number(px)} {number(py)}")
        before = py
    return "".join(parts)


def percent(value: float, places: int = 1) -> str:
    """A share as a percentage."""
    return minus(f"{100 * value:.{places}f}%") if math.isfinite(value) else "–"
