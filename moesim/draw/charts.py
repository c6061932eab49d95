"""The kinds of chart: bars, intervals, lines, points. Each gives one Picture from plain values.

Colour is never the only sign: lines have dashes, points have shapes, bars their names beside them.
Legends stand above the data. Bars begin at 0; other axes that do not are said to by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.draw.axes import Axes, linear_axis, padded, plane
from moesim.draw.colours import AXIS, PAPER, SERIES, SOFT, TEXT
from moesim.draw.picture import WIDTH, Picture, Spec

ROW = 42
BAR = 16
CHAR = 6.2
"""About how wide a character of 12 points is drawn, in pixels."""
MAX_POINTS = 400
CROWDED = 150
DASHES = ([1, 0], [6, 3], [2, 3], [8, 3, 2, 3], [4, 2], [1, 2], [10, 4], [3, 3], [5, 1])
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")


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
    """A group of points, each with the text a pointer shows; `big` ones are rings around others."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    series: int
    hints: Sequence[str] = ()
    big: bool = False


def bars(
    title: str, rows: Sequence[Bar], axis: str, *, mark: tuple[float, str] | None = None
) -> Picture:
    """Horizontal bars from 0, stacked where a row has several parts. `mark`: a line across all
    rows, such as a bound, with its name."""
    data: list[Spec] = []
    parts: dict[str, str] = {}
    for row, bar in enumerate(rows):
        at = 0.0
        for name, series, value in bar.parts:
            parts[name] = SERIES[series]
            if value > 0:
                said = f"{name} {value:,.4g}" if name else bar.text
                own = {"row": row, "from": at, "to": at + value, "part": name}
                data.append(own | {"hint": f"{bar.name}: {said}", "colour": SERIES[series]})
                at += value
    most = max([*(d["to"] for d in data), mark[0] if mark else 0.0], default=0.0)
    stacked = len(parts) > 1
    drawn = layer(
        data,
        {"type": "bar", "height": BAR, "yOffset": 8, "cornerRadius": 1.5, "stroke": PAPER}
        | {"strokeWidth": 1 if stacked else 0},
        y=_row(),
        x=linear_axis("from", axis, [0, most * 1.02 or 1.0]),
        x2={"field": "to"},
        color=_by_name(parts, "part", 8) if stacked else own_look("colour"),
        description={"field": "hint"},
    )
    layers = [drawn, *_row_texts([(bar.name, bar.text) for bar in rows])]
    if mark is not None:
        layers += _row_mark(*mark, len(rows), mark[0] > most / 2)
    return _rows_picture(title, layers, [f"{bar.name}: {bar.text}" for bar in rows])


def columns(
    title: str, names: Sequence[str], parts: Sequence[tuple[str, int, Sequence[float]]], axes: Axes
) -> Picture:
    """Columns from 0, one per name, stacked of `parts`: (name, series number, value per column)."""
    data: list[Spec] = []
    at = [0.0] * len(names)
    for part, _, values in parts:
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            said = f"{axes.x} {name}: {part} {value:,.4g}"
            own = {"column": name, "from": at[i], "to": at[i] + value, "part": part, "hint": said}
            data.append(own)
            at[i] += value
    top = (axes.y_range or (0.0, max(at, default=0.0) * 1.05 or 1.0))[1]
    view = layer(
        data,
        {"type": "bar"},
        x={"field": "column", "type": "ordinal", "scale": {"domain": list(names)}}
        | {"axis": {"title": axes.x, "labelAngle": 0, "grid": False}},
        y=linear_axis("from", axes.y, [0, top]),
        y2={"field": "to"},
        color=_by_name({part: SERIES[series] for part, series, _ in parts}, "part"),
        description={"field": "hint"},
    )
    said = f"{axes.y} by {axes.x}, {len(names)} columns"
    return Picture(title, {"height": axes.height, **view}, said)


def intervals(
    title: str, rows: Sequence[Interval], axis: str, *, mark: tuple[float, str] | None = None
) -> Picture:
    """A point and its interval per row. `mark`: a line across all rows with its name."""
    ends = [x for row in rows for x in (row.low, row.high, row.value)] + ([mark[0]] if mark else [])
    low, high = padded(min(ends), max(ends))
    data = [
        {"row": i, "low": r.low, "high": r.high, "value": r.value, "hint": f"{r.name}: {r.text}"}
        | {"colour": SERIES[r.series], "shape": SHAPES[r.series % len(SHAPES)]}
        for i, r in enumerate(rows)
    ]
    y, colour = _row(), own_look("colour")
    at = {name: linear_axis(name, axis, [low, high]) for name in ("low", "high", "value")}
    tick = {"type": "tick", "size": 10, "thickness": 2, "yOffset": 8}
    rule = {"type": "rule", "strokeWidth": 2, "yOffset": 8}
    point = {"type": "point", "filled": True, "size": 90, "yOffset": 8, "opacity": 1}
    said, shape = {"field": "hint"}, own_look("shape")
    layers = [
        layer(data, rule, y=y, x=at["low"], x2={"field": "high"}, color=colour),
        *(layer(data, tick, y=y, x=at[end], color=colour) for end in ("low", "high")),
        layer(data, point, y=y, x=at["value"], color=colour, shape=shape, description=said),
        *_row_texts([(r.name, r.text) for r in rows]),
    ]
    if mark is not None:
        layers += _row_mark(*mark, len(rows), mark[0] > (low + high) / 2)
    return _rows_picture(title, layers, [f"{r.name}: {r.text}" for r in rows])


def lines(title: str, series: Sequence[Line], axes: Axes) -> Picture:
    """Lines over common axes; what logarithmic axes cannot show is left out."""
    drawn = [line for line in (_usable(line, axes) for line in series) if line.x]
    names = {line.name: SERIES[line.series] for line in drawn}
    dashes = {line.name: DASHES[line.series if len(drawn) > 1 else 0] for line in drawn}
    look: Spec = {"symbolType": "stroke", "symbolStrokeWidth": 2, "symbolSize": 300}
    x, y = plane(axes, [v for s in drawn for v in s.x], [v for s in drawn for v in s.y])
    own = {"x": x, "y": y, "color": _by_name(names, **look)}
    layers: list[Spec] = []
    for line in drawn:
        values = [
            {"x": a, "y": b, "name": line.name, "hint": f"{line.name}: {a:,.4g}, {b:,.4g}"}
            for a, b in zip(line.x, line.y, strict=True)
        ]
        stroke: Spec = {"type": "line", "strokeJoin": "round", "description": line.name}
        stroke |= {"interpolate": "step-after" if line.step else "linear", "aria": True}
        stroke |= {"strokeWidth": 1.2 if len(line.x) > CROWDED else 2}
        layers.append(layer(values, stroke, **own, strokeDash=_by_name(dashes, **look)))
        if len(line.x) <= 24 and not line.step:
            point = {"type": "point", "filled": True, "size": 30, "opacity": 1}
            point |= {"shape": SHAPES[line.series % len(SHAPES)]}
            layers.append(layer(values, point, **own, description={"field": "hint"}))
    said = f"{axes.y} against {axes.x}: " + ", ".join(line.name for line in drawn[:12])
    return _layered(title, axes, layers, x, y, said)


def points(
    title: str, groups: Sequence[Points], axes: Axes, *, band: float | None = None, joined: str = ""
) -> Picture:
    """Points over common axes. `band`: the diagonal with a band of that relative width, on equal
    axes. `joined`: the group whose points a line joins."""
    xs = [v for g in groups for v in g.x]
    ys = [v for g in groups for v in g.y]
    if band is not None:
        ends = (min(xs + ys) / 1.15, max(xs + ys) * 1.15)
        axes = Axes(axes.x, axes.y, axes.log_x, axes.log_y, ends, ends, height=280)
    x, y = plane(axes, xs, ys)
    layers = [] if band is None else _diagonal(band, x, y)
    names = {g.name: SERIES[g.series] for g in groups}
    shapes = {g.name: SHAPES[g.series % len(SHAPES)] for g in groups}
    for group in groups:
        if group.name == joined and len(group.x) > 1:
            along = [{"x": a, "y": b} for a, b in sorted(zip(group.x, group.y, strict=True))]
            line = {"type": "line", "color": SERIES[group.series], "strokeWidth": 1.2}
            layers.append(layer(along, line, x=x, y=y))
    for group in groups:
        hints = group.hints or [""] * len(group.x)
        values = [
            {"x": a, "y": b, "name": group.name, "hint": f"{group.name}: {hint}"}
            for a, b, hint in zip(group.x, group.y, hints, strict=True)
        ]
        look = {"type": "point", "filled": not group.big, "strokeWidth": 2}
        look |= {"size": 170 if group.big else 45, "opacity": 1 if group.big else 0.7}
        own = {
            "color": _by_name(names),
            "shape": _by_name(shapes),
            "description": {"field": "hint"},
        }
        layers.append(layer(values, look, x=x, y=y, **own))
    return _layered(title, axes, layers, x, y, f"{axes.y} against {axes.x}, {len(xs)} points")


def _diagonal(band: float, x: Spec, y: Spec) -> list[Spec]:
    """Where both axes agree, and within a share of `band` of it."""
    low, high = x["scale"]["domain"]
    edge = [low * (high / low) ** (i / 40) for i in range(41)]
    values = [
        {"x": v, "y": v, "low": max(low, v * (1 - band)), "high": min(high, v * (1 + band))}
        for v in edge
    ]
    area = {"type": "area", "color": AXIS, "opacity": 0.18}
    line = {"type": "line", "color": TEXT, "strokeWidth": 1}
    return [
        layer(values, area, x=x, y={**y, "field": "low"}, y2={"field": "high"}),
        layer(values, line, x=x, y=y),
    ]


def layer(values: Sequence[Spec], mark: Spec, **encoding: Spec) -> Spec:
    """Marks of one kind; those with a description say it to a pointer and to screen readers."""
    mark = {"aria": "description" in encoding, **mark}
    return {"data": {"values": values}, "mark": mark, "encoding": encoding}


def own_look(field: str) -> Spec:
    """A look that every mark holds itself."""
    return {"field": field, "type": "nominal", "scale": None}


def _row() -> Spec:
    return {"field": "row", "type": "ordinal", "axis": None}


def _row_texts(rows: Sequence[tuple[str, str]]) -> list[Spec]:
    """Names above the rows at the left, values at the right."""
    wide = max((len(text) for _, text in rows), default=0) * CHAR
    data = [{"row": i, "name": n, "text": t} for i, (n, t) in enumerate(rows)]
    name = {"type": "text", "dy": -10, "align": "left", "limit": WIDTH - 30 - wide}
    text = {"type": "text", "dy": -10, "align": "right", "fontWeight": 600}
    return [
        layer(data, name, y=_row(), x={"value": 0}, text={"field": "name"}),
        layer(data, text, y=_row(), x={"value": "width"}, text={"field": "text"}),
    ]


def _rows_picture(title: str, layers: list[Spec], said: Sequence[str]) -> Picture:
    return Picture(title, {"height": {"step": ROW}, "layer": layers}, "; ".join(said[:12]))


def _row_mark(value: float, name: str, num_rows: int, late: bool) -> list[Spec]:
    """A line across the bars, clear of the texts between them, its name on top; before the line
    where it is `late` in the axis."""
    at: Spec = {"field": "at", "type": "quantitative"}
    tick = {"type": "tick", "size": 24, "thickness": 1.2, "color": TEXT, "yOffset": 8}
    text = {"type": "text", "fontSize": 11, "color": SOFT, "dy": -5}
    text |= {"align": "right" if late else "left"}
    rows = [{"row": row, "at": value} for row in range(num_rows)]
    named = [{"at": value, "name": name}]
    return [
        layer(rows, tick, x=at, y=_row()),
        layer(named, text, x=at, y={"value": 0}, text={"field": "name"}),
    ]


def _marks(axes: Axes, x: Spec, y: Spec) -> list[Spec]:
    """Dashed lines across the data with their names inside; those beyond the axes are left out."""
    out: list[Spec] = []
    at: Spec = {"field": "at", "type": "quantitative"}
    dashed = {"type": "rule", "strokeDash": [3, 3], "strokeWidth": 1}
    for axis, marks, scale in (("x", axes.marks_x, x["scale"]), ("y", axes.marks_y, y["scale"])):
        low, high = scale["domain"]
        for value, name in marks:
            if not low <= value <= high:
                continue
            middle = (low * high) ** 0.5 if scale.get("type") == "log" else (low + high) / 2
            late = value > middle
            beside = {"dy": -8, "dx": -4 if late else 4, "align": "right" if late else "left"}
            text = {"type": "text", "fontSize": 11, "color": SOFT}
            text |= beside if axis == "x" else {"dy": -7, "align": "right"}
            end = {"y": {"value": "height"}} if axis == "x" else {"x": {"value": "width"}}
            data = [{"at": value, "name": name}]
            out.append(layer(data, dashed, **{axis: at}))
            out.append(layer(data, text, **{axis: at}, **end, text={"field": "name"}))
    return out


def _by_name(looks: Mapping[str, Any], field: str = "name", offset: int = 26, **more: Any) -> Spec:
    """A look for each name, and the legend above the data, in as many columns as there is room."""
    scale = {"domain": list(looks), "range": list(looks.values())}
    legend: Spec | None = None
    if len(looks) > 1:
        legend = {"columns": _columns(list(looks)), "offset": offset, **more}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def _columns(names: Sequence[str]) -> int:
    """The most columns in which the names of a legend fit beside each other."""
    for count in range(len(names), 1, -1):
        if sum(max(map(len, names[i::count])) * CHAR + 36 for i in range(count)) <= WIDTH:
            return count
    return 1


def _layered(title: str, axes: Axes, layers: list[Spec], x: Spec, y: Spec, said: str) -> Picture:
    drawn = [*layers, *_marks(axes, x, y)] or [layer([], {"type": "point"}, x=x, y=y)]
    return Picture(title, {"height": axes.height, "layer": drawn}, said)


def _usable(line: Line, axes: Axes) -> Line:
    """The line without points that logarithmic axes cannot show, thinned to MAX_POINTS."""
    keep = [
        (float(x), float(y))
        for x, y in zip(line.x, line.y, strict=True)
        if (x > 0 or not axes.log_x) and (y > 0 or not axes.log_y)
    ]
    if len(keep) > MAX_POINTS:
        last = len(keep) - 1
        chosen = sorted({round(i * last / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})
        keep = [keep[i] for i in chosen]
    return Line(line.name, [x for x, _ in keep], [y for _, y in keep], line.series, line.step)
