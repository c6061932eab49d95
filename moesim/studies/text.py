"""What `moesim whatif` says of its result, as text."""

from __future__ import annotations

from typing import Any

from moesim.errors import plain
from moesim.figures import text_table

MAX_COLUMNS = 7
COST = "cost_usd_per_hour"


def summary(data: dict[str, Any], rows: int) -> str:
    """The table of points, at most `rows` of them, the answer, the sensitivity, the basis."""
    points = data["points"]
    counts = {s: sum(p["status"] == s for p in points) for s in ("ok", "infeasible", "refused")}
    skipped = len(points) - sum(counts.values())
    parts = [f"{counts['ok']} evaluated"]
    parts += [f"{counts['infeasible']} infeasible"] if counts["infeasible"] else []
    parts += [f"{counts['refused']} refused"] if counts["refused"] else []
    parts += [f"{skipped} not evaluated"] if skipped else []
    name = f"{plain(data['name'])}: " if data["name"] else ""
    lines = [f"{name}{data['about']}; {len(points)} points: {', '.join(parts)}"]
    lines += _table(data, _columns(data), rows)
    lines += [*_refused(points), *_answer(data), *_sensitivity(data), *_basis(data)]
    return "\n".join(lines)


def _columns(data: dict[str, Any]) -> list[str]:
    """Figures to show: the goal, those with a promise, the front's axes, then others."""
    asked = [data["question"]["goal"], *(b["figure"] for b in data["question"]["slo"])]
    front = [axis["figure"] for axis in data["pareto"]["axes"]]
    out = list(dict.fromkeys([*asked, *front]))
    known = [n for n in data["figures"] if n not in ("gpus", COST, "cost_usd_per_million_tokens")]
    out += [name for name in known if name not in out][: max(0, 5 - len(out))]
    varied = data["varied"]
    return [name for name in out if name not in varied][:MAX_COLUMNS]


def _table(data: dict[str, Any], columns: list[str], limit: int) -> list[str]:
    points = [p for p in data["points"] if p["status"] == "ok"]
    if not points:
        return []
    goal, low = data["question"]["goal"], data["question"]["better"] == "low"

    def rank(point: dict[str, Any]) -> tuple[bool, float]:
        value = point["figures"].get(goal)
        if value is None:
            return not point["keeps"], float("inf")
        return not point["keeps"], value if low else -value

    ranked = sorted(points, key=rank)
    varied = list(data["varied"])
    head = ["", *(plain(name) for name in varied)]
    head += [heading(name, data["figures"]) for name in columns]
    table = []
    best = data["answer"]["point"] if data["answer"] else None
    for point in ranked[:limit]:
        mark = "*" if point["key"] == best else "+" if point["pareto"] else ""
        mark = mark if point["keeps"] else "x"
        cells = [plain(_short(point["params"][name])) for name in varied]
        unit = {name: data["figures"].get(name, {}).get("unit", "") for name in columns}
        shown = [number(point["figures"].get(name), unit[name]) for name in columns]
        table.append([mark, *cells, *shown])
    legend = ["* the answer", "+ on the Pareto front"]
    if any(not p["keeps"] for p in points):
        legend.append("x misses a promise")
    more = f"; {len(ranked) - limit} more points in the file" if len(ranked) > limit else ""
    return [text_table(head, table, left=1 + len(varied)), "; ".join(legend) + more]


def heading(name: str, figures: dict[str, Any]) -> str:
    """A figure's label with the unit that `number` shows it in."""
    figure = figures.get(name, {"label": name, "unit": ""})
    shown = {"us": "ms", "s": "ms", "bytes": "KB"}.get(figure["unit"], "")
    return figure["label"] + (f", {shown}" if shown else "")


def number(value: float | None, unit: str) -> str:
    """A figure for a table: times in ms, bytes in KB, at most four digits."""
    if value is None:
        return "-"
    value *= {"us": 1e-3, "s": 1e3, "bytes": 1e-3}.get(unit, 1.0)
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or (abs(value) >= 100 and float(value).is_integer()):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _refused(points: list[dict[str, Any]]) -> list[str]:
    lines = []
    for status, label in (("infeasible", "infeasible"), ("refused", "refused")):
        causes: dict[str, list[str]] = {}
        for point in points:
            if point["status"] == status:
                causes.setdefault(point["cause"], []).append(point["remedy"])
        for cause, remedies in list(causes.items())[:3]:
            lines.append(f"{label} ({len(remedies)}): {plain(cause, 300)}")
        if len(causes) > 3:
            lines.append(f"{label}: {len(causes) - 3} more causes in the file")
    return lines


def _answer(data: dict[str, Any]) -> list[str]:
    question = data["question"]
    answer = data["answer"]
    if answer is None:
        near = data["nearest"]
        bounds = _bounds(question)
        none = f"keeps the promises ({bounds})" if bounds else "can be run"
        lines = [f"no point {none}"]
        if near is not None:
            point = next(p for p in data["points"] if p["key"] == near["point"])
            lines.append(
                f"nearest: {_settings(data, point['params'])} misses {', '.join(near['missed'])}"
                f" by {100 * near['violation']:.0f}%"
            )
        return lines
    point = next(p for p in data["points"] if p["key"] == answer["point"])
    unit = data["figures"].get(question["goal"], {}).get("unit", "")
    lines = [
        f"answer: {_settings(data, point['params'])}: {heading(question['goal'], data['figures'])}"
        f" {number(answer['value'], unit)}"
        + (f", keeping {_bounds(question)}" if question["slo"] else "")
    ]
    per_token = answer["figures"].get("cost_usd_per_million_tokens")
    if per_token is not None:
        lines.append(
            f"${answer['figures'][COST]:,.2f} per hour, ${per_token:,.3f} per million tokens"
        )
    return lines


def _bounds(question: dict[str, Any]) -> str:
    return ", ".join(b["text"] for b in question["slo"])


def _settings(data: dict[str, Any], params: dict[str, Any]) -> str:
    varied = data["varied"]
    if not varied:
        return "the one point"
    return ", ".join(f"{name} {plain(_short(params[name]))}" for name in varied)


def _sensitivity(data: dict[str, Any]) -> list[str]:
    rows = data["sensitivity"]["rows"]
    if not rows:
        return []
    goal = data["question"]["goal"]
    unit = data["figures"].get(goal, {}).get("unit", "")
    by_key = {p["key"]: p for p in data["points"]}
    lines = [f"asked again over {data['sensitivity']['over']}:"]
    for row in rows:
        change = f"{100 * (row['factor'] - 1):+.0f}%"
        if row["answer"] is None:
            text = "no point keeps the promises any more"
        elif row["changed"]:
            other = by_key[row["answer"]]
            text = f"another answer: {_settings(data, other['params'])}"
        else:
            text = "the same answer"
        value = "" if row["answer"] is None else f" ({number(row['value'], unit)})"
        broken = "" if row["kept"] or row["answer"] is None else "; the first misses a promise"
        lines.append(f"  {row['input']} {change}: {text}{value}{broken}")
    return lines


def _basis(data: dict[str, Any]) -> list[str]:
    lines = []
    if data["basis"]:
        lines.append(f"figures rest on {data['basis']} inputs")
    for gpu, used in data["prices"].items():
        if used["usd_per_gpu_hour"] is not None:
            lines.append(
                f"price of {gpu}: ${used['usd_per_gpu_hour']:g} per GPU-hour, {used['kind']}"
                f" ({used['source']})"
            )
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 32 else f"...{text[-29:]}"
